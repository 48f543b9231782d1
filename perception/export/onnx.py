"""Exports a network as one ONNX graph of standard operators, with a contract that describes its inputs and outputs.

The graph includes all steps from camera images to boxes and lines: colour conversion, resizing, normalisation, network
and post-processing. Calibration, motion and memory are inputs, and the new memory is an output. The graph has no
plugins and no data-dependent shapes. Half precision is written into the graph (`perception.export.half`), so that one
file gives the same types in every runtime.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from perception import __version__
from perception.cameras import surround_rig, usual_mounting
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.export.contract import CONTRACT, MODEL, ImageInputs, write_contract
from perception.export.dialect import check_dialect
from perception.export.export_rig import ExportRig
from perception.export.half import WEIGHTED, check_weight, convert_to_half
from perception.export.images import ImagePreprocessing
from perception.export.lowering import OPSET, OPSET_FP8, TRACED, lower_graph
from perception.export.progress import stage
from perception.export.quantize import KINDS, FrameInputs, quantize_all, quantize_graph, quiet, record_frames
from perception.export.simplify import simplify
from perception.files import replacing
from perception.inference.crop import fitted_rig
from perception.models import Network
from perception.models.base import memory_tensors, with_tensors
from perception.ops.bilinear import exporting_for_cpu
from perception.types import NUSCENES_EGO_FROM_LIDAR, CameraRig, Frame, NumpyCameraRig, Weights

if TYPE_CHECKING:
    import onnx

PRECISIONS = ("fp32", "fp16", "int8", "fp8")
CALIBRATION_AND_MOTION = (
    "img_from_cam", "ego_from_cam", "present", "ego_from_prev", "seconds_since_prev", "is_first",
)  # fmt: skip
OUTPUTS = {
    "box": (
        "box_center", "box_size", "box_yaw", "box_velocity", "box_label", "box_score", "box_valid", "box_uncertainty",
    ),
    "line": ("line_points", "line_closed", "line_label", "line_score", "line_uncertainty"),
}  # fmt: skip


class DeployedNetwork(nn.Module):
    """Runs a network on one frame without batch dimension, with image preprocessing and decoding, as in an export.

    Args:
        network: in evaluation mode.
        images: sizes and format of the camera images.
    """

    usual_lidar: Tensor
    still: Tensor

    def __init__(self, network: Network, images: ImageInputs) -> None:
        super().__init__()
        self.network = network
        memories = tuple(memory_tensors(network.initial_state(1)))
        self.remembers = bool(memories)
        self.input_names = (*images.names, *CALIBRATION_AND_MOTION, *network.extra_inputs, *memories)
        self.output_names = tuple(
            name for kind in network.finds for name in (*output_names(network, kind), *raw_names(network, kind))
        ) + tuple(f"new_{name}" for name in memories)
        self.preprocess = ImagePreprocessing(images, network.config.image_size)
        # For networks that do not read them.
        for name, tensor in zip(("usual_lidar", "still"), usual_mounting(1, len(images.sizes)), strict=True):
            self.register_buffer(name, tensor.clone(), persistent=False)

    def forward(
        self,
        images: Sequence[Tensor],
        img_from_cam: Tensor,
        ego_from_cam: Tensor,
        present: Tensor,
        ego_from_prev: Tensor,
        seconds_since_prev: Tensor,
        is_first: Tensor,
        *extra_and_memory: Tensor,
    ) -> tuple[Tensor, ...]:
        """Predicts one frame.

        Args are in the order of `input_names`, with the images of all cameras as one sequence; `example_inputs` shows
        their shapes. Results are in the order of `output_names`.
        """
        if self.preprocess.fitted:
            img_from_cam = self.preprocess.img_from_raw @ img_from_cam
        extra = dict(zip(self.network.extra_inputs, extra_and_memory, strict=False))
        frame = Frame(
            self.preprocess(images)[None],
            CameraRig(img_from_cam[None], ego_from_cam[None], present[None]),
            ego_from_prev[None],
            seconds_since_prev,
            is_first,
            extra["ego_from_lidar"][None] if "ego_from_lidar" in extra else self.usual_lidar,
            self.still,
        )
        state = with_tensors(self.network.initial_state(1), extra_and_memory[len(extra) :])
        prediction, state = self.network(frame, state)
        objects = self.network.decode(prediction)
        raw = named_raw_outputs(self.network, prediction)
        results = []
        for kind in self.network.finds:
            tensors = objects.boxes if kind == "box" else objects.lines
            for name in output_names(self.network, kind):
                if name == "box_id" and objects.ids is not None:
                    results.append(objects.ids.boxes[0].int())
                    continue
                result = getattr(tensors, name.removeprefix(f"{kind}_"))[0]
                results.append(result.int() if name.endswith("label") else result)
            results += [raw[name][0] for name in raw_names(self.network, kind)]
        return (*results, *memory_tensors(state).values())


def output_names(network: Network, kind: str) -> tuple[str, ...]:
    """Returns the names of an export's decoded boxes ("box") or lines ("line"); those of a tracker have ids."""
    return (*OUTPUTS[kind], "box_id") if kind == "box" and network.tracks else OUTPUTS[kind]


