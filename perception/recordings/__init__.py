"""Recordings of cameras as sequences of frames, and predictions of recordings as files.

- `recording`: `Recording` and its frames: images that belong together, their times, and the motion between them.
- `trajectory`: poses over time, and their interpolation.
- `sources`: `open_recording`, which recognises folders, videos, ROS bags, KITTI raw and nuScenes-format datasets.
- `folders`, `videos`, `bags`, `ros_images`, `kitti`, `nuscenes`: one format each.
- `predicting`: runs a network over a recording.
- `outputs`, `rerun_file`, `mcap_file`: writes what it predicted.
- `convert`: a nuScenes-format dataset as bag, videos or folder.
"""

from perception.recordings.recording import Recording
from perception.recordings.sources import open_recording

__all__ = ["Recording", "open_recording"]
