"""The configs lie beside the package in a checkout, and inside it, as `perception/configs`, in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["perception", "perception.*"]), "perception.configs"],
    package_dir={"perception.configs": "configs"},
)
