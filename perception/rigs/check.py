"""Checks a rig before it drives: what live use refuses or warns of, and what only names, images and views show.

The rules of live use (`perception.inference.checks`, `plausibility`) see one frame of pinholes. Here all cameras of all
models are judged, every fault is named, not only the first, and the name of a camera counts: one that is called left
and looks to the right is wrong. What of the surroundings the cameras see is in `surround_view`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from perception.errors import DataError
from perception.geometry import invert_rigid, transform_points
from perception.inference.checks import roll_and_elevation
from perception.inference.plausibility import ImageStatistics, implausible_rig, sampled_rgb
from perception.rigs.rig import Rig, RigCamera, with_names
from perception.rigs.vanishing import Tilt, find_lines, measure_tilt
from perception.types import NumpyCameraRig

REACH = 50.0  # metres to each side of the grid of cells
CELL = 1.0  # metres
EYE_LEVEL = 1.0  # metres above the ground at which blind sectors and overlaps are measured
RING = 20.0  # metres from the rear axle, at which they are measured
LEAST_SECTOR = 2  # degrees of a blind sector
UPWARDS_DEG = 12.0  # of an optical axis; those of vehicles look level or down
LOWEST = 0.2  # metres of a camera above the ground
UNEQUAL = 1.1  # ratio of the focal lengths from which an image was probably resized unequally
SWAPPED = 0.08  # share of the image within which an exchanged principal point is in its middle
STEEP_DEG = 60.0  # below the horizon, from which a direction on the ground means little
TURNED_DEG = 40.0  # around 90, 180 or 270 degrees for a frame with other axes
MOST_IMAGES = 6  # of a camera in which lines are looked for

_SIDES = {"left": 90.0, "l": 90.0, "right": -90.0, "r": -90.0}
_ENDS = {
    "front": 0.0,
    "fwd": 0.0,
    "forward": 0.0,
    "f": 0.0,
    "rear": 180.0,
    "back": 180.0,
    "backward": 180.0,
    "b": 180.0,
}


class RigFinding(NamedTuple):
    """What is wrong with a rig.

    Attributes:
        camera: its name; empty for the whole rig.
        sentence: what is wrong, and the fix.
    """

    camera: str
    sentence: str


class SurroundView(NamedTuple):
    """What of the surroundings the cameras see, walls and vehicles aside.

    Attributes:
        names: of the cameras.
        sectors: [N, 360] bool: the camera sees a point 1 m above the ground, 20 m from the rear axle, at this azimuth
            (degrees from ahead to the left).
        cells: [N, X, Y] bool: it sees the middle of a cell of 1 m on the ground; x from -50 to 50 m, y likewise.
    """

    names: tuple[str, ...]
    sectors: NDArray[np.bool_]
    cells: NDArray[np.bool_]

    def blind_sectors(self) -> list[tuple[int, int]]:
        """The azimuths from and to (degrees, to the left, to may exceed 360) that no camera sees."""
        runs = circular_runs(~self.sectors.any(0))
        return sorted((a % 360, a % 360 + b - a) for a, b in runs if b - a >= LEAST_SECTOR)

    def overlaps(self) -> list[tuple[str, str, int]]:
        """Pairs of cameras and the degrees that both see."""
        both = self.sectors.astype(int) @ self.sectors.T.astype(int)
        pairs = ((a, b) for a in range(len(self.names)) for b in range(a + 1, len(self.names)))
        return [(self.names[a], self.names[b], int(both[a, b])) for a, b in pairs if both[a, b]]

    def unseen_share(self) -> float:
        """The share of the cells that no camera sees."""
        return float((~self.cells.any(0)).mean())


class RigReport(NamedTuple):
    """The result of `check_rig`."""

    cameras: tuple[RigCamera, ...]  # that can be drawn: their numbers are those of a camera
    findings: tuple[RigFinding, ...]
    view: SurroundView
    tilts: Mapping[str, Tilt]  # of the cameras with images

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the cameras as rows of text, with a head."""
        rows: list[tuple[str, ...]] = [
            ("camera", "model", "pixels", "field", "yaw", "pitch", "roll", "x, y, z (m)", "ground", "from images")
        ]
        for camera, cells in zip(self.cameras, self.view.cells, strict=True):
            about = describe(camera)
            angles = (f"{about[key]:.1f}" for key in ("yaw_deg", "pitch_deg", "roll_deg"))
            rows.append(
                (
                    camera.name,
                    camera.model.kind,
                    f"{camera.image_size[1]} x {camera.image_size[0]}",
                    f"{about['field_of_view_deg']:.0f}",
                    *angles,
                    ", ".join(f"{x:.2f}" for x in camera.ego_from_cam[:3, 3]),
                    f"{cells.mean():.0%}",
                    str(self.tilts.get(camera.name, "")),
                )
            )
        return rows

    def surroundings(self) -> str:
        """Describes which directions and how much of the ground no camera sees."""
        if not self.cameras:
            return "no camera can be drawn"
        sectors = ", ".join(f"{start} to {end}" for start, end in self.view.blind_sectors())
        blind = f"no camera sees {sectors} degrees (from ahead to the left, at {RING:.0f} m)"
        unseen = f"{self.view.unseen_share():.0%} of the cells within {REACH:.0f} m are seen by no camera"
        pairs = ", ".join(f"{a} and {b} {degrees}" for a, b, degrees in self.view.overlaps())
        overlaps = f"; degrees that two cameras see: {pairs}" if pairs else ""
        return f"{blind if sectors else 'the view is all around'}; {unseen}{overlaps}"

    def to_dict(self) -> dict[str, object]:
        """Returns plain JSON values."""
        seen = {name: float(cells.mean()) for name, cells in zip(self.view.names, self.view.cells, strict=True)}
        return {
            "findings": [finding._asdict() for finding in self.findings],
            "cameras": {
                c.name: describe(c) | {"ground_cells_seen": seen[c.name]}
                | ({"from_images": self.tilts[c.name]._asdict()} if c.name in self.tilts else {})
                for c in self.cameras
            },
            "blind_sectors_deg": [list(sector) for sector in self.view.blind_sectors()],
            "overlaps_deg": [list(pair) for pair in self.view.overlaps()],
            "unseen_cells": self.view.unseen_share(),
            "cell_m": CELL,
            "reach_m": REACH,
        }  # fmt: skip


