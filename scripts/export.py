"""Exports a network for the vehicle and certifies it: the export drives the same streets as the original."""

import argparse
from pathlib import Path

EXAMPLE = """examples:
  python scripts/export.py nano --out out/nano_onnx
  python scripts/export.py nano --out out/nano_cpu --precision int8 --target cpu
  python scripts/export.py nano --out out/nano_rtx --precision fp16 --format tensorrt-rtx --target sm86,sm89
  python scripts/export.py out/nano/nano.safetensors --out out/nano_fp16 --precision fp16 --cameras 6 --raw-size 256x448

Without --dataroot the streets are generated; those of a second rig, with other cameras, always are. The folder holds
model.onnx, contract.json, certificate.json and certificate.md; where a GPU is here that an engine was built for,
certificate.tensorrt.json and .md of that engine too.
Exit code 2 if the export is not good enough; the folder says why.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a .safetensors file, or the name of weights that came with the library")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "int8", "fp8"), default="fp32", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--format", choices=("onnx", "tensorrt-rtx", "tensorrt"), default="onnx",
        help="tensorrt-rtx builds engines for any target without a GPU, tensorrt for the GPU of this machine "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--target",
        default="current",
        help="of engines, such as sm86,sm89; or cpu, for INT8 as CPUs want it (default: %(default)s)",
    )
    parser.add_argument("--cameras", type=int, default=6, help="images per moment (default: %(default)s)")
    parser.add_argument("--raw-size", metavar="HxW", help="size of the images that are given, fitted in the graph")
    parser.add_argument("--dataroot", type=Path, help="dataset to certify on, images of the size that is given")
    parser.add_argument("--version", help="of the dataset")
    parser.add_argument("--split", help="of the dataset")
    parser.add_argument("--calibration-split", help="of the dataset, for int8 and fp8; another than --split")
    parser.add_argument("--drift", type=int, default=0, help="frames of a further drive without a reset (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of generated streets (default: %(default)s)")
    arguments = parser.parse_args()

    import tempfile

    from perception.data.nuscenes import NuScenesDataset
    from perception.errors import ConfigError
    from perception.export.certificate import Certificate
    from perception.export.contract import read_contract
    from perception.export.engine_session import find_engine
    from perception.export.onnx import export_onnx
    from perception.export.parity import LEAST_FRAMES, LEAST_SCENES, certify
    from perception.export.quantize import KINDS
    from perception.export.tensorrt import build_engines, gpus_of
    from perception.models.checkpoint import load_checkpoint
    from perception.predictor import weights_file
    from perception.synthetic import VERSION, simulate
    from perception.synthetic.sensors import EIGHT_CAMERAS, FIVE_CAMERAS, SIX_CAMERAS, Mounting

    network, _ = load_checkpoint(weights_file(arguments.checkpoint))
    raw_size = None
    if arguments.raw_size:
        try:
            raw_size = tuple(int(side) for side in arguments.raw_size.lower().split("x"))
            height, width = raw_size
        except ValueError:
            raise ConfigError(f"--raw-size {arguments.raw_size!r} is not HEIGHTxWIDTH, such as 900x1600") from None
    if len({bool(arguments.dataroot), bool(arguments.version), bool(arguments.split)}) > 1:
        raise ConfigError("--dataroot, --version and --split go together; give all three or none")
    eight_bits = arguments.precision in KINDS
    if arguments.dataroot and eight_bits and arguments.calibration_split in (None, arguments.split):
        raise ConfigError(
            "give --calibration-split a split other than --split: ranges of eight bits are not judged on the frames "
            "they were taken from"
        )
    for_cpu = arguments.target == "cpu"
    if for_cpu and arguments.format != "onnx":
        raise ConfigError(f"--format {arguments.format} builds for GPUs; leave it out with --target cpu")
    targets = arguments.target.split(",")
    if arguments.format != "onnx":
        gpus_of(arguments.format, targets)  # what is missing is told before the long work
    size = raw_size or network.config.image_size
    with tempfile.TemporaryDirectory(prefix="perception-export-") as folder:

        def generated(seed: int, rig: tuple[Mounting, ...] = SIX_CAMERAS) -> NuScenesDataset:
            root, keyframes = Path(folder, str(seed)), LEAST_FRAMES // LEAST_SCENES
            simulate(
                root, scenes=LEAST_SCENES, seed=seed, keyframes=keyframes, split="export", image_size=size, rig=rig
            )
            return NuScenesDataset(root, VERSION, "export", image_size=size, cameras=[camera.name for camera in rig])

        def streets(split: str | None, seed: int) -> NuScenesDataset:
            """A split of the dataset that was given; without one, generated streets of that seed."""
            if arguments.dataroot:
                return NuScenesDataset(arguments.dataroot, arguments.version, split, image_size=size)
            return generated(seed)

        def certified(backend: str) -> Certificate:
            return certify(
                network, arguments.out, judge, other_rig=other_rig, backend=backend, drift_frames=arguments.drift,
                progress=True,
            )  # fmt: skip

        judge = streets(arguments.split, arguments.seed)
        other_rig = generated(arguments.seed + 2, EIGHT_CAMERAS if arguments.cameras >= 8 else FIVE_CAMERAS)
        calibration = streets(arguments.calibration_split, arguments.seed + 1) if eight_bits else None
        export_onnx(
            network, arguments.out, cameras=arguments.cameras, raw_size=raw_size, precision=arguments.precision,
            for_cpu=for_cpu, calibration=calibration,
        )  # fmt: skip
        if arguments.format != "onnx":
            engines = build_engines(arguments.out, package=arguments.format, targets=targets)
            for target, path in engines.items():
                print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB for {target}")
        certificates = [certified("onnxruntime")]
        if arguments.format != "onnx":
            try:
                find_engine(arguments.out, read_contract(arguments.out))
            except ConfigError as error:
                print(f"engines are built but not run: {error}")
            else:
                certificates.append(certified("tensorrt"))
    for certificate in certificates:
        certificate.save(arguments.out)
        print(certificate.markdown())
    if failures := [failure for certificate in certificates for failure in certificate.failures]:
        raise ConfigError(f"{arguments.out} must not be used: {'; '.join(failures)}")


if __name__ == "__main__":
    from perception.errors import run_script

    run_script(main)
