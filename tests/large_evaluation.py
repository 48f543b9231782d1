"""Measures the evaluation of boxes at the size of nuScenes val: 300 boxes for each of 6,040 samples.

    perception simulate --out out/routes --scenes 4 --seed 7 --keyframes 40 --split town_try --image-size 32x56
    python tests/large_tables.py out/routes out/val --scenes 151
    python tests/large_evaluation.py out/val --workers 2

The predictions are the ground truth with noise, and boxes at random places.
"""

import argparse
import os
import resource
from pathlib import Path

import numpy as np
import torch
from nuscenes.eval.detection.evaluate import DetectionEval

from perception.data.nuscenes import NuScenesDataset
from perception.evaluation import detection
from perception.synthetic import VERSION
from perception.types import Boxes, FrameObjects, Polylines

NO_LINES = Polylines(*(torch.zeros(0) for _ in Polylines._fields))


def cpu() -> float:
    """CPU seconds of this process and of its processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def predictions(data: NuScenesDataset, count: int, seed: int) -> dict[str, FrameObjects]:
    """Makes `count` boxes for each sample."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, token in enumerate(data.tokens):
        gt = data.gt_boxes(i)
        near = min(len(gt.label), count)
        noise = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        center = noise(count, 3) * torch.tensor([25.0, 25.0, 1.0])
        size, yaw, velocity = noise(count, 3).abs() + 0.3, 3 * noise(count), noise(count, 2)
        label = torch.randint(0, 10, (count,), generator=generator)
        center[:near] = gt.center[:near] + noise(near, 3)
        size[:near], yaw[:near], label[:near] = gt.size[:near], gt.yaw[:near] + 0.2 * noise(near), gt.label[:near]
        score = torch.rand(count, generator=generator) * 0.5
        score[:near] += 0.4
        attribute, valid = torch.full((count,), -1), torch.ones(count, dtype=torch.bool)
        boxes = Boxes(center, size, yaw, velocity, label, attribute, score, valid, torch.zeros(count, 9))
        found[token] = FrameObjects(boxes, NO_LINES)
    return found


def main(root: Path, workers: int, count: int = 300) -> None:
    """Prints the CPU seconds of each part and the memory."""
    data = NuScenesDataset(root, VERSION, "large", image_size=(32, 56))
    poses = {token: data.ego_pose(i) for i, token in enumerate(data.tokens)}
    predicted = predictions(data, count, seed=0)
    start = cpu()
    nusc = detection.load_tables(root, VERSION)
    print(f"tables read, checked and indexed by the devkit: {cpu() - start:.1f} CPU s", flush=True)
    start = cpu()
    submission = detection.submission_from_predictions(predicted, poses)
    made = cpu() - start
    print(f"{len(predicted)} samples of {count} boxes: submission {made:.1f} CPU s", flush=True)
    devkit = 0.0

    def timed(function):
        def run(*arguments, **keywords):
            nonlocal devkit
            start = cpu()
            result = function(*arguments, **keywords)
            devkit += cpu() - start
            print(f"devkit {devkit:.1f} CPU s", flush=True)
            return result

        return run

    DetectionEval.__init__ = timed(DetectionEval.__init__)
    detection._evaluate = timed(detection._evaluate)
    start = cpu()
    result = detection.evaluate_submission(nusc, "large", submission, workers=workers)
    ours = cpu() - start - devkit
    print(f"evaluated by {workers} workers: {ours:.1f} CPU s besides the devkit; NDS {result.nds:.17g}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"beyond the devkit {made + ours:.1f} CPU s, {memory:.1f} GB, load {os.getloadavg()[0]:.1f}")
    assert np.isfinite(result.nds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="tables with the split `large`")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    main(arguments.root, arguments.workers)
