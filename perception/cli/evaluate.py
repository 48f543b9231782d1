"""Evaluates weights, or a submission file, on a nuScenes-format split: boxes by the official devkit, lanes by one of
two published protocols. Options of the group "robustness" add further evaluations with disturbed inputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from perception.cli import (
    SEED,
    add_import,
    add_launcher,
    add_precision,
    command_parser,
    number,
    output_file,
    output_folder,
)

EXAMPLE = """examples:
  perception evaluate configs/synthetic/nano.py out/nano/nano.safetensors --json out/nano/evaluation.json
  perception evaluate configs/synthetic/nano.py out/nano/epoch_24.pth --dataroot out/other_town --split val \\
      --lanes-protocol streammapnet --range 100x50 --save-submission out/nano/submission
  perception evaluate --submission out/nano/submission/lanes.json --dataroot out/other_town \\
      --version v1.0-synthetic --split val
  torchrun --nproc_per_node 2 -m perception evaluate configs/synthetic/nano.py nano --launcher pytorch
  perception evaluate configs/synthetic/nano.py nano --drop-camera each --extrinsics-noise-deg 1 \\
      --corrupt each --no-memory --json out/nano/robustness.json

A submission is a JSON file of boxes in nuScenes' format, or of lanes in the one that docs/evaluation.md describes.
"""


def lane_options(arguments) -> dict:
    """Options of the lane evaluation, the same for a network and for a file."""
    return {
        "protocol": arguments.lanes_protocol,
        "lane_range": arguments.range,
        "score_threshold": arguments.score_threshold,
        "workers": arguments.workers,
        "progress": True,
    }


def evaluate_weights(arguments) -> tuple[str, dict, dict]:
    """The tables, the headline and all numbers of a network. The processes of a launcher share the scenes."""
    from perception.engine.config_file import check_datasets

    options = {
        f"val_data.{key}": value for key in ("dataroot", "version", "split") if (value := getattr(arguments, key))
    }
    check_datasets(arguments.config, options, ("val_data",))

    import torch  # takes seconds to load

    from perception.engine.config import build_dataset, load_config
    from perception.engine.launchers import join_processes
    from perception.engine.weights import load_weights
    from perception.errors import ConfigError
    from perception.evaluation.dataset import check_evaluable, evaluate_predictions, save_submissions
    from perception.evaluation.robustness import evaluate_robustness, plan_trials
    from perception.inference.acceleration import accelerated
    from perception.inference.shared import from_first, predict_shared, rank_and_size

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu")
    join_processes(arguments.launcher)
    first = rank_and_size()[0] == 0
    config = load_config(arguments.config, options)
    network = load_weights(arguments.checkpoint, config.model).to(arguments.device)
    model = accelerated(network, precision=arguments.precision)
    if first:
        print(f"precision: {model.choice}", file=sys.stderr)
    dataset = build_dataset(config.val_data, config.model)
    check_evaluable(dataset)
    trials = plan_trials(
        dataset.cameras,
        drop_camera=arguments.drop_camera,
        extrinsics_noise_deg=arguments.extrinsics_noise_deg,
        corrupt=arguments.corrupt,
        no_memory=arguments.no_memory,
        seed=arguments.seed,
    )
    stream = predict_shared(model, dataset, workers=arguments.workers, progress=True)
    if arguments.save_submission and first:
        save_submissions(arguments.save_submission, dataset, stream.objects)
    evaluation = from_first(lambda: evaluate_predictions(dataset, stream.objects, **lane_options(arguments)))
    metrics = evaluation.as_dict() | {
        "precision": model.precision,
        "fps": 1 / stream.seconds_per_frame,
        "samples": len(dataset),
    }
    table = evaluation.table()
    if trials:
        card = evaluate_robustness(
            model,
            dataset,
            trials,
            evaluation.metrics(),
            protocol=arguments.lanes_protocol,
            lane_range=arguments.range,
            workers=arguments.workers,
            progress=True,
        )
        metrics["robustness"] = card.as_dict() | {"seed": arguments.seed}
        table = f"{table}\n\n{card.table()}"
    return table, {name: metrics[name] for name in ("nds", "mAP", "lane_mAP", "fps")}, metrics


def evaluate_file(arguments) -> tuple[str, dict, dict]:
    """The tables, the headline and all numbers of a submission."""
    from perception.evaluation.submission import DetectionSubmission, check_samples, read_submission
    from perception.files import check_dataset

    submission = read_submission(arguments.submission)
    check_dataset(arguments.dataroot, arguments.version)

    from perception.data.nuscenes import NuScenesDataset  # PyTorch and the devkit, which take seconds to load
    from perception.evaluation.dataset import evaluate_lines
    from perception.evaluation.detection import evaluate_submission, load_tables, split_tokens

    if isinstance(submission, DetectionSubmission):
        tables = load_tables(arguments.dataroot, arguments.version)
        check_samples(submission, split_tokens(tables, arguments.split))
        content = {"meta": submission.meta, "results": submission.results}
        result = evaluate_submission(tables, arguments.split, content)
        headline = {"nds": result.nds, "mAP": result.mean_ap}
        return result.table(), headline, headline | {"detection": result.as_dict(), "samples": result.samples}
    # Images are not read, so their size does not matter.
    dataset = NuScenesDataset(arguments.dataroot, arguments.version, arguments.split, image_size=(90, 160))
    check_samples(submission, dataset.tokens)
    lanes, strict = evaluate_lines(dataset, submission.results, **lane_options(arguments))
    headline = {"lane_mAP": lanes.mean_ap, "lane_mAP_strict": strict.mean_ap}
    details = {"lanes": lanes.as_dict(), "strict_lanes": strict.as_dict(), "samples": lanes.frames}
    return f"{lanes.table()}\n\n{strict.table()}", headline, headline | details


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("evaluate", __doc__, EXAMPLE)
    parser.add_argument("config", nargs="?", help="the config that the weights were trained with, a file or a name")
    parser.add_argument(
        "checkpoint", nargs="?", help=".safetensors or .pth of a training, or the name of shipped weights"
    )
    parser.add_argument("--submission", type=Path, help="JSON of boxes or lanes, instead of config and checkpoint")
    parser.add_argument("--dataroot", help="instead of the config's val_data.dataroot")
    parser.add_argument("--version", help="instead of the config's val_data.version")
    parser.add_argument(
        "--split",
        help="instead of the config's val_data.split; or a file of scene names, one a line or as a JSON list (.json or "
        ".txt)",
    )
    parser.add_argument("--lanes-protocol", choices=("maptr", "streammapnet"), default="maptr", help="(default: maptr)")
    parser.add_argument("--range", help="of the lanes, metres along x and y (default: the model's; 60x30 for a file)")
    parser.add_argument(
        "--score-threshold",
        type=number(float, 0, 1),
        help="score threshold of the operating point (default: that of the best F1, per class)",
    )
    parser.add_argument(
        "--save-submission",
        type=output_folder("--save-submission"),
        metavar="DIR",
        help="also write detection.json and lanes.json",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_precision(parser, default="float32")
    add_import(parser)
    add_launcher(parser)
    parser.add_argument(
        "--workers", type=number(int, 0, 1024), default=0, help="processes that load images and match lines (default 0)"
    )
    parser.add_argument("--json", type=output_file("--json"), help="file for all numbers")
    disturbed = parser.add_argument_group("robustness", "also evaluate with disturbed inputs")
    disturbed.add_argument("--drop-camera", metavar="NAME", help="a camera is missing; `each` for one after the other")
    disturbed.add_argument(
        "--extrinsics-noise-deg",
        type=number(float, -180, 180),
        metavar="X",
        help="the yaw of each camera is off by this angle",
    )
    disturbed.add_argument(
        "--corrupt",
        metavar="KIND[:SEVERITY]",
        help="images are bad: bright, dark, fog, blur, noise, quantize or `each`; severity 1 to 3 (default 2)",
    )
    disturbed.add_argument(
        "--no-memory", action="store_true", help="without temporal memory: each frame is a first frame"
    )
    disturbed.add_argument("--seed", type=SEED, default=0, help="of random disturbances (default 0)")
    arguments = parser.parse_args(argv)

    from perception.errors import ConfigError
    from perception.files import write_json
    from perception.types import LaneRange

    arguments.range = LaneRange.parse(arguments.range) if arguments.range else None
    if arguments.submission:
        if arguments.config or arguments.save_submission:
            raise ConfigError("--submission needs neither config, checkpoint nor --save-submission; leave them out")
        if arguments.no_memory or {arguments.drop_camera, arguments.extrinsics_noise_deg, arguments.corrupt} != {None}:
            raise ConfigError("--submission has no inputs to disturb; give config and checkpoint instead")
        if missing := [name for name in ("dataroot", "version", "split") if not getattr(arguments, name)]:
            raise ConfigError(f"--{missing[0]} is missing: with --submission give --dataroot, --version and --split")
        if arguments.launcher != "none":
            raise ConfigError("--submission has no scenes to predict that processes could share; leave out --launcher")
    elif not (arguments.config and arguments.checkpoint):
        raise ConfigError("config and checkpoint are missing; give both, or a file with --submission")

    table, headline, metrics = (evaluate_file if arguments.submission else evaluate_weights)(arguments)
    if arguments.launcher != "none":
        from perception.inference.shared import rank_and_size

        if rank_and_size()[0] != 0:
            return
    print(table)
    if "lane_mAP" in headline:
        lanes = metrics["lanes"]
        thresholds = ", ".join(f"{t:g}" for t in lanes["thresholds_m"])
        print(f"\nlane mAP by protocol {lanes['protocol']}, range {lanes['lane_range']}, thresholds {thresholds} m")
    print("\n" + "  ".join(f"{name} {value:.3f}" for name, value in headline.items()))
    if arguments.json:
        write_json(arguments.json, metrics)
