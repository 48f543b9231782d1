"""A procedural town, its renderer, and a writer of nuScenes-format datasets."""

from perception.synthetic.writer import VERSION, simulate

__all__ = ["VERSION", "simulate"]
