"""Trains a network as a config says."""

import argparse
from pathlib import Path

EXAMPLE = """example:
  python scripts/train.py configs/synthetic/nano.py --work-dir out/nano
  python scripts/train.py configs/synthetic/nano.py --work-dir out/nano --resume
  python scripts/train.py configs/synthetic/nano.py --work-dir out/short --cfg-options train.epochs=2 train.lr=1e-3
  python scripts/train.py configs/nuscenes/r50_704_24e.py --dry-run --amp
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file, e.g. configs/synthetic/nano.py")
    parser.add_argument("--work-dir", help="folder for checkpoints, weights, logs and TensorBoard scalars")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run two steps on generated streets and print what the training would cost",
    )
    parser.add_argument("--json", type=Path, help="file for the numbers of --dry-run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the work directory")
    parser.add_argument("--amp", action="store_true", help="run the network in bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default 0)")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="override the config, e.g. train.lr=1e-4"
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    arguments = parser.parse_args()

    from perception.engine import dry_run, load_config, parse_options, train
    from perception.errors import ConfigError
    from perception.files import write_json

    if arguments.dry_run == bool(arguments.work_dir):
        raise ConfigError("give either --work-dir, to train, or --dry-run")
    if arguments.json and not arguments.dry_run:
        raise ConfigError("--json is for --dry-run; a training leaves its numbers in --work-dir")
    config = load_config(arguments.config, parse_options(arguments.cfg_options))
    if arguments.dry_run:
        told = dry_run(config, seed=arguments.seed, amp=arguments.amp)
        print(told.table())
        if arguments.json:
            write_json(arguments.json, told.as_dict())
        return
    train(
        config,
        arguments.work_dir,
        seed=arguments.seed,
        resume=arguments.resume,
        amp=arguments.amp,
        launcher=arguments.launcher,
    )


if __name__ == "__main__":
    from perception.errors import run_script

    run_script(main)
