"""Draws on images with Pillow: colours, strokes, legend, name plates; needs no torch.

Pictures are drawn at `SUPERSAMPLING` times their size and reduced, which smooths the edges.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from perception.types import BOX_CLASSES, LINE_CLASSES

Color: TypeAlias = tuple[int, int, int]

BOX_COLORS: dict[str, Color] = dict(
    zip(
        BOX_CLASSES,
        (
            (56, 189, 248), (251, 146, 60), (217, 200, 158), (250, 204, 21), (163, 230, 53),
            (244, 114, 182), (232, 89, 249), (167, 139, 250), (255, 94, 58), (45, 212, 191),
        ),
        strict=True,
    )
)  # fmt: skip
LINE_COLORS: dict[str, Color] = dict(zip(LINE_CLASSES, ((253, 224, 110), (74, 222, 128), (248, 90, 90)), strict=True))

GT_COLOR = (236, 240, 246)
BACKGROUND, PANEL, GRID, TEXT, FAINT = (13, 17, 23), (22, 27, 34), (44, 53, 66), (223, 228, 236), (125, 138, 155)
NOTE = (255, 123, 114)
SUPERSAMPLING = 2
UNSEEN_ALPHA, UNSEEN_WIDTH = 90, 1.0  # of lines where no camera has looked


@lru_cache(maxsize=32)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns Pillow's own font in a size in pixels; loading it takes longer than a frame should."""
    return ImageFont.load_default(size)


class Canvas:
    """Draws on an RGB image of `SUPERSAMPLING` times its final size; widths are in pixels of the final image."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self._pen = ImageDraw.Draw(image, "RGBA")

    def stroke(self, segments: np.ndarray, color: tuple, width: float, dash: tuple[float, float] | None) -> None:
        """Draws segments [S, 2, 2] in canvas pixels; a dash pattern continues from one segment to the next."""
        width = max(round(width * SUPERSAMPLING), 1)
        phase = 0.0
        for start, end in segments:
            length = float(np.linalg.norm(end - start))
            if length == 0:
                continue
            pieces = [(0.0, 1.0)]
            if dash is not None:
                on, period = dash[0] * SUPERSAMPLING, sum(dash) * SUPERSAMPLING
                begins = np.arange(-phase, length, period)
                pieces = [(max(b, 0) / length, min(b + on, length) / length) for b in begins if b + on > 0]
                phase = (phase + length) % period
            for a, b in pieces:
                ends = [tuple(start + t * (end - start)) for t in (a, b)]
                self._pen.line(ends, fill=color, width=width)
            if dash is None and width > 2:  # round the joints
                self._pen.circle(tuple(end), (width - 1) / 2, fill=color)

    def curve(self, points: np.ndarray, color: tuple, width: float) -> None:
        """Draws a polyline [P, 2] in canvas pixels, in one call."""
        self._pen.line(points.ravel().tolist(), fill=color, width=max(round(width * SUPERSAMPLING), 1))

    def ellipse(self, center: np.ndarray, radii: np.ndarray, color: tuple) -> None:
        """Draws the outline of an ellipse in canvas pixels, with its radii [2] along the axes of the picture."""
        box = [*(center - radii).tolist(), *(center + radii).tolist()]
        self._pen.ellipse(box, outline=color, width=SUPERSAMPLING // 2)

    def fill(self, corners: np.ndarray, color: tuple) -> None:
        """Draws a filled polygon [P, 2] in canvas pixels, blended if the colour has an alpha value."""
        self._pen.polygon([tuple(corner) for corner in corners], fill=color)

    def arrow(self, start: np.ndarray, end: np.ndarray, color: tuple, width: float) -> None:
        """Draws an arrow between two points in canvas pixels."""
        along = (end - start) / np.linalg.norm(end - start)
        across = np.array([-along[1], along[0]])
        head = 4.5 * SUPERSAMPLING
        self.stroke(np.array([[start, end]]), color, width * 0.75, None)
        self.fill(np.array([end + along * head, end + across * head / 2, end - across * head / 2]), color)

    def circle(self, center: np.ndarray, radius: float, color: tuple) -> None:
        """Draws a circle in canvas pixels."""
        self._pen.circle(tuple(center), radius, outline=color, width=SUPERSAMPLING)

    def text(self, position: np.ndarray, text: str, color: tuple, size: int) -> None:
        """Draws text centred at a position in canvas pixels; `size` is in pixels of the final image."""
        self._pen.text(tuple(position), text, fill=color, font=font(size * SUPERSAMPLING), anchor="mm")

    def finished(self) -> Image.Image:
        """Returns the image in its final size."""
        return self.image.reduce(SUPERSAMPLING)


def draw_rings(canvas: Canvas, center: np.ndarray, scale: float) -> None:
    """Draws circles of equal distance around the car, labelled in metres at the upper right."""
    reach = max(canvas.image.size) / scale
    step = next(s for s in (5, 10, 20, 50, 100, 1000) if reach / s <= 8)
    slant = np.array([np.sin(np.pi / 4), -np.cos(np.pi / 4)])
    for radius in range(step, int(reach) + step, step):
        canvas.circle(center, radius * scale, GRID)
        canvas.text(center + slant * radius * scale, f"{radius} m", FAINT, 11)


def draw_ego_marker(canvas: Canvas, flip: Callable[[np.ndarray], np.ndarray]) -> None:
    """Draws an arrow head of the size of a car, with its origin on the rear axle."""
    canvas.fill(flip(np.array([[3.6, 0.0], [-1.0, 1.1], [-0.2, 0.0], [-1.0, -1.1]])), TEXT)


def draw_tag(tile: Image.Image, name: str) -> None:
    """Draws the camera's name on a dark plate in the upper left corner."""
    pen = ImageDraw.Draw(tile, "RGBA")
    face = font(13)
    right = 8 + pen.textlength(name, font=face) + 14
    pen.rounded_rectangle((8, 8, right, 29), radius=5, fill=(*BACKGROUND, 190))
    pen.text((15, 18), name, fill=TEXT, font=face, anchor="lm")


