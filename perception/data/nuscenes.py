"""Reads nuScenes-format datasets, real or generated, as clips of frames with their ground truth."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perception.data.augment import Augment
from perception.data.index import Index, concatenate, load_index
from perception.data.lane_map import LaneMap
from perception.data.lane_topology import Centerlines
from perception.data.loader import ClipRequest, decode_image, open_image, pad_boxes, pad_lines
from perception.data.sample_lines import ego_from_patch, lines_around
from perception.data.splits import Split
from perception.data.table_files import read_rig
from perception.errors import DataError, PerceptionWarning
from perception.geometry import invert_rigid, yaw_from_rotation
from perception.inference.ego_motion import MAX_GAP, interrupted
from perception.rigs.coverage import CUT_FIRST, SEE_TABLE, fitted_coverage
from perception.rigs.rig import RIG_FILE, Rig
from perception.rigs.virtual import VirtualRig, chosen_pinholes
from perception.types import (
    BOX_CLASSES,
    DEFAULT_LANE_RANGE,
    Boxes,
    CameraRig,
    Clip,
    Frame,
    FrameObjects,
    Ids,
    LaneRange,
    MapLine,
    NumpyCameraRig,
)

NUSCENES_CAMERAS = (
    "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT",
)  # fmt: skip


class NuScenesDataset(Dataset):
    """Keyframes of a nuScenes-format dataset as clips.

    Index it with a number to get one sample as a clip of one frame, for streaming inference in scene order. The frame
    holds the ego motion since the previous keyframe. It is first at the start of a scene and, as in live use, after a
    gap of more than 2 s or a jump of the pose. Index it with a `ClipRequest` to get a longer clip for training, which
    may leave keyframes out.

    A rig file `rig.yaml` in the folder of the tables describes cameras with distortion, which the tables cannot. The
    images of clips are then those of its virtual pinholes, as in `Predictor(rig=...)`, and `cameras` names them.

    Lines of clips follow the MapTR protocol: a patch of `lane_range`, centred at LIDAR_TOP.

    Args:
        dataroot: folder of the dataset, or several folders that are read as one dataset.
        version: name of the folder of tables, such as `v1.0-trainval`.
        split: an official split, one of `<version>/splits.json`, or a file of scene names: a Path, or text that ends in
            `.json` or `.txt` or contains a `/` (see `perception.data.splits`). Every root must have the file's scenes.
        image_size: height and width of the images; images of other sizes are fitted, see `fit_image`.
        cameras: channels, in order; None for those of the rig file, or else nuScenes' six. A camera that a sample
            lacks is marked as not present.
        points_per_line: P of the ground-truth lines.
        lane_range: extent of the ground-truth lines.
        cache_dir: folder of the index cache, see `load_index`.
        augment: augmentation of the clips of a `ClipRequest`, seeded by the request.

    Raises:
        ConfigError: the augmentation moves the ego frame beyond the lines in the index.
        DataError: a file or field is missing or malformed, here or when an item is read; or the rig files of several
            roots differ.

    Warns:
        PerceptionWarning: the boxes or times are implausible, or resizing to `image_size` cuts off the horizon or most
            of the ground.
    """

    classes = BOX_CLASSES

    def __init__(
        self,
        dataroot: str | Path | Sequence[str | Path],
        version: str,
        split: str | Path,
        *,
        image_size: tuple[int, int],
        cameras: Sequence[str] | None = None,
        points_per_line: int = 20,
        lane_range: LaneRange = DEFAULT_LANE_RANGE,
        cache_dir: str | Path | None = None,
        augment: Augment | None = None,
    ) -> None:
        roots = [Path(root) for root in ([dataroot] if isinstance(dataroot, str | Path) else dataroot)]
        cache = None if cache_dir is None else Path(cache_dir)
        rig = _common_rig(roots, version)
        channels = tuple(cameras or (rig.names if rig else NUSCENES_CAMERAS))
        indices = [load_index(root, version, split, channels, lane_range, cache) for root in roots]
        size = (image_size[0], image_size[1])
        self.roots: tuple[Path, ...]
        self.split: Split
        self.cameras: tuple[str, ...]
        self.virtual_rig = chosen_pinholes(Rig([rig[name] for name in channels]), size) if rig else None
        for root, part in zip(roots, indices, strict=True):
            _warn_if_implausible(part, root / version)
            warn_of_lost_views(part, root / version, channels, self.virtual_rig or size)
        self.roots, self.version, self.split = tuple(roots), version, split
        self.cameras = self.virtual_rig.names if self.virtual_rig else channels
        self._keep(concatenate(indices, roots), size, points_per_line, lane_range, augment)

    @classmethod
    def from_index(
        cls,
        index: Index,
        root: Path,
        version: str,
        split: Split,
        *,
        image_size: tuple[int, int],
        cameras: Sequence[str],
        points_per_line: int = 20,
        lane_range: LaneRange = DEFAULT_LANE_RANGE,
        augment: Augment | None = None,
    ) -> NuScenesDataset:
        """Makes a dataset of an index that was read from other files than the tables.

        Args:
            index: with paths of images and maps as they are opened.
            root, version, split: of the tables that the evaluation reads; `version` is empty without any.
            image_size, cameras, points_per_line, lane_range, augment: as for the constructor.

        Raises:
            ConfigError: as for the constructor.
        """
        dataset = cls.__new__(cls)
        dataset.roots, dataset.version, dataset.split = (root,), version, split
        dataset.virtual_rig, dataset.cameras = None, tuple(cameras)
        dataset._keep(index, (image_size[0], image_size[1]), points_per_line, lane_range, augment)
        return dataset

    def _keep(
        self,
        index: Index,
        image_size: tuple[int, int],
        points_per_line: int,
        lane_range: LaneRange,
        augment: Augment | None,
    ) -> None:
        self._index, self.image_size = index, image_size
        self.points_per_line, self.lane_range = points_per_line, lane_range
        if augment is not None:
            augment.check_reach(lane_range)
        self.augment = augment
        self._lane_maps: dict[bytes, LaneMap] = {}  # by file, read on first use
        self.max_boxes = int(np.diff(index.box_offset).max())
        self.max_lines = int(np.diff(index.lines.sample_offset).max())

    def __len__(self) -> int:
        return len(self._index.token)

    @property
    def index(self) -> Index:
        """The tables as flat arrays, one row per sample."""
        return self._index

    @property
    def tokens(self) -> list[str]:
        """Sample tokens, indexed by `Clip.sample_index`."""
        return [token.decode() for token in self._index.token]

    @property
    def scene_of_sample(self) -> np.ndarray:
        """[S] index into `scene_names`."""
        return self._index.scene

    @property
    def scene_names(self) -> list[str]:
        """Names of the scenes, indexed by `scene_of_sample`."""
        return [name.decode() for name in self._index.scene_name]

    @property
    def timestamps(self) -> np.ndarray:
        """[S] float64 seconds: the reference time of each sample, that of LIDAR_TOP."""
        return self._index.timestamp_us * 1e-6

    def ego_pose(self, i: int) -> np.ndarray:
        """Returns global_from_ego [4, 4] float64 of sample i at its reference time."""
        return self._index.global_from_ego[i]

    def ego_from_lidar(self, i: int) -> np.ndarray:
        """Returns ego_from_lidar [4, 4] float64 of sample i."""
        return self._index.ego_from_lidar[i]

    def gt_lines(self, i: int, protocol: str = "maptr", lane_range: LaneRange | None = None) -> list[MapLine]:
        """Returns the ground-truth lines of sample i with exact vertices, in the ego frame.

        Lines of the default protocol and range are read from the index; others are cut from the map.

        Args:
            i: the sample.
            protocol: "maptr" (patch with the position and yaw of LIDAR_TOP) or "streammapnet" (patch of the ego frame,
                crossings united by direction).
            lane_range: extent of the patch; the dataset's own by default.

        Raises:
            ConfigError: the protocol is unknown.
            DataError: the map file is missing or malformed.
        """
        lane_range = lane_range or self.lane_range
        if protocol == "maptr" and lane_range == self.lane_range:
            return self._index.lines.of_sample(i)
        return lines_around(self._lane_map(i), self.ego_pose(i), self.ego_from_lidar(i), lane_range, protocol)

    def gt_centerlines(self, i: int, lane_range: LaneRange | None = None) -> Centerlines:
        """Returns the lane centre lines around sample i and their successor links, in the ego frame.

        Args:
            i: the sample.
            lane_range: extent of the patch; the dataset's own by default.

        Raises:
            DataError: the map file is missing or has no lane graph.
        """
        pose = self.ego_pose(i)
        x, y = pose[:2, 3]
        return self._lane_map(i).centerlines(x, y, float(yaw_from_rotation(pose)), lane_range or self.lane_range)

    def _lane_map(self, i: int) -> LaneMap:
        path = self._index.scene_map[self._index.scene[i]]
        if path not in self._lane_maps:
            self._lane_maps[path] = LaneMap(os.fsdecode(path))
        return self._lane_maps[path]

    def gt_boxes(self, i: int) -> Boxes:
        """Returns the ground-truth boxes [M] of sample i, not padded.

        A box is valid unless the sum of its LiDAR and radar points is 0, as in the nuScenes evaluation: a number of -1
        is unknown, and such a box counts.
        """
        index = self._index
        rows = slice(index.box_offset[i], index.box_offset[i + 1])
        return Boxes(
            center=torch.from_numpy(index.box_center[rows]),
            size=torch.from_numpy(index.box_size[rows]),
            yaw=torch.from_numpy(index.box_yaw[rows]),
            velocity=torch.from_numpy(index.box_velocity[rows]),
            label=torch.from_numpy(index.box_label[rows]),
            attribute=torch.from_numpy(index.box_attribute[rows]),
            score=torch.ones(rows.stop - rows.start),
            valid=torch.from_numpy(index.box_points[rows] != 0),
            uncertainty=torch.zeros(rows.stop - rows.start, 9),
        )

    def gt_ids(self, i: int) -> Tensor:
        """Returns the ids [M] int64 of the objects of `gt_boxes`, the same in all samples of a scene."""
        index = self._index
        return torch.from_numpy(index.box_instance[index.box_offset[i] : index.box_offset[i + 1]])

    def __getitem__(self, item: int | ClipRequest) -> Clip:
        if isinstance(item, ClipRequest):
            samples = np.array(item.samples)  # [T]
            previous = np.array([item.previous, *item.samples[:-1]])
        else:
            samples = np.array([range(len(self))[item]])  # an IndexError beyond the end
            previous = self._index.previous[samples]
        boxes = pad_boxes([self.gt_boxes(i) for i in samples], self.max_boxes)
        ids = torch.full_like(boxes.label, -1)
        for row, i in zip(ids, samples, strict=True):
            of_sample = self.gt_ids(i)
            row[: len(of_sample)] = of_sample
        lines = pad_lines([self.gt_lines(i) for i in samples], self.points_per_line, self.max_lines)
        gt = FrameObjects(boxes, lines, Ids(ids, None))
        clip = Clip(self._frames(samples, previous), gt, torch.from_numpy(samples))
        if self.augment is None or not isinstance(item, ClipRequest):
            return clip
        scene_rng = np.random.default_rng(item.seed)
        # Plus one, because numpy treats a seed that ends in zero like the same seed without the zero.
        clip_rng = np.random.default_rng((*item.seed, item.samples[0] + 1))
        patches = [ego_from_patch(self.ego_pose(i), self.ego_from_lidar(i)) for i in samples]
        wide_lines = [self._index.wide_lines.of_sample(i) for i in samples]
        return self.augment(clip, wide_lines, patches, self.lane_range, scene_rng, clip_rng)

    def _frames(self, samples: np.ndarray, previous: np.ndarray) -> Frame:
        """Builds the frames [T] of samples, with the ego motion since the samples in `previous` (-1: none).

        A frame after a gap or a jump of the pose is a first frame, by the rule of `perception.inference.ego_motion`.
        """
        index = self._index
        ego_from_prev = invert_rigid(index.global_from_ego[samples]) @ index.global_from_ego[previous]
        seconds = (index.timestamp_us[samples] - index.timestamp_us[previous]) * 1e-6
        # As in live use. Keyframes that a request leaves out count as a gap.
        is_first = (previous < 0) | interrupted(ego_from_prev, np.where(previous < 0, 0.0, seconds))
        ego_from_prev[is_first], seconds[is_first] = np.eye(4), 0.0
        images, img_from_cam = zip(*(self._images(i) for i in samples), strict=True)
        present, ego_from_cam = np.char.str_len(index.image_path[samples]) > 0, index.ego_from_cam[samples]
        ego_from_exposure = index.ego_from_exposure[samples]
        if self.virtual_rig is not None:
            sources, source_from_pinhole = _mounting(self.virtual_rig)
            present, ego_from_cam = present[:, sources], ego_from_cam[:, sources] @ source_from_pinhole
            ego_from_exposure = ego_from_exposure[:, sources]
        return Frame(
            images=torch.stack(images),  # [T, N, 3, H, W]
            rig=CameraRig(
                img_from_cam=torch.from_numpy(np.stack(img_from_cam)).float(),  # [T, N, 3, 3]
                ego_from_cam=torch.from_numpy(ego_from_cam).float(),  # [T, N, 4, 4]
                present=torch.from_numpy(present),  # [T, N]
            ),
            ego_from_prev=torch.from_numpy(ego_from_prev).float(),  # [T, 4, 4]
            seconds_since_prev=torch.from_numpy(seconds).float(),  # [T]
            is_first=torch.from_numpy(is_first),  # [T]
            ego_from_lidar=torch.from_numpy(index.ego_from_lidar[samples]).float(),  # [T, 4, 4]
            ego_from_exposure=torch.from_numpy(ego_from_exposure).float(),  # [T, N, 4, 4]
        )

    def _images(self, i: int) -> tuple[torch.Tensor, np.ndarray]:
        """Decodes the images of all cameras of one sample: [N, 3, H, W] uint8, and img_from_cam [N, 3, 3]."""
        index = self._index
        if self.virtual_rig is not None:
            return self._pinhole_images(i, self.virtual_rig)
        images = torch.zeros(len(self.cameras), 3, *self.image_size, dtype=torch.uint8)
        img_from_cam = index.img_from_cam[i].copy()
        for camera, path in enumerate(index.image_path[i]):
            if path:
                height, width = index.image_size[i, camera]
                images[camera], img_from_cam[camera] = decode_image(
                    os.fsdecode(path), img_from_cam[camera], self.image_size, (height, width)
                )
        return images, img_from_cam

    def _pinhole_images(self, i: int, rig: VirtualRig) -> tuple[torch.Tensor, np.ndarray]:
        """As `_images`, of the pinholes that stand for the cameras of a rig file."""
        index = self._index
        images = torch.zeros(len(rig), 3, *self.image_size, dtype=torch.uint8)
        img_from_cam = rig.camera_rig().img_from_cam
        raw: dict[str, np.ndarray] = {}  # the last decoded image; the pinholes of a camera follow each other
        for n, (camera, source) in enumerate(zip(rig.cameras, _mounting(rig)[0], strict=True)):
            path, name = os.fsdecode(index.image_path[i, source]), camera.source.name
            if not path:
                continue
            if camera.is_unchanged:
                images[n], img_from_cam[n] = decode_image(
                    path, index.img_from_cam[i, source], self.image_size, camera.image_size
                )
                continue
            if name not in raw:
                with open_image(path, camera.source.image_size) as image:
                    raw = {name: np.asarray(image.convert("RGB"))}
            images[n] = torch.from_numpy(camera.table(raw[name])).permute(2, 0, 1)
        return images, img_from_cam


def _common_rig(roots: Sequence[Path], version: str) -> Rig | None:
    """Reads the rig file of several roots, whose frames must have the same cameras."""
    rigs = [read_rig(root / version) for root in roots]
    for root, rig in zip(roots, rigs, strict=True):
        if _rig_numbers(rig) != _rig_numbers(rigs[0]):
            raise DataError(
                f"{root / version} and {roots[0] / version} have different cameras in {RIG_FILE}; give roots of one rig"
            )
    return rigs[0]


def _rig_numbers(rig: Rig | None) -> list[tuple]:
    return [(c.name, c.image_size, c.model, c.lens_angle, c.ego_from_cam.tobytes()) for c in rig or ()]


def _mounting(rig: VirtualRig) -> tuple[list[int], np.ndarray]:
    """The number of each pinhole's camera, and source_from_pinhole [N, 4, 4]."""
    sources = [rig.rig.names.index(camera.source.name) for camera in rig.cameras]
    poses = [invert_rigid(camera.source.ego_from_cam) @ camera.ego_from_cam for camera in rig.cameras]
    return sources, np.stack(poses)


