"""Writes the predictions of a recording as an MCAP file with Foxglove's messages, for Foxglove and Lichtblick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from perception.errors import not_installed
from perception.recordings.predicting import PredictedFrame, as_arrays
from perception.types import BOX_CLASSES, LINE_CLASSES
from perception.visualization.canvas import BOX_COLORS, LINE_COLORS

WORLD, EGO = "world", "ego"
OBJECTS, TRANSFORMS, CAMERAS = "/perception/objects", "/tf", "/cameras"
BOX_ALPHA, LINE_THICKNESS = 0.4, 0.15  # metres


class McapFile:
    """An MCAP file: `foxglove.SceneUpdate` with an entity per box and line, images and calibrations.

    Topics are `/perception/objects`, `/tf`, `/cameras/NAME/image` and `/cameras/NAME/calibration`. Entities are in the
    frame `ego`; their metadata hold class, score and velocity. Images are those of pinholes, without distortion.

    Args:
        path: the file.
        encode: returns the images of a frame as JPEG.

    Raises:
        ConfigError: mcap-protobuf-support or foxglove-schemas-protobuf is not installed.
    """

    def __init__(self, path: Path, encode: Callable[[PredictedFrame], list[bytes | None]]) -> None:
        try:
            import foxglove_schemas_protobuf  # noqa: F401
            from mcap_protobuf.writer import Writer
        except ImportError as error:
            raise not_installed(error) or error from None
        self._file = path.open("wb")
        self._writer = Writer(self._file)
        self._encode = encode

    def add(self, frame: PredictedFrame) -> None:
        """Appends a frame."""
        from foxglove_schemas_protobuf.CameraCalibration_pb2 import CameraCalibration
        from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage

        time = frame.recorded.time_ns
        stamp = _timestamp(time)
        self._write(TRANSFORMS, self._transforms(frame), time)
        self._write(OBJECTS, self._scene_update(frame), time)
        for n, (name, data) in enumerate(zip(frame.names, self._encode(frame), strict=True)):
            image = frame.images[n]
            if data is None or image is None:
                continue
            k = frame.rig.img_from_cam[n]
            height, width = image.shape[:2]
            calibration = CameraCalibration(
                timestamp=stamp, frame_id=name, width=width, height=height, K=k.ravel(), R=np.eye(3).ravel(),
                P=np.pad(k, ((0, 0), (0, 1))).ravel(),
            )  # fmt: skip
            self._write(f"{CAMERAS}/{name}/calibration", calibration, time)
            picture = CompressedImage(timestamp=stamp, frame_id=name, data=data, format="jpeg")
            self._write(f"{CAMERAS}/{name}/image", picture, time)

    def close(self) -> None:
        """Finishes the file."""
        try:
            self._writer.finish()
        finally:
            self._file.close()

    def _write(self, topic: str, message: Any, time_ns: int) -> None:
        self._writer.write_message(topic, message, log_time=time_ns, publish_time=time_ns)

    def _transforms(self, frame: PredictedFrame) -> Any:
        from foxglove_schemas_protobuf.FrameTransform_pb2 import FrameTransform
        from foxglove_schemas_protobuf.FrameTransforms_pb2 import FrameTransforms

        stamp = _timestamp(frame.recorded.time_ns)
        known = frame.recorded.global_from_ego
        poses = [] if known is None else [(WORLD, EGO, known)]
        poses += [(EGO, name, pose) for name, pose in zip(frame.names, frame.rig.ego_from_cam, strict=True)]
        return FrameTransforms(
            transforms=[
                FrameTransform(
                    timestamp=stamp, parent_frame_id=parent, child_frame_id=child,
                    translation=_vector(pose[:3, 3]), rotation=_quaternion(Rotation.from_matrix(pose[:3, :3])),
                )
                for parent, child, pose in poses
            ]
        )  # fmt: skip

    def _scene_update(self, frame: PredictedFrame) -> Any:
        from foxglove_schemas_protobuf.CubePrimitive_pb2 import CubePrimitive
        from foxglove_schemas_protobuf.LinePrimitive_pb2 import LinePrimitive
        from foxglove_schemas_protobuf.SceneEntity_pb2 import SceneEntity
        from foxglove_schemas_protobuf.SceneEntityDeletion_pb2 import SceneEntityDeletion
        from foxglove_schemas_protobuf.SceneUpdate_pb2 import SceneUpdate

        stamp = _timestamp(frame.recorded.time_ns)
        boxes, lines, _ = as_arrays(frame.objects)
        update = SceneUpdate(deletions=[SceneEntityDeletion(timestamp=stamp, type=SceneEntityDeletion.ALL)])
        for m, label in enumerate(boxes.label):
            name = BOX_CLASSES[label]
            cube = CubePrimitive(
                pose=_pose(boxes.center[m], Rotation.from_euler("z", float(boxes.yaw[m]))),
                size=_vector(boxes.size[m]), color=_color(BOX_COLORS[name], BOX_ALPHA),
            )  # fmt: skip
            numbers = {"score": boxes.score[m], "velocity_x": boxes.velocity[m, 0], "velocity_y": boxes.velocity[m, 1]}
            update.entities.append(
                SceneEntity(
                    timestamp=stamp, frame_id=EGO, id=f"box {m}", frame_locked=True, cubes=[cube],
                    metadata=_metadata(name, numbers),
                )
            )  # fmt: skip
        for m, label in enumerate(lines.label):
            name = LINE_CLASSES[label]
            strip = LinePrimitive(
                type=LinePrimitive.LINE_STRIP, pose=_pose(np.zeros(3), Rotation.identity()),
                thickness=LINE_THICKNESS, color=_color(LINE_COLORS[name], 1.0),
                points=[_vector((x, y, 0.0)) for x, y in lines.points[m]],
            )  # fmt: skip
            update.entities.append(
                SceneEntity(
                    timestamp=stamp, frame_id=EGO, id=f"line {m}", frame_locked=True, lines=[strip],
                    metadata=_metadata(name, {"score": lines.score[m]}),
                )
            )  # fmt: skip
        return update


# protobuf takes nested messages as dicts, which its stubs do not say.


def _timestamp(time_ns: int) -> Any:
    return {"seconds": time_ns // 1_000_000_000, "nanos": time_ns % 1_000_000_000}


def _vector(values: Any) -> Any:
    return dict(zip("xyz", map(float, values), strict=True))


def _quaternion(rotation: Any) -> Any:
    return dict(zip("xyzw", map(float, rotation.as_quat()), strict=True))


def _pose(position: NDArray[Any], rotation: Any) -> Any:
    return {"position": _vector(position), "orientation": _quaternion(rotation)}


def _color(rgb: tuple[int, int, int], alpha: float) -> Any:
    return dict(zip("rgba", [*(value / 255 for value in rgb), alpha], strict=True))


def _metadata(name: str, numbers: dict[str, Any]) -> Any:
    texts = {"class": name} | {key: f"{float(value):.9g}" for key, value in numbers.items()}
    return [{"key": key, "value": value} for key, value in texts.items()]
