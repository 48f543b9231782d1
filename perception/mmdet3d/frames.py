"""Makes frames of the library from the data dictionaries of mmdet3d's datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet3d.structures import Det3DDataSample
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry
from mmengine.structures import InstanceData
from torch import Tensor

from perception.data.infos import InfoSample, load_frame
from perception.data.nuscenes import NUSCENES_CAMERAS
from perception.errors import DataError
from perception.reading import number, short
from perception.types import Frame

TRANSFORMS = Registry("transform", parent=MMENGINE_TRANSFORMS, scope="perception", locations=["perception.mmdet3d"])


class FrameInput(NamedTuple):
    """What `Detector` gets of one sample; mmengine stacks and moves it as any other named tuple."""

    frame: Frame  # a first frame, without leading [B]; the detector fills in the motion
    global_from_ego: Tensor  # [4, 4] float64
    time_s: Tensor  # [] float64


@TRANSFORMS.register_module()
class PackFrame(BaseTransform):
    """Reads the images of a sample and packs them for `perception.Detector`, as the last transform of a pipeline.

    It takes the place of mmdet3d's `LoadMultiViewImageFromFiles` and `Pack3DDetInputs`. Boxes are those that
    `LoadAnnotations3D` and the filters after it left.

    Args:
        image_size: height and width of the network's images, see `fit_image`.
        cameras: names, in order; a camera that a sample lacks is marked as not present.
    """

    def __init__(self, image_size: tuple[int, int], cameras: Sequence[str] = NUSCENES_CAMERAS) -> None:
        self.image_size = (image_size[0], image_size[1])
        self.cameras = tuple(cameras)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Packs one sample.

        Args:
            results: of mmdet3d's `NuScenesDataset` or another dataset over infos of v1.1, with `use_camera` in its
                `modality`, so that paths of images are complete.

        Returns:
            `inputs`, a dictionary with a `FrameInput`, and `data_samples`, a `Det3DDataSample`.

        Raises:
            DataError: a field is missing or malformed, or an image is missing.
        """
        name = f"sample {short(results.get('token', results.get('sample_idx')))} of mmdet3d"
        sample = InfoSample(Path(), name, results, None, "")
        rig, ego_from_exposure = sample.rig(self.cameras)
        paths = {int(n): Path(str(results["images"][self.cameras[n]]["img_path"])) for n in np.flatnonzero(rig.present)}
        time = number(results.get("timestamp"))
        if not np.isfinite(time):
            raise DataError(f"{name}: timestamp is {short(results.get('timestamp'))}; give seconds")
        ego_from_lidar = sample.ego_from_lidar()
        frame = load_frame(rig, ego_from_exposure, ego_from_lidar, paths, self.image_size)
        packed = Det3DDataSample()
        kept = {key: results[key] for key in ("sample_idx", "token", "box_type_3d", "box_mode_3d") if key in results}
        packed.set_metainfo(kept | {"ego_from_lidar": frame.ego_from_lidar.numpy()})
        if "gt_bboxes_3d" in results:
            packed.gt_instances_3d = InstanceData(
                bboxes_3d=results["gt_bboxes_3d"], labels_3d=torch.as_tensor(results["gt_labels_3d"])
            )
        pose = torch.from_numpy(sample.global_from_ego())
        inputs = FrameInput(frame, pose, torch.tensor(time, dtype=torch.float64))
        return {"inputs": {"frame": inputs}, "data_samples": packed}
