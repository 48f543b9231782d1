"""Generates synthetic datasets: a procedural town, its renderer, and a writer of the nuScenes format."""

from perception.synthetic.writer import VERSION, simulate

__all__ = ["VERSION", "simulate"]
