"""Builds TensorRT engines from an exported graph. TensorRT-RTX builds for named targets without a GPU.

The network is strongly typed: every tensor has the type that it has in the graph. An engine runs on one GPU
architecture and with one version of TensorRT; the contract holds both, with the hash of the engine. Before an engine is
built, the layers of the parsed network are compared with the graph, because a parser may misread an operator without an
error.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perception.errors import ConfigError
from perception.export.contract import CONTRACT, MODEL, read_contract
from perception.export.engine_session import Cuda, import_tensorrt
from perception.export.nodes import UNKNOWN, Node, nodes_of
from perception.files import replacing, write_json

if TYPE_CHECKING:
    import onnx

CURRENT = "current"  # the GPU of this machine
PARSED = "parser run"  # entry in the contract for a graph whose layers were compared
NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
SHOWN = 3  # differences in an error message
# Kinds of layers that correspond to one node each: class with their settings, and operators.
LAYERS = {
    "GRID_SAMPLE": ("IGridSampleLayer", ("GridSample",)),
    "REDUCE": ("IReduceLayer", ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum", "ReduceL2")),
    "RESIZE": ("IResizeLayer", ("Resize",)),
    "TOPK": ("ITopKLayer", ("TopK",)),
    "SOFTMAX": ("ISoftMaxLayer", ("Softmax",)),
    "NORMALIZATION": ("INormalizationLayer", ("LayerNormalization",)),
    "CONVOLUTION": ("IConvolutionLayer", ("Conv",)),
    "POOLING": ("IPoolingLayer", ("MaxPool",)),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", ("MatMul", "Gemm")),
    "EINSUM": ("IEinsumLayer", ("Einsum",)),
    "GATHER": ("IGatherLayer", ("Gather", "GatherElements", "GatherND")),
    "CONCATENATION": ("IConcatenationLayer", ("Concat",)),
    "SELECT": ("ISelectLayer", ("Where",)),
    "QUANTIZE": ("IQuantizeLayer", ("QuantizeLinear",)),
    "DEQUANTIZE": ("IDequantizeLayer", ("DequantizeLinear",)),
}
TYPES = {
    "FLOAT": "FLOAT", "FLOAT16": "HALF", "INT32": "INT32", "INT64": "INT64", "BOOL": "BOOL", "UINT8": "UINT8",
    "INT8": "INT8", "FLOAT8E4M3FN": "FP8",
}  # fmt: skip


def build_engines(
    folder: str | Path, *, package: str = "tensorrt-rtx", targets: Sequence[str] = (CURRENT,)
) -> dict[str, Path]:
    """Builds an engine of an export for each target and adds them to the contract.

    With "tensorrt", kernel timings are stored in `timing.cache`, which makes a second build faster and may be deleted.

    Args:
        folder: written by `export_onnx`.
        package: "tensorrt-rtx", which builds for all its targets on any machine; or "tensorrt", which builds for the
            GPU of this machine.
        targets: compute capabilities such as "sm89", or "current".

    Returns:
        The engine of each target.

    Raises:
        CheckpointError: the folder does not hold an export.
        ConfigError: the package is not installed, does not support a target, rejects the graph, or misreads it.
    """
    folder = Path(folder)
    contract = read_contract(folder)
    gpus = gpus_of(package, targets)
    trt = import_tensorrt(package)
    logger = trt.Logger(trt.Logger.ERROR)
    engines = {}
    for target, gpu in gpus.items():
        builder = trt.Builder(logger)
        network, _parser = parse_graph(trt, builder, logger, folder / MODEL, package)
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # geometry needs the full precision of float32
        if target != CURRENT:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
        cache = folder / "timing.cache" if package == "tensorrt" else None  # TensorRT-RTX times nothing
        if cache:
            timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
            config.set_timing_cache(timings, ignore_mismatch=False)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise ConfigError(f"{package} builds no engine of {folder / MODEL} for {target}; see its messages above")
        name = f"model.{target}.engine"
        content = bytes(engine)
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
        if cache:
            with replacing(cache) as temporary:
                temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
        contract["engines"][target] = {
            "file": name, "gpu": gpu, "package": package, "package_version": trt.__version__,
        }  # fmt: skip
        contract["sha256"][name] = hashlib.sha256(content).hexdigest()
        checks = contract.setdefault("checked", {}).setdefault(runtime_name(package, trt.__version__), [])
        if PARSED not in checks:
            checks.append(PARSED)
        write_json(folder / CONTRACT, contract)
        engines[target] = folder / name
    return engines


def gpus_of(package: str, targets: Sequence[str]) -> dict[str, str]:
    """Returns the compute capability of each target, such as "sm89". Call it before long work to check the targets.

    Args:
        package, targets: as for `build_engines`.

    Raises:
        ConfigError: the package is not installed or does not support a target, or the target is "current" and there is
            no GPU.
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


