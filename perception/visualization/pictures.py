"""Draws boxes, lines and ground truth onto the network's images and a bird's-eye view.

`perception.visualization.live` draws results of live use on the original, distorted images.

Pictures are drawn at twice their size and reduced, which smooths the edges. Predictions are solid, in the colour of
their class; ground truth is thin, dashed and white. In the bird's-eye view, ego x points up and ego y points to the
left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from perception.errors import DataError
from perception.geometry import box_corners, invert_rigid, transform_points
from perception.types import (
    BOX_CLASSES,
    LINE_CLASSES,
    Boxes,
    CameraRig,
    Frame,
    FrameObjects,
    NumpyBoxes,
    NumpyPolylines,
    Polylines,
    Seen,
)
from perception.visualization.canvas import (
    BACKGROUND,
    BOX_COLORS,
    GT_COLOR,
    LINE_COLORS,
    NOTE,
    PANEL,
    SUPERSAMPLING,
    TEXT,
    UNSEEN_ALPHA,
    UNSEEN_WIDTH,
    Canvas,
    draw_ego_marker,
    draw_rings,
    draw_tag,
    legend_picture,
)

_NEAR = 0.1  # metres; lines are clipped at this depth
_GAP = 8  # pixels between the tiles of a composite
_LINE_DASH, _BOX_DASH = (7.0, 5.0), (3.5, 2.5)  # lengths of dashes and gaps in pixels

# Edges of geometry.box_corners: the bottom and top rings and the four posts; corners 0, 3, 7, 4 are the front face.
_EDGES = np.array([[i, (i + 1) % 4] for i in range(4)] + [[i + 4, (i + 1) % 4 + 4] for i in range(4)]
                  + [[i, i + 4] for i in range(4)])  # fmt: skip
_FRONT = [0, 3, 7, 4]

# Row and column of nuScenes' six cameras in the composite.
_TILES = {
    "CAM_FRONT_LEFT": (0, 0), "CAM_FRONT": (0, 1), "CAM_FRONT_RIGHT": (0, 2),
    "CAM_BACK_LEFT": (1, 0), "CAM_BACK": (1, 1), "CAM_BACK_RIGHT": (1, 2),
}  # fmt: skip


def draw_frame(
    frame: Frame,
    objects: FrameObjects,
    gt: FrameObjects | None = None,
    *,
    cameras: Sequence[str] = (),
    caption: str = "",
    note: str = "",
    seen: Seen | None = None,
    min_score: float = 0.3,
    x_range: tuple[float, float] = (-51.2, 51.2),
    y_range: tuple[float, float] = (-51.2, 51.2),
    camera_width: int = 480,
) -> Image.Image:
    """Draws one picture of a frame: all camera images, the bird's-eye view on their right, a legend and a caption.

    Args:
        frame: without batch dimension: images [N, 3, H, W], rig [N, ...].
        objects: predictions, without batch dimension.
        gt: ground truth, drawn dashed over the predictions; None for none.
        cameras: names of the cameras; nuScenes' six are arranged as on the car.
        caption: one line of text for the top.
        note: what limits these predictions, such as weights that were trained on other data; in red behind the caption.
        seen: of the predictions, from live use. Points of lines that no camera has seen are drawn faintly in the
            bird's-eye view and not at all in the images.
        min_score: score threshold; predictions below it are not drawn.
        x_range, y_range: range of the bird's-eye view in metres.
        camera_width: width of one camera's tile in pixels.

    Raises:
        DataError: the frame or its objects have a batch dimension, or the number of names is not that of the cameras.
    """
    tiles = draw_cameras(frame.images, frame.rig, objects, gt, seen=seen, min_score=min_score, width=camera_width)
    if cameras and len(cameras) != len(tiles):
        raise DataError(
            f"there are {len(tiles)} camera images but {len(cameras)} camera names; give one name per image"
        )
    names = list(cameras) or [f"camera {index}" for index in range(len(tiles))]
    if set(_TILES) == set(names):
        cells = [_TILES[name] for name in names]
    else:
        cells = [divmod(index, 3) for index in range(len(tiles))]
    columns, rows = 1 + max(column for _, column in cells), 1 + max(row for row, _ in cells)
    tile_width, tile_height = tiles[0].size
    wall_width, wall_height = columns * (tile_width + _GAP) - _GAP, rows * (tile_height + _GAP) - _GAP

    legend = legend_picture(wall_width, gt is not None, seen is not None)
    height = max(wall_height + _GAP + legend.height, 360)
    bev = draw_bev(objects, gt, seen=seen, x_range=x_range, y_range=y_range, height=height, min_score=min_score)
    top = 44
    picture = Image.new("RGB", (wall_width + bev.width + 3 * _GAP, top + height + _GAP), BACKGROUND)
    for tile, name, present, (row, column) in zip(tiles, names, frame.rig.present, cells, strict=True):
        draw_tag(tile, name.removeprefix("CAM_").replace("_", " ").lower() + ("" if present else " (no image)"))
        picture.paste(tile, (_GAP + column * (tile_width + _GAP), top + row * (tile_height + _GAP)))
    picture.paste(legend, (_GAP, top + height - legend.height))
    picture.paste(bev, (wall_width + 2 * _GAP, top))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(19)
    pen.text((_GAP + 4, top / 2), caption, fill=TEXT, font=font, anchor="lm")
    if note:
        left = _GAP + 4 + (pen.textlength(caption, font=font) + 24 if caption else 0)
        while note and left + pen.textlength(note, font=font) > picture.width - _GAP:  # at the end of a word
            note = note.rpartition(" ")[0]
        pen.text((left, top / 2), note, fill=NOTE, font=font, anchor="lm")
    return picture


def draw_cameras(
    images: Tensor,
    rig: CameraRig,
    objects: FrameObjects,
    gt: FrameObjects | None = None,
    *,
    seen: Seen | None = None,
    min_score: float = 0.3,
    width: int = 480,
) -> list[Image.Image]:
    """Draws boxes as wire frames with a tinted front, and lines on the ground plane z = 0, onto camera images.

    Args:
        images: [N, 3, H, W] RGB 0..255, uint8 or float.
        rig: calibration of these images, [N, ...]; a camera that is not present gives an empty tile.
        objects: predictions, without batch dimension, in the ego frame of the rig.
        gt: ground truth, drawn dashed over the predictions; None for none.
        seen: of the predictions; points of lines that are not seen are not drawn.
        min_score: score threshold; predictions below it are not drawn.
        width: of the pictures in pixels; the height keeps the aspect ratio.

    Returns:
        One RGB picture per camera.

    Raises:
        DataError: the images or the objects have a batch dimension.
    """
    if images.ndim != 4 or rig.img_from_cam.ndim != 3:
        raise DataError(f"the images have shape {tuple(images.shape)}; drawing takes one frame, [N, 3, H, W]")
    N, _, H, W = images.shape
    layers = _layers(objects, gt, seen, min_score)
    size = (width, round(width * H / W))
    pictures = []
    for camera in range(N):
        if not rig.present[camera]:
            pictures.append(Image.new("RGB", size, PANEL))
            continue
        pixels = images[camera].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()  # [H, W, 3]
        canvas = Canvas(Image.fromarray(pixels).resize([SUPERSAMPLING * s for s in size], Image.Resampling.LANCZOS))
        scale = canvas.image.width / W
        canvas_from_cam = np.diag([scale, canvas.image.height / H, 1.0]) @ _numpy(rig.img_from_cam[camera])
        cam_from_ego = invert_rigid(_numpy(rig.ego_from_cam[camera]))
        for layer in layers:
            for color, points, visible in layer.lines:
                points_cam = transform_points(cam_from_ego, np.pad(points, ((0, 0), (0, 1))))  # [P, 3]
                chain = np.stack([points_cam[:-1], points_cam[1:]], 1)[visible]  # [segments, 2, 3]
                canvas.stroke(
                    _clip(chain, canvas_from_cam, canvas.image.size), color, layer.line_width, layer.line_dash
                )
            # Boxes are drawn from far to near, so that near boxes cover far ones.
            by_depth = [(transform_points(cam_from_ego, corners), color) for color, corners, _ in layer.boxes]
            for corners_cam, color in sorted(by_depth, key=lambda item: -np.linalg.norm(item[0].mean(0))):
                segments = _clip(corners_cam[_EDGES], canvas_from_cam, canvas.image.size)
                if len(segments) and layer.box_dash is None and (corners_cam[_FRONT, 2] > _NEAR).all():
                    front = corners_cam[_FRONT] @ canvas_from_cam.T
                    canvas.fill(front[:, :2] / front[:, 2:], (*color, 70))
                canvas.stroke(segments, color, layer.box_width, layer.box_dash)
        pictures.append(canvas.finished())
    return pictures


def draw_bev(
    objects: FrameObjects,
    gt: FrameObjects | None = None,
    *,
    seen: Seen | None = None,
    x_range: tuple[float, float] = (-51.2, 51.2),
    y_range: tuple[float, float] = (-51.2, 51.2),
    height: int = 640,
    min_score: float = 0.3,
) -> Image.Image:
    """Draws a bird's-eye view with the car at the origin, heading up; arrows are the motion of a box in one second.

    Args:
        objects: predictions, without batch dimension.
        gt: ground truth, drawn dashed over the predictions; None for none.
        seen: of the predictions; points of lines that are not seen are drawn faintly.
        x_range, y_range: range in metres along ego x (up) and ego y (to the left).
        height: of the picture in pixels; the width follows from the ranges.
        min_score: score threshold; predictions below it are not drawn.

    Raises:
        DataError: the objects have a batch dimension, or a range is empty.
    """
    for name, (low, high) in (("x_range", x_range), ("y_range", y_range)):
        if not low < high:
            raise DataError(f"{name} of the bird's-eye view is ({low}, {high}); the first number must be smaller")
    scale = SUPERSAMPLING * height / (x_range[1] - x_range[0])  # canvas pixels per metre
    width = max(round((y_range[1] - y_range[0]) * scale / SUPERSAMPLING), 1)
    canvas = Canvas(Image.new("RGB", (SUPERSAMPLING * width, SUPERSAMPLING * height), PANEL))

    def flip(points_ego: np.ndarray) -> np.ndarray:
        """Converts ego metres [..., 2+] to canvas pixels [..., 2]: x up, y left."""
        return np.stack([y_range[1] - points_ego[..., 1], x_range[1] - points_ego[..., 0]], -1) * scale

    draw_rings(canvas, flip(np.zeros(2)), scale)
    layers = _layers(objects, gt, seen, min_score)
    for layer in layers:
        for color, points, visible in layer.lines:
            corners = flip(points)
            segments = np.stack([corners[:-1], corners[1:]], 1)
            canvas.stroke(segments[~visible], (*color, UNSEEN_ALPHA), UNSEEN_WIDTH, layer.line_dash)
            canvas.stroke(segments[visible], color, layer.line_width, layer.line_dash)
    draw_ego_marker(canvas, flip)
    for layer in layers:
        for color, corners, velocity in layer.boxes:
            ground = flip(corners[:4])  # [4, 2]
            center, nose = ground.mean(0), ground[[0, 3]].mean(0)
            if layer.box_dash is None:
                canvas.fill(ground, (*color, 70))
            outline = np.stack([ground, np.roll(ground, -1, 0)], 1)  # [4, 2, 2]
            canvas.stroke(outline, color, layer.box_width, layer.box_dash)
            canvas.stroke(np.array([[center, nose]]), color, layer.box_width, None)
            if np.linalg.norm(velocity) > 0.5:
                canvas.arrow(nose, nose + flip(velocity) - flip(np.zeros(2)), color, layer.box_width)
    return canvas.finished()


class _Layer(NamedTuple):
    """Objects in one style: for each box or line its colour, its geometry in ego metres and (boxes) its velocity."""

    boxes: list[tuple[tuple, np.ndarray, np.ndarray]]  # corners [8, 3], velocity [2]
    lines: list[tuple[tuple, np.ndarray, np.ndarray]]  # points [P, 2], which segments [P - 1] are seen at one end
    box_width: float
    box_dash: tuple[float, float] | None
    line_width: float
    line_dash: tuple[float, float] | None


def _layers(objects: FrameObjects, gt: FrameObjects | None, seen: Seen | None, min_score: float) -> list[_Layer]:
    seen_lines = None if seen is None else np.asarray(seen.lines, bool)
    lines = list(_lines(objects.lines, min_score, seen_lines))
    layers = [_Layer(list(_boxes(objects.boxes, min_score)), lines, 1.6, None, 2.2, None)]
    if gt is not None:
        boxes = [(GT_COLOR, corners, velocity) for _, corners, velocity in _boxes(gt.boxes, 0.0)]
        lines = [(GT_COLOR, points, visible) for _, points, visible in _lines(gt.lines, 0.0, None)]
        layers.append(_Layer(boxes, lines, 1.0, _BOX_DASH, 1.5, _LINE_DASH))
    return layers


def _boxes(boxes: Boxes, min_score: float) -> Iterator[tuple[tuple, np.ndarray, np.ndarray]]:
    if boxes.valid.ndim != 1:
        raise DataError(f"the boxes have shape {tuple(boxes.valid.shape)}; drawing takes one frame, boxes [M, ...]")
    arrays = NumpyBoxes(*map(_numpy, boxes))
    corners = box_corners(arrays.center, arrays.size, arrays.yaw)  # [M, 8, 3]
    for index in np.nonzero(arrays.valid.astype(bool) & (arrays.score >= min_score))[0]:
        color = BOX_COLORS[BOX_CLASSES[int(arrays.label[index])]]
        yield color, corners[index], np.nan_to_num(arrays.velocity[index])


def _lines(
    lines: Polylines, min_score: float, seen: np.ndarray | None
) -> Iterator[tuple[tuple, np.ndarray, np.ndarray]]:
    if lines.valid.ndim != 1:
        raise DataError(f"the lines have shape {tuple(lines.valid.shape)}; drawing takes one frame, lines [M, ...]")
    arrays = NumpyPolylines(*map(_numpy, lines))
    for index in np.nonzero(arrays.valid.astype(bool) & (arrays.score >= min_score))[0]:
        points = np.ones(arrays.points.shape[1], bool) if seen is None else seen[index]
        yield LINE_COLORS[LINE_CLASSES[int(arrays.label[index])]], arrays.points[index], points[:-1] | points[1:]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _clip(segments_cam: np.ndarray, img_from_cam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Clips segments to the visible part and projects them to pixels.

    Segments are clipped in 3D, before the division by depth, at the near plane and the four planes through the image
    borders, so that points behind the camera are not projected and coordinates stay small.

    Args:
        segments_cam: [S, 2, 3] metres.
        img_from_cam: [3, 3].
        size: width and height of the image in pixels.

    Returns:
        [S', 2, 2] pixels, without the segments that are not visible.
    """
    margin = 8.0  # pixels, so that wide strokes are not cut at the border
    u, v, z = np.moveaxis(segments_cam @ img_from_cam.T, -1, 0)  # [S, 2] each, u and v times depth
    borders = [u + margin * z, (size[0] + margin) * z - u, v + margin * z, (size[1] + margin) * z - v]
    planes = np.stack([z - _NEAR, *borders])  # [5, S, 2], positive inside
    start, end = planes[..., 0], planes[..., 1]  # [5, S]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = start / (start - end)
    enter = np.where((start < 0) & (end >= 0), crossing, 0.0).max(0)  # [S] fractions of the segment
    leave = np.where((start >= 0) & (end < 0), crossing, 1.0).min(0)
    seen = ~((start < 0) & (end < 0)).any(0) & (enter < leave)
    ends = np.stack([enter, leave], 1)[seen, :, None]  # [S', 2, 1]
    first, last = segments_cam[seen, :1], segments_cam[seen, 1:]
    homogeneous = (first + ends * (last - first)) @ img_from_cam.T  # [S', 2, 3]
    return homogeneous[..., :2] / homogeneous[..., 2:]
