"""Writes districts as a nuScenes map expansion (JSON, version 1.3) that the devkit's NuScenesMap reads unchanged.

What nuscenes-devkit 1.2.0 really opens: `NuScenesMap(dataroot, map_name)` reads `maps/expansion/<map_name>.json` and
nothing else; `map_name` must be one of four known names. `NuScenes(version, dataroot)` wants `<version>/map.json` with
`log_tokens` and, for each of its records, that the file `filename` (a PNG) exists: its pixels are read only when a map
is drawn, as a mask with 0.1 m per pixel whose last row is y = 0. The PNGs under `maps/basemap` are never needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from shapely.geometry import LineString, Polygon

from perception.errors import ConfigError
from perception.files import write_json
from perception.synthetic.district import District

# Fields that the devkit or its users expect beside the geometry, by layer.
_POLYGON_LAYERS = {
    "road_segment": {"drivable_area_token": ""},
    "lane": {"lane_type": "CAR", "from_edge_line_token": "", "to_edge_line_token": "",
             "left_lane_divider_segments": [], "right_lane_divider_segments": []},
    "ped_crossing": {"road_segment_token": ""},
    "walkway": {},
    "stop_line": {"stop_line_type": "STOP_SIGN", "ped_crossing_tokens": [], "traffic_light_tokens": [],
                  "road_block_token": ""},
    "carpark_area": {"orientation": 0.0, "road_block_token": ""},
}  # fmt: skip
_LINE_LAYERS = {"road_divider": {"road_segment_token": None}, "lane_divider": {"lane_divider_segments": []}}
_EMPTY_LAYERS = ("road_block", "traffic_light", "lane_connector")


class _Records:
    """The growing JSON object; tokens are hashes of names, nodes are shared by all that pass the same coordinates."""

    def __init__(self, location: str):
        self.location = location
        self.layers: dict[str, list[dict]] = {"polygon": [], "line": [], "node": []}
        self.nodes: dict[tuple[float, float], str] = {}

    def token(self, *names) -> str:
        digest = hashlib.sha256("/".join(map(str, (self.location, *names))).encode()).hexdigest()
        return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))

    def node(self, x: float, y: float) -> str:
        if (x, y) not in self.nodes:
            self.nodes[x, y] = self.token("node", x, y)
            self.layers["node"].append({"token": self.nodes[x, y], "x": x, "y": y})
        return self.nodes[x, y]

    def ring(self, coords) -> list[str]:
        """Node tokens of a closed ring, the last point (equal to the first) left out."""
        return [self.node(float(x), float(y)) for x, y in list(coords)[:-1]]

    def polygon(self, name: tuple, polygon: Polygon) -> str:
        token = self.token("polygon", *name)
        holes = [{"node_tokens": self.ring(ring.coords)} for ring in polygon.interiors]
        record = {"token": token, "exterior_node_tokens": self.ring(polygon.exterior.coords), "holes": holes}
        self.layers["polygon"].append(record)
        return token

    def line(self, name: tuple, line: LineString) -> str:
        token = self.token("line", *name)
        nodes = [self.node(float(x), float(y)) for x, y in line.coords]
        self.layers["line"].append({"token": token, "node_tokens": nodes})
        return token


def write_map_expansion(districts: Sequence[District], path: str | Path) -> None:
    """Writes the map of one location: the union of its districts.

    Lanes come without a lane graph (`arcline_path_3`, `connectivity` and `lane_connector` are empty), because nothing
    in perception reads one. Road segments of junctions carry `is_intersection`.

    Args:
        districts: all of one location, at least one, with different names and in positive coordinates.
        path: `<dataroot>/maps/expansion/<location>.json`; its folder is made, the file is replaced at once.

    Raises:
        ConfigError: where there is no district, locations or names clash, or coordinates are negative.
    """
    path = Path(path)
    locations = {district.location for district in districts}
    if len(locations) != 1:
        raise ConfigError(f"{path}: one map needs districts of exactly one location, got {sorted(locations)}")
    if len({district.name for district in districts}) != len(districts):
        raise ConfigError(f"{path}: two districts have the same name; give each its own seed")
    records = _Records(locations.pop())
    layers = records.layers
    for name in (*_POLYGON_LAYERS, *_LINE_LAYERS, "drivable_area", *_EMPTY_LAYERS):
        layers[name] = []
    for district in districts:
        for layer, fields in _POLYGON_LAYERS.items():
            for index, polygon in enumerate(district.layers[layer]):
                name = (district.name, layer, index)
                record = {"token": records.token(*name), "polygon_token": records.polygon(name, polygon), **fields}
                if layer == "road_segment":
                    record["is_intersection"] = district.intersections[index]
                layers[layer].append(record)
        for layer, fields in _LINE_LAYERS.items():
            for index, line in enumerate(district.layers[layer]):
                name = (district.name, layer, index)
                layers[layer].append({"token": records.token(*name), "line_token": records.line(name, line), **fields})
        area = [
            records.polygon((district.name, "drivable_area", index), polygon)
            for index, polygon in enumerate(district.layers["drivable_area"])
        ]
        layers["drivable_area"].append({"token": records.token(district.name, "drivable_area"), "polygon_tokens": area})
    xy = np.array(list(records.nodes))  # [P, 2]
    if xy.min() < 0:
        raise ConfigError(f"{path}: a district reaches negative map coordinates; move its origin_xy into the canvas")
    document = {
        "version": "1.3",
        "canvas_edge": (np.ceil(xy.max(axis=0) / 10.0) * 10.0).tolist(),
        "arcline_path_3": {},
        "connectivity": {},
        **layers,
    }
    write_json(path, document, indent=None)
