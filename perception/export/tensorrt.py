"""TensorRT engines from an exported graph, for named targets and without a GPU where TensorRT-RTX is used.

The network is strongly typed: the precision of every tensor is the one that the graph says. An engine belongs to one
kind of GPU and to one version of TensorRT; both are written into the contract beside its hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from perception.errors import ConfigError
from perception.export.contract import CONTRACT, MODEL, read_contract
from perception.export.engine_session import Cuda, import_tensorrt
from perception.files import replacing, write_json

CURRENT = "current"  # the GPU of this machine


def build_engines(
    folder: str | Path, *, package: str = "tensorrt-rtx", targets: Sequence[str] = (CURRENT,)
) -> dict[str, Path]:
    """Builds an engine of the graph in a folder for each target and enters them into its contract.

    With "tensorrt", timings of kernels are kept in `timing.cache`, so that a second build takes less time; it may be
    deleted.

    Args:
        folder: that `export_onnx` wrote.
        package: "tensorrt-rtx", which builds for any target that it knows, on any machine; or "tensorrt", which builds
            for the GPU of this machine.
        targets: compute capabilities such as "sm89", or "current".

    Returns:
        The engine of each target.

    Raises:
        CheckpointError: the folder is none of an export.
        ConfigError: the package is not installed, does not know a target, or does not take the graph.
    """
    folder = Path(folder)
    contract = read_contract(folder)
    gpus = gpus_of(package, targets)
    trt = import_tensorrt(package)
    logger = trt.Logger(trt.Logger.ERROR)
    engines = {}
    for target, gpu in gpus.items():
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse((folder / MODEL).read_bytes()):
            reason = str(parser.get_error(0)).splitlines()[0] if parser.num_errors else "it does not say why"
            raise ConfigError(f"{package} does not take {folder / MODEL}: {reason}")
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # geometry in float32 means all of its digits
        if target != CURRENT:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
        cache = folder / "timing.cache" if package == "tensorrt" else None  # TensorRT-RTX times nothing
        if cache:
            timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
            config.set_timing_cache(timings, ignore_mismatch=False)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise ConfigError(f"{package} builds no engine of {folder / MODEL} for {target}; its messages say why")
        name = f"model.{target}.engine"
        content = bytes(engine)
        with replacing(folder / name) as beside:
            beside.write_bytes(content)
        if cache:
            with replacing(cache) as beside:
                beside.write_bytes(bytes(config.get_timing_cache().serialize()))
        contract["engines"][target] = {
            "file": name, "gpu": gpu, "package": package, "package_version": trt.__version__,
        }  # fmt: skip
        contract["sha256"][name] = hashlib.sha256(content).hexdigest()
        write_json(folder / CONTRACT, contract)
        engines[target] = folder / name
    return engines


def gpus_of(package: str, targets: Sequence[str]) -> dict[str, str]:
    """The compute capability that each target means, such as "sm89"; asked before long work, it says what is missing.

    Args:
        package, targets: as for `build_engines`.

    Raises:
        ConfigError: the package is not installed or does not know a target, or there is no GPU to be the current one.
    """
    trt = import_tensorrt(package)
    gpus = {}
    for target in targets:
        if target == CURRENT:
            gpus[target] = Cuda().target()
            continue
        if package != "tensorrt-rtx":
            raise ConfigError(f"target {target!r}: {package} builds for the GPU of this machine only; use {CURRENT!r}")
        known = [name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM")]
        if target not in known:
            raise ConfigError(f"target {target!r} is not known to {package}; it builds for {', '.join(known)}")
        gpus[target] = target
    return gpus