def raw_names(network: Network, kind: str) -> tuple[str, ...]:
    """Returns the names of an export's raw outputs of boxes ("box") or lines ("line"); logits come first."""
    return tuple(f"raw_{name}" for name in network.raw_names if name.startswith(f"{kind}_"))


def named_raw_outputs(network: Network, prediction: Any) -> dict[str, Tensor]:
    """Returns `Network.raw_outputs` [B, Q, ...] by their names in an export."""
    return {f"raw_{name}": x for name, x in zip(network.raw_names, network.raw_outputs(prediction), strict=True)}


def example_inputs(network: Network, images: ImageInputs) -> tuple[Any, ...]:
    """Returns arguments of `DeployedNetwork.forward` for a first frame, with cameras in all directions.

    The first argument holds the images of all cameras. The last ones are `Network.extra_inputs` and the tensors of the
    memory, which a network without a memory does not have.
    """
    rig = surround_rig(images.sizes)
    memory = memory_tensors(network.initial_state(1)).values()
    extra = {"ego_from_lidar": torch.tensor(NUSCENES_EGO_FROM_LIDAR)}
    return (
        tuple(torch.randint(0, 256, images.shape(n), dtype=torch.uint8) for n in range(len(images.sizes))),
        *rig, torch.eye(4), torch.zeros(1),
        torch.ones(1, dtype=torch.bool), *(extra[name] for name in network.extra_inputs), *memory,
    )  # fmt: skip


def check_export(
    network: Network, *, cameras: int, precision: str, for_cpu: bool, export_rig: ExportRig | None = None
) -> None:
    """Checks the arguments of `export_onnx`. Call it before long work.

    Args:
        network, cameras, precision, for_cpu, export_rig: as for `export_onnx`.

    Raises:
        ConfigError: the network cannot be exported, the precision or the number of cameras is invalid, or a weight is
            too large for float16.
    """
    if network.no_export:
        raise ConfigError(f"{type(network).__name__} is not exported: {network.no_export}")
    for_rig = getattr(network, "for_rig", None)
    if for_rig and export_rig is None:
        raise ConfigError(
            f"{type(network).__name__} is exported for the cameras of one vehicle, and their calibration becomes part "
            "of the graph; give the rig file as --rig"
        )
    if export_rig is not None and not for_rig:
        raise ConfigError(f"a {type(network).__name__} takes any calibration as an input; export it without a rig")
    if cameras < 1:
        raise ConfigError(f"cameras is {cameras}; give at least 1")
    wanted = network.config.cameras
    if wanted is not None and cameras != wanted:
        raise ConfigError(f"cameras is {cameras}; this {type(network).__name__} was trained with {wanted}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is not known; use one of {', '.join(PRECISIONS)}")
    if for_cpu and precision not in ("fp32", "int8"):
        raise ConfigError(f"precision {precision} is slow on CPUs; use fp32 or int8")
    for module_name, module in network.named_modules() if precision != "fp32" and not for_cpu else ():
        # A convolution without a bias is followed by a batch norm, which the trace folds into its weight.
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            for name, parameter in module.named_parameters(recurse=False):
                check_weight(f"{module_name}.{name}", _array(parameter))


