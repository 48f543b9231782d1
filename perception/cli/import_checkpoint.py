"""Imports a checkpoint of the published code of BEVFormer, MapTR, MapTRv2 or MapQR, recognised by its keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perception.cli import command_parser, output_file

EXAMPLE = """example:
  perception import-checkpoint bevformer_tiny_epoch_24.pth --out out/bevformer_tiny.safetensors

The file is read as plain tensors only; no code in it is run. State dicts under `state_dict` or `model`, prefixes of
DataParallel and of averaged models, and half precision are recognised. What is written loads as other weights do.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("import-checkpoint", __doc__, EXAMPLE)
    parser.add_argument("checkpoint", type=Path, help=".pth with a state dict of official keys")
    parser.add_argument("--out", type=output_file("--out"), required=True, help=".safetensors to write")
    arguments = parser.parse_args(argv)

    from perception.errors import ConfigError
    from perception.models import preset_name
    from perception.models.checkpoint import import_published, save_checkpoint

    if arguments.out.suffix != ".safetensors":
        raise ConfigError(f"--out is {arguments.out}; give a name that ends in .safetensors")
    model = import_published(arguments.checkpoint)
    save_checkpoint(arguments.out, model, {})
    name, parameters = preset_name(model.config), sum(p.numel() for p in model.parameters())
    print(f"{arguments.checkpoint} is {name}, {parameters / 1e6:.2f} M parameters; written to {arguments.out}")
