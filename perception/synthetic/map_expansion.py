"""Writes districts as a nuScenes map expansion (JSON, version 1.3) that the devkit's NuScenesMap reads unchanged.

Files that nuscenes-devkit 1.2.0 opens: `NuScenesMap(dataroot, map_name)` reads only `maps/expansion/<map_name>.json`;
`map_name` must be one of four known names. `NuScenes(version, dataroot)` needs `<version>/map.json` with `log_tokens`,
and the file `filename` (a PNG) of each of its records must exist. Its pixels are read only when a map is drawn, as a
mask with 0.1 m per pixel whose last row is y = 0. `map_images` writes these images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from shapely.geometry import LineString, Polygon

from perception.errors import ConfigError
from perception.files import write_json
from perception.synthetic.district import District
from perception.synthetic.lane_graph import arcline_path

# Fields that the devkit or its users expect in addition to the geometry, by layer.
_POLYGON_LAYERS: dict[str, dict[str, Any]] = {
    "road_segment": {"drivable_area_token": ""},
    "lane": {"lane_type": "CAR", "left_lane_divider_segments": [], "right_lane_divider_segments": []},
    "lane_connector": {},
    "ped_crossing": {"road_segment_token": ""},
    "walkway": {},
    "stop_line": {"stop_line_type": "STOP_SIGN", "ped_crossing_tokens": [], "traffic_light_tokens": [],
                  "road_block_token": ""},
    "carpark_area": {"orientation": 0.0, "road_block_token": ""},
}  # fmt: skip
_LINE_LAYERS: dict[str, dict[str, Any]] = {
    "road_divider": {"road_segment_token": None},
    "lane_divider": {"lane_divider_segments": []},
}
_EMPTY_LAYERS = ("road_block", "traffic_light")


class _Records:
    """Collects the records of a map; tokens are hashes of names, equal coordinates share one node."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.layers: dict[str, list[dict]] = {"polygon": [], "line": [], "node": []}
        self.nodes: dict[tuple[float, float], str] = {}

    def token(self, *names: object) -> str:
        digest = hashlib.sha256("/".join(map(str, (self.location, *names))).encode()).hexdigest()
        return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))

    def node(self, x: float, y: float) -> str:
        if (x, y) not in self.nodes:
            self.nodes[x, y] = self.token("node", x, y)
            self.layers["node"].append({"token": self.nodes[x, y], "x": x, "y": y})
        return self.nodes[x, y]

    def ring(self, coords: Iterable[tuple[float, ...]]) -> list[str]:
        """Adds the nodes of a closed ring and returns their tokens, without the last point (equal to the first)."""
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


def write_map_expansion(districts: Sequence[District], path: str | Path) -> list[float]:
    """Writes the map of one location: the union of its districts.

    `arcline_path_3` follows the centres of lanes and connectors to 2 cm. `connectivity` leads from lanes to connectors
    and from connectors to lanes. Road segments of junctions have `is_intersection`.

    Args:
        districts: all districts of one location, at least one, with different names and positive coordinates.
        path: `<dataroot>/maps/expansion/<location>.json`; missing folders are made, an existing file is replaced.

    Returns:
        Width and height of the map, metres.

    Raises:
        ConfigError: there is no district, locations differ, names are equal, or coordinates are negative.
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
                key = (district.name, layer, index)
                record = {"token": records.token(*key), "polygon_token": records.polygon(key, polygon), **fields}
                if layer == "road_segment":
                    record["is_intersection"] = district.intersections[index]
                elif layer == "lane":
                    centre = district.lane_graph.lanes[index]
                    for edge, row in (("from_edge_line", 0), ("to_edge_line", -1)):
                        record[f"{edge}_token"] = records.line((*key, edge), LineString(centre.edge(row)))
                layers[layer].append(record)
        for layer, fields in _LINE_LAYERS.items():
            for index, line in enumerate(district.layers[layer]):
                key = (district.name, layer, index)
                layers[layer].append({"token": records.token(*key), "line_token": records.line(key, line), **fields})
        area = [
            records.polygon((district.name, "drivable_area", index), polygon)
            for index, polygon in enumerate(district.layers["drivable_area"])
        ]
        layers["drivable_area"].append({"token": records.token(district.name, "drivable_area"), "polygon_tokens": area})
    xy = np.array(list(records.nodes))  # [P, 2]
    if xy.min() < 0:
        raise ConfigError(f"{path}: a district reaches negative map coordinates; move its origin_xy into the canvas")
    canvas: list[float] = (np.ceil(xy.max(axis=0) / 10.0) * 10.0).tolist()
    arclines, connectivity = _lane_graph(districts, records)
    document = {
        "version": "1.3",
        "canvas_edge": canvas,
        "arcline_path_3": arclines,
        "connectivity": connectivity,
        **layers,
    }
    write_json(path, document, indent=None)
    return canvas


def _lane_graph(districts: Sequence[District], records: _Records) -> tuple[dict[str, list], dict[str, dict]]:
    """Returns `arcline_path_3` and `connectivity`: path, and lanes before and after, of each lane and connector."""
    arclines: dict[str, list] = {}
    connectivity: dict[str, dict[str, list[str]]] = {}
    for district in districts:
        graph = district.lane_graph
        lanes, connectors = (
            [records.token(district.name, layer, index) for index in range(len(paths))]
            for layer, paths in (("lane", graph.lanes), ("lane_connector", graph.connectors))
        )
        for token, path in zip([*lanes, *connectors], [*graph.lanes, *graph.connectors], strict=True):
            arclines[token] = arcline_path(path)
            connectivity[token] = {"incoming": [], "outgoing": []}
        for connector, (before, after) in zip(connectors, graph.links, strict=True):
            for one, other in ((lanes[before], connector), (connector, lanes[after])):
                connectivity[one]["outgoing"].append(other)
                connectivity[other]["incoming"].append(one)
    return arclines, connectivity