def export_onnx(
    network: Network,
    folder: str | Path,
    *,
    cameras: int = 6,
    raw_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    image_format: str = "rgb",
    precision: str = "fp32",
    for_cpu: bool = False,
    calibration: NuScenesDataset | Sequence[FrameInputs] | None = None,
    graph: onnx.ModelProto | None = None,
    weights: Weights | None = None,
    export_rig: ExportRig | None = None,
    progress: bool = False,
) -> Path:
    """Writes `model.onnx` and `contract.json`, and deletes certificates of an older graph in the folder.

    Args:
        network: in evaluation mode, on the CPU.
        folder: is created if it is missing.
        cameras: number of camera inputs; `present` is False for a missing camera.
        raw_size: height and width of the camera images, one pair for all cameras or one pair for each; None if they
            have the network's size.
        image_format: of the camera images, one of `perception.export.contract.IMAGE_FORMATS`.
        precision: "fp32"; "fp16" for float16 except in geometry, normalisation and softmax; "int8" or "fp8" for eight
            bits in the layers with weights that are not too sensitive, and float16 as before in the others.
        for_cpu: features are sampled in a form that is fast on CPUs; with "int8", unsigned activations for instructions
            such as AVX-512 VNNI, and float32 instead of float16.
        calibration: dataset for the quantization ranges, with images of the export's size or larger. Or the frames for
            the ranges themselves, by input of the graph: then no layer is excepted for its sensitivity.
        graph: result of `trace` for the same network, cameras, sizes and `for_cpu`, which takes longest; traced here if
            None.
        weights: what results say about the weights of the network, from `weights_of`; None if that is not known.
        export_rig: the only calibration that the graph is for, of a network with `for_rig`; None for the others.
        progress: show the steps and their duration on stderr.

    Returns:
        The folder.

    Raises:
        ConfigError: the network cannot be exported; the precision, the cameras, the sizes or the format are invalid; a
            weight is too large for float16; or the graph has a form that a TensorRT parser may misread.
    """
    check_export(network, cameras=cameras, precision=precision, for_cpu=for_cpu, export_rig=export_rig)
    if precision in KINDS and calibration is None:
        raise ConfigError(f"precision {precision} needs a dataset for its quantization ranges; give one as calibration")
    images = ImageInputs.of_rig(cameras, network.config.image_size, raw_size, image_format)
    halved = precision != "fp32" and not for_cpu
    folder = Path(folder)
    model = DeployedNetwork(network if export_rig is None else _for_rig(network, export_rig, images), images).eval()
    inputs = example_inputs(network, images)
    if graph is None:
        with stage("tracing the network", progress):
            graph = trace(model, inputs, for_cpu)
    quantization: dict = {}
    if calibration is not None and precision in KINDS:
        if halved:
            convert_to_half(graph)  # checks the weights that the trace has folded, before the long work
        kind = "uint8" if for_cpu else precision
        if isinstance(calibration, NuScenesDataset):
            frames = record_frames(graph, calibration, images, progress=progress)
            graph, quantization = quantize_graph(graph, frames, kind, progress=progress)
        else:
            graph, quantization = quantize_all(graph, calibration, kind)
    if halved:
        graph = convert_to_half(graph)
    custom = sorted({node.op_type for node in graph.graph.node if node.domain not in ("", "ai.onnx")})
    if custom:
        raise ConfigError(f"the graph holds operators that are not standard ONNX: {', '.join(custom)}")
    graph = lower_graph(graph, OPSET_FP8 if precision == "fp8" else OPSET)
    checked = check_dialect(graph, () if for_cpu and precision in KINDS else None)  # unsigned Q/DQ: CPUs only
    content = graph.SerializeToString()
    with torch.inference_mode():
        outputs = dict(zip(model.output_names, model(*inputs), strict=True))
    for old in folder.glob("certificate*"):
        old.unlink()
    with replacing(folder / MODEL) as temporary:
        temporary.write_bytes(content)
    write_contract(
        folder / CONTRACT,
        inputs=dict(zip(model.input_names, map(_array, (*inputs[0], *inputs[1:])), strict=True)),
        outputs={name: _array(tensor) for name, tensor in outputs.items()},
        sha256={MODEL: hashlib.sha256(content).hexdigest()},
        network=type(network).__name__,
        weights=weights or Weights(),
        image_size=network.config.image_size,
        images=images,
        precision=precision,
        opset=graph.opset_import[0].version,
        layers=layer_types(graph),
        quantization=quantization,
        checked=checked,
        version=__version__,
        export_rig=export_rig,
    )
    return folder


