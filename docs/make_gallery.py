"""Writes docs/gallery/*.jpg: results of the shipped weights on generated scenes, with several rigs, and their timing.

    python docs/make_gallery.py

Takes about 5 minutes on one core. Everything is generated here; no recording of a real street is used.
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from perception import Predictor, Rig, simulate
from perception.errors import PerceptionWarning
from perception.recordings.nuscenes import read_nuscenes
from perception.recordings.predicting import predict_frames
from perception.types import Ids
from perception.visualization.live import draw_live

GALLERY = Path(__file__).resolve().parent / "gallery"
RIGS = {"nuscenes": 77, "surround_fisheye": 77, "argoverse2": 77}  # rig and seed of the town
QUALITY = 80


def last_frame(rig: str, seed: int, folder: Path):
    """The images, the rig and the result of the last of four frames of a generated scene."""
    simulate(folder, scenes=1, seed=seed, keyframes=4, rig=Rig.load(rig), split="town_val")
    recording = read_nuscenes(folder, Rig.load(rig))
    predictor = Predictor("nano", min_score=0.25)
    *_, frame = predict_frames(predictor, recording.rig, recording.frames())
    return frame.recorded.images, recording.rig, frame.objects


def main() -> None:
    warnings.simplefilter("ignore", PerceptionWarning)  # rigs unlike that of the training; the pictures say so
    GALLERY.mkdir(exist_ok=True)
    for rig, seed in RIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            images, cameras, objects = last_frame(rig, seed, Path(folder) / "town")
        picture = draw_live(images, cameras, objects, caption=rig)
        picture.save(GALLERY / f"{rig}.jpg", quality=QUALITY, optimize=True)
        seconds = []
        for _ in range(10):
            start = time.process_time()
            draw_live(images, cameras, objects, caption=rig)
            seconds.append(time.process_time() - start)
        boxes, lines = len(objects.boxes.score), len(objects.lines.score)
        print(f"{rig}: {len(images)} images, {boxes} boxes, {lines} lines: {1e3 * min(seconds):.0f} ms of one core")
        if rig == "nuscenes":
            # A single camera, with the ids that a tracker would give.
            ids = Ids(np.arange(boxes), np.full(lines, -1))
            one = Rig([cameras["CAM_FRONT"]])
            ahead = {"x_range": (-10.0, 50.0), "y_range": (-20.0, 20.0)}
            numbered = objects._replace(ids=ids)
            picture = draw_live({"CAM_FRONT": images["CAM_FRONT"]}, one, numbered, caption="one camera", **ahead)
            picture.save(GALLERY / "one_camera.jpg", quality=QUALITY, optimize=True)
    size = sum(file.stat().st_size for file in GALLERY.glob("*.jpg"))
    print(f"{GALLERY}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
