"""How far an exported network is from its original, which of that may pass, and how it is written down."""

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
    """The largest differences that pass; None where nothing is held to one."""

    raw: float | None  # of raw outputs and memory
    raw_mean: float | None  # likewise, on average
    nds: float
    lane_ap: float


GATES = {
    "fp32": Gate(1e-3, None, 0.0005, 0.0005),
    "fp16": Gate(None, None, 0.003, 0.005),
    "int8": Gate(None, None, 0.01, 0.01),
    "fp8": Gate(None, None, 0.01, 0.01),
}
# For fp32 exports in OpenVINO, which sums in another order than PyTorch and ONNX Runtime. All three are about equally
# far from float64, but PyTorch and ONNX Runtime share most of their rounding. Without that the largest of so many
# differences is chance, so the mean is held. In bfloat16 it is as good as any other 16-bit float.
OPENVINO_GATES = {"openvino": Gate(None, 1e-4, 0.0005, 0.0005), "openvino-bf16": GATES["fp16"]}
GROWTH = 3.0  # how many times larger the differences at the end of a long drive may be than at its beginning
# The share of the largest float16 that a value may reach: partial sums, and other frames, go beyond what was measured.
MOST_OF_HALF = 0.5
# The share of a quantized tensor that may lie beyond its range: 100 times what ranges leave out where they come from.
# With all layers of the shipped network in INT8, the most is 0.9 %; with ranges without blinded cameras it is 1.6 %.
SATURATED = 0.01
SHOWN = 8  # rows of a table for people; the JSON file holds all


@dataclass(frozen=True)
class Replay:
    """One dataset, driven by original and export.

    Args:
        cameras: of the dataset's rig that the export takes.
        seats: cameras that the export takes; those that the rig has not are absent.
        focal_lengths: of each camera in the first frame, in image widths.
        bad_images: whether some images were black or white.
        frames, scenes: of the dataset.
        not_finite: frames in which the export gave numbers that are not finite; they count as empty and are left out of
            the differences.
        raw: largest and mean difference by output, rows aligned. A number that is larger than one counts in units of
            itself, for float32 keeps digits, not decimals: a box 40 m away is not known to a millimetre.
        pixels: the largest difference in grey values between what the graph makes of the images that it is given and
            what they are in training (RGB, fitted by Pillow), and the share of values that differ at all.
        boxes, lines: largest and mean distance in metres of matched boxes (centres) and lines (points).
        metrics: by name, of the original and of the export.
    """

    cameras: int
    seats: int
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
        """What is too far off."""
        found = []
        if self.not_finite:
            found.append(f"outputs are not finite in {self.not_finite} of {self.frames} frames")
        for name, (largest, mean) in self.raw.items():
            if gate.raw is not None and not largest <= gate.raw:
                found.append(f"{name} differs by {largest:.2e}, more than {gate.raw:.0e}")
            if gate.raw_mean is not None and not mean <= gate.raw_mean:
                found.append(f"{name} differs by {mean:.2e} on average, more than {gate.raw_mean:.0e}")
        if self.pixels[0] > 1:
            found.append(f"fitted images differ by up to {self.pixels[0]:.0f} grey values from those of training")
        for name, most in (("nds", gate.nds), ("lane_mAP", gate.lane_ap)):
            one, other = self.metrics[name]
            if not abs(one - other) <= most:
                found.append(f"{name} is {other:.4f} instead of {one:.4f}, more than {most} off")
        return found

    def rows(self) -> list[str]:
        """Its tables for people, in Markdown."""
        bad = ", a black image and a white image" if self.bad_images else ""
        absent = f" in {self.seats} seats" if self.seats != self.cameras else ""
        return [
            f"{self.frames} frames of {self.scenes} scenes, in each a missing camera, turned cameras{bad}. "
            f"{self.cameras} cameras{absent}, focal lengths in image widths: "
            f"{', '.join(f'{focal:.2f}' for focal in self.focal_lengths)}.",
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


@dataclass(frozen=True)
class Certificate:
    """How far an exported network is from its original.

    Args:
        precision: of the export.
        backend: that ran the export, as `Runtime` calls it.
        replays: of each dataset that both drove.
        peaks: largest absolute value that each float16 tensor has in float32, over all replays; empty without halves.
        saturation: by quantized tensor, over all replays; empty for other precisions.
        drift: largest differences of the memory over the first and over the last quarter of a long drive without a
            reset, empty where none was made.
        quantization: what `quantize_graph` found out, empty for other precisions.
        second_reading: some frames again by another executor; None where ONNX Runtime did not run the export, or where
            it gave numbers that are not finite.
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
        """Why the export must not be used; empty if it may."""
        gate = GATES[self.precision]
        if self.precision == "fp32":
            gate = OPENVINO_GATES.get(self.backend, gate)
        found = []
        for number, replay in enumerate(self.replays, 1):
            where = f"replay {number}: " if number > 1 else ""
            found += [f"{where}{failure}" for failure in replay.failures(gate)]
        high = [f"{name} {peak:.0f}" for name, peak in self.peaks.items() if not peak <= MOST_OF_HALF * LARGEST]
        if high:
            found.append(
                f"values reach more than {MOST_OF_HALF * LARGEST:.0f}, half of what float16 holds: {_listed(high)}"
            )
        cut = [f"{name} {100 * x.share:.2f} %" for name, x in self.saturation.items() if not x.share <= SATURATED]
        if cut:
            found.append(f"more than {100 * SATURATED:.0f} % of values are beyond their range: {_listed(cut)}")
        if self.drift and not self.drift[1] <= max(GROWTH * self.drift[0], 1e-3):
            found.append(f"the memory drifts: off by {self.drift[0]:.2e} early and by {self.drift[1]:.2e} late")
        return found + (self.second_reading.failures(self.precision) if self.second_reading else [])

    def as_dict(self) -> dict:
        """Plain JSON values."""
        return asdict(self) | {"passed": not self.failures, "failures": self.failures}

    def markdown(self) -> str:
        """All of it for people."""
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
                "| layer (tensor) | beyond the range | in the worst frame | largest, in ranges |",
                "|---|---|---|---|",
                *(f"| {n} | {100 * x.share:.3f} % | {100 * x.worst:.3f} % | {x.reach:.2f} |" for n, x in worst),
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
        rows += self.second_reading.markdown() if self.second_reading else []
        verdict = "**passed**" if not self.failures else "**failed**: " + "; ".join(self.failures)
        return "\n".join([*rows, f"Gate: {verdict}", ""])

    def save(self, folder: str | Path) -> None:
        """Writes `certificate.json` and `.md`; of other backends than ONNX Runtime, such as OpenVINO,
        `certificate.openvino.json` and `.md`."""
        name = "certificate" if self.backend == "onnxruntime" else f"certificate.{self.backend}"
        write_json(Path(folder, f"{name}.json"), self.as_dict())
        with replacing(Path(folder, f"{name}.md")) as beside:
            beside.write_text(self.markdown(), encoding="utf-8")


def _listed(found: list[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more
