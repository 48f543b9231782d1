"""The certificate: an exported network and its original over the same drive, each with its own memory.

Differences of raw numbers show that the graph is the network; differences of the official metrics show that it does not
matter. The drive has several scenes, moments without one of the cameras, and moments with another calibration, because
these are inputs of the graph and must work as such.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from perception.data.loader import fit_image
from perception.data.nuscenes import NuScenesDataset
from perception.errors import DataError
from perception.evaluation.streaming import evaluate_scenes
from perception.export.contract import ImageInputs
from perception.export.drive import CameraFrame, aligned, camera_frame, drive, moment_inputs
from perception.export.images import ImagePreprocessing, to_rgb
from perception.export.onnx import raw_outputs
from perception.export.progress import stage
from perception.export.runtime import Runtime
from perception.files import replacing, write_json
from perception.models.checkpoint import Network
from perception.types import Frame, Scene, State, map_tensors

LEAST_FRAMES, LEAST_SCENES = 40, 2
METRICS = ("nds", "map", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "lane_map", "lane_map_strict")
# The largest differences that pass, by precision: of raw numbers (None: not held to any), NDS and lane mAP.
GATES = {
    "fp32": (1e-3, 0.0005, 0.0005),
    "fp16": (None, 0.003, 0.005),
    "int8": (None, 0.01, 0.01),
    "fp8": (None, 0.01, 0.01),
}
# For fp32 exports in OpenVINO, which sums in another order than PyTorch and ONNX Runtime. All three are about equally
# far from float64, but PyTorch and ONNX Runtime share most of their rounding. Without that the largest of so many
# differences is chance, so the mean is held.
MEAN_RAW_OPENVINO = 1e-4
GROWTH = 3.0  # how many times larger the differences at the end of a long drive may be than at its beginning


@dataclass(frozen=True)
class Certificate:
    """How far an exported network is from its original.

    Args:
        precision: of the export.
        backend: that ran the export, as `Runtime` calls it.
        frames, scenes: of the drive.
        raw: largest and mean difference by output, rows aligned. A number that is larger than one counts in units of
            itself, for float32 keeps digits, not decimals: a box 40 m away is not known to a millimetre.
        pixels: the largest difference in grey values between what the graph makes of the images that it is given and
            what they are in training (RGB, fitted by Pillow), and the share of values that differ at all.
        boxes, lines: largest and mean distance in metres of matched boxes (centres) and lines (points).
        metrics: by name, of the original and of the export.
        drift: largest differences of the memory over the first and over the last quarter of a long drive without a
            reset, empty where none was made.
        quantization: what `quantize_graph` found out, empty for other precisions.
    """

    precision: str
    backend: str
    frames: int
    scenes: int
    raw: dict[str, tuple[float, float]]
    pixels: tuple[float, float]
    boxes: tuple[float, float]
    lines: tuple[float, float]
    metrics: dict[str, tuple[float, float]]
    drift: tuple[float, ...] = ()
    quantization: dict = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """Why the export must not be used; empty if it may."""
        bfloat16 = self.precision == "fp32" and self.backend == "openvino-bf16"  # as good as any other 16-bit float
        most_raw, most_nds, most_lane = GATES["fp16" if bfloat16 else self.precision]
        found = []
        if self.precision == "fp32" and self.backend == "openvino":
            found += [
                f"{name} differs by {mean:.2e} on average, more than {MEAN_RAW_OPENVINO:.0e}"
                for name, (_, mean) in self.raw.items()
                if not mean <= MEAN_RAW_OPENVINO
            ]
        elif most_raw is not None:
            found += [
                f"{name} differs by {largest:.2e}, more than {most_raw:.0e}"
                for name, (largest, _) in self.raw.items()
                if not largest <= most_raw
            ]
        if self.pixels[0] > 1:
            found.append(f"fitted images differ by up to {self.pixels[0]:.0f} grey values from those of training")
        for name, most in (("nds", most_nds), ("lane_map", most_lane)):
            one, other = self.metrics[name]
            if not abs(one - other) <= most:
                found.append(f"{name} is {other:.4f} instead of {one:.4f}, more than {most} off")
        if self.drift and not self.drift[1] <= max(GROWTH * self.drift[0], 1e-3):
            found.append(f"the memory drifts: off by {self.drift[0]:.2e} early and by {self.drift[1]:.2e} late")
        return found

    def as_dict(self) -> dict:
        """Plain JSON values."""
        return asdict(self) | {"passed": not self.failures, "failures": self.failures}

    def markdown(self) -> str:
        """All of it for people."""
        rows = [
            f"Precision {self.precision}, run by {self.backend}; {self.frames} frames of {self.scenes} scenes, in "
            "each a missing camera and turned cameras.",
            "",
            "| output | largest difference | mean |",
            "|---|---|---|",
            *(f"| {name} | {largest:.2e} | {mean:.2e} |" for name, (largest, mean) in self.raw.items()),
            f"| grey values of fitted images | {self.pixels[0]:.0f} | differ in {100 * self.pixels[1]:.3f} % |",
            f"| centres of matched boxes, m | {self.boxes[0]:.2e} | {self.boxes[1]:.2e} |",
            f"| points of matched lines, m | {self.lines[0]:.2e} | {self.lines[1]:.2e} |",
            "",
            "| metric | PyTorch fp32 | export |",
            "|---|---|---|",
            *(f"| {name} | {one:.4f} | {other:.4f} |" for name, (one, other) in self.metrics.items()),
            "",
        ]
        if self.drift:
            rows += [f"Memory without a reset: off by {self.drift[0]:.2e} early, by {self.drift[1]:.2e} late.", ""]
        if self.quantization:
            rows += [
                "| layers | change the answers by | share of the work | in eight bits |",
                "|---|---|---|---|",
                *(
                    f"| {group} | {change:.4f} | {self.quantization['work'][group]:.3f} "
                    f"| {'yes' if group in self.quantization['groups'] else 'no'} |"
                    for group, change in self.quantization["sensitivities"].items()
                ),
                f"| all that are in eight bits together | {self.quantization['together']:.4f} | "
                f"{sum(self.quantization['work'][group] for group in self.quantization['groups']):.3f} | |",
                "",
            ]
        verdict = "**passed**" if not self.failures else "**failed**: " + "; ".join(self.failures)
        return "\n".join([*rows, f"Gate: {verdict}", ""])

    def save(self, folder: str | Path) -> None:
        """Writes `certificate.json` and `.md`; their names hold the backend where it is not ONNX Runtime, such as
        `certificate.openvino.json`.
        """
        name = "certificate" if self.backend == "onnxruntime" else f"certificate.{self.backend}"
        write_json(Path(folder, f"{name}.json"), self.as_dict())
        with replacing(Path(folder, f"{name}.md")) as beside:
            beside.write_text(self.markdown(), encoding="utf-8")


@torch.inference_mode()
def certify(
    network: Network,
    folder: str | Path,
    dataset: NuScenesDataset,
    *,
    backend: str = "onnxruntime",
    drift_frames: int = 0,
    progress: bool = False,
) -> Certificate:
    """Drives a dataset with a network and with its export.

    Args:
        network: the original, in evaluation mode, on the CPU.
        folder: of the export.
        dataset: images as the export takes them, or larger; they are brought to the size and format of each camera.
        backend: that runs the export, as for `Runtime`.
        drift_frames: of a further drive without a reset, 0 for none.
        progress: show progress bars.

    Raises:
        CheckpointError: the folder is none of an export.
        ConfigError: the backend cannot run here.
        DataError: the dataset has fewer than 40 frames or 2 scenes.
    """
    scenes = len(np.unique(dataset.scene_of_sample))
    if len(dataset) < LEAST_FRAMES or scenes < LEAST_SCENES:
        raise DataError(
            f"the dataset has {len(dataset)} frames of {scenes} scenes; a certificate needs {LEAST_FRAMES} of "
            f"{LEAST_SCENES}"
        )
    runtime = Runtime(folder, backend=backend)
    image_size = tuple(runtime.contract["image_size"])
    preprocess = ImagePreprocessing(runtime.images, image_size)
    differences: dict[str, list[np.ndarray]] = {}
    pixels = []
    originals, exports = {}, {}
    box_distances, line_distances = [], []
    state = network.initial_state(1)
    for token, frame in tqdm(
        drive(dataset, runtime.contract["cameras"]), total=len(dataset), unit="frame", disable=not progress,
        desc=f"certificate of {backend}",
    ):  # fmt: skip
        given = camera_frame(frame, runtime.images)
        seen = fitted(given, runtime.images, image_size)
        in_graph = preprocess([torch.from_numpy(image) for image in given.images])
        pixels.append((in_graph - seen.images[0]).abs().numpy().ravel())
        prediction, state, scene = _original(network, seen, state)
        said = _exported(runtime, given)
        pairs = {"memory": (state.bev.numpy().ravel(), runtime.memory().ravel())} if state.bev.numel() else {}
        for kind in ("box", "line"):
            if f"raw_{kind}_logits" in runtime.outputs:
                one = np.concatenate([raw[-1, 0].flatten(1) for raw in raw_outputs(prediction, kind)], 1)  # [Q, ...]
                names = f"raw_{kind}_logits", f"raw_{kind}_places"
                other = np.concatenate([runtime.outputs[name].reshape(len(one), -1) for name in names], 1)
                # Two equally good places may be followed up in either order.
                pairs[f"raw_{kind}"] = one, other[aligned(one, other)]
        for name, (one, other) in pairs.items():
            differences.setdefault(name, []).append((np.abs(one - other) / np.maximum(1, np.abs(one))).ravel())
        box_distances.append(matched_distances(scene.boxes.center.numpy(), said.boxes.center, scene.boxes, said.boxes))
        line_distances.append(matched_distances(scene.lines.points.numpy(), said.lines.points, scene.lines, said.lines))
        originals[token], exports[token] = scene, map_tensors(lambda x: torch.from_numpy(x.copy()), said)
    off = np.concatenate(pixels)
    with stage("official metrics of both", progress):
        one, other = (evaluate_scenes(dataset, scenes).metrics() for scenes in (originals, exports))
    return Certificate(
        precision=runtime.contract["precision"],
        backend=backend,
        frames=len(dataset),
        scenes=scenes,
        raw={name: _summary(parts) for name, parts in differences.items()},
        pixels=(float(off.max()), float((off > 0).mean())),
        boxes=_summary(box_distances),
        lines=_summary(line_distances),
        metrics={name: (one[name], other[name]) for name in METRICS},
        quantization=runtime.contract["quantization"],
        drift=_drift(network, runtime, dataset, drift_frames, image_size, progress) if drift_frames else (),
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
    prediction, state = network(frame, state)
    return prediction, state, map_tensors(lambda tensor: tensor[0], network.decode(prediction))


def _exported(runtime: Runtime, frame: CameraFrame) -> Scene:
    for name, array in moment_inputs(frame).items():
        runtime.inputs[name][...] = array
    runtime.run()
    return runtime.scene()


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


def _summary(parts: list[np.ndarray]) -> tuple[float, float]:
    together = np.concatenate(parts)
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
        for _, frame in drive(dataset, runtime.contract["cameras"]):
            frame = frame._replace(is_first=torch.tensor([not off]))
            given = camera_frame(frame, runtime.images)
            _, state, _ = _original(network, fitted(given, runtime.images, image_size), state)
            _exported(runtime, given)
            off.append(float(np.abs(state.bev.numpy() - runtime.memory()).mean()))
            bar.update()
            if len(off) == frames:
                break
    bar.close()
    quarter = max(frames // 4, 1)
    return float(np.mean(off[:quarter])), float(np.mean(off[-quarter:]))
