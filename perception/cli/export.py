"""Exports a network for the vehicle and certifies it: both run on the same scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perception.cli import SEED, add_import, command_parser, number, output_folder

EXAMPLE = """examples:
  perception export nano --out out/nano_onnx
  perception export nano --out out/nano_onnx --also openvino openvino-bf16
  perception export nano --out out/nano_cpu --precision int8 --target cpu
  perception export nano --out out/nano_rtx --precision fp16 --format tensorrt-rtx --target sm86,sm89
  perception export out/nano/nano.safetensors --out out/nano_fp16 --precision fp16 --cameras 6 --raw-size 256x448
  perception export nano --out out/nano_rig --raw-size sizes.yaml --image-format nv12
  perception export out/maptrv2.safetensors --out out/maptrv2_onnx --rig nuscenes

sizes.yaml holds one size per camera, in the order of the cameras, as a list or with names:

  front_wide: 2160x3840
  front_right: 1080x1920
  front_left: 1080x1920
  back: 1080x1920
  back_left: 1080x1920
  back_right: 1080x1920

Formats of images, one buffer of bytes per camera:

{formats}

Without --dataroot the scenes are generated; those of a second rig, with other cameras, always are. The folder holds
model.onnx, contract.json, certificate.json and certificate.md; of each runtime in --also, such as openvino,
certificate.openvino.json and .md too; and where a GPU is here that an engine was built for, certificate.tensorrt.json
and .md of that engine. Progress goes to stderr.
Exit code 2 if the export is not good enough; see certificate.md there.
"""
DRAWN_WIDTH = 1600  # pixels


def main(argv: Sequence[str] | None = None) -> None:
    from perception.export.contract import IMAGE_FORMATS

    formats = "\n".join(f"  {name:12}{meaning}" for name, meaning in IMAGE_FORMATS.items())
    parser = command_parser("export", __doc__, EXAMPLE.format(formats=formats))
    parser.add_argument("checkpoint", help="a .safetensors file, or the name of weights that came with the library")
    parser.add_argument("--out", type=output_folder("--out"), required=True, help="folder to write")
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
    parser.add_argument(
        "--also", nargs="+", choices=("openvino", "openvino-bf16"), default=[], metavar="RUNTIME",
        help="certify the graph in these runtimes too: openvino, openvino-bf16",
    )  # fmt: skip
    parser.add_argument("--cameras", type=number(int, 1, 64), default=6, help="images per frame (default: %(default)s)")
    parser.add_argument(
        "--raw-size", metavar="HxW", action="append",
        help="size of the images that are given, fitted in the graph: once for all cameras, once for each in their "
        "order, or a .yaml file of sizes (default: that of the network)",
    )  # fmt: skip
    parser.add_argument(
        "--image-format", choices=tuple(IMAGE_FORMATS), default="rgb",
        help="of the images that are given (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rig", metavar="FILE",
        help="rig file of the vehicle, or a rig of the library, for a network whose export holds its calibration, such "
        "as MapTRv2; instead of --cameras and --raw-size",
    )  # fmt: skip
    parser.add_argument("--dataroot", type=Path, help="dataset to certify on")
    parser.add_argument("--version", help="of the dataset")
    parser.add_argument("--split", help="of the dataset")
    parser.add_argument("--calibration-split", help="of the dataset, for int8 and fp8; another than --split")
    parser.add_argument(
        "--drift", type=number(int, 0), default=0, help="frames of a further drive without a reset (default: 0)"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of generated scenes (default: %(default)s)")
    add_import(parser)
    arguments = parser.parse_args(argv)

    from perception.errors import ConfigError
    from perception.files import check_dataset, locked, scratch_folder

    if len({bool(arguments.dataroot), bool(arguments.version), bool(arguments.split)}) > 1:
        raise ConfigError("--dataroot, --version and --split go together; give all three or none")
    if arguments.dataroot:
        check_dataset(arguments.dataroot, arguments.version)

    from perception.data.nuscenes import NuScenesDataset
    from perception.export.contract import ImageInputs, read_contract
    from perception.export.engine_session import find_engine
    from perception.export.export_rig import ExportRig
    from perception.export.onnx import check_export, export_onnx
    from perception.export.openvino_session import openvino_core
    from perception.export.parity import LEAST_FRAMES, LEAST_SCENES, certify
    from perception.export.progress import stage
    from perception.export.quantize import KINDS
    from perception.export.tensorrt import build_engines, gpus_of
    from perception.models.checkpoint import load_model, read_provenance
    from perception.models.provenance import weights_of
    from perception.rigs.rig import Rig
    from perception.synthetic import VERSION, simulate
    from perception.synthetic.sensors import EIGHT_CAMERAS, FIVE_CAMERAS, SIX_CAMERAS, Mounting

    network = load_model(arguments.checkpoint)
    raw_size: Any = read_sizes(arguments.raw_size) if arguments.raw_size else None
    export_rig = None
    if arguments.rig:
        if raw_size:
            raise ConfigError("--rig and --raw-size were given; leave --raw-size out, the rig has the sizes of images")
        export_rig, raw_size = ExportRig.of_rig(Rig.load(arguments.rig), network.config.image_size)
        arguments.cameras = len(raw_size)
    images = ImageInputs.of_rig(arguments.cameras, network.config.image_size, raw_size, arguments.image_format)
    eight_bits = arguments.precision in KINDS
    if arguments.dataroot and eight_bits and arguments.calibration_split in (None, arguments.split):
        raise ConfigError(
            "give --calibration-split a split other than --split: ranges of eight bits are not judged on the frames "
            "they were taken from"
        )
    for_cpu = arguments.target == "cpu"
    if for_cpu and arguments.format != "onnx":
        raise ConfigError(f"--format {arguments.format} builds for GPUs; leave it out with --target cpu")
    check_export(
        network, cameras=arguments.cameras, precision=arguments.precision, for_cpu=for_cpu, export_rig=export_rig
    )
    for backend in arguments.also:
        openvino_core(backend, arguments.precision)
    targets = arguments.target.split(",")
    if arguments.format != "onnx":
        gpus_of(arguments.format, targets)  # names missing packages before the long work
    size = max(images.sizes, key=lambda pair: pair[0] * pair[1])  # others are made from it
    # Another export into the same folder waits, so that all files of the folder are of one export.
    with locked(arguments.out / ".lock"), scratch_folder("export") as folder:

        def generated(seed: int, rig: tuple[Mounting, ...] = SIX_CAMERAS) -> NuScenesDataset:
            root, keyframes = Path(folder, str(seed)), LEAST_FRAMES // LEAST_SCENES
            drawn, names = drawn_size(size), [camera.name for camera in rig]
            simulate(
                root, scenes=LEAST_SCENES, seed=seed, keyframes=keyframes, split="export", image_size=drawn, rig=rig
            )
            return NuScenesDataset(root, VERSION, "export", image_size=drawn, cameras=names)

        def scenes(split: str | None, seed: int) -> NuScenesDataset:
            """A split of the dataset that was given; without one, generated scenes of that seed."""
            if arguments.dataroot and split:
                return NuScenesDataset(arguments.dataroot, arguments.version, split, image_size=size)
            return generated(seed)

        with stage("drive for the certificate", progress=True):
            judge = scenes(arguments.split, arguments.seed)
        with stage("drive of another rig for the certificate", progress=True):
            other_rig = generated(arguments.seed + 2, EIGHT_CAMERAS if arguments.cameras >= 8 else FIVE_CAMERAS)
        calibration = None
        if eight_bits:
            with stage("drive for the ranges of eight bits", progress=True):
                calibration = scenes(arguments.calibration_split, arguments.seed + 1)
        with stage(f"export to {arguments.out}", progress=True):
            export_onnx(
                network, arguments.out, cameras=arguments.cameras, raw_size=images.sizes,
                image_format=images.image_format, precision=arguments.precision, for_cpu=for_cpu,
                calibration=calibration, progress=True, export_rig=export_rig,
                weights=weights_of(arguments.checkpoint, read_provenance(arguments.checkpoint)),
            )  # fmt: skip
        backends = ["onnxruntime", *dict.fromkeys(arguments.also)]
        if arguments.format != "onnx":
            with stage(f"engines of {arguments.format} for {arguments.target}", progress=True):
                engines = build_engines(arguments.out, package=arguments.format, targets=targets)
            for target, path in engines.items():
                print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB for {target}")
            try:
                find_engine(arguments.out, read_contract(arguments.out))
            except ConfigError as error:
                print(f"engines are built but not run: {error}")
            else:
                backends.append("tensorrt")
        failures = []
        for backend in backends:
            with stage(f"certificate of {backend}", progress=True):
                certificate = certify(
                    network, arguments.out, judge, other_rig=other_rig, backend=backend, drift_frames=arguments.drift,
                    progress=True,
                )  # fmt: skip
            certificate.save(arguments.out)
            print(certificate.markdown())
            failures += [f"{backend}: {failure}" for failure in certificate.failures]
    if failures:
        raise ConfigError(f"{arguments.out} must not be used: {'; '.join(failures)}")


def read_sizes(given: list[str]) -> list[tuple[int, int]]:
    """The sizes that `--raw-size` gave, one for all cameras or one for each."""
    from perception.errors import ConfigError

    source, entries = "--raw-size", list(given)
    if len(given) == 1 and given[0].endswith((".yaml", ".yml")):
        import yaml

        source = given[0]
        try:
            entries = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"--raw-size {source} is missing; write the sizes there, or give HEIGHTxWIDTH") from None
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"--raw-size {source} cannot be read ({' '.join(str(error).split())})") from None
        entries = list(entries.values()) if isinstance(entries, dict) else entries
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f"--raw-size {source} holds no sizes; write one HEIGHTxWIDTH per camera, as a list")
    sizes = []
    for entry in entries:
        try:
            height, width = (int(side) for side in str(entry).lower().split("x"))
        except ValueError:
            raise ConfigError(f"{source}: {str(entry)!r} is not HEIGHTxWIDTH, such as 900x1600") from None
        sizes.append((height, width))
    return sizes


def drawn_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size at which generated scenes are rendered: that of the cameras, but at most DRAWN_WIDTH wide, for it takes
    long."""
    scale = min(1.0, DRAWN_WIDTH / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
