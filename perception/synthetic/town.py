"""Makes districts: roads, traffic, buildings, trees and light from one seed."""

from __future__ import annotations

from perception.synthetic.district import (
    Actor,
    Building,
    District,
    Kerb,
    Light,
    Marking,
    Pole,
    Surface,
    Trajectory,
    Tree,
)

__all__ = ["Actor", "Building", "District", "Kerb", "Light", "Marking", "Pole", "Surface", "Trajectory", "Tree"]
