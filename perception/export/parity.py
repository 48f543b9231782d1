"""The certificate: an exported network and its original over the same drive, each with its own memory.

Differences of raw numbers show that the graph is the network; differences of the official metrics show that it does not
matter. The drive has several scenes, frames without one of the cameras, and frames with another calibration, because
these are inputs of the graph and must work as such. A second dataset shows that another rig and blinded cameras do too.
Along with both runs the graph in float32, which shows how close the values come to what the export's types can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from perception.data.nuscenes import NuScenesDataset
from perception.errors import DataError
from perception.evaluation.dataset import evaluate_predictions
from perception.export.certificate import METRICS, Certificate, Replay
from perception.export.contract import MODEL, ImageInputs
from perception.export.headroom import RangeMonitor
from perception.export.images import ImagePreprocessing, to_rgb
from perception.export.onnx import named_raw_outputs
from perception.export.progress import stage
from perception.export.replay import CameraFrame, aligned, camera_frame, frame_inputs, replay_frames
from perception.export.runtime import Runtime
from perception.export.second_reading import SecondExecutor
from perception.inference.fitting import fit_image
from perception.models import Network
from perception.ops.bilinear import preferred_implementation
from perception.types import Frame, FrameObjects, State, map_tensors

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
    """Drives datasets with a network and with its export.

    Args:
        network: the original, in evaluation mode, on the CPU.
        folder: of the export.
        dataset: images as the export takes them, or larger; they are brought to the size and format of each camera.
        other_rig: a second dataset, of other cameras. Some of its images are made black or white; the same gates hold.
        backend: that runs the export, as for `Runtime`.
        drift_frames: of a further drive without a reset, 0 for none.
        progress: show progress bars.

    Raises:
        CheckpointError: the folder is none of an export.
        ConfigError: the backend cannot run here, or the graph cannot be run a second time.
        DataError: a dataset has fewer than 40 frames or 2 scenes.
    """
    datasets = [dataset] if other_rig is None else [dataset, other_rig]
    for each in datasets:
        scenes = len(np.unique(each.scene_of_sample))
        if len(each) < LEAST_FRAMES or scenes < LEAST_SCENES:
            raise DataError(
                f"the dataset has {len(each)} frames of {scenes} scenes; a certificate needs {LEAST_FRAMES} of "
                f"{LEAST_SCENES}"
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
    """Drives one dataset with a network and with its export, and measures the values of the export in float32.

    Args:
        network, dataset, progress: as for `certify`.
        runtime: of the export.
        monitor: of the export's graph, keeps what it measures; None where float32 holds everything.
        second: runs some of the frames again; None for none.
        bad_images: make some images black or white.
    """
    image_size = tuple(runtime.contract["image_size"])
    seats = runtime.contract["cameras"]
    preprocess = ImagePreprocessing(runtime.images, image_size)
    differences: dict[str, list[np.ndarray]] = {}
    pixels = []
    originals, exports, not_finite = {}, {}, 0
    box_distances, line_distances = [], []
    state = network.initial_state(1)
    for token, frame in tqdm(
        replay_frames(dataset, seats, bad_images=bad_images), total=len(dataset), unit="frame", disable=not progress,
        desc="certificate, another rig" if bad_images else "certificate",
    ):  # fmt: skip
        given = camera_frame(frame, runtime.images)
        seen = fitted(given, runtime.images, image_size)
        in_graph = preprocess([torch.from_numpy(image) for image in given.images])
        pixels.append((in_graph - seen.images[0]).abs().numpy().ravel())
        prediction, state, scene = _original(network, seen, state)
        inputs = frame_inputs(given)
        if monitor:
            monitor.run(inputs)
        memory = runtime.memory()
        said = _exported(runtime, inputs)
        if not all(np.isfinite(x).all() for x in (*runtime.outputs.values(), runtime.memory())):
            not_finite += 1
            originals[token], exports[token] = scene, map_tensors(lambda x: torch.from_numpy(x[:0].copy()), said)
            continue
        if second and len(originals) in second.frames:
            second.add(runtime.inputs | {"memory": memory}, runtime.outputs | {"new_memory": runtime.memory()})
        pairs = {"memory": (state.bev.numpy().ravel(), runtime.memory().ravel())} if state.bev.numel() else {}
        raw = {name: tensor[0].numpy() for name, tensor in named_raw_outputs(network, prediction).items()}
        for kind in network.finds:
            pairs[f"raw_{kind}"] = raw_queries(raw, kind), raw_queries(runtime.outputs, kind)
        for name, (one, other) in pairs.items():
            differences.setdefault(name, []).append(raw_differences(one, other))
        box_distances.append(matched_distances(scene.boxes.center.numpy(), said.boxes.center, scene.boxes, said.boxes))
        line_distances.append(matched_distances(scene.lines.points.numpy(), said.lines.points, scene.lines, said.lines))
        originals[token], exports[token] = scene, map_tensors(lambda x: torch.from_numpy(x.copy()), said)
    off = np.concatenate(pixels)
    with stage("official metrics of both", progress):
        one, other = (evaluate_predictions(dataset, scenes).metrics() for scenes in (originals, exports))
    first = dataset[0].frames
    focal_lengths = first.rig.img_from_cam[0, :seats, 0, 0] / first.images.shape[-1]
    return Replay(
        cameras=len(focal_lengths),
        seats=seats,
        focal_lengths=tuple(focal_lengths.tolist()),
        bad_images=bad_images,
        frames=len(dataset),
        scenes=len(np.unique(dataset.scene_of_sample)),
        not_finite=not_finite,
        raw={name: largest_and_mean(parts) for name, parts in differences.items()},
        pixels=(float(off.max()), float((off > 0).mean())),
        boxes=largest_and_mean(box_distances),
        lines=largest_and_mean(line_distances),
        metrics={name: (one[name], other[name]) for name in METRICS},
    )


def fitted(frame: CameraFrame, images: ImageInputs, image_size: tuple[int, int]) -> Frame:
    """A frame [1, ...] as the network was trained with it: RGB, of its size, fitted by Pillow."""
    pixels, img_from_cam = [], []
    for image, matrix in zip(frame.images, frame.rig.img_from_cam[0].double().numpy(), strict=True):
        fit = fit_image(Image.fromarray(to_rgb(image, images.image_format)), matrix, image_size)
        pixels.append(fit[0])
        img_from_cam.append(torch.from_numpy(fit[1]))
    rig = frame.rig._replace(img_from_cam=torch.stack(img_from_cam)[None].float())
    return Frame(torch.stack(pixels)[None].float(), rig, *frame[2:])


def _original(network: Network, frame: Frame, state: State):
    # The graph is made of the plain implementation. A faster one sums in another order, and every decoder layer makes
    # that noise larger: it would be held against the export.
    with preferred_implementation("plain"):
        prediction, state = network(frame, state)
    return prediction, state, map_tensors(lambda tensor: tensor[0], network.decode(prediction))


def _exported(runtime: Runtime, inputs: Mapping[str, np.ndarray]) -> FrameObjects:
    for name, array in inputs.items():
        runtime.inputs[name][...] = array
    runtime.run()
    return runtime.scene()


def raw_queries(outputs: Mapping[str, np.ndarray], kind: str) -> np.ndarray:
    """Joins the raw outputs of boxes ("box") or lines ("line") query by query: [Q, values]."""
    parts = [array for name, array in outputs.items() if name.startswith(f"raw_{kind}_")]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], 1)


def raw_differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Compares memories [M] or queries [Q, C] as `Certificate.raw` does; the result is flat.

    Queries are compared in the order that fits best: two equally good places may be followed up in either order.
    """
    if one.ndim > 1:
        other = other[aligned(one, other)]
    return (np.abs(one - other) / np.maximum(1, np.abs(one))).ravel()


