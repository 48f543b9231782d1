"""Compares trainings with several seeds each (variants of a config, or networks), compares runtimes, measures a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perception.cli import SEED, command_parser, number, output_file, output_folder

EXAMPLE = """example:
  perception benchmark ablation configs/synthetic/compare_flagship.py --out out/ablation --seeds 0 1 --amp \\
      --vary "no average of weights: train.ema_momentum=0" \\
      --vary "no BEV segmentation: train.disabled_losses=('bev_seg',)"
  perception benchmark accuracy configs/synthetic/compare_flagship.py configs/synthetic/compare_bevformer.py \\
      configs/synthetic/compare_maptr.py --out out/accuracy --seeds 0 1 --amp --json out/accuracy.json
  perception benchmark latency nano --backends pytorch ort openvino openvino-bf16 --json out/latency.json
  perception benchmark gpu --json out/gpu.json
  perception benchmark gpu --models nano --stages deployed --json out/deployed.json

What is finished is not trained again, so the same command goes on after an interruption. An interrupted latency prints
what it has measured, and writes no JSON.
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
    latency = commands.add_parser("latency", help="one frame in several runtimes that take turns")
    latency.add_argument("checkpoint", help="a .safetensors file, or the name of weights that came with the library")
    latency.add_argument(
        "--backends", nargs="+", default=["pytorch", "ort"],
        help="pytorch, compile, ort, openvino, openvino-bf16, tensorrt; the others are held to the first "
        "(default: pytorch ort)",
    )  # fmt: skip
    latency.add_argument("--export", type=Path, help="folder of an export; one is made where none is given")
    latency.add_argument("--passes", type=number(int, 1), default=30, help="timed for each (default: %(default)s)")
    latency.add_argument(
        "--max-seconds",
        type=number(float, 0),
        default=300,
        help="after which no further pass begins (default: %(default)s)",
    )
    latency.add_argument(
        "--threads", type=number(int, 0, 4096), default=0, help="of the CPU; 0 for all (default: %(default)s)"
    )
    latency.add_argument("--seed", type=SEED, default=0, help="of the images (default: %(default)s)")
    latency.add_argument("--json", type=output_file("--json"), help="file for all numbers")
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
    arguments = parser.parse_args(argv)
    if arguments.command == "latency":
        _latency(arguments)
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


def _latency(arguments) -> None:
    import sys

    from perception.export.latency import Interrupted, as_dict, check_request, measure, table
    from perception.export.onnx import export_onnx
    from perception.files import scratch_folder, write_json
    from perception.models.checkpoint import load_model

    network = load_model(arguments.checkpoint)
    bounds = {name: getattr(arguments, name) for name in ("passes", "threads", "max_seconds")}
    check_request(network, arguments.export, arguments.backends, **bounds)
    with scratch_folder("latency") as folder:
        if not arguments.export:
            export_onnx(network, folder, progress=True)
        try:
            measured = measure(
                network, arguments.export or folder, arguments.backends, seed=arguments.seed, progress=True, **bounds
            )
        except Interrupted as stop:
            print(table(stop.measured))
            raise
    made = len(next(iter(measured.values())).passes)
    if made < arguments.passes:
        print(f"stopped after {arguments.max_seconds:g} s: {made} of {arguments.passes} passes", file=sys.stderr)
    print(table(measured))
    if arguments.json:
        write_json(arguments.json, as_dict(measured))


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
