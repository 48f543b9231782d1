"""Builds the mesh of each actor. A mesh lies inside its labelled box and touches all faces of the box.

Front and back differ (white lamps in front, red lamps behind, a sloping windscreen), so that the heading is visible.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from perception.synthetic.district import Actor
from perception.synthetic.mesh import Material, Mesh, MeshBuilder

_BLACK, _DARK, _GLASS = (0.02, 0.02, 0.02), (0.09, 0.09, 0.1), (0.07, 0.09, 0.11)
_WHITE_LAMP, _RED_LAMP, _AMBER = (1.0, 0.98, 0.9), (0.85, 0.03, 0.03), (1.0, 0.55, 0.05)
# Front left, rear left, rear right, front right: (index into rear and front, side).
_AROUND = ((1, 1), (0, 1), (0, -1), (1, -1))
_CHROME, _PLATE, _SKIN = (0.6, 0.6, 0.62), (0.9, 0.9, 0.85), (0.75, 0.55, 0.42)


def actor_mesh(actor: Actor, owner: int) -> Mesh:
    """Builds the mesh of one actor.

    Args:
        actor: its category, size, colour and rider are used.
        owner: index written into `Mesh.owners`.

    Returns:
        A mesh in the actor's frame: x forward, y left, z up from the ground, origin under the centre of its box.
    """
    builder = MeshBuilder()
    builder.owner = owner
    # Variations of the shape depend on the name only, so they are the same at all times.
    rng = np.random.default_rng(zlib.crc32(actor.name.encode()))
    shapes = {
        "vehicle.car": _car,
        "vehicle.emergency.police": _car,
        "vehicle.emergency.ambulance": _van,
        "vehicle.truck": _truck,
        "vehicle.trailer": _trailer,
        "vehicle.bus.rigid": _bus,
        "vehicle.bus.bendy": _bus,
        "vehicle.construction": _excavator,
        "vehicle.bicycle": _bicycle,
        "vehicle.motorcycle": _motorcycle,
        "movable_object.trafficcone": _cone,
        "movable_object.barrier": _barrier,
    }
    shape = _pedestrian if actor.category.startswith("human") else shapes.get(actor.category, _crate)
    shape(builder, actor, rng)
    mesh = builder.build()
    # The shapes fill their boxes within a few centimetres; rescaling makes the labels exact.
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    size = np.array(actor.size)
    vertices = (mesh.vertices - low) / (high - low) * size - size * [0.5, 0.5, 0]
    return mesh._replace(vertices=vertices.astype(np.float32))


def _wheels(b: MeshBuilder, positions: Sequence[float], radius: float, half_width: float, width: float = 0.24) -> None:
    """Adds pairs of wheels on the ground at x positions, flush with the sides of the box."""
    for x in positions:
        for side in (-1, 1):
            outer, inner = side * half_width, side * (half_width - width)
            b.cylinder([x, inner, radius], [x, outer, radius], radius, _BLACK, Material.RUBBER, sides=14)
            hub = side * (half_width - 0.012)
            b.cylinder([x, hub, radius], [x, outer, radius], radius * 0.58, _CHROME, Material.METAL, sides=10)
            b.cylinder([x, hub, radius], [x, outer, radius], radius * 0.2, _DARK, Material.METAL, sides=6)


def _lamps(b: MeshBuilder, l: float, w: float, z: float, height: float, width: float) -> None:
    """Adds two white lamps at the front face and two red lamps at the back face, wrapped around the corners."""
    for x, color in ((l / 2, _WHITE_LAMP), (-l / 2, _RED_LAMP)):
        inward = -np.sign(x)
        for side in (-1, 1):
            y = side * (w / 2 - 0.01)
            low = [min(x, x + inward * 0.22), min(y, y - side * width), z]
            high = [max(x, x + inward * 0.22), max(y, y - side * width), z + height]
            b.box(low, high, color, Material.LAMP)


def _cabin(
    b: MeshBuilder,
    base: tuple[float, float],
    roof: tuple[float, float],
    z0: float,
    z1: float,
    y0: float,
    y1: float,
    color: ArrayLike,
    pillars: Sequence[float],
) -> None:
    """Adds a glazed cabin over the belt line.

    Args:
        base, roof: rear and front x at the bottom and at the top.
        z0, z1, y0, y1: heights and half widths at the bottom and at the top.
        pillars: positions of the pillars along the side, as shares 0..1.
    """
    corner = np.array([[x[i], side * y, z] for x, y, z in ((base, y0, z0), (roof, y1, z1)) for i, side in _AROUND])
    b.polygon(corner[4:], color, Material.PAINT)
    for a, c in ((0, 3), (2, 1)):  # windscreen and rear window, inside a painted frame
        quad = np.array([corner[a], corner[c], corner[c + 4], corner[a + 4]])
        b.polygon(quad, color, Material.PAINT)
        outward = np.array([0.006 if a == 0 else -0.006, 0, 0.003])
        b.polygon(quad.mean(0) + (quad - quad.mean(0)) * 0.9 + outward, _GLASS, Material.GLASS)
    for side, (rear, front) in ((1, (1, 0)), (-1, (2, 3))):
        low_rear, low_front, top_rear, top_front = corner[rear], corner[front], corner[rear + 4], corner[front + 4]
        b.polygon(np.array([low_rear, low_front, top_front, top_rear]), color, Material.PAINT)
        edges, outward = ((low_rear, low_front), (top_rear, top_front)), np.array([0, side * 0.008, 0])
        for s0, s1 in pairwise([0.04, *pillars, 0.96]):
            shares = ((s0 + 0.015, 0.1), (s1 - 0.015, 0.1), (s1 - 0.015, 0.88), (s0 + 0.015, 0.88))
            b.polygon(np.array([_on_side(*edges, s, up) + outward for s, up in shares]), _GLASS, Material.GLASS)


def _on_side(
    bottom: tuple[np.ndarray, np.ndarray], top: tuple[np.ndarray, np.ndarray], s: float, up: float
) -> np.ndarray:
    """Returns a point of the face between a bottom and a top edge: share `s` along the edges, `up` between them."""
    low, high = (rear + s * (front - rear) for rear, front in (bottom, top))
    return low + up * (high - low)


def _car(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    (l, w, h), color = actor.size, actor.color
    half = w / 2 - 0.025  # wheels and mirrors reach the box, the body is narrower
    belt = 0.57 * h
    estate = h > 1.62 or rng.random() < 0.45
    nose, tail = 0.5 * l - 0.015, -0.5 * l + 0.015
    hood_end, trunk_end = 0.21 * l, (-0.46 if estate else -0.33) * l
    profile = [[tail, 0.17 * h], [nose, 0.17 * h], [nose, 0.40 * h], [nose - 0.06 * l, 0.50 * h], [hood_end, belt]]
    profile += [[trunk_end, belt], [tail + 0.015 * l, 0.54 * h], [tail, 0.45 * h]]
    b.extrude(profile, half, color, Material.PAINT)
    roof_rear, roof_front = (-0.40 if estate else -0.20) * l, (0.06 if estate else 0.02) * l
    base = (trunk_end - (0.0 if estate else 0.03 * l), hood_end + 0.02 * l)
    _cabin(b, base, (roof_rear, roof_front), belt - 0.01, h, half - 0.02, half - 0.15, color, (0.36, 0.70))
    _lamps(b, l, w - 0.06, 0.36 * h, 0.10 * h, 0.19 * w)
    b.box([nose, -0.26 * w, 0.22 * h], [l / 2, 0.26 * w, 0.36 * h], _DARK, Material.RUBBER)
    b.box([-l / 2, -0.14 * w, 0.30 * h], [tail, 0.14 * w, 0.37 * h], _PLATE, Material.CLOTH)
    b.box([-l / 2, -half, 0.17 * h], [tail + 0.05, half, 0.25 * h], _DARK, Material.RUBBER)
    for side in (-1, 1):
        y = sorted((side * w / 2, side * (half - 0.06)))
        b.box([0.15 * l, y[0], belt], [0.15 * l + 0.16, y[1], belt + 0.14], color, Material.PAINT)
    _wheels(b, (0.31 * l, -0.30 * l), min(0.235 * h, 0.36), w / 2)
    if "police" in actor.category:
        b.box([-0.1 * l, -0.3 * w, h - 0.12], [-0.02 * l, 0, h], (0.1, 0.2, 1.0), Material.LAMP)
        b.box([-0.1 * l, 0, h - 0.12], [-0.02 * l, 0.3 * w, h], _RED_LAMP, Material.LAMP)


def _van(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    (l, w, h), color = actor.size, actor.color
    half = w / 2 - 0.025
    profile = [[-l / 2, 0.12 * h], [l / 2, 0.12 * h], [l / 2, 0.36 * h], [0.36 * l, 0.50 * h], [0.26 * l, 0.97 * h]]
    profile += [[0.2 * l, h], [-0.48 * l, h], [-l / 2, 0.95 * h]]
    b.extrude(profile, half, color, Material.PAINT)
    front = np.array([[0.355, 0.54], [0.355, 0.54], [0.275, 0.93], [0.275, 0.93]]) * [l, h]
    y = np.array([0.42, -0.42, -0.38, 0.38]) * w
    b.polygon(np.stack([front[:, 0] + 0.015, y, front[:, 1]], -1), _GLASS, Material.GLASS)
    for side in (-1, 1):
        window = np.array([[0.12, 0.54], [0.31, 0.54], [0.25, 0.88], [0.12, 0.88]]) * [l, h]
        b.polygon(np.insert(window, 1, side * (half + 0.008), axis=1), _GLASS, Material.GLASS)
        b.box(
            [-0.4 * l, side * half - 0.005, 0.42 * h],
            [0.1 * l, side * half + 0.005, 0.5 * h],
            _RED_LAMP,
            Material.PAINT,
        )
    _lamps(b, l, w - 0.03, 0.3 * h, 0.08 * h, 0.15 * w)
    _wheels(b, (0.32 * l, -0.30 * l), min(0.16 * h, 0.4), w / 2)


def _truck(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    (l, w, h), color = actor.size, actor.color
    half = w / 2 - 0.03
    cab = min(2.3, 0.32 * l)
    cab_top, rear = min(h, 2.9) if h > 3.2 else 0.92 * h, l / 2 - cab
    radius = min(0.5, 0.16 * h)
    b.box([-l / 2 + 0.1, -0.3 * w, radius], [l / 2 - 0.1, 0.3 * w, 1.7 * radius], _DARK, Material.RUBBER)
    profile = [[rear + 0.08, 0.8 * radius], [l / 2, 0.8 * radius], [l / 2, 0.5 * cab_top]]
    profile += [[l / 2 - 0.22, cab_top - 0.06], [l / 2 - 0.4, cab_top], [rear + 0.08, cab_top]]
    b.extrude(profile, half, color, Material.PAINT)
    lean = np.array([[l / 2 + 0.0, 0.53], [l / 2, 0.53], [l / 2 - 0.17, 0.90], [l / 2 - 0.17, 0.90]])
    y = np.array([0.44, -0.44, -0.42, 0.42]) * w
    b.polygon(np.stack([lean[:, 0], y, lean[:, 1] * cab_top], -1), _GLASS, Material.GLASS)
    b.box([l / 2 - 0.02, -0.3 * w, 1.3 * radius], [l / 2, 0.3 * w, 0.44 * cab_top], _DARK, Material.RUBBER)
    for side in (-1, 1):
        window = np.array([[rear + 0.35 * cab, 0.55], [l / 2 - 0.3, 0.55], [l / 2 - 0.42, 0.86]])
        window = np.array([*window, [rear + 0.35 * cab, 0.86]]) * [1, cab_top]
        b.polygon(np.insert(window, 1, side * (half + 0.008), axis=1), _GLASS, Material.GLASS)
    # Cargo: a white or coloured box, or a low open bed.
    cargo = np.array([(0.85, 0.85, 0.83), (0.75, 0.78, 0.8), color][rng.integers(3)])
    top = h if h > 2.3 else 0.62 * h
    b.box([-l / 2 + 0.04, -w / 2, 1.7 * radius], [rear, w / 2, top], cargo, Material.PAINT)
    b.box([-l / 2 + 0.03, -0.46 * w, 1.9 * radius], [-l / 2 + 0.05, 0.46 * w, top - 0.12], cargo * 0.8, Material.PAINT)
    if top < h:  # an open bed: the cab reaches the top of the box
        b.box([rear + 0.1, -0.4 * w, 0.9 * h], [l / 2 - 0.45, 0.4 * w, h], color, Material.PAINT)
    for x, shade in ((rear - 0.02, 0.7), (-l / 2 + 0.06, 0.7)):  # dark edges distinguish the box from a wall
        b.box([x - 0.06, -w / 2, 1.7 * radius], [x, w / 2 + 0.0, top], cargo * shade, Material.PAINT)
    _lamps(b, l, w - 0.08, 1.2 * radius, 0.22, 0.14 * w)
    _wheels(b, (l / 2 - 0.55 * cab, -0.24 * l, -0.24 * l - 2.2 * radius), radius, w / 2, 0.3)


def _trailer(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    (l, w, h), color = actor.size, actor.color
    radius = min(0.5, 0.14 * h)
    b.box([-l / 2, -0.35 * w, radius], [l / 2, 0.35 * w, 2.0 * radius], _DARK, Material.RUBBER)
    b.box([-l / 2 + 0.04, -w / 2, 2.0 * radius], [l / 2, w / 2, h], color, Material.PAINT)
    for x in np.arange(-l / 2 + 0.6, l / 2, 1.2):
        for side in (-1, 1):
            y = sorted((side * w / 2, side * (w / 2 - 0.02)))
            b.box([x, y[0], 2.0 * radius], [x + 0.08, y[1], h - 0.05], np.array(color) * 0.75, Material.PAINT)
    b.box([-l / 2, -0.46 * w, 2.2 * radius], [-l / 2 + 0.05, 0.46 * w, h - 0.15], np.array(color) * 0.8, Material.PAINT)
    for side in (-1, 1):
        y = sorted((side * 0.45 * w, side * 0.3 * w))
        b.box([-l / 2, y[0], 1.5 * radius], [-l / 2 + 0.06, y[1], 1.9 * radius], _RED_LAMP, Material.LAMP)
    _wheels(b, (-0.22 * l, -0.22 * l - 2.3 * radius), radius, w / 2, 0.3)
    b.box([0.36 * l, -0.3 * w, 0], [0.36 * l + 0.12, -0.2 * w, 2 * radius], _CHROME, Material.METAL)
    b.box([0.36 * l, 0.2 * w, 0], [0.36 * l + 0.12, 0.3 * w, 2 * radius], _CHROME, Material.METAL)


def _bus(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    (l, w, h), color = actor.size, actor.color
    half = w / 2 - 0.03
    profile = [[-l / 2 + 0.02, 0.1 * h], [l / 2 - 0.02, 0.1 * h], [l / 2 - 0.02, 0.55 * h], [l / 2 - 0.14, 0.97 * h]]
    profile += [[l / 2 - 0.3, h], [-l / 2 + 0.15, h], [-l / 2 + 0.02, 0.96 * h]]
    b.extrude(profile, half, color, Material.PAINT)
    panes = max(4, int(l / 1.5))
    edges = np.linspace(-l / 2 + 0.35, l / 2 - 0.35, panes + 1)
    for side in (-1, 1):
        for x0, x1 in pairwise(edges):
            pane = np.array([[x0 + 0.06, 0.45], [x1 - 0.06, 0.45], [x1 - 0.06, 0.82], [x0 + 0.06, 0.82]]) * [1, h]
            b.polygon(np.insert(pane, 1, side * (half + 0.01), axis=1), _GLASS, Material.GLASS)
        stripe = np.array([[-l / 2 + 0.1, 0.26], [l / 2 - 0.1, 0.26], [l / 2 - 0.1, 0.32], [-l / 2 + 0.1, 0.32]])
        b.polygon(np.insert(stripe * [1, h], 1, side * (half + 0.008), axis=1), np.array(color) * 0.45, Material.PAINT)
    front = np.array([[l / 2, 0.40], [l / 2, 0.40], [l / 2 - 0.105, 0.84], [l / 2 - 0.105, 0.84]])
    y = np.array([0.46, -0.46, -0.45, 0.45]) * w
    b.polygon(np.stack([front[:, 0], y, front[:, 1] * h], -1), _GLASS, Material.GLASS)
    b.box([l / 2 - 0.14, -0.32 * w, 0.87 * h], [l / 2 - 0.05, 0.32 * w, 0.94 * h], _AMBER, Material.LAMP)
    b.box([-l / 2, -0.36 * w, 0.60 * h], [-l / 2 + 0.04, 0.36 * w, 0.80 * h], _GLASS, Material.GLASS)
    b.box([-l / 2, -0.40 * w, 0.25 * h], [-l / 2 + 0.04, 0.40 * w, 0.42 * h], _DARK, Material.RUBBER)
    _lamps(b, l, w - 0.06, 0.2 * h, 0.08 * h, 0.13 * w)
    _wheels(b, (0.29 * l, -0.28 * l), min(0.5, 0.15 * h), w / 2, 0.3)


def _excavator(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    (l, w, h), color = actor.size, actor.color
    for side in (-1, 1):
        y = sorted((side * w / 2, side * 0.28 * w))
        b.box([-0.42 * l, y[0], 0], [0.28 * l, y[1], 0.24 * h], _DARK, Material.RUBBER, top=(0.85, 1.0))
    b.box([-l / 2, -0.42 * w, 0.26 * h], [0.2 * l, 0.42 * w, 0.52 * h], color, Material.PAINT)
    b.box([-0.12 * l, -0.02 * w, 0.52 * h], [0.16 * l, 0.40 * w, 0.96 * h], color, Material.PAINT, top=0.9)
    b.box([-0.06 * l, 0.0, 0.58 * h], [0.172 * l, 0.415 * w, 0.88 * h], _GLASS, Material.GLASS, top=0.92)
    b.cylinder([0.1 * l, -0.2 * w, 0.5 * h], [0.3 * l, -0.2 * w, 0.95 * h], 0.09 * h, color, Material.PAINT)
    b.cylinder([0.3 * l, -0.2 * w, 0.94 * h], [0.43 * l, -0.2 * w, 0.3 * h], 0.06 * h, color, Material.PAINT)
    b.box([0.36 * l, -0.38 * w, 0.02 * h], [l / 2, -0.02 * w, 0.26 * h], _CHROME, Material.METAL, top=(0.7, 1.0))
    b.cylinder([-0.2 * l, 0, 0.5 * h], [-0.2 * l, 0, h], 0.04 * h, _DARK, Material.METAL)
    for side in (-1, 1):
        y = sorted((side * 0.4 * w, side * 0.26 * w))
        b.box([-l / 2, y[0], 0.42 * h], [-l / 2 + 0.03, y[1], 0.5 * h], _RED_LAMP, Material.LAMP)


def _person(
    b: MeshBuilder,
    size: tuple[float, float, float],
    shirt: ArrayLike,
    legs: ArrayLike,
    rng: np.random.Generator,
    step: float,
) -> None:
    """Adds an upright person who fills a box of `size`; `step` 0..1 spreads the legs."""
    l, w, h = size
    hip, shoulder = 0.47 * h, 0.83 * h
    skin = np.array(_SKIN) * rng.uniform(0.5, 1.1)
    for side in (-1, 1):
        foot = -0.025 + side * step * (l / 2 - 0.115)
        b.box([-0.07, side * 0.08 - 0.07, hip - 0.02], [0.07, side * 0.08 + 0.07, hip], legs, Material.CLOTH)
        thigh = [[foot - 0.06, 0], [foot + 0.07, 0], [0.09, hip], [-0.09, hip]]
        vertices = [[px, side * 0.1 + dy, pz] for dy in (-0.075, 0.075) for px, pz in thigh]
        sides = ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7))
        b.triangles(vertices, [t for p, q, r, s in sides for t in ((p, q, r), (p, r, s))], legs, Material.CLOTH)
        b.box([foot - 0.09, side * 0.1 - 0.06, 0], [foot + 0.14, side * 0.1 + 0.06, 0.07], _BLACK, Material.CLOTH)
        arm = side * (w / 2 - 0.055)
        hand = -side * step * 0.6 * (l / 2)
        b.cylinder([0, arm, shoulder - 0.03], [hand, arm, hip - 0.02], 0.055, shirt, Material.CLOTH, sides=6)
        b.sphere([hand, arm, hip - 0.03], [0.05, 0.05, 0.06], skin, Material.CLOTH)
    torso = max(0.16, w / 2 - 0.10)
    b.box([-0.13, -torso, hip - 0.03], [0.13, torso, shoulder], shirt, Material.CLOTH, top=(0.85, 1.0))
    b.cylinder([0, 0, shoulder], [0, 0, 0.88 * h], 0.055, skin, Material.CLOTH, sides=6)
    head = 0.075 * h
    b.sphere([0, 0, h - head], [head * 0.85, head * 0.75, head], skin, Material.CLOTH)
    hair = np.array([0.12, 0.08, 0.05]) * rng.uniform(0.2, 3.0)
    b.sphere([-0.025, 0, h - 0.8 * head], [head * 0.8, head * 0.8, head * 0.8], hair, Material.CLOTH)


def _pedestrian(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    l, w, h = actor.size
    shirt = actor.color
    legs = np.array([(0.08, 0.1, 0.2), (0.1, 0.1, 0.1), (0.35, 0.3, 0.22), (0.2, 0.25, 0.35)][rng.integers(4)])
    walking = not actor.trajectory.static
    _person(b, actor.size, shirt, legs, rng, 1.0 if walking else 0.25)
    if not walking:  # a bag on the back and a hand with a telephone in front
        b.box(
            [-l / 2, -0.15, 0.55 * h], [-0.1, 0.15, 0.80 * h], rng.uniform(0.05, 0.6, 3), Material.CLOTH, top=(0.9, 0.8)
        )
        hand = [l / 2 - 0.05, 0.08, 0.68 * h]
        b.cylinder([0, w / 2 - 0.06, 0.62 * h], hand, 0.05, shirt, Material.CLOTH, sides=6)
        b.box([l / 2 - 0.03, 0.04, 0.67 * h], [l / 2, 0.12, 0.75 * h], _BLACK, Material.GLASS)
    if actor.category.endswith("construction_worker"):
        b.box([-0.14, -0.2 * w, 0.5 * h], [0.14, 0.2 * w, 0.78 * h], (1.0, 0.45, 0.02), Material.LAMP)
        b.sphere([0, 0, 0.955 * h], [0.09 * h * 0.8, 0.08 * h * 0.8, 0.045 * h], (1.0, 0.8, 0.05), Material.CLOTH)


def _rider(
    b: MeshBuilder, size: tuple[float, float, float], seat: float, shirt: ArrayLike, rng: np.random.Generator
) -> None:
    """Adds a rider who sits on the saddle and leans towards the handlebar."""
    l, w, h = size
    skin, legs = np.array(_SKIN) * rng.uniform(0.5, 1.1), (0.1, 0.11, 0.16)
    head = 0.11
    b.sphere([0.06 * l, 0, h - head], [head, head * 0.9, head], shirt if rng.random() < 0.5 else skin, Material.CLOTH)
    vertices_top, bottom = h - 2 * head + 0.02, seat
    b.cylinder([-0.12 * l, 0, bottom], [0.03 * l, 0, vertices_top], 0.17, shirt, Material.CLOTH, end_radius=0.19)
    for side in (-1, 1):
        b.cylinder(
            [0.03 * l, side * 0.17, vertices_top - 0.08], [0.22 * l, side * 0.2, 0.62 * h], 0.05, shirt, Material.CLOTH
        )
        b.cylinder([-0.1 * l, side * 0.1, seat], [0.08 * l, side * 0.13, 0.36 * h], 0.08, legs, Material.CLOTH)
        b.cylinder([0.08 * l, side * 0.13, 0.36 * h], [0.0, side * 0.11, 0.1 * h], 0.06, legs, Material.CLOTH)


def _bicycle(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    (l, w, h), color = actor.size, actor.color
    frame = h if not actor.rider else min(1.05, 0.62 * h)
    radius = min(0.34, 0.24 * l)
    rear, front = [-l / 2 + radius, 0, radius], [l / 2 - radius, 0, radius]
    for hub in (rear, front):
        b.ring(hub, radius, 0.06, _BLACK)
        b.cylinder([hub[0], -0.02, radius], [hub[0], 0.02, radius], 0.05, _CHROME, Material.METAL, sides=6)
    crank, saddle, bar = [-0.04 * l, 0, radius * 0.9], [-0.14 * l, 0, 0.88 * frame], [0.24 * l, 0, frame - 0.03]
    head = [0.22 * l, 0, 0.72 * frame]
    for a, c in ((rear, crank), (crank, saddle), (crank, head), (saddle, head), (saddle, rear), (head, front)):
        b.cylinder(a, c, 0.032, color, Material.PAINT, sides=6)
    b.cylinder(head, bar, 0.03, _CHROME, Material.METAL, sides=6)
    b.box([0.22 * l, -w / 2, frame - 0.06], [0.27 * l, w / 2, frame], _DARK, Material.RUBBER)
    b.box([-0.2 * l, -0.09, 0.88 * frame - 0.03], [-0.06 * l, 0.09, 0.88 * frame + 0.03], _BLACK, Material.RUBBER)
    b.box([-l / 2 + radius - 0.1, -0.04, 0.72 * frame], [-l / 2 + radius, 0.04, 0.80 * frame], _RED_LAMP, Material.LAMP)
    if actor.rider:
        _rider(b, actor.size, 0.9 * frame, rng.uniform(0.1, 0.9, 3), rng)


def _motorcycle(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    (l, w, h), color = actor.size, actor.color
    frame = h if not actor.rider else min(1.2, 0.68 * h)
    radius = min(0.31, 0.17 * l)
    for x in (-l / 2 + radius, l / 2 - radius):
        b.cylinder([x, -0.08, radius], [x, 0.08, radius], radius, _BLACK, Material.RUBBER, sides=14)
        b.cylinder([x, -0.09, radius], [x, 0.09, radius], radius * 0.5, _CHROME, Material.METAL, sides=8)
    b.box([-0.18 * l, -0.17, 0.22 * frame], [0.2 * l, 0.17, 0.55 * frame], _DARK, Material.METAL)
    b.box([-0.05 * l, -0.18, 0.5 * frame], [0.22 * l, 0.18, 0.78 * frame], color, Material.PAINT, top=(0.7, 0.8))
    b.box([-0.44 * l, -0.15, 0.56 * frame], [-0.02 * l, 0.15, 0.68 * frame], _BLACK, Material.RUBBER)
    b.box([-0.46 * l, -0.16, 0.48 * frame], [-0.2 * l, 0.16, 0.58 * frame], color, Material.PAINT)
    b.cylinder([l / 2 - radius, 0, radius], [0.22 * l, 0, 0.9 * frame], 0.06, _CHROME, Material.METAL, sides=6)
    b.box([0.24 * l, -0.16, 0.72 * frame], [0.33 * l, 0.16, frame], color, Material.PAINT, top=(0.6, 0.8))
    b.box([0.325 * l, -0.1, 0.76 * frame], [0.35 * l, 0.1, 0.9 * frame], _WHITE_LAMP, Material.LAMP)
    b.box([-0.48 * l, -0.1, 0.5 * frame], [-0.455 * l, 0.1, 0.58 * frame], _RED_LAMP, Material.LAMP)
    b.box([0.19 * l, -w / 2, 0.88 * frame], [0.23 * l, w / 2, 0.93 * frame], _DARK, Material.RUBBER)
    if actor.rider:
        _rider(b, actor.size, 0.68 * frame, rng.uniform(0.05, 0.6, 3), rng)


def _cone(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    l, w, h = actor.size
    orange, white = (1.0, 0.33, 0.03), (0.95, 0.95, 0.92)
    b.box([-l / 2, -w / 2, 0], [l / 2, w / 2, 0.05 * h], _DARK, Material.RUBBER)
    radius = 0.42 * min(l, w)
    stops = ((0.05, orange), (0.42, white), (0.68, orange), (1.0, orange))
    for (z0, color), (z1, _) in pairwise(stops):
        r0, r1 = radius * (1 - 0.85 * z0), radius * (1 - 0.85 * z1)
        b.cylinder([0, 0, z0 * h], [0, 0, z1 * h], r0, color, Material.CLOTH, sides=10, end_radius=r1)


def _barrier(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    l, w, h = actor.size
    red, white = (0.85, 0.1, 0.07), (0.93, 0.93, 0.9)
    bands = max(3, round(w / 0.35) | 1)
    edges = np.linspace(-w / 2, w / 2, bands + 1)
    for i in range(bands):
        color = red if i % 2 == 0 else white
        b.box([-l / 2, edges[i], 0], [l / 2, edges[i + 1], 0.45 * h], color, Material.CLOTH, top=(0.5, 1.0))
        b.box([-0.25 * l, edges[i], 0.45 * h], [0.25 * l, edges[i + 1], h], color, Material.CLOTH)


def _crate(b: MeshBuilder, actor: Actor, rng: np.random.Generator) -> None:
    """Adds a plain box with a darker band, for all other categories."""
    (l, w, h), color = actor.size, actor.color
    b.box([-l / 2, -w / 2, 0], [l / 2, w / 2, 0.6 * h], color, Material.CLOTH)
    b.box([-0.45 * l, -0.45 * w, 0.6 * h], [0.45 * l, 0.45 * w, h], np.array(color) * 0.7, Material.CLOTH)
