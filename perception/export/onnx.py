"""A network as one ONNX graph of standard operators, with a contract that says what goes in and comes out.

The graph is the whole way from the bytes of the cameras to boxes and lines: colours, resizing, normalisation, network,
decoding. Calibration, motion and memory are inputs, the new memory is an output. There are no plugins and no
shapes that depend on data. With half precision the graph itself says which numbers are halves
(`perception.export.half`), so that one file means the same to every runtime.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from perception import __version__
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.export.contract import CONTRACT, MODEL, ImageInputs, write_contract
from perception.export.dialect import check_dialect
from perception.export.half import WEIGHTED, check_weight, halve_graph
from perception.export.images import ImagePreprocessing
from perception.export.lowering import OPSET, OPSET_FP8, TRACED, lower_graph
from perception.export.progress import stage
from perception.export.quantize import KINDS, quantize_graph, quiet, record
from perception.files import replacing
from perception.models import Network
from perception.types import CameraRig, Frame, State

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
    """A network as the vehicle calls it: one frame, named arrays in, named arrays out, no batch dimension.

    Args:
        network: in evaluation mode.
        images: how the images are given.
    """

    def __init__(self, network: Network, images: ImageInputs) -> None:
        super().__init__()
        self.network = network
        self.remembers = network.initial_state(1).bev.numel() > 0
        self.input_names = (*images.names, *CALIBRATION_AND_MOTION, *(("memory",) if self.remembers else ()))
        self.output_names = tuple(
            name for kind in network.finds for name in (*OUTPUTS[kind], *raw_names(network, kind))
        ) + (("new_memory",) if self.remembers else ())
        self.preprocess = ImagePreprocessing(images, network.config.image_size)

    def forward(
        self,
        images: Sequence[Tensor],
        img_from_cam: Tensor,
        ego_from_cam: Tensor,
        present: Tensor,
        ego_from_prev: Tensor,
        seconds_since_prev: Tensor,
        is_first: Tensor,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Arguments in the order of `input_names`, the images of all cameras as the first; results in that of
        `output_names`; shapes in `example_inputs`."""
        if self.preprocess.fitted:
            img_from_cam = self.preprocess.img_from_raw @ img_from_cam
        frame = Frame(
            self.preprocess(images)[None],
            CameraRig(img_from_cam[None], ego_from_cam[None], present[None]),
            ego_from_prev[None],
            seconds_since_prev,
            is_first,
        )
        state = self.network.initial_state(1) if memory is None else State(memory)
        prediction, state = self.network(frame, state)
        scene = self.network.decode(prediction)
        raw = named_raw_outputs(self.network, prediction)
        results = []
        for kind in self.network.finds:
            noun = scene.boxes if kind == "box" else scene.lines
            for name in OUTPUTS[kind]:
                result = getattr(noun, name.removeprefix(f"{kind}_"))[0]
                results.append(result.int() if name.endswith("label") else result)
            results += [raw[name][0] for name in raw_names(self.network, kind)]
        return (*results, state.bev) if self.remembers else tuple(results)


def raw_names(network: Network, kind: str) -> tuple[str, ...]:
    """Names of an export's outputs before decoding, of boxes ("box") or lines ("line"); logits are the first."""
    return tuple(f"raw_{name}" for name in network.raw_names if name.startswith(f"{kind}_"))


def named_raw_outputs(network: Network, prediction) -> dict[str, Tensor]:
    """`Network.raw_outputs` [B, Q, ...] under the names that they have in an export."""
    return {f"raw_{name}": x for name, x in zip(network.raw_names, network.raw_outputs(prediction), strict=True)}


def example_inputs(network: Network, images: ImageInputs) -> tuple[tuple[Tensor, ...] | Tensor, ...]:
    """Arguments of `DeployedNetwork.forward` for a first frame of cameras that look in all directions.

    The images of all cameras are the first, the memory is the last; a network without one has none.
    """
    cameras = len(images.sizes)
    angle = torch.arange(cameras) * (2 * torch.pi / cameras)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(cameras)
    ego_from_cam = torch.eye(4).repeat(cameras, 1, 1)
    ego_from_cam[:, :3, 0] = torch.stack([sin, -cos, zero], -1)
    ego_from_cam[:, :3, 1] = torch.tensor([0.0, 0.0, -1.0])
    ego_from_cam[:, :3, 2] = torch.stack([cos, sin, zero], -1)
    ego_from_cam[:, 2, 3] = 1.6
    img_from_cam = torch.tensor(
        [[[0.7 * W, 0.0, W / 2], [0.0, 0.7 * W, H / 2], [0.0, 0.0, 1.0]] for H, W in images.sizes]
    )
    memory = network.initial_state(1).bev
    return (
        tuple(torch.randint(0, 256, images.shape(n), dtype=torch.uint8) for n in range(cameras)),
        img_from_cam, ego_from_cam, torch.ones(cameras, dtype=torch.bool), torch.eye(4), torch.zeros(1),
        torch.ones(1, dtype=torch.bool), *((memory,) if memory.numel() else ()),
    )  # fmt: skip