def runtime_name(package: str, version: str) -> str:
    """Returns the name of a runtime in contracts, such as "TensorRT-RTX 1.7"."""
    return f"{NAMES[package]} {'.'.join(version.split('.')[:2])}"


def parse_graph(trt: Any, builder: Any, logger: Any, path: str | Path, package: str) -> tuple[Any, Any]:
    """Parses a graph with TensorRT and compares the layers of the network with the graph.

    Args:
        trt: the module, from `import_tensorrt`.
        builder, logger: of that module.
        path: of the ONNX file.
        package: name of the module's package, for messages.

    Returns:
        The network, strongly typed, and the parser, which must live as long as the network.

    Raises:
        ConfigError: the parser rejects the graph, or misreads it.
    """
    import onnx

    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    content = Path(path).read_bytes()
    if not parser.parse(content):
        reason = str(parser.get_error(0)).splitlines()[0] if parser.num_errors else "it gives no reason"
        raise ConfigError(f"{package} does not take {path}: {reason}")
    differences = compare_layers(trt, network, onnx.ModelProto.FromString(content))
    if differences:
        more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise ConfigError(
            f"the parser of {package} {trt.__version__} reads {path} otherwise than ONNX defines it: "
            f"{'; '.join(differences[:SHOWN])}{more}"
        )
    return network, parser


def compare_layers(trt: Any, network: Any, model: onnx.ModelProto) -> list[str]:
    """Compares the layers of a parsed network with the nodes of its graph.

    It compares the type and the shape of all node outputs, the number of layers of the kinds in `LAYERS`, and their
    settings: modes and padding of GridSample and Resize, axes of Reduce, Softmax, LayerNormalization, TopK, Gather and
    Concat, strides, padding and groups of convolutions and poolings.

    Args:
        trt: the module of `network`.
        network: an `INetworkDefinition`.
        model: the graph.

    Returns:
        The differences, each with the name of its node.
    """
    nodes = nodes_of(model)
    layers = [network.get_layer(k) for k in range(network.num_layers)]
    differences = []
    tensors = {layer.get_output(k).name: layer.get_output(k) for layer in layers for k in range(layer.num_outputs)}
    for node in nodes:
        for name in filter(None, node.outputs):
            kind, shape = node.tensors.kinds.get(name, UNKNOWN)
            if name not in tensors:
                differences.append(f"{node.operator} {node.name} has no tensor {name}")
            elif (found := tensors[name].dtype) != getattr(trt.DataType, TYPES.get(kind, kind), None):
                differences.append(f"{node.operator} {node.name} gives {found.name} instead of {kind}")
            elif (found := tuple(tensors[name].shape)) != shape:
                differences.append(f"{node.operator} {node.name} gives the shape {found} instead of {shape}")
    made_of: dict[tuple[str, str], list] = {}  # layers by kind and name of their node
    for layer in layers:
        node_name = layer.metadata.removeprefix("[ONNX Layer: ").removesuffix("]")
        made_of.setdefault((layer.type.name, node_name), []).append(layer)
    counts = Counter(layer.type.name for layer in layers)
    for kind, (class_name, operators) in LAYERS.items():
        expected = [node for node in nodes if node.operator in operators]
        if counts[kind] != len(expected):
            differences.append(f"{len(expected)} nodes {'/'.join(operators)} became {counts[kind]} layers {kind}")
        for node in expected:
            for layer in made_of.get((kind, node.name), ()):
                layer.__class__ = getattr(trt, class_name)  # only that class has the settings as attributes
                for name, wanted in _settings(trt, node).items():
                    found = getattr(layer, name)
                    found = tuple(found) if isinstance(wanted, tuple) else found
                    if found != wanted:
                        differences.append(
                            f"{node.operator} {node.name} has the {name} {_text(found)} instead of {_text(wanted)}"
                        )
            if (kind, node.name) not in made_of:
                differences.append(f"{node.operator} {node.name} has no layer {kind}")
    return differences


