"""Compares trainings with several seeds each (variants of a config, or networks), and measures what a frame takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from perception.cli import SEED, command_parser, number, output_file, output_folder

EXAMPLE = """example:
  perception benchmark ablation configs/synthetic/compare_flagship.py --out out/ablation --seeds 0 1 --amp \\
      --vary "no average of weights: train.ema_momentum=0" \\
      --vary "no BEV segmentation: train.disabled_losses=('bev_seg',)"
  perception benchmark accuracy configs/synthetic/compare_flagship.py configs/synthetic/compare_bevformer.py \\
      configs/synthetic/compare_maptr.py --out out/accuracy --seeds 0 1 --amp --json out/accuracy.json
  perception benchmark latency --models nano tiny base --backends pytorch bf16 ort openvino-bf16 --json out/latency.json
  perception benchmark roofline --models nano tiny base --json out/roofline.json --plot out/roofline.png
  perception benchmark scaling --models nano --json out/scaling.json --plot out/scaling.png
  perception benchmark gpu --json out/gpu.json
  perception benchmark gpu --models nano --stages deployed --json out/deployed.json

What is finished is not trained again, so the same command goes on after an interruption. An interrupted latency prints
what it has measured of the model that it was at; its JSON has the models before.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("benchmark", __doc__, EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    ablation = commands.add_parser("ablation", help="a config against variants that differ in some of its values")
    ablation.add_argument("config", help="what the variants are held to")
    ablation.add_argument(
        "--vary", action="append", default=[], metavar="'NAME: KEY=VALUE ...'", help="a variant; may be given often"
    )
    accuracy = commands.add_parser("accuracy", help="networks against each other, with what a frame costs each")
    accuracy.add_argument("configs", nargs="+", help="the others are held to the first")
    for command in (ablation, accuracy):
        command.add_argument("--seeds", type=SEED, nargs="+", default=[0, 1], help="at least two (default: 0 1)")
        command.add_argument("--out", type=output_folder("--out"), required=True, help="folder for the trainings")
        command.add_argument("--amp", action="store_true", help="run the networks in bfloat16")
        command.add_argument("--json", type=output_file("--json"), help="file for all numbers")
    latency = commands.add_parser("latency", help="one frame in several backends that take turns, with their accuracy")
    latency.add_argument(
        "--backends", nargs="+", default=["pytorch", "ort"], metavar="BACKEND",
        help="of baseline, which is always measured, pytorch, bf16, compile, compile-bf16, ort, ort-int8, openvino, "
        "openvino-bf16, openvino-int8, openvino-int8-bf16, tensorrt (default: pytorch ort)",
    )  # fmt: skip
    latency.add_argument(
        "--exports", type=output_folder("--exports"), metavar="DIR",
        help="folder of exports, such as DIR/nano-fp32; those that are missing are made there, and stay (default: all "
        "are made, and deleted)",
    )  # fmt: skip
    latency.add_argument("--passes", type=number(int, 1), default=30, help="timed for each (default: %(default)s)")
    latency.add_argument(
        "--scenes", type=number(int, 0), default=4,
        help="of a generated town on which the metrics of trained weights are compared; 0 for none (default: "
        "%(default)s)",
    )  # fmt: skip
    latency.add_argument("--seed", type=SEED, default=0, help="of images and towns (default: %(default)s)")
    gpu = commands.add_parser("gpu", help="a frame, its parts and training steps on a GPU, most important first")
    gpu.add_argument(
        "--models", nargs="+", default=["base", "nano", "tiny"], metavar="MODEL",
        help="presets, shipped weights or .safetensors files, what matters most first (default: %(default)s)",
    )  # fmt: skip
    gpu.add_argument(
        "--stages", nargs="+", default=["frames", "ports", "sampling", "training", "deployed", "compiled"],
        metavar="STAGE", help="which to run; deployed compares accuracy, with the first model that has trained weights "
        "(default: %(default)s)",
    )  # fmt: skip
    gpu.add_argument("--seconds", type=number(float, 0), default=360, help="of all together (default: %(default)s)")
    gpu.add_argument("--device", default="cuda", help="cuda, or cpu without CUDA graphs (default: %(default)s)")
    gpu.add_argument(
        "--json",
        type=output_file("--json"),
        required=True,
        help="file for all numbers, written anew after each of them",
    )
    roofline = commands.add_parser("roofline", help="parts of a frame against what the machine can do")
    roofline.add_argument(
        "--precisions", nargs="+", default=[], metavar="PRECISION",
        help="fp32, bf16, which take turns (default: those that the device has)",
    )  # fmt: skip
    scaling = commands.add_parser("scaling", help="time of a frame over cameras, image size, grid, queries and batch")
    scaling.add_argument(
        "--axes", nargs="+", default=["cameras", "image", "grid", "queries", "batch"], metavar="AXIS",
        help="what is changed, one after another (default: %(default)s)",
    )  # fmt: skip
    scaling.add_argument("--precision", default="fp32", help="fp32 or bf16 (default: fp32)")
    for command in (roofline, scaling):
        command.add_argument("--passes", type=number(int, 1), default=5, help="timed for each (default: %(default)s)")
        command.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
        command.add_argument("--plot", type=output_file("--plot"), help="PNG to write; needs matplotlib")
    for command in (latency, roofline, scaling):
        command.add_argument(
            "--models", nargs="+", default=["nano"], metavar="MODEL",
            help="shipped weights, presets with random weights, or .safetensors files (default: nano)",
        )  # fmt: skip
        command.add_argument(
            "--threads", type=number(int, 0, 4096), default=0, help="of the CPU; 0 for one per CPU (default: 0)"
        )
        command.add_argument(
            "--cpus",
            type=cpu_list,
            default=[],
            metavar="N,N",
            help="that the process may use (default: all of its own)",
        )
        command.add_argument(
            "--max-seconds", type=number(float, 0), default=300,
            help="of timed passes per model, or per model and axis, after which none begins (default: %(default)s)",
        )  # fmt: skip
        command.add_argument("--json", type=output_file("--json"), help="file for all numbers")
    arguments = parser.parse_args(argv)
    if arguments.command == "latency":
        _latency(arguments)
        return
    if arguments.command in ("roofline", "scaling"):
        _machine(arguments)
        return
    if arguments.command == "gpu":
        _gpu(arguments)
        return

    import dataclasses

    from perception.engine.comparison import compare, measure_costs
    from perception.engine.config import load_config
    from perception.engine.config_file import parse_options
    from perception.errors import ConfigError

    if arguments.command == "accuracy":
        configs = {Path(path).stem: load_config(path) for path in arguments.configs}
        result = compare(configs, arguments.seeds, arguments.out, amp=arguments.amp)
        _tell(dataclasses.replace(result, costs=measure_costs(configs)), arguments.json)
        return
    variants = {"as configured": load_config(arguments.config)}
    for text in arguments.vary:
        name, colon, options = text.partition(":")
        if not colon or not options.strip():
            raise ConfigError(
                f"--vary {text!r} is not 'NAME: KEY=VALUE ...'; write e.g. 'no EMA: train.ema_momentum=0'"
            )
        variants[name.strip()] = load_config(arguments.config, parse_options(options.split()))
    _tell(compare(variants, arguments.seeds, arguments.out, amp=arguments.amp), arguments.json)


def cpu_list(text: str) -> list[int]:
    """The type of an argument that names CPUs, such as `0,1` or `0-3,8`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise argparse.ArgumentTypeError(f"{text!r} names no CPUs; give their numbers, such as 0,1 or 0-3")
        found += range(int(first), int(last or first) + 1)
    return found


def _latency(arguments) -> None:
    from perception.benchmark.latency import measure_models

    measure_models(
        arguments.models, arguments.backends, exports=arguments.exports, passes=arguments.passes,
        threads=arguments.threads, cpus=arguments.cpus, scenes=arguments.scenes, seed=arguments.seed,
        max_seconds=arguments.max_seconds, json=arguments.json, progress=True,
    )  # fmt: skip


def _machine(arguments) -> None:
    import importlib

    if arguments.plot:
        importlib.import_module("matplotlib")  # before the long work
    options = {
        name: getattr(arguments, name) for name in ("device", "passes", "threads", "cpus", "max_seconds", "json")
    }
    if arguments.command == "roofline":
        from perception.benchmark import roofline

        content = roofline.measure_roofline(arguments.models, precisions=arguments.precisions, progress=True, **options)
        tables, draw = roofline.tables, roofline.draw
    else:
        from perception.benchmark import scaling

        content = scaling.measure_scaling(
            arguments.models, axes=arguments.axes, precision=arguments.precision, progress=True, **options
        )
        tables, draw = scaling.tables, scaling.draw
    print(tables(content))
    if arguments.plot:
        draw(content, arguments.plot)


def _gpu(arguments) -> None:
    from perception.benchmark.gpu import measure, tables

    content = measure(
        arguments.json, models=arguments.models, stages=arguments.stages, device=arguments.device,
        seconds=arguments.seconds,
    )  # fmt: skip
    print(tables(content))


def _tell(result, path: Path | None) -> None:
    from perception.files import write_json

    print(result.table())
    if path:
        write_json(path, result.as_dict())
