"""Trains a network by a config."""

from __future__ import annotations

from collections.abc import Sequence

from perception.cli import SEED, add_import, add_launcher, command_parser, output_file, output_folder

EXAMPLE = """example:
  perception train configs/synthetic/nano.py --work-dir out/nano
  perception train configs/synthetic/nano.py --work-dir out/nano --resume
  perception train configs/synthetic/nano.py --work-dir out/nano --resume --allow-change --cfg-options train.epochs=20
  perception train configs/synthetic/nano.py --work-dir out/short --cfg-options train.epochs=2 train.lr=1e-3
  perception train configs/nuscenes/r50_704_24e.py --dry-run --amp
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("train", __doc__, EXAMPLE)
    parser.add_argument("config", help="config file, or the name of one of the library, e.g. synthetic/nano")
    parser.add_argument(
        "--work-dir",
        type=output_folder("--work-dir"),
        help="folder for checkpoints, weights, logs and TensorBoard scalars",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run two steps on generated scenes and print what the training would cost",
    )
    parser.add_argument("--json", type=output_file("--json"), help="file for the numbers of --dry-run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the work directory")
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="with --resume: accept another length, learning rate or place of the data than the training had so far",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the checkpoints and weights in the work directory and start"
    )
    parser.add_argument("--amp", action="store_true", help="run the network in bfloat16")
    parser.add_argument("--seed", type=SEED, default=0, help="of weights, order and augmentation (default 0)")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="override the config, e.g. train.lr=1e-4"
    )
    add_import(parser)
    add_launcher(parser)
    arguments = parser.parse_args(argv)

    from perception.engine.config_file import check_datasets, parse_options
    from perception.errors import ConfigError

    if arguments.dry_run == bool(arguments.work_dir):
        raise ConfigError("give either --work-dir, to train, or --dry-run")
    if arguments.allow_change and not arguments.resume:
        raise ConfigError("--allow-change is for a training that goes on; add --resume")
    if arguments.json and not arguments.dry_run:
        raise ConfigError("--json is for --dry-run; a training leaves its numbers in --work-dir")
    options = parse_options(arguments.cfg_options)
    if not arguments.dry_run:
        check_datasets(arguments.config, options, ("train_data", "val_data"))

    from perception.engine.config import load_config  # PyTorch, which takes seconds to load

    config = load_config(arguments.config, options)
    if arguments.dry_run:
        from perception.engine.dry_run import dry_run
        from perception.files import write_json

        result = dry_run(config, seed=arguments.seed, amp=arguments.amp)
        print(result.table())
        if arguments.json:
            write_json(arguments.json, result.as_dict())
        return

    from perception.engine.training import train

    train(
        config,
        arguments.work_dir,
        seed=arguments.seed,
        resume=arguments.resume,
        allow_change=arguments.allow_change,
        overwrite=arguments.overwrite,
        amp=arguments.amp,
        launcher=arguments.launcher,
    )