def _text(value: object) -> str:
    return getattr(value, "name", str(value))


def _settings(trt: Any, node: Node) -> Mapping[str, object]:
    """Returns the settings of a layer that is equivalent to a node, by the names of TensorRT's attributes."""
    given = node.attributes
    rank = len(node.shape(0))

    def mask(axes: Iterable[int]) -> int:
        return int(sum(1 << int(axis) % rank for axis in axes))

    def window(count: int) -> dict[str, object]:
        pads = given.get("pads", [0] * 2 * count)
        return {
            "stride_nd": tuple(given.get("strides", [1] * count)),
            "pre_padding": tuple(pads[:count]),
            "post_padding": tuple(pads[count:]),
            "padding_mode": trt.PaddingMode.EXPLICIT_ROUND_DOWN,
        }

    kind = node.operator
    if kind == "GridSample":
        modes = {"bilinear": "LINEAR", "linear": "LINEAR", "nearest": "NEAREST"}
        return {
            "interpolation_mode": getattr(trt.InterpolationMode, modes[given["mode"]]),
            "sample_mode": getattr(trt.SampleMode, {"zeros": "FILL", "border": "CLAMP"}[given["padding_mode"]]),
            "align_corners": bool(given["align_corners"]),
        }
    if kind.startswith("Reduce"):
        axes = given.get("axes") if len(node.inputs) == 1 else node.constant(1)
        operation = {"Max": "MAX", "Min": "MIN", "Mean": "AVG", "Sum": "SUM", "L2": "SUM"}[kind.removeprefix("Reduce")]
        return {
            "axes": mask(range(rank) if axes is None else axes),
            "keep_dims": bool(given["keepdims"]),
            "op": getattr(trt.ReduceOperation, operation),
        }
    if kind == "Resize":
        return {
            "resize_mode": getattr(trt.InterpolationMode, given["mode"].upper()),
            "coordinate_transformation": getattr(
                trt.ResizeCoordinateTransformation, given["coordinate_transformation_mode"].upper()
            ),
            "exclude_outside": bool(given["exclude_outside"]),
            **({"nearest_rounding": trt.ResizeRoundMode.FLOOR} if given["nearest_mode"] == "floor" else {}),
        }
    if kind == "TopK":
        operation = trt.TopKOperation.MAX if given["largest"] else trt.TopKOperation.MIN
        return {"axes": mask([given["axis"]]), "op": operation}
    if kind == "Softmax":
        return {"axes": mask([given["axis"]])}
    if kind == "LayerNormalization":
        return {"axes": mask(range(given["axis"] % rank, rank)), "epsilon": float(np.float32(given["epsilon"]))}
    if kind == "Conv":
        count = rank - 2
        return window(count) | {
            "dilation_nd": tuple(given.get("dilations", [1] * count)),
            "num_groups": given["group"],
        }
    if kind == "MaxPool":
        return window(rank - 2) | {"window_size_nd": tuple(given["kernel_shape"]), "type": trt.PoolingType.MAX}
    if kind in ("Gather", "GatherElements"):
        mode = trt.GatherMode.DEFAULT if kind == "Gather" else trt.GatherMode.ELEMENT
        return {"axis": given["axis"] % rank, "mode": mode}
    if kind == "GatherND":
        return {"num_elementwise_dims": given["batch_dims"], "mode": trt.GatherMode.ND}
    if kind == "Concat":
        return {"axis": given["axis"] % rank}
    if kind == "Einsum":
        return {"equation": given["equation"]}
    if kind in ("QuantizeLinear", "DequantizeLinear"):
        scale = node.constant(1)
        return {"axis": given["axis"] % rank} if scale is not None and scale.size > 1 else {}
    return {}
