"""How far an exported network is from its original, which of that may pass, and how it is written down."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from perception.files import replacing, write_json

METRICS = ("nds", "map", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "lane_map", "lane_map_strict")
# The largest differences that pass, by precision: of raw numbers (None: not held to any), NDS and lane mAP.
GATES = {
    "fp32": (1e-3, 0.0005, 0.0005),
    "fp16": (None, 0.003, 0.005),
    "int8": (None, 0.01, 0.01),
    "fp8": (None, 0.01, 0.01),
}
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
        pixels: the largest difference in grey values between images fitted in the graph and by Pillow, as in training,
            and the share of values that differ at all; zero where nothing is fitted in the graph.
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
        most_raw, most_nds, most_lane = GATES[self.precision]
        found = []
        if most_raw is not None:
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
        """Writes `certificate.json` and `certificate.md`, of TensorRT `certificate.tensorrt.json` and `.md`."""
        name = "certificate" if self.backend == "onnxruntime" else f"certificate.{self.backend}"
        write_json(Path(folder, f"{name}.json"), self.as_dict())
        with replacing(Path(folder, f"{name}.md")) as beside:
            beside.write_text(self.markdown(), encoding="utf-8")