def legend_picture(width: int, with_gt: bool, with_unseen: bool) -> Image.Image:
    """Draws the colours of box classes, line classes and the two styles, in as many rows as the width needs."""
    face = font(13 * SUPERSAMPLING)
    boxes = [(name, color, "box") for name, color in BOX_COLORS.items()]
    lines = [(name, color, "solid") for name, color in LINE_COLORS.items()]
    lines += [("prediction", TEXT, "solid"), ("ground truth", GT_COLOR, "dashed")] if with_gt else []
    lines += [("not seen by a camera", TEXT, "faint")] if with_unseen else []
    placed: list[tuple[float, int, str, tuple, str]] = []
    row = -1
    for group in (boxes, lines):
        x, row = 14.0, row + 1
        for name, color, kind in group:
            text = name.replace("_", " ")
            advance = 30 + face.getlength(text) / SUPERSAMPLING + 18
            if x + advance > width and x > 14:
                x, row = 14.0, row + 1
            placed.append((x, row, text, color, kind))
            x += advance
    canvas = Canvas(Image.new("RGB", (SUPERSAMPLING * width, SUPERSAMPLING * (16 + 24 * (row + 1))), PANEL))
    pen = ImageDraw.Draw(canvas.image)
    for x, row, text, color, kind in placed:
        y = 8 + 24 * row + 12
        if kind == "box":
            corners = np.array([[x, y - 5], [x + 20, y - 5], [x + 20, y + 5], [x, y + 5]]) * float(SUPERSAMPLING)
            canvas.fill(corners, (*color, 70))
            canvas.stroke(np.stack([corners, np.roll(corners, -1, 0)], 1), color, 1.6, None)
        else:
            stroke = np.array([[[x, y], [x + 20, y]]]) * float(SUPERSAMPLING)
            width_px, dash = {"solid": (2.4, None), "dashed": (1.2, (5.0, 2.5)), "faint": (UNSEEN_WIDTH, None)}[kind]
            canvas.stroke(stroke, (*color, UNSEEN_ALPHA) if kind == "faint" else color, width_px, dash)
        at = ((x + 28) * SUPERSAMPLING, y * SUPERSAMPLING)
        pen.text(at, text, fill=TEXT, font=face, anchor="lm")
    return canvas.finished()