def _warn_if_implausible(index: Index, tables: Path) -> None:
    """Warns if no box counts, or if most keyframes come after a gap."""
    if len(index.box_points) and not index.box_points.any():
        warnings.warn(
            f"{tables}/sample_annotation.json gives every box of the split 0 LiDAR and radar points, and boxes without "
            "points do not count in training and evaluation; write -1 as num_lidar_pts where the number is unknown",
            PerceptionWarning,
            stacklevel=3,
        )
    later = np.flatnonzero(index.previous >= 0)
    before = index.previous[later]
    motion = invert_rigid(index.global_from_ego[later]) @ index.global_from_ego[before]
    seconds = (index.timestamp_us[later] - index.timestamp_us[before]) * 1e-6
    broken = int(interrupted(motion, seconds).sum())
    if 2 * broken > len(later):
        warnings.warn(
            f"{broken} of {len(later)} keyframes of {tables} come more than {MAX_GAP:g} s after the keyframe before, or"
            f" their pose jumps, so the memory is dropped there; keyframes are {np.median(seconds):.4g} s apart if "
            "timestamps are microseconds: check their unit, and ego_pose.json",
            PerceptionWarning,
            stacklevel=3,
        )


def warn_of_lost_views(
    index: Index, tables: Path, cameras: tuple[str, ...], network: tuple[int, int] | VirtualRig
) -> None:
    """Warns if fitting the images cuts off the horizon or most of the ground, in the first sample with all cameras.

    Args:
        network: height and width of its images, or the pinholes that it sees.
    """
    if isinstance(network, VirtualRig):
        if finding := network.coverage().finding(SEE_TABLE):
            warnings.warn(f"{tables / RIG_FILE}: {finding}", PerceptionWarning, stacklevel=3)
        return
    present = index.image_path != b""
    i = int(present.sum(1).argmax())
    rig = NumpyCameraRig(index.img_from_cam[i], index.ego_from_cam[i], present[i])
    coverage = fitted_coverage(cameras, rig, [(int(H), int(W)) for H, W in index.image_size[i]], network)
    if finding := coverage.finding(CUT_FIRST):
        warnings.warn(f"{tables}: {finding}", PerceptionWarning, stacklevel=3)
