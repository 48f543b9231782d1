"""Draws a rig so that a person sees a wrong calibration at a glance: the ground in the images, the coverage, a page.

In an image the ground grid has lines every 10 m, the horizon is yellow, and posts of 1.7 m, as high as a person, stand
on the crossings. If a calibration is right, the grid lies on the road, the horizon is where streets end, and people
near a post reach about as high. The bird's-eye view has ego x up and ego y to the left.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from perception.geometry import invert_rigid, transform_points
from perception.inference.checks import roll_and_elevation
from perception.rigs.check import REACH, RigReport, SurroundView, circular_runs
from perception.rigs.rig import RigCamera

STEP = 10.0  # metres between lines of the grid
FINE, NEAR = 2.0, 10.0  # metres between lines near the vehicle, and how far they reach
GRID = 40.0  # metres from the rear axle to which it reaches
POST = 1.7  # metres
SAMPLE = 0.1  # metres between points of a line near the camera
SMOOTH = 2  # pictures are drawn larger and reduced
_DARK, _PANEL, _TEXT, _FAINT, _BAD = (13, 17, 23), (30, 36, 45), (223, 228, 236), (125, 138, 155), (255, 110, 95)
_HORIZON, _AHEAD, _LINES, _FINE_LINES = (255, 214, 10), (74, 222, 128), (56, 189, 248), (38, 106, 140)
_CAMERA_COLORS = (
    (56, 189, 248), (251, 146, 60), (74, 222, 128), (244, 114, 182), (250, 204, 21), (167, 139, 250),
    (45, 212, 191), (248, 113, 113), (163, 230, 53), (232, 89, 249), (217, 200, 158), (148, 163, 184),
)  # fmt: skip
_SEEN = ((52, 20, 24), (30, 58, 95), (45, 106, 135), (80, 160, 170), (150, 210, 190))  # by 0, 1, 2, 3, 4 cameras


def draw_camera(camera: RigCamera, image: NDArray[np.uint8] | None = None, *, width: int = 960) -> Image.Image:
    """Draws the ground grid, the horizon and posts as a camera sees them.

    Args:
        camera: of any model and mounting.
        image: uint8 [H, W, 3] in the size of the camera; None for an empty one.
        width: of the picture in pixels; the height keeps the aspect ratio.
    """
    H, W = camera.image_size
    size = (width, max(1, round(width * H / W)))
    if image is None:
        canvas = Image.new("RGB", (SMOOTH * size[0], SMOOTH * size[1]), _PANEL)
    else:
        canvas = Image.fromarray(image).resize((SMOOTH * size[0], SMOOTH * size[1]), Image.Resampling.LANCZOS)
    pen, scale = ImageDraw.Draw(canvas), SMOOTH * width / W
    for points, color, thick in _scene(camera):
        for chain in _visible(camera, points):
            pen.line([tuple(xy) for xy in (chain * scale).tolist()], fill=color, width=SMOOTH * thick, joint="curve")
    picture = canvas.resize(size, Image.Resampling.LANCZOS)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    row = np.inf
    for distance in np.arange(STEP, GRID + 1, STEP):
        for base in _along_view(camera, distance):
            uv, seen = camera.project(transform_points(invert_rigid(camera.ego_from_cam), base[None]))
            if seen[0] and abs(row - uv[0, 1] * width / W) > 16:  # otherwise the text would lie on that before
                row = uv[0, 1] * width / W
                at = uv[0] * width / W
                pen.text(
                    (at[0] + 4, at[1] - 2),
                    f"{distance:.0f} m",
                    fill=_TEXT,
                    font=font,
                    stroke_width=2,
                    stroke_fill=_DARK,
                )
    roll, elevation = roll_and_elevation(camera.ego_from_cam)
    height = camera.ego_from_cam[2, 3]
    _label(picture, f"{camera.name}   pitch {-elevation + 0.0:.1f}   roll {roll + 0.0:.1f}   height {height:.2f} m")
    return picture


def _scene(camera: RigCamera) -> Iterator[tuple[NDArray[np.float64], tuple[int, int, int], int]]:
    """Lines of the ego frame: points [P, 3], colour, width."""
    near = np.arange(-NEAR, NEAR + SAMPLE / 2, SAMPLE)
    for offset in np.arange(-NEAR, NEAR + 1, FINE):
        level, ground = np.full_like(near, offset), np.zeros_like(near)
        yield np.stack([near, level, ground], -1), _FINE_LINES, 1
        yield np.stack([level, near, ground], -1), _FINE_LINES, 1
    along = np.arange(-GRID, GRID + SAMPLE / 2, SAMPLE)
    for offset in np.arange(-GRID, GRID + 1, STEP):
        for first, second in ((along, np.full_like(along, offset)), (np.full_like(along, offset), along)):
            is_ahead = offset == 0 and first is along
            yield (
                np.stack([first, second, np.zeros_like(along)], -1),
                _AHEAD if is_ahead else _LINES,
                2 if is_ahead else 1,
            )
    azimuth = np.radians(np.arange(0, 360.01, 0.25))
    far = 1e6 * np.stack([np.cos(azimuth), np.sin(azimuth), np.zeros_like(azimuth)], -1)
    yield far + camera.ego_from_cam[:3, 3], _HORIZON, 2
    up = np.linspace(0, POST, 12)
    nodes = np.arange(-GRID, GRID + 1, STEP)
    for x in nodes:
        for y in nodes:
            if 0 < np.hypot(x, y) <= GRID:
                yield np.stack([np.full_like(up, x), np.full_like(up, y), up], -1), (255, 255, 255), 2


def _along_view(camera: RigCamera, distance: float) -> list[NDArray[np.float64]]:
    """The posts of the grid at a distance on the axis of ego x or y that the camera looks along."""
    forward = camera.ego_from_cam[:2, 2]
    ends = distance * np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    return [end for end in ends if end[:2] @ forward > 0.6 * distance * np.hypot(*forward)]


def _visible(camera: RigCamera, points_ego: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """The parts of a line that are in the image, [P, 2] pixels each."""
    uv, seen = camera.project(transform_points(invert_rigid(camera.ego_from_cam), points_ego))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], seen.astype(int), [0]])))
    for first, last in edges.reshape(-1, 2):
        if last - first > 1:
            yield uv[first:last]


def draw_coverage(cameras: Sequence[RigCamera], view: SurroundView, *, size: int = 720) -> Image.Image:
    """Draws from above how many cameras see each cell of the ground, where the cameras stand, and blind sectors.

    Args:
        cameras: those of the view, in its order.
        view: from `surround_view`.
        size: of the picture in pixels.
    """
    counts = np.minimum(view.cells.sum(0), len(_SEEN) - 1) if len(view.cells) else np.zeros((100, 100), int)
    colors = np.array(_SEEN, np.uint8)[counts]  # [X, Y, 3]
    full = SMOOTH * size
    canvas = Image.fromarray(np.ascontiguousarray(colors[::-1, ::-1])).resize((full, full), Image.Resampling.NEAREST)
    pen, scale = ImageDraw.Draw(canvas), full / (2 * REACH)

    def at(x: float, y: float) -> tuple[float, float]:
        return (REACH - y) * scale, (REACH - x) * scale

    for ring in np.arange(STEP, REACH + 1, STEP):
        pen.ellipse([*at(ring, ring), *at(-ring, -ring)], outline=(70, 80, 95), width=SMOOTH)
    for start, end in view.blind_sectors():
        # Pillow counts clockwise from the right, we to the left from ahead (up).
        pen.arc([*at(20, 20), *at(-20, -20)], -90 - end, -90 - start, fill=_BAD, width=SMOOTH * 5)
    pen.rectangle([*at(3.8, 0.95), *at(-1.0, -0.95)], outline=_FAINT, width=SMOOTH)
    for k, camera in enumerate(cameras):
        color = _CAMERA_COLORS[k % len(_CAMERA_COLORS)]
        x, y = camera.ego_from_cam[:2, 3]
        pen.ellipse([*at(x + 0.5, y + 0.5), *at(x - 0.5, y - 0.5)], fill=color)
        for start, end in circular_runs(view.sectors[k]):
            radius = 22.0 + 2.4 * k
            pen.arc([*at(radius, radius), *at(-radius, -radius)], -90 - end, -90 - start, fill=color, width=SMOOTH * 3)
    picture = canvas.resize((size, size), Image.Resampling.LANCZOS)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for k, camera in enumerate(cameras):
        pen.text((10, 10 + 18 * k), camera.name, fill=_CAMERA_COLORS[k % len(_CAMERA_COLORS)], font=font)
    for ring in np.arange(STEP, REACH, STEP):
        pen.text((at(ring, 0)[0] / SMOOTH + 3, at(ring, 0)[1] / SMOOTH), f"{ring:.0f} m", fill=_TEXT, font=font)
    for n, color in enumerate(_SEEN):
        left = 10 + 62 * n
        pen.rectangle([left, size - 24, left + 14, size - 10], fill=color, outline=_FAINT)
        pen.text((left + 19, size - 26), f"{n}{'+' if n == len(_SEEN) - 1 else ''}", fill=_TEXT, font=font)
    pen.text((10, size - 46), "cameras that see the ground", fill=_TEXT, font=font)
    return picture


def _label(picture: Image.Image, text: str) -> None:
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    box = pen.textbbox((8, 6), text, font=font)
    pen.rectangle([0, 0, box[2] + 8, box[3] + 6], fill=_DARK)
    pen.text((8, 6), text, fill=_TEXT, font=font)


def report_page(title: str, report: RigReport, pictures: Mapping[str, Image.Image], coverage: Image.Image) -> str:
    """Returns an HTML page with everything in it: findings, a table, the coverage, and the picture of each camera.

    Args:
        title: of the page, such as the name of the rig file.
        report: from `check_rig`.
        pictures: by camera, from `draw_camera`.
        coverage: from `draw_coverage`.
    """
    named = html.escape(title)
    findings = "".join(f"<li>{html.escape(finding.sentence)}</li>" for finding in report.findings)
    verdict = f"<ul class=bad>{findings}</ul>" if findings else "<p class=good>No finding.</p>"
    head, *rows = report.rows()
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    images = "".join(
        f"<figure><img src='{_embedded(picture)}' alt='{html.escape(name)}'></figure>"
        for name, picture in pictures.items()
    )
    return f"""<!doctype html><html lang=en><meta charset=utf-8><title>{named}</title><style>
body {{font: 15px/1.5 system-ui, sans-serif; background: #0d1117; color: #dfe4ec; margin: 2em; max-width: 1500px}}
table {{border-collapse: collapse}} td, th {{padding: .3em .8em; border-bottom: 1px solid #2c3542; text-align: left}}
.bad {{color: #ff6e5f}} .good {{color: #4ade80}} figure {{display: inline-block; margin: .5em}} img {{max-width: 720px}}
</style><h1>{named}</h1>{verdict}<table><tr>{titles}</tr>{cells}</table><p>{html.escape(report.surroundings())}</p>
<p>Blue: the ground grid, every 10 m; green: straight ahead and behind; yellow: the horizon; white: posts of 1.7 m.</p>
<figure><img src='{_embedded(coverage)}' alt='coverage'></figure>{images}</html>
"""


def _embedded(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
