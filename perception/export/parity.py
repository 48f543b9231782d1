"""Certifies an export: runs it and its original network over the same dataset and compares their outputs.

Each of the two has its own memory. Differences of the raw outputs show that the graph computes what the network
computes; differences of the official metrics show whether the remaining differences matter. The dataset has several
scenes, frames with a missing camera and frames with rotated cameras, because these are inputs of the graph. A second
dataset tests another rig and blinded cameras. The graph also runs in float32, to measure how close its values come to
the limits of the types in the export.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from perception.data.nuscenes import NuScenesDataset
from perception.errors import DataError
from perception.evaluation.dataset import evaluate_predictions
from perception.export.certificate import METRICS, Certificate, Replay
from perception.export.contract import MODEL, ImageInputs, comparable_memory
from perception.export.export_rig import ExportRig
from perception.export.headroom import RangeMonitor
from perception.export.images import ImagePreprocessing, to_rgb
from perception.export.onnx import named_raw_outputs
from perception.export.progress import stage
from perception.export.replay import (
    CameraFrame,
    camera_frame,
    frame_inputs,
    match_rows,
    replay_frames,
    with_export_rig,
)
from perception.export.runtime import Runtime
from perception.export.second_reading import SecondExecutor
from perception.inference.fitting import fit_image
from perception.models import Network
from perception.models.base import memory_tensors
from perception.ops.bilinear import preferred_implementation
from perception.types import (
    Boxes,
    Frame,
    FrameObjects,
    Memory,
    NumpyBoxes,
    NumpyFrameObjects,
    NumpyPolylines,
    Polylines,
    map_tensors,
)

LEAST_FRAMES, LEAST_SCENES = 40, 2


@torch.inference_mode()
def certify(
    network: Network,
    folder: str | Path,
    dataset: NuScenesDataset,
    *,
    other_rig: NuScenesDataset | None = None,
    backend: str = "onnxruntime",
    drift_frames: int = 0,
    progress: bool = False,
) -> Certificate:
    """Compares an export with its original network on one or two datasets.

    Args:
        network: the original, in evaluation mode, on the CPU.
        folder: of the export.
        dataset: with images of the export's size or larger, which are converted to the size and format of each camera.
        other_rig: a second dataset with other cameras. Some of its images are replaced by black or white ones. The same
            gates apply.
        backend: runs the export, as for `Runtime`.
        drift_frames: length of a further replay without a reset of the memory, 0 for none.
        progress: show progress bars.

    Raises:
        CheckpointError: the folder does not hold an export.
        ConfigError: the backend cannot run here, or the second executor cannot run the graph.
        DataError: a dataset has fewer than 40 frames or 2 scenes.
    """
    datasets = [dataset] if other_rig is None else [dataset, other_rig]
    for each in datasets:
        scenes = len(np.unique(each.scene_of_sample))
        if len(each) < LEAST_FRAMES or scenes < LEAST_SCENES:
            raise DataError(
                f"the dataset has {len(each)} frames of {scenes} scenes; give at least {LEAST_FRAMES} frames of "
                f"{LEAST_SCENES} scenes"
            )
    import onnx

    runtime = Runtime(folder, backend=backend)
    precision = runtime.contract["precision"]
    second = SecondExecutor(folder, runtime.contract, len(dataset)) if backend == "onnxruntime" else None
    monitor = None if precision == "fp32" else RangeMonitor(onnx.load(Path(folder, MODEL)))
    replays = [replay(network, runtime, dataset, monitor, second, progress=progress)]
    if other_rig is not None:
        replays.append(replay(network, runtime, other_rig, monitor, None, bad_images=True, progress=progress))
    image_size = tuple(runtime.contract["image_size"])
    return Certificate(
        precision=precision,
        backend=backend,
        replays=tuple(replays),
        peaks=monitor.peaks() if monitor else {},
        saturation=monitor.saturation() if monitor else {},
        quantization=runtime.contract["quantization"],
        drift=_drift(network, runtime, dataset, drift_frames, image_size, progress) if drift_frames else (),
        second_reading=second.result() if second and not replays[0].not_finite else None,
    )


def replay(
    network: Network,
    runtime: Runtime,
    dataset: NuScenesDataset,
    monitor: RangeMonitor | None,
    second: SecondExecutor | None,
    *,
    bad_images: bool = False,
    progress: bool = False,
) -> Replay:
    """Compares an export with its original network on one dataset.

    Args:
        network, dataset, progress: as for `certify`.
        runtime: of the export.
        monitor: measures the range of the export's tensors in float32; None for an export in float32.
        second: runs some of the frames in a second executor; None for none.
        bad_images: replace some images by black or white ones.
    """
    image_size = tuple(runtime.contract["image_size"])
    slots, fixed = runtime.contract["cameras"], ExportRig.of_contract(runtime.contract)
    preprocess = ImagePreprocessing(runtime.images, image_size)
    differences: dict[str, list[np.ndarray]] = {}
    pixels = []
    originals, exports, not_finite = {}, {}, 0
    box_distances, line_distances = [], []
    state = network.initial_state(1)
    for token, frame in tqdm(
        replay_frames(dataset, slots, bad_images=bad_images), total=len(dataset), unit="frame", disable=not progress,
        desc="certificate, another rig" if bad_images else "certificate",
    ):  # fmt: skip
        exported_frame = with_export_rig(camera_frame(frame, runtime.images), fixed)
        original_frame = fitted_frame(exported_frame, runtime.images, image_size)
        in_graph = preprocess([torch.from_numpy(image) for image in exported_frame.images])
        pixels.append((in_graph - original_frame.images[0]).abs().numpy().ravel())
        prediction, state, expected = _run_original(network, original_frame, state)
        inputs = frame_inputs(exported_frame, network.extra_inputs)
        if monitor:
            monitor.run(inputs)
        memory = runtime.memories()
        found = _run_export(runtime, inputs)
        originals[token] = expected
        remembered = runtime.memories()
        if not all(np.isfinite(x).all() for x in (*runtime.outputs.values(), *remembered.values())):
            not_finite += 1
            exports[token] = as_tensors(map_tensors(lambda array: array[:0], found))
            continue
        if second and len(exports) in second.frames:
            second.add(runtime.inputs | memory, runtime.outputs | {f"new_{n}": x for n, x in remembered.items()})
        pairs = memory_pairs(state, remembered)
        raw = {name: tensor[0].numpy() for name, tensor in named_raw_outputs(network, prediction).items()}
        for kind in network.finds:
            pairs[f"raw_{kind}"] = raw_queries(raw, kind), raw_queries(runtime.outputs, kind)
        for name, (one, other) in pairs.items():
            differences.setdefault(name, []).append(raw_differences(one, other))
        box_distances.append(
            matched_distances(expected.boxes.center.numpy(), found.boxes.center, expected.boxes, found.boxes)
        )
        line_distances.append(
            matched_distances(expected.lines.points.numpy(), found.lines.points, expected.lines, found.lines)
        )
        exports[token] = as_tensors(found)
    pixel_differences = np.concatenate(pixels)
    with stage("official metrics of both", progress):
        metrics = [evaluate_predictions(dataset, objects).metrics() for objects in (originals, exports)]
    first = dataset[0].frames
    focal_lengths = first.rig.img_from_cam[0, :slots, 0, 0] / first.images.shape[-1]
    return Replay(
        cameras=len(focal_lengths),
        slots=slots,
        focal_lengths=tuple(focal_lengths.tolist()),
        bad_images=bad_images,
        frames=len(dataset),
        scenes=len(np.unique(dataset.scene_of_sample)),
        not_finite=not_finite,
        raw={name: largest_and_mean(parts) for name, parts in differences.items()},
        pixels=(float(pixel_differences.max()), float((pixel_differences > 0).mean())),
        boxes=largest_and_mean(box_distances),
        lines=largest_and_mean(line_distances),
        metrics={name: (metrics[0][name], metrics[1][name]) for name in METRICS},
    )


def as_tensors(objects: NumpyFrameObjects) -> FrameObjects:
    """Copies the result of an export to tensors."""
    boxes, lines = (map(torch.from_numpy, map(np.copy, arrays)) for arrays in objects[:2])
    return FrameObjects(Boxes(*boxes), Polylines(*lines))


def fitted_frame(frame: CameraFrame, images: ImageInputs, image_size: tuple[int, int]) -> Frame:
    """Converts a frame [1, ...] to the input of the original network: RGB, resized and cropped by Pillow."""
    pixels, img_from_cam = [], []
    for image, matrix in zip(frame.images, frame.rig.img_from_cam[0].double().numpy(), strict=True):
        fit = fit_image(Image.fromarray(to_rgb(image, images.image_format)), matrix, image_size)
        pixels.append(fit[0])
        img_from_cam.append(torch.from_numpy(fit[1]))
    rig = frame.rig._replace(img_from_cam=torch.stack(img_from_cam)[None].float())
    return Frame(torch.stack(pixels)[None].float(), rig, *frame[2:])


def memory_pairs(memory: Memory, found: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs the memory of a network with that of its export, in the form of `comparable_memory`."""
    expected = comparable_memory({name: tensor.numpy() for name, tensor in memory_tensors(memory).items()})
    other = comparable_memory(found)
    return {name: (rows, other[name]) for name, rows in expected.items()}


