"""Writes the predictions of a recording as a rerun recording, `.rrd`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from perception.errors import not_installed
from perception.recordings.predicting import PredictedFrame, as_arrays
from perception.types import BOX_CLASSES, LINE_CLASSES
from perception.visualization.canvas import BOX_COLORS, LINE_COLORS

DATES_SINCE_NS = 10**17  # times before 1973 are counted from the beginning of a recording


class RerunFile:
    """A `.rrd`: boxes, lines, cameras with their images, and the way of the vehicle.

    Entities are `world/ego/boxes`, `world/ego/lines`, `world/ego/velocities` and `world/ego/cameras/NAME`, all in the
    ego frame; `world` has the origin of the first known pose. Timelines are `frame` and `time`.

    Args:
        path: the file.
        encode: returns the images of a frame as JPEG.

    Raises:
        ConfigError: rerun is not installed.
    """

    def __init__(self, path: Path, encode: Callable[[PredictedFrame], list[bytes | None]]) -> None:
        try:
            import rerun
        except ImportError as error:
            raise not_installed(error) or error from None
        self._rr, self._encode = rerun, encode
        self._stream = rerun.RecordingStream("perception")
        self._stream.save(path, default_blueprint=self._views())
        self._stream.log("world", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        self._origin: np.ndarray | None = None
        self._count = 0

    def add(self, frame: PredictedFrame) -> None:
        """Appends a frame."""
        rr, stream = self._rr, self._stream
        stream.set_time("frame", sequence=self._count)
        time = frame.recorded.time_ns
        if time > DATES_SINCE_NS:
            stream.set_time("time", timestamp=np.datetime64(time, "ns"))
        else:
            stream.set_time("time", duration=np.timedelta64(time, "ns"))
        self._count += 1
        pose = frame.recorded.global_from_ego
        if pose is not None:
            self._origin = pose[:3, 3] if self._origin is None else self._origin  # rerun has float32
            stream.log("world/ego", rr.Transform3D(translation=pose[:3, 3] - self._origin, mat3x3=pose[:3, :3]))
        self._add_objects(frame)
        for n, (name, data) in enumerate(zip(frame.names, self._encode(frame), strict=True)):
            entity: list[object] = ["world", "ego", "cameras", name]
            if data is None:
                stream.log(entity, rr.Clear(recursive=True))
                continue
            image, ego_from_cam = frame.images[n], frame.rig.ego_from_cam[n]
            assert image is not None
            height, width = image.shape[:2]
            stream.log(entity, rr.Transform3D(translation=ego_from_cam[:3, 3], mat3x3=ego_from_cam[:3, :3]))
            stream.log(
                entity,
                rr.Pinhole(
                    image_from_camera=frame.rig.img_from_cam[n], resolution=[width, height],
                    camera_xyz=rr.ViewCoordinates.RDF,
                ),
            )  # fmt: skip
            stream.log(entity, rr.EncodedImage(contents=data, media_type="image/jpeg"))
        for text in frame.objects.warnings:
            stream.log("warnings", rr.TextLog(text, level=rr.TextLogLevel.WARN))

    def close(self) -> None:
        """Finishes the file."""
        self._stream.flush(blocking=True)
        self._stream.disconnect()

    def _add_objects(self, frame: PredictedFrame) -> None:
        rr, stream = self._rr, self._stream
        boxes, lines, _ = as_arrays(frame.objects)
        names = [BOX_CLASSES[label] for label in boxes.label]
        stream.log(
            "world/ego/boxes",
            rr.Boxes3D(
                centers=boxes.center, sizes=boxes.size, colors=[BOX_COLORS[name] for name in names],
                quaternions=Rotation.from_euler("z", boxes.yaw.astype(float)[:, None]).as_quat() if len(names) else [],
                class_ids=boxes.label, show_labels=False,
                labels=[f"{name} {score:.2f}" for name, score in zip(names, boxes.score, strict=True)],
            ),
            rr.AnyValues(score=boxes.score),
        )  # fmt: skip
        nose = boxes.center + 0.5 * boxes.size[:, :1] * np.stack(
            [np.cos(boxes.yaw), np.sin(boxes.yaw), np.zeros_like(boxes.yaw)], -1
        )
        stream.log(
            "world/ego/velocities",
            rr.Arrows3D(
                origins=nose, vectors=np.pad(np.nan_to_num(boxes.velocity), ((0, 0), (0, 1))),
                colors=[BOX_COLORS[name] for name in names],
            ),
        )  # fmt: skip
        kinds = [LINE_CLASSES[label] for label in lines.label]
        stream.log(
            "world/ego/lines",
            rr.LineStrips3D(
                list(np.pad(lines.points, ((0, 0), (0, 0), (0, 1)))), colors=[LINE_COLORS[kind] for kind in kinds],
                class_ids=lines.label, radii=0.08, show_labels=False,
                labels=[f"{kind} {score:.2f}" for kind, score in zip(kinds, lines.score, strict=True)],
            ),
            rr.AnyValues(score=lines.score),
        )  # fmt: skip

    def _views(self) -> Any:
        from rerun import blueprint

        return blueprint.Blueprint(
            blueprint.Spatial3DView(origin="world", name="world"), collapse_panels=True, auto_views=True
        )