def describe(camera: RigCamera) -> dict[str, Any]:
    """What a person compares with the vehicle: model, size, field of view, place and direction of a camera."""
    roll, elevation = roll_and_elevation(camera.ego_from_cam)
    return {
        "model": camera.model.kind,
        "image_size_px": {"width": camera.image_size[1], "height": camera.image_size[0]},
        "field_of_view_deg": round(float(np.degrees(_width(camera))), 1),
        "position_m": [round(float(x), 3) for x in camera.ego_from_cam[:3, 3]],
        "yaw_deg": round(_azimuth(camera), 1),
        "pitch_deg": round(-elevation, 1) + 0.0,
        "roll_deg": round(roll, 1) + 0.0,
    }


def check_rig(
    entries: Mapping[str, RigCamera | DataError],
    images: Mapping[str, Sequence[NDArray[np.uint8]]] | None = None,
    progress: bool = False,
) -> RigReport:
    """Finds what is wrong with the cameras of a rig.

    Args:
        entries: from `perception.rigs.rig.read_cameras`.
        images: uint8 RGB [H, W, 3] of cameras by name, in order of time; cameras may be missing.
        progress: show a progress bar of the cameras on stderr.

    Returns:
        All findings, and what the cameras see.
    """
    found = [RigFinding(name, str(entry)) for name, entry in entries.items() if isinstance(entry, DataError)]
    given = [entry for entry in entries.values() if isinstance(entry, RigCamera)]
    together = _refused([camera for camera in given if not _mirrored(camera)])
    usable = []
    if "cam_from_ego" in together:  # the poses of all cameras together show it; alone some of them would pass
        found.append(RigFinding("", together))
        given = []
    for camera in given:
        if sentence := _mirrored(camera) or _refused([camera]):
            found.append(RigFinding(camera.name, sentence))
        else:
            usable.append(camera)
    found += _implausible(usable) + _wrong_direction(usable)
    tilts: dict[str, Tilt] = {}
    if images:
        found += _wrong_images(usable, images)
        blamed = {finding.camera for finding in found}
        for camera in tqdm(usable, desc="lines", unit="camera", disable=not progress, delay=2):
            fitting = [image for image in images.get(camera.name, ()) if image.shape[:2] == camera.image_size]
            if fitting and camera.name not in blamed:
                tilts[camera.name] = measure_tilt(
                    [find_lines(image, camera) for image in fitting[:MOST_IMAGES]], camera
                )
                if deviation := tilts[camera.name].finding():
                    found.append(
                        RigFinding(
                            camera.name,
                            f"camera {camera.name!r}: straight lines in its images show that it looks {deviation} than "
                            "ego_from_cam says; correct the rotation",
                        )
                    )
    return RigReport(tuple(usable), tuple(found), surround_view(usable), tilts)


