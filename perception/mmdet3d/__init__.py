"""The library's networks inside mmdet3d 1.4: a detector, a transform and conversions of boxes.

Importing this package registers `perception.Detector` and `perception.PackFrame` with MMEngine, under the scope
`perception`: write `custom_imports = dict(imports=["perception.mmdet3d"])` into a config of mmdet3d.

The import also makes mmdet3d importable beside mmcv-lite, which has no compiled operators: `mmcv._ext` becomes a module
whose operators raise an error that names them when they are called (`perception.engine.mmcv_ops`). Networks, datasets
and metrics of this package call none. An mmcv with its operators is left as it is.
"""

from perception.engine.mmcv_ops import install_stub

install_stub()  # before anything imports mmdet3d

from perception.mmdet3d.boxes import ego_boxes, sensor_boxes  # noqa: E402
from perception.mmdet3d.detector import Detector  # noqa: E402
from perception.mmdet3d.frames import FrameInput, PackFrame  # noqa: E402

__all__ = ["Detector", "FrameInput", "PackFrame", "ego_boxes", "sensor_boxes"]
