"""What is declared is what is used: requirements, extras, versions of Python, and the files of a wheel."""

import ast
import configparser
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from perception.engine.mmdet_parts import MMDetBackbone
from perception.errors import EXTRAS as EXTRAS_BY_PACKAGE
from perception.errors import ConfigError, run_script
from perception.ros2.__main__ import ROS

SETUP = configparser.ConfigParser()
SETUP.read(PROJECT / "setup.cfg")
# The distribution that an import comes from, where the names differ.
DISTRIBUTION = {
    "PIL": "pillow", "cv2": "opencv-python-headless", "mmengine": "mmengine-lite", "nuscenes": "nuscenes-devkit",
    "yaml": "pyyaml", "mmcv": "mmcv-lite", "cuda": "cuda-bindings", "tensorrt_rtx": "tensorrt-rtx",
    "mcap_protobuf": "mcap-protobuf-support", "foxglove_schemas_protobuf": "foxglove-schemas-protobuf",
    "rerun": "rerun-sdk", "onnx_ir": "onnx-ir",
}  # fmt: skip
BROUGHT = {"triton"}  # by torch, where there is a GPU to use it on
# Loaded by others: TensorBoard by MMEngine's visualizer.
UNSEEN = {"tensorboard"}


def names(requirements: str) -> set[str]:
    lines = (line.strip() for line in requirements.splitlines())
    return {re.match(r"[\w.-]+", line)[0].lower() for line in lines if line and not line.startswith("#")}


BASE = names(SETUP["options"]["install_requires"])
EXTRAS = {name: names(text) for name, text in SETUP["options.extras_require"].items()}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The distributions that a file imports when it is loaded, and all that it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    first, everything = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        roots = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"perception"}
        found = {DISTRIBUTION.get(root, root).lower() for root in roots} - BROUGHT
        everything |= found
        if id(node) not in later:
            first |= found
    return first, everything


FILES = {path.relative_to(PROJECT).as_posix(): imports(path) for path in (PROJECT / "perception").rglob("*.py")}
# Packages of ROS 2 come with ROS; one file may import them.
FILES["perception/ros2/node.py"] = tuple(found - set(ROS) for found in FILES["perception/ros2/node.py"])


def test_every_import_is_declared_and_every_requirement_is_used():
    used = set().union(*(everything for _, everything in FILES.values()))
    declared = BASE.union(*(EXTRAS[name] for name in EXTRAS if name not in ("dev", "all")))
    assert not used - declared
    assert BASE - used == UNSEEN


def test_the_base_is_enough_to_load_every_module_but_those_of_exports_and_mmdet3d():
    """Whoever installed no extra gets a sentence where one is needed, never an ImportError at the top of a file."""
    for path, (first, _) in FILES.items():
        if not path.startswith(("perception/export/", "perception/mmdet3d/")):
            assert not first - BASE, path
    assert not FILES["perception/mmdet3d/__main__.py"][0] - BASE  # it says what is missing
    # The torch-free runtime has numpy alone.
    for name in ("runtime", "contract", "engine_session", "openvino_session", "progress"):
        assert FILES[f"perception/export/{name}.py"][0] <= {"numpy"}, name


def test_all_is_all():
    assert EXTRAS["all"] == set().union(*(extra for name, extra in EXTRAS.items() if name != "all"))


def test_a_package_of_an_extra_that_is_absent_is_named_with_the_extra(monkeypatch, capsys):
    brought = {name: {DISTRIBUTION.get(p, p) for p in packages} for name, packages in EXTRAS_BY_PACKAGE.items()}
    used = set().union(*(everything for _, everything in FILES.values())) - BASE
    assert used <= set().union(*brought.values())
    for extra, packages in brought.items():
        assert packages <= EXTRAS[extra], extra

    for package in ("onnx", "mmdet"):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: importlib.import_module("onnx.checker"))
    assert stop.value.code == 2
    sentence = "error: onnx is not installed; install it, or the extra [export] of driving-perception\n"
    assert capsys.readouterr().err == sentence
    with pytest.raises(ModuleNotFoundError):
        run_script(lambda: importlib.import_module("no_such_package"))
    with pytest.raises(ConfigError, match=r"mm(cv|det) is not installed; .* the extra \[mmdet3d\]"):
        MMDetBackbone("mmdet", "ResNeXt", 4, {})


def test_versions_of_python():
    stated = re.findall(r"Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.M)
    assert stated == ["3.10", "3.11", "3.12"]
    assert SETUP["options"]["python_requires"] == ">=3.10,<3.13"
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in stated


@pytest.mark.slow
def test_the_wheel_holds_configs_weights_and_types(tmp_path):
    import zipfile

    source = tmp_path / "source"
    for folder in ("perception", "configs"):
        for path in (PROJECT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = source / path.relative_to(PROJECT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((PROJECT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    (wheel,) = tmp_path.glob("driving_perception-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        (entry_points,) = (archive.read(name).decode() for name in inside if name.endswith("entry_points.txt"))
    assert "perception = perception.cli:run" in entry_points
    expected = {path for path in FILES} | {"perception/py.typed", "perception/weights/nano.safetensors"}
    expected |= {f"perception/{path.relative_to(PROJECT)}" for path in (PROJECT / "configs").rglob("*.py")}
    data = [path for kind in ("*.yaml", "*.json") for path in (PROJECT / "perception").rglob(kind)]
    expected |= {str(path.relative_to(PROJECT)) for path in data}
    assert expected == {name for name in inside if ".dist-info/" not in name}