def circular_runs(marked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Returns first and end of the runs of marked degrees [360] around the circle; an end may exceed 360."""
    if marked.all():
        return [(0, 360)]
    start = int(np.argmin(marked))  # an unmarked one, so that no run is cut
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.roll(marked, -start).astype(int), [0]])))
    return [(int(a) + start, int(b) + start) for a, b in edges.reshape(-1, 2)]


def surround_view(cameras: Sequence[RigCamera]) -> SurroundView:
    """Computes which directions and which cells of the ground cameras see."""
    azimuth = np.radians(np.arange(360) + 0.5)
    ring = np.stack([RING * np.cos(azimuth), RING * np.sin(azimuth), np.full(360, EYE_LEVEL)], -1)
    middles = np.arange(-REACH, REACH, CELL) + CELL / 2
    x, y = np.meshgrid(middles, middles, indexing="ij")
    ground = np.stack([x, y, np.zeros_like(x)], -1)  # [X, Y, 3]
    return SurroundView(
        tuple(camera.name for camera in cameras),
        np.array([_sees(camera, ring) for camera in cameras], bool).reshape(-1, 360),
        np.array([_sees(camera, ground) for camera in cameras], bool).reshape(-1, *x.shape),
    )


def _sees(camera: RigCamera, points_ego: NDArray[np.float64]) -> NDArray[np.bool_]:
    return camera.project(transform_points(invert_rigid(camera.ego_from_cam), points_ego))[1]


def _mirrored(camera: RigCamera) -> str:
    """Returns a sentence about a pose that is the mirror image of a rigid one; an empty text if it is not."""
    pose = np.asarray(camera.ego_from_cam, np.float64)
    if pose.shape != (4, 4) or not np.isfinite(pose).all() or np.linalg.det(pose[:3, :3]) > -0.5:
        return ""
    return (
        f"camera {camera.name!r}: ego_from_cam is left-handed, a mirror image of a rotation; check the sign of each "
        "axis (camera: x right, y down, z forward; ego: x forward, y left, z up)"
    )


def _refused(cameras: Sequence[RigCamera]) -> str:
    """Returns why live use refuses cameras; an empty text if it takes them."""
    try:
        if cameras:
            Rig(cameras)
    except DataError as error:
        return str(error)
    return ""


def _implausible(cameras: Sequence[RigCamera]) -> list[RigFinding]:
    """What live use warns of, for each camera, and stricter rules for which a vehicle need not stop."""
    found = []
    ground = surround_view(cameras).cells.any((1, 2))
    for camera, sees in zip(cameras, ground, strict=True):
        sentences = [*_of_live_use([camera], [bool(sees)]).values(), *_unusual(camera)]
        found += [RigFinding(camera.name, sentence) for sentence in sentences]
    if same := _of_live_use(cameras, ground.tolist()).get("same pose"):
        found.append(RigFinding("", same))
    return found


def _of_live_use(cameras: Sequence[RigCamera], sees: Sequence[bool]) -> dict[str, str]:
    if not cameras:
        return {}
    rig = NumpyCameraRig(
        np.stack([camera.model.img_from_cam for camera in cameras]),
        np.stack([camera.ego_from_cam for camera in cameras]),
        np.ones(len(cameras), bool),
    )
    found = implausible_rig(rig, [camera.image_size for camera in cameras], np.array(sees))
    return {kind: with_names(sentence, [camera.name for camera in cameras]) for kind, sentence in found.items()}


def _unusual(camera: RigCamera) -> list[str]:
    """Sentences about numbers that live use accepts."""
    (H, W), matrix = camera.image_size, camera.model.img_from_cam
    where, found = f"camera {camera.name!r}", []
    u, v = matrix[0, 2], matrix[1, 2]
    if abs(u - W / 2) > 2 * SWAPPED * W and max(abs(v - W / 2), abs(u - H / 2)) < SWAPPED * max(H, W):
        found.append(
            f"{where}: cx and cy are {u:.4g} and {v:.4g} px in an image of {W} x {H} (width x height); exchange them"
        )
    ratio = matrix[0, 0] / matrix[1, 1]
    if max(ratio, 1 / ratio) > UNEQUAL:
        found.append(
            f"{where}: fx and fy are {matrix[0, 0]:.4g} and {matrix[1, 1]:.4g} px, and pixels of cameras are square; "
            "give both in pixels of the same image"
        )
    _, elevation = roll_and_elevation(camera.ego_from_cam)
    if UPWARDS_DEG < elevation <= 30.0:  # above that live use warns
        found.append(
            f"{where}: ego_from_cam looks {elevation:.0f} degrees upwards; a positive pitch looks downwards: "
            "check its sign"
        )
    if 0 <= camera.ego_from_cam[2, 3] < LOWEST:
        found.append(
            f"{where} is {camera.ego_from_cam[2, 3]:.2f} m above the ground; the origin of the ego frame is on the "
            "ground, not at the axle, the IMU or a camera"
        )
    return found


def _azimuth(camera: RigCamera) -> float:
    """The direction of the optical axis, degrees from ahead to the left; of the upper edge if it looks down."""
    forward, up = camera.ego_from_cam[:3, 2], -camera.ego_from_cam[:3, 1]
    heading = forward if np.hypot(*forward[:2]) > np.cos(np.radians(STEEP_DEG)) else up
    return float(np.degrees(np.arctan2(heading[1], heading[0]))) + 0.0


def _width(camera: RigCamera) -> float:
    """The field of view along the middle row, radians."""
    W = camera.image_size[1]
    center = camera.model.img_from_cam[1, 2]
    rays, seen = camera.unproject(np.stack([np.linspace(0, W, 181), np.full(181, center)], -1))
    angle = np.arctan2(rays[seen, 0], rays[seen, 2])
    return float(np.ptp(angle)) if seen.any() else 0.0


def _named_direction(name: str) -> tuple[float | None, float | None]:
    """The end (0 front, 180 rear) and the side (90 left, -90 right) in a name, None for none or for two."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    ends, sides = ({table[word] for word in words if word in table} for table in (_ENDS, _SIDES))
    return (ends.pop() if len(ends) == 1 else None), (sides.pop() if len(sides) == 1 else None)


def _apart(a: float, b: float) -> float:
    """The angle from b to a, -180 to 180 degrees."""
    return (a - b + 180) % 360 - 180


def _wrong_direction(cameras: Sequence[RigCamera]) -> list[RigFinding]:
    """Cameras that look where their names do not say; one finding if all show the same mistake."""
    wrong: dict[str, str] = {}
    turns, sides = [], []
    for camera in cameras:
        end, side = _named_direction(camera.name)
        azimuth = _azimuth(camera)
        if end is not None:
            turns.append(_apart(azimuth, end if side is None else end + _apart(side, end) / 2))
            if abs(_apart(azimuth, end)) > (60 if side is None else 115):
                wrong[camera.name] = "ahead" if end == 0 else "to the rear"
        if side is not None:
            looks_aside = 20 < abs(azimuth) < 160
            sides.append(np.sign(side) * np.sign(azimuth) if looks_aside else 0)
            if looks_aside and sides[-1] < 0:
                wrong[camera.name] = "to the left" if side > 0 else "to the right"
    if not wrong:
        return _exchanged(cameras)
    if len(turns) > 1 and any(all(abs(_apart(t, turn)) < TURNED_DEG for t in turns) for turn in (90, 180, -90)):
        turn = np.degrees(np.angle(np.exp(1j * np.radians(turns)).mean()))
        return [
            RigFinding(
                "",
                f"the rig is turned by {abs(turn):.0f} degrees to the {'left' if turn > 0 else 'right'}: its cameras "
                "look elsewhere than their names say; give poses in the ego frame (x forward, y left, z up), not in "
                "one with x to the side or to the rear",
            )
        ]
    if len(sides) > 1 and sum(s < 0 for s in sides) > 1 and not any(s > 0 for s in sides):
        return [
            RigFinding(
                "",
                "left and right are mirrored: every camera whose name has a side looks to the other one; the ego frame "
                "has y to the left, and a positive yaw turns to the left",
            )
        ]
    return [
        RigFinding(
            name,
            f"camera {name!r} looks {_said(_azimuth(camera))}, and its name says {where}; give it its own pose and "
            "image",
        )
        for camera in cameras
        for name, where in wrong.items()
        if camera.name == name
    ]


def _exchanged(cameras: Sequence[RigCamera]) -> list[RigFinding]:
    """Two cameras of a stereo pair that stand on each other's side."""
    stand = {camera.name: camera.ego_from_cam[:3, 3] for camera in cameras}
    found = []
    for name, position in stand.items():
        other = re.sub("left", "right", name, flags=re.IGNORECASE)
        other = next((n for n in stand if n.lower() == other.lower() and n != name), "")
        if other and np.abs(_azimuth_of(cameras, name)) < 20 and stand[other][1] - position[1] > 0.05:
            found.append(
                RigFinding("", f"camera {name!r} stands to the right of {other!r}; exchange their poses, or mirror y")
            )
    return found


def _azimuth_of(cameras: Sequence[RigCamera], name: str) -> float:
    return next(_azimuth(camera) for camera in cameras if camera.name == name)


def _said(azimuth: float) -> str:
    side = "to the left" if azimuth > 0 else "to the right"
    return (
        "ahead" if abs(azimuth) < 10 else "to the rear" if abs(azimuth) > 170 else f"{abs(azimuth):.0f} degrees {side}"
    )


def _wrong_images(cameras: Sequence[RigCamera], images: Mapping[str, Sequence[NDArray[np.uint8]]]) -> list[RigFinding]:
    """Images of another size than the calibration, and what live use finds in their pixels."""
    found = []
    for camera in cameras:
        other = {image.shape[:2] for image in images.get(camera.name, ())} - {camera.image_size}
        if other:
            (H, W), (own_H, own_W) = other.pop(), camera.image_size
            turned = "; they are turned by 90 degrees" if (H, W) == (own_W, own_H) else ""
            found.append(
                RigFinding(
                    camera.name,
                    f"camera {camera.name!r} is calibrated for images of {own_W} x {own_H} pixels (width x height), "
                    f"and its images have {W} x {H}{turned}; give image_size_px and intrinsics of these images",
                )
            )
    statistics = ImageStatistics()
    sentences: dict[str, str] = {}
    names = [camera.name for camera in cameras]
    for k in range(max((len(images.get(name, ())) for name in names), default=0)):
        frame = {n: sampled_rgb(images[name][k]) for n, name in enumerate(names) if len(images.get(name, ())) > k}
        seen, kept = statistics.implausible(frame)
        statistics.keep(kept)
        sentences |= {kind: with_names(sentence, names) for kind, sentence in seen.items()}
    return found + [RigFinding("", sentence) for sentence in sentences.values()]
