"""Imports a checkpoint of the published code of BEVFormer, MapTR, MapTRv2, MapQR, Sparse4D or SparseDrive.

It is recognised by its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from perception.cli import command_parser, number, output_file

EXAMPLE = """example:
  perception import-checkpoint bevformer_tiny_epoch_24.pth --out out/bevformer_tiny.safetensors
  perception import-checkpoint sparse4dv3_r50.pth --out out/sparse4dv3_fast.safetensors --best-cameras 2

The file is read as plain tensors only; no code in it is run. State dicts under `state_dict` or `model`, prefixes of
DataParallel and of averaged models, and half precision are recognised. What is written loads as other weights do.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("import-checkpoint", __doc__, EXAMPLE)
    parser.add_argument("checkpoint", type=Path, help=".pth with a state dict of official keys")
    parser.add_argument("--out", type=output_file("--out"), required=True, help=".safetensors to write")
    parser.add_argument(
        "--best-cameras", type=number(int, 1), metavar="K",
        help="Sparse4D and SparseDrive: each instance samples only the K cameras that count most for it, for speed",
    )  # fmt: skip
    arguments = parser.parse_args(argv)

    from perception.errors import ConfigError
    from perception.models import build_network, preset_name
    from perception.models.checkpoint import import_published, save_checkpoint

    if arguments.out.suffix != ".safetensors":
        raise ConfigError(f"--out is {arguments.out}; give a name that ends in .safetensors")
    model = import_published(arguments.checkpoint)
    name = preset_name(model.config)
    if arguments.best_cameras is not None:
        if not hasattr(model.config, "best_cameras"):
            raise ConfigError(
                f"--best-cameras is for Sparse4D and SparseDrive, and the checkpoint is {name}; leave it out"
            )
        imported = model
        model = build_network(replace(imported.config, best_cameras=arguments.best_cameras))
        model.load_state_dict(imported.state_dict())
    save_checkpoint(arguments.out, model, {})
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{arguments.checkpoint} is {name}, {parameters / 1e6:.2f} M parameters; written to {arguments.out}")
