"""Imports a checkpoint of the published code, recognised by its keys: BEVFormer tiny, small or base, or MapTR-tiny with
BEVFormer's encoder."""

import argparse
from pathlib import Path

EXAMPLE = """example:
  python scripts/import_checkpoint.py bevformer_tiny_epoch_24.pth --out out/bevformer_tiny.safetensors

The file is read as plain tensors only; no code in it is run. What is written loads as weights of this library do.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help=".pth with a state dict of official keys")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors to write")
    arguments = parser.parse_args()

    from perception.errors import ConfigError
    from perception.models.checkpoint import import_published, save_checkpoint

    if arguments.out.suffix != ".safetensors":
        raise ConfigError(f"--out is {arguments.out}; give a name that ends in .safetensors")
    name, model = import_published(arguments.checkpoint)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(arguments.out, model, {})
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{arguments.checkpoint} is {name}, {parameters / 1e6:.2f} M parameters; written to {arguments.out}")


if __name__ == "__main__":
    from perception.errors import run_script

    run_script(main)