def check_export(network: Network, *, cameras: int, precision: str, for_cpu: bool) -> None:
    """Checks what `export_onnx` is asked for; ask before long work.

    Args:
        network, cameras, precision, for_cpu: as for `export_onnx`.

    Raises:
        ConfigError: the network is none that is exported, precision or cameras cannot be, or a weight is too large for
            float16.
    """
    if network.no_export:
        raise ConfigError(f"{type(network).__name__} is not exported: {network.no_export}")
    if cameras < 1:
        raise ConfigError(f"cameras is {cameras}; give at least 1")
    wanted = network.config.cameras
    if wanted is not None and cameras != wanted:
        raise ConfigError(f"cameras is {cameras}; this {type(network).__name__} was trained with {wanted}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is not known; use one of {', '.join(PRECISIONS)}")
    if for_cpu and precision not in ("fp32", "int8"):
        raise ConfigError(f"precision {precision} is slow on CPUs; take fp32 or int8")
    for module_name, module in network.named_modules() if precision != "fp32" and not for_cpu else ():
        # A convolution without a bias has a batch norm behind it, which the trace folds into its weight.
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
    calibration: NuScenesDataset | None = None,
    graph: onnx.ModelProto | None = None,
    progress: bool = False,
) -> Path:
    """Writes `model.onnx` and `contract.json`. Certificates in the folder, which are of another graph, are removed.

    Args:
        network: in evaluation mode, on the CPU.
        folder: is made where it is missing.
        cameras: how many images are given at a time; a camera that is missing is told by `present`.
        raw_size: height and width of the images that are given, for all cameras or one pair for each; None where they
            come as the network takes them.
        image_format: how they are given, of `perception.export.contract.IMAGE_FORMATS`.
        precision: "fp32"; "fp16" for halves wherever geometry, normalisation and softmax allow; "int8" or "fp8" for
            eight bits in the layers with weights that bear it, and halves in the others.
        for_cpu: "int8" as CPUs want it, with bytes from zero up between the layers and float32 instead of halves.
        calibration: streets for the ranges of eight bits, images as the export takes them.
        graph: what `trace` made of the same network, cameras and sizes, which takes longest; made here where not given.
        progress: show on stderr what is done and how long it took.

    Returns:
        The folder.

    Raises:
        ConfigError: the network is none that is exported, precision, cameras, sizes or format cannot be, a weight is
            too large for float16, or the graph has a form that a TensorRT parser may read otherwise than ONNX defines
            it.
    """
    check_export(network, cameras=cameras, precision=precision, for_cpu=for_cpu)
    if precision in KINDS and calibration is None:
        raise ConfigError(
            f"precision {precision} needs a dataset for the ranges of its numbers; give one as calibration"
        )
    images = ImageInputs.of_rig(cameras, network.config.image_size, raw_size, image_format)
    halved = precision != "fp32" and not for_cpu
    folder = Path(folder)
    model = DeployedNetwork(network, images).eval()
    inputs = example_inputs(network, images)
    if graph is None:
        with stage("tracing the network", progress):
            graph = trace(model, inputs)
    quantization = {}
    if precision in KINDS:
        if halved:
            halve_graph(graph)  # refuses a weight that the trace has folded before the long work
        kind = "uint8" if for_cpu else precision
        moments = record(graph, calibration, images, progress=progress)
        graph, quantization = quantize_graph(graph, moments, kind, progress=progress)
    if halved:
        graph = halve_graph(graph)
    strange = sorted({node.op_type for node in graph.graph.node if node.domain not in ("", "ai.onnx")})
    if strange:
        raise ConfigError(f"the graph holds operators that are no standard ones: {', '.join(strange)}")
    graph = lower_graph(graph, OPSET_FP8 if precision == "fp8" else OPSET)
    checked = check_dialect(graph, () if for_cpu and precision in KINDS else None)  # bytes from zero up are for CPUs
    content = graph.SerializeToString()
    with torch.inference_mode():
        outputs = dict(zip(model.output_names, model(*inputs), strict=True))
    for old in folder.glob("certificate*"):
        old.unlink()
    with replacing(folder / MODEL) as beside:
        beside.write_bytes(content)
    write_contract(
        folder / CONTRACT,
        inputs=dict(zip(model.input_names, map(_array, (*inputs[0], *inputs[1:])), strict=True)),
        outputs={name: _array(tensor) for name, tensor in outputs.items()},
        sha256={MODEL: hashlib.sha256(content).hexdigest()},
        network=type(network).__name__,
        image_size=network.config.image_size,
        images=images,
        precision=precision,
        opset=graph.opset_import[0].version,
        layers=layer_types(graph),
        quantization=quantization,
        checked=checked,
        version=__version__,
    )
    return folder


def layer_types(model) -> dict[str, dict[str, int]]:
    """How many operators of each kind give which type: what a strongly typed runtime will run them in."""
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


def trace(model: DeployedNetwork, inputs: tuple[tuple[Tensor, ...] | Tensor, ...]) -> onnx.ModelProto:
    """The graph of a network in float32 and opset 18, weights under the names that they have in the network.

    Args:
        model: in evaluation mode.
        inputs: from `example_inputs`.
    """
    with warnings.catch_warnings(), quiet(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, inputs, dynamo=True, opset_version=TRACED, verbose=False, optimize=True,
            input_names=list(model.input_names), output_names=list(model.output_names),
        )  # fmt: skip
    graph = program.model_proto
    _name_weights(graph)
    # Where in which file a node comes from is nobody's business in a vehicle.
    for node in graph.graph.node:
        del node.metadata_props[:]
    for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del value.metadata_props[:]
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    return graph


def _name_weights(graph) -> None:
    """Gives weights that the exporter transposed, and numbered, the names of the layers that they belong to."""
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