def matched_distances(one: np.ndarray, other: np.ndarray, nouns, other_nouns) -> np.ndarray:
    """Distances in metres of things of the same class that both found with a score of 0.1 or more, best pairs first.

    Args:
        one, other: [M, 3] centres or [M, P, 2] points.
        nouns, other_nouns: the Boxes or Polylines that they are from.
    """
    found = []
    label, score, valid = (np.asarray(x) for x in (nouns.label, nouns.score, nouns.valid))
    for k in np.unique(label):
        a = (label == k) & (score >= 0.1) & valid
        b = (other_nouns.label == k) & (other_nouns.score >= 0.1) & other_nouns.valid
        if a.any() and b.any():
            cost = np.linalg.norm(one[a][:, None] - other[b], axis=-1)
            cost = cost.mean(-1) if cost.ndim == 3 else cost
            found.append(cost[linear_sum_assignment(cost)])
    return np.concatenate(found) if found else np.zeros(0)


def largest_and_mean(parts: list[np.ndarray]) -> tuple[float, float]:
    """Sums up differences; zeros where there are none."""
    together = np.concatenate([*parts, np.zeros(0)])
    return (float(together.max()), float(together.mean())) if len(together) else (0.0, 0.0)


def _drift(
    network: Network,
    runtime: Runtime,
    dataset: NuScenesDataset,
    frames: int,
    image_size: tuple[int, int],
    progress: bool,
) -> tuple[float, float]:
    """The mean difference of the memories over the first and the last quarter of a drive that never starts afresh."""
    state, off = network.initial_state(1), []
    # Every frame but the very first goes on from the memory, whatever scene it is from.
    bar = tqdm(total=frames, desc="drift", disable=not progress)
    while len(off) < frames:
        for _, frame in replay_frames(dataset, runtime.contract["cameras"]):
            frame = frame._replace(is_first=torch.tensor([not off]))
            given = camera_frame(frame, runtime.images)
            _, state, _ = _original(network, fitted(given, runtime.images, image_size), state)
            _exported(runtime, frame_inputs(given))
            off.append(float(np.abs(state.bev.numpy() - runtime.memory()).mean()))
            bar.update()
            if len(off) == frames:
                break
    bar.close()
    quarter = max(frames // 4, 1)
    return float(np.mean(off[:quarter])), float(np.mean(off[-quarter:]))