def _for_rig(network: Any, fixed: ExportRig, images: ImageInputs) -> Network:
    """Returns a network for one calibration, which is given in pixels of the export's images."""
    rig = NumpyCameraRig(fixed.img_from_cam, fixed.ego_from_cam, np.ones(len(fixed.img_from_cam), bool))
    fitted = fitted_rig(rig, dict(enumerate(images.sizes)), network.config.image_size)
    tensors = (torch.from_numpy(array[None]) for array in (fitted.img_from_cam, fitted.ego_from_cam, fitted.present))
    found: Network = network.for_rig(CameraRig(*tensors), torch.from_numpy(fixed.ego_from_lidar)[None].float())
    return found


def layer_types(model: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """Counts the operators of each kind by output type, in which a strongly typed runtime runs them."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    counts: dict[str, Counter] = {}
    for node in graph.node:
        kind = onnx.TensorProto.DataType.Name(kinds.get(node.output[0], 0)).lower()
        counts.setdefault(node.op_type, Counter())[kind] += 1
    return {name: dict(counts[name]) for name in sorted(counts)}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def trace(
    model: DeployedNetwork, inputs: tuple[tuple[Tensor, ...] | Tensor, ...], for_cpu: bool = False
) -> onnx.ModelProto:
    """Traces a network to a graph in float32 and opset 18. Weights keep their names of the network.

    Args:
        model: in evaluation mode.
        inputs: from `example_inputs`.
        for_cpu: sample features in the form that is fast on CPUs.
    """
    sampling = exporting_for_cpu() if for_cpu else nullcontext()
    with warnings.catch_warnings(), quiet(), torch.no_grad(), sampling:
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, inputs, dynamo=True, opset_version=TRACED, verbose=False, optimize=False,
            input_names=list(model.input_names), output_names=list(model.output_names),
        )  # fmt: skip
        assert program is not None  # None without dynamo
        simplify(program.model)
    graph = program.model_proto
    _name_weights(graph)
    # The metadata names source files and lines, which do not belong into a vehicle.
    for node in graph.graph.node:
        del node.metadata_props[:]
    for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del value.metadata_props[:]
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    return graph


def _name_weights(graph: onnx.ModelProto) -> None:
    """Renames weights that the exporter transposed and numbered after their layers."""
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    names: dict[str, str] = {}
    for node in graph.graph.node:
        weight = node.input[1] if node.op_type in WEIGHTED and len(node.input) > 1 else ""
        scopes = {prop.key: prop.value for prop in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
        scopes = [scope for scope in ast.literal_eval(scopes) if scope.startswith("network.")]
        if weight in constants and not weight.startswith("network.") and scopes:
            names[weight] = f"{scopes[-1]}.weight/{weight}"
    for node in graph.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for old, new in names.items():
        constants[old].name = new