def _run_original(network: Network, frame: Frame, state: Memory) -> tuple[Any, Memory, FrameObjects]:
    # The graph is traced from the plain implementation. A faster implementation sums in another order, and every
    # decoder layer amplifies the rounding errors, which would count as differences of the export.
    with preferred_implementation("plain"):
        prediction, state = network(frame, state)
    return prediction, state, map_tensors(lambda tensor: tensor[0], network.decode(prediction))


def _run_export(runtime: Runtime, inputs: Mapping[str, np.ndarray]) -> NumpyFrameObjects:
    for name, array in inputs.items():
        runtime.inputs[name][...] = array
    runtime.run()
    return runtime.objects()


def raw_queries(outputs: Mapping[str, np.ndarray], kind: str) -> np.ndarray:
    """Concatenates the raw outputs of boxes ("box") or lines ("line") of each query: [Q, values]."""
    parts = [array for name, array in outputs.items() if name.startswith(f"raw_{kind}_")]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], 1)


def raw_differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the differences of memories [M] or queries [Q, C], in the units of `Replay.raw`, as a flat array.

    Queries are matched with `match_rows` first, because their order is not defined.
    """
    if one.ndim > 1:
        other = other[match_rows(one, other)]
    return (np.abs(one - other) / np.maximum(1, np.abs(one))).ravel()


def matched_distances(
    one: np.ndarray,
    other: np.ndarray,
    objects: Boxes | Polylines | NumpyBoxes | NumpyPolylines,
    other_objects: NumpyBoxes | NumpyPolylines,
) -> np.ndarray:
    """Matches objects of the same class with a score of at least 0.1 and returns their distances in metres.

    Args:
        one, other: [M, 3] centres or [M, P, 2] points.
        objects, other_objects: the boxes or lines of `one` and `other`.
    """
    found = []
    label, score, valid = (np.asarray(x) for x in (objects.label, objects.score, objects.valid))
    for k in np.unique(label):
        a = (label == k) & (score >= 0.1) & valid
        b = (other_objects.label == k) & (other_objects.score >= 0.1) & other_objects.valid
        if a.any() and b.any():
            cost = np.linalg.norm(one[a][:, None] - other[b], axis=-1)
            cost = cost.mean(-1) if cost.ndim == 3 else cost
            found.append(cost[linear_sum_assignment(cost)])
    return np.concatenate(found) if found else np.zeros(0)


def largest_and_mean(parts: list[np.ndarray]) -> tuple[float, float]:
    """Returns the largest and the mean of all differences; zeros if there are none."""
    differences = np.concatenate([*parts, np.zeros(0)])
    return (float(differences.max()), float(differences.mean())) if len(differences) else (0.0, 0.0)


def _drift(
    network: Network,
    runtime: Runtime,
    dataset: NuScenesDataset,
    frames: int,
    image_size: tuple[int, int],
    progress: bool,
) -> tuple[float, float]:
    """Returns the mean difference of the memories over the first and the last quarter of a replay without resets."""
    state = network.initial_state(1)
    differences: list[float] = []
    # Only the very first frame is a first frame, also across scenes.
    bar = tqdm(total=frames, desc="drift", disable=not progress)
    while len(differences) < frames:
        for _, frame in replay_frames(dataset, runtime.contract["cameras"]):
            frame = frame._replace(is_first=torch.tensor([not differences]))
            exported_frame = with_export_rig(
                camera_frame(frame, runtime.images), ExportRig.of_contract(runtime.contract)
            )
            _, state, _ = _run_original(network, fitted_frame(exported_frame, runtime.images, image_size), state)
            _run_export(runtime, frame_inputs(exported_frame, network.extra_inputs))
            errors = [
                np.abs(one - (other[match_rows(one, other)] if one.ndim > 1 else other)).mean()
                for one, other in memory_pairs(state, runtime.memories()).values()
            ]
            differences.append(float(np.mean(errors)))
            bar.update()
            if len(differences) == frames:
                break
    bar.close()
    quarter = max(frames // 4, 1)
    return float(np.mean(differences[:quarter])), float(np.mean(differences[-quarter:]))
