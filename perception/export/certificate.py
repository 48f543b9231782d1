"""Defines the certificate of an export: its differences from the original network, the gates, and its tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from perception.export.half import LARGEST
from perception.export.headroom import Saturation
from perception.export.second_reading import SecondReading
from perception.files import replacing, write_json

METRICS = ("nds", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "lane_mAP", "lane_mAP_strict")


class Gate(NamedTuple):
    """The largest differences that pass; None for no limit."""

    raw: float | None  # largest difference of raw outputs and memory
    raw_mean: float | None  # mean difference of raw outputs and memory
    nds: float
    lane_ap: float


GATES = {
    "fp32": Gate(1e-3, None, 0.0005, 0.0005),
    "fp16": Gate(None, None, 0.003, 0.005),
    "int8": Gate(None, None, 0.01, 0.01),
    "fp8": Gate(None, None, 0.01, 0.01),
}
# For fp32 exports in OpenVINO, which sums in another order than PyTorch and ONNX Runtime. All three have about the same
# error compared with float64, but PyTorch and ONNX Runtime share most of their rounding errors and OpenVINO does not.
# The largest difference is then random, so the gate uses the mean. In bfloat16 the gate is that of float16.
OPENVINO_GATES = {"openvino": Gate(None, 1e-4, 0.0005, 0.0005), "openvino-bf16": GATES["fp16"]}
GROWTH = 3.0  # largest ratio of the differences at the end of a long replay to those at its beginning
# Largest value as a share of the float16 maximum. The margin is for partial sums and for frames that were not measured.
MAX_SHARE_OF_HALF = 0.5
# Largest share of a quantized tensor outside its range. In the shipped network with 80 % of the work in INT8 the
# largest share was 0.02 %, with all layers, of which some have few values, 0.15 %.
SATURATED = 0.01
SHOWN = 8  # rows of a table in Markdown; the JSON file holds all rows


@dataclass(frozen=True)
class Replay:
    """The comparison of original and export on one dataset.

    Args:
        cameras: number of cameras of the dataset that the export uses.
        slots: number of camera inputs of the export; those without a camera in the dataset are not present.
        focal_lengths: of each camera in the first frame, in image widths.
        bad_images: True if some images were black or white.
        frames, scenes: number in the dataset.
        not_finite: number of frames with outputs of the export that are not finite. These frames count as empty and do
            not enter the differences.
        raw: largest and mean difference by output, after matching rows. Differences are relative for values above 1 and
            absolute for others, because float32 has a relative precision.
        pixels: largest difference in grey values between the preprocessing in the graph and in training (RGB, resized
            and cropped by Pillow), and the share of values that differ.
        boxes, lines: largest and mean distance in metres of matched boxes (centres) and lines (points).
        metrics: by name, of the original and of the export.
    """

    cameras: int
    slots: int
    focal_lengths: tuple[float, ...]
    bad_images: bool
    frames: int
    scenes: int
    not_finite: int
    raw: dict[str, tuple[float, float]]
    pixels: tuple[float, float]
    boxes: tuple[float, float]
    lines: tuple[float, float]
    metrics: dict[str, tuple[float, float]]

    def failures(self, gate: Gate) -> list[str]:
        """Returns one sentence for each difference that does not pass the gate."""
        found = []
        if self.not_finite:
            found.append(f"outputs are not finite in {self.not_finite} of {self.frames} frames")
        for name, (largest, mean) in self.raw.items():
            if gate.raw is not None and not largest <= gate.raw:
                found.append(f"{name} differs by {largest:.2e}, more than {gate.raw:.0e}")
            if gate.raw_mean is not None and not mean <= gate.raw_mean:
                found.append(f"{name} differs by {mean:.2e} on average, more than {gate.raw_mean:.0e}")
        if self.pixels[0] > 1:
            found.append(f"preprocessed images differ by up to {self.pixels[0]:.0f} grey values from those of training")
        for name, most in (("nds", gate.nds), ("lane_mAP", gate.lane_ap)):
            one, other = self.metrics[name]
            if not abs(one - other) <= most:
                found.append(f"{name} is {other:.4f} instead of {one:.4f}, a difference of more than {most}")
        return found

    def rows(self) -> list[str]:
        """Returns the tables in Markdown."""
        bad = ", a black image and a white image" if self.bad_images else ""
        absent = f" in {self.slots} camera inputs" if self.slots != self.cameras else ""
        return [
            f"{self.frames} frames of {self.scenes} scenes, each with a missing camera, rotated cameras{bad}. "
            f"{self.cameras} cameras{absent}, focal lengths in image widths: "
            f"{', '.join(f'{focal:.2f}' for focal in self.focal_lengths)}.",
            "",
            "| output | largest difference | mean |",
            "|---|---|---|",
            *(f"| {name} | {largest:.2e} | {mean:.2e} |" for name, (largest, mean) in self.raw.items()),
            f"| grey values of preprocessed images | {self.pixels[0]:.0f} | differ in {100 * self.pixels[1]:.3f} % |",
            f"| centres of matched boxes, m | {self.boxes[0]:.2e} | {self.boxes[1]:.2e} |",
            f"| points of matched lines, m | {self.lines[0]:.2e} | {self.lines[1]:.2e} |",
            "",
            "| metric | PyTorch fp32 | export |",
            "|---|---|---|",
            *(f"| {name} | {one:.4f} | {other:.4f} |" for name, (one, other) in self.metrics.items()),
            "",
        ]


@dataclass(frozen=True)
class Certificate:
    """The differences between an exported network and its original.

    Args:
        precision: of the export.
        backend: of `Runtime` that ran the export.
        replays: one per dataset.
        peaks: largest absolute value of each float16 tensor, measured in float32 over all replays; empty for an export
            without float16 tensors.
        saturation: by quantized tensor, over all replays; empty for an export that is not quantized.
        drift: mean differences of the memory over the first and over the last quarter of a long replay without a reset,
            empty for none.
        quantization: the report of `quantize_graph`, empty for an export that is not quantized.
        second_reading: comparison with a second executor; None if ONNX Runtime did not run the export or its outputs
            were not finite.
    """

    precision: str
    backend: str
    replays: tuple[Replay, ...]
    peaks: dict[str, float] = field(default_factory=dict)
    saturation: dict[str, Saturation] = field(default_factory=dict)
    drift: tuple[float, ...] = ()
    quantization: dict = field(default_factory=dict)
    second_reading: SecondReading | None = None

    @property
    def failures(self) -> list[str]:
        """Returns the reasons why the export must not be used; empty if it passed."""
        gate = GATES[self.precision]
        if self.precision == "fp32":
            gate = OPENVINO_GATES.get(self.backend, gate)
        found = []
        for number, replay in enumerate(self.replays, 1):
            where = f"replay {number}: " if number > 1 else ""
            found += [f"{where}{failure}" for failure in replay.failures(gate)]
        high = [f"{name} {peak:.0f}" for name, peak in self.peaks.items() if not peak <= MAX_SHARE_OF_HALF * LARGEST]
        if high:
            found.append(
                f"values above {MAX_SHARE_OF_HALF * LARGEST:.0f}, half of the largest float16: {_listed(high)}"
            )
        cut = [f"{name} {100 * x.share:.2f} %" for name, x in self.saturation.items() if not x.share <= SATURATED]
        if cut:
            found.append(f"more than {100 * SATURATED:.0f} % of values are outside their range: {_listed(cut)}")
        if self.drift and not self.drift[1] <= max(GROWTH * self.drift[0], 1e-3):
            found.append(
                f"the memory drifts: it differs by {self.drift[0]:.2e} at first and by {self.drift[1]:.2e} at the end"
            )
        return found + (self.second_reading.failures(self.precision) if self.second_reading else [])

    def as_dict(self) -> dict:
        """Returns plain JSON values."""
        return asdict(self) | {"passed": not self.failures, "failures": self.failures}

    def markdown(self) -> str:
        """Returns the certificate in Markdown."""
        rows = [f"Precision {self.precision}, run by {self.backend}.", ""]
        for number, replay in enumerate(self.replays, 1):
            rows += [f"### Replay {number}", "", *replay.rows()]
        if self.peaks:
            largest = sorted(self.peaks.items(), key=lambda pair: -pair[1])[:SHOWN]
            rows += [
                f"### float16: the {len(largest)} largest of {len(self.peaks)} tensors",
                "",
                f"| layer (tensor) | largest float32 magnitude | share of {LARGEST:.0f} |",
                "|---|---|---|",
                *(f"| {name} | {peak:.4g} | {peak / LARGEST:.4f} |" for name, peak in largest),
                "",
            ]
        if self.saturation:
            worst = sorted(self.saturation.items(), key=lambda pair: -pair[1].share)[:SHOWN]
            rows += [
                f"### Eight bits: the {len(worst)} most saturated of {len(self.saturation)} tensors",
                "",
                "| layer (tensor) | outside the range | in the worst frame | largest, in ranges |",
                "|---|---|---|---|",
                *(f"| {n} | {100 * x.share:.3f} % | {100 * x.worst:.3f} % | {x.reach:.2f} |" for n, x in worst),
                "",
            ]
        if self.drift:
            early, late = self.drift
            rows += [f"Memory without a reset: differs by {early:.2e} at the beginning, {late:.2e} at the end.", ""]
        if self.quantization:
            rows += [
                "| layers | change of the outputs | share of the operations | in eight bits |",
                "|---|---|---|---|",
                *(
                    f"| {group} | {change:.4f} | {self.quantization['work'][group]:.3f} "
                    f"| {'yes' if group in self.quantization['groups'] else 'no'} |"
                    for group, change in self.quantization["sensitivities"].items()
                ),
                f"| all layers in eight bits | {self.quantization['together']:.4f} | "
                f"{sum(self.quantization['work'][group] for group in self.quantization['groups']):.3f} | |",
                "",
            ]
        rows += self.second_reading.markdown() if self.second_reading else []
        verdict = "**passed**" if not self.failures else "**failed**: " + "; ".join(self.failures)
        return "\n".join([*rows, f"Gate: {verdict}", ""])

    def save(self, folder: str | Path) -> None:
        """Writes `certificate.json` and `certificate.md`, or `certificate.<backend>.json` and `.md`.

        The backend is part of the name unless it is ONNX Runtime.
        """
        name = "certificate" if self.backend == "onnxruntime" else f"certificate.{self.backend}"
        write_json(Path(folder, f"{name}.json"), self.as_dict())
        with replacing(Path(folder, f"{name}.md")) as temporary:
            temporary.write_text(self.markdown(), encoding="utf-8")


def _listed(found: list[str]) -> str:
    """Joins the first three entries and the number of the others."""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more
