"""Runs all measurements on a GPU in one call, most important first; results are written as they come.

The flagship at full size, `models[0]`, matters most. Time limits of the stages are shares of the total time. Their sum
is larger than one, since most stages need less; the remaining time goes to the last stages. The compiler is last,
because it may take minutes and fail.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from perception.benchmark.deployed import measure_deployed
from perception.benchmark.frames import PORTS, check_model, has_weights, measure_frames, measure_ports
from perception.benchmark.sampling import measure_sampling
from perception.benchmark.stages import Stage, run_stages
from perception.benchmark.training import measure_training
from perception.errors import ConfigError
from perception.files import write_json

MODELS = ("base", "nano", "tiny")
STAGES = ("frames", "ports", "sampling", "training", "deployed", "compiled")
SECONDS = 360.0
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def plan(models: Sequence[str], stages: Sequence[str], device: str, seconds: float) -> list[Stage]:
    """Plans the stages in order, most important first.

    Args:
        models: shipped weights, presets or `.safetensors` files of flagships, most important first. Stage "deployed"
            measures the first one with trained weights.
        stages: of `STAGES`.
        device: "cuda" or "cpu".
        seconds: total time limit.

    Raises:
        ConfigError: a stage is unknown, or there is nothing to measure.
    """
    if unknown := [name for name in stages if name not in STAGES]:
        raise ConfigError(f"--stages: {unknown[0]!r} is not known; use some of {', '.join(STAGES)}")
    if not models or not stages:
        raise ConfigError("nothing to measure; give at least one of --models and of --stages")
    first, *others = models
    trained = [name for name in models if has_weights(name)]
    if list(stages) == ["deployed"] and not trained:
        raise ConfigError(
            "--stages deployed compares metrics, which random weights do not have; give --models shipped weights, such "
            "as nano, or a .safetensors file"
        )

    def frames(model: str, share: float) -> Stage:
        return Stage("frames", model, measure_frames, (model, device, False), share * seconds)

    def compiled(model: str, share: float) -> Stage:
        return Stage("compiled", model, measure_frames, (model, device, True), share * seconds)

    def training(model: str, share: float) -> Stage:
        return Stage("training", model, measure_training, (model, device, BATCHES), share * seconds)

    order = [
        frames(first, 0.2),
        Stage("ports", first, measure_ports, (first, device), 0.14 * seconds),
        *(frames(model, 0.1) for model in others[:1]),
        Stage("sampling", "", measure_sampling, (tuple(models), device), 0.1 * seconds),
        training(first, 0.2),
        *(Stage("deployed", model, measure_deployed, (model, device), 0.3 * seconds) for model in trained[:1]),
        *(training(model, 0.13) for model in others[:1]),
        *(frames(model, 0.1) for model in others[1:]),
        *(training(model, 0.2) for model in others[1:]),
        *(compiled(model, 0.36) for model in models),
    ]
    chosen = [stage for stage in order if stage.name in stages]
    stretch = max(1.0, seconds / sum(stage.seconds for stage in chosen))  # few stages share the total time
    return [replace(stage, seconds=stretch * stage.seconds) for stage in chosen]


def measure(
    path: str | Path,
    *,
    models: Sequence[str] = MODELS,
    stages: Sequence[str] = STAGES,
    device: str = "cuda",
    seconds: float = SECONDS,
    progress: Callable[[str], None] = print,
) -> dict:
    """Runs all stages and rewrites the results after every measurement.

    Args:
        path: of the JSON file.
        models, stages, device, seconds: as in `plan`.
        progress: receives a line for every measurement.

    Returns:
        The content of the file: the machine, and `rows` with `stage`, `model`, `name` and values, or an `error`.

    Raises:
        CheckpointError: a model's file is missing.
        ConfigError: the device is not available, the model is unknown, or as in `plan`.
    """
    order = plan(models, stages, device, seconds)
    if device not in ("cuda", "cpu") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device {device!r} is not available; use one of {', '.join(_devices())}")
    for model in models:
        check_model(model)
    rows: list[dict] = []
    content = {"machine": _machine(device), "seconds": seconds, "rows": rows}
    write_json(path, content)
    for row in run_stages(order, seconds):
        rows.append(row)
        write_json(path, content)
        progress(_line(row))
    return content


def _devices() -> list[str]:
    return ["cpu"] + ["cuda"] * torch.cuda.is_available()


def _machine(device: str) -> dict:
    """Describes the machine and the software versions."""
    threads = f"{torch.get_num_threads()} CPU threads"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else threads,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _line(row: dict) -> str:
    """Formats a row for the terminal."""
    head = " ".join(part for part in (row["stage"], row["model"], row["name"]) if part)
    if "error" in row:
        return f"{head}: {row['error']}"
    facts = [
        f"{row[key]:.{digits}f} {unit}"
        for key, digits, unit in (
            ("p50_ms", 2, "ms"), ("step_ms", 1, "ms a step"), ("frames_per_s", 1, "frames/s"),
            ("kernel_ms", 2, "ms of kernels"), ("kernels", 0, "kernels"),
            ("speedup", 2, "x speedup"), ("share", 3, "of both ports"),
        )
        if key in row
    ]  # fmt: skip
    if "gate" in row:
        facts.append(f"{'passes' if row['passed'] else 'fails'} the gate of {row['gate']}")
    return f"{head}: {', '.join(facts)}"


# -------------------------------------------------------------------------------------------------------------- tables


def tables(content: dict) -> str:
    """Formats the result of `measure` as Markdown."""
    rows = content["rows"]
    parts = ["{device}, torch {torch}, CUDA {cuda}".format(**content["machine"])]

    def add(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        if lines:
            body = ["| " + " | ".join(line) + " |" for line in (heads, *lines)]
            parts.append("\n".join([title, "", body[0], "|---" * len(heads) + "|", *body[1:]]))

    good = [row for row in rows if "error" not in row]
    for model in dict.fromkeys(row["model"] for row in rows if row["stage"] in ("frames", "compiled")):
        lines = [
            [
                row["name"] + (f" ({row['mode']})" if "mode" in row else ""),
                *_milliseconds(row), f"{row['speedup']:.2f}", _number(row.get("peak_mib"), 0),
                *(_difference(row.get("difference", {}), kind) for kind in ("memory", "box", "line")),
            ]
            for row in good
            if row["model"] == model and row["stage"] in ("frames", "compiled") and "speedup" in row
        ]  # fmt: skip
        heads = [
            "one frame",
            "p50 ms",
            "p90",
            "p99",
            "speedup",
            "peak MiB",
            "memory difference",
            "box difference",
            "line difference",
        ]
        add(f"{model}: one frame of six cameras, batch 1, interleaved with eager float32", heads, lines)
    lines = [
        [row["name"], *(f"{row[name]['p50_ms']:.2f}" for name in (row["model"], *PORTS)), f"{row['share']:.3f}"]
        for row in good
        if row["stage"] == "ports" and "share" in row
    ]
    add("p50 in ms, all interleaved", ["one frame", "flagship", *PORTS, "flagship over both"], lines)
    lines = [
        [
            row["name"], f"{row['p50_ms']:.3f}", f"{row['plain_p50_ms']:.3f}", f"{row['speedup']:.2f}",
            " ".join(f"{difference:.1e}" for difference in row["difference"]),
        ]
        for row in good
        if row["stage"] == "sampling"
    ]  # fmt: skip
    add(
        "sampling, interleaved with F.grid_sample",
        ["function, sizes of", "p50 ms", "plain ms", "speedup", "difference"],
        lines,
    )
    parts_of_step = ("data", "forward", "losses", "matching", "backward", "optimizer")
    lines = [
        [
            f"{row['model']}, {row['name']}", f"{row['step_ms']:.0f}", _number(row.get("frames_per_s"), 1),
            *(_number(100 * shares[part], 0) if part in shares else "" for part in parts_of_step),
            _number(row.get("peak_mib"), 0), _number(row["gpu_busy"] * 100, 0) if "gpu_busy" in row else "",
        ]
        for row in good
        if row["stage"] == "training"
        for shares in [row.get("shares", {})]
    ]  # fmt: skip
    heads = ["training", "ms a step", "frames/s", *(f"{part} %" for part in parts_of_step), "peak MiB", "GPU busy %"]
    add("training steps in bfloat16 (matching is a part of losses)", heads, lines)
    for model in dict.fromkeys(row["model"] for row in good if row["stage"] == "deployed"):
        lines = [_deployed_line(row) for row in good if row["stage"] == "deployed" and row["model"] == model]
        heads = [
            "a frame with copies", "p50 ms", "p99", "memory difference", "raw box difference", "raw line difference",
            "box difference, m", "line difference, m", "NDS", "lane mAP", "gate",
        ]  # fmt: skip
        add(f"{model}: generated scenes with its own memory, against float32 on the CPU", heads, lines)
    failed = [f"- {_line(row)}" for row in rows if "error" in row]
    return "\n\n".join([*parts, *(["Not measured:", "\n".join(failed)] if failed else [])])


def _deployed_line(row: dict) -> list[str]:
    """Formats a line of the accuracy table: metrics of the reference, differences of metrics for other modes."""
    head = [row["name"], f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}"]
    metrics = [row["metrics"][name] for name in ("nds", "lane_mAP")]
    if "gate" not in row:
        return [*head, *[""] * 5, *(f"{value:.4f}" for value in metrics), ""]
    return [
        *head,
        *(_difference(row["raw"], kind) for kind in ("memory", "raw_box", "raw_line")),
        *(_difference(row, kind) for kind in ("boxes", "lines")),
        *(f"{other - one:+.4f}" for one, other in metrics),
        f"{row['gate']}: {'passed' if row['passed'] else 'failed'}",
    ]


def _milliseconds(row: dict) -> list[str]:
    return [f"{row[f'p{share}_ms']:.2f}" for share in (50, 90, 99)]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _difference(differences: dict, kind: str) -> str:
    if kind not in differences:
        return ""
    return "not finite" if differences[kind] is None else "{:.1e} ({:.1e})".format(*differences[kind])
