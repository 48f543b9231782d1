"""A network as one ONNX graph of standard operators, with a contract that says what goes in and comes out.

The graph is the whole way from pixels to boxes and lines: normalisation (and resizing, where it is asked for),
network, decoding. Calibration, motion and memory are inputs, the new memory is an output. There are no plugins and no
shapes that depend on data. With half precision the graph itself says which numbers are halves
(`perception.export.half`), so that one file means the same to every runtime.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.export.contract import CONTRACT, MODEL, write_contract
from perception.export.half import WEIGHTED, check_weight, halve_graph
from perception.export.lowering import OPSET, OPSET_FP8, TRACED, lower_graph
from perception.export.quantize import KINDS, quantize_graph, quiet, record
from perception.files import replacing
from perception.models.bevformer import BEVFormer, RawBoxes
from perception.models.checkpoint import Network
from perception.models.maptr import MapTR, RawLines
from perception.models.maptrv2 import MapTRv2
from perception.types import CameraRig, Frame, Prediction, State

if TYPE_CHECKING:
    import onnx

PRECISIONS = ("fp32", "fp16", "int8", "fp8")
MOMENT = (
    "images", "img_from_cam", "ego_from_cam", "present", "ego_from_prev", "seconds_since_prev", "is_first",
)  # fmt: skip
OUTPUTS = {
    "box": (
        "box_center", "box_size", "box_yaw", "box_velocity", "box_label", "box_score", "box_valid", "box_spread",
    ),
    "line": ("line_points", "line_closed", "line_label", "line_score", "line_spread"),
}  # fmt: skip


class DeployedNetwork(nn.Module):
    """A network as the vehicle calls it: one moment, named arrays in, named arrays out, no batch dimension.

    Args:
        network: in evaluation mode.
        raw_size: height and width of the images that are given, None for those of the network.
    """

    def __init__(self, network: Network, raw_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.network = network
        self.remembers = network.initial_state(1).bev.numel() > 0
        self.finds = tuple(
            kind for kind, without in (("box", MapTR), ("line", BEVFormer)) if not isinstance(network, without)
        )
        self.input_names = (*MOMENT, "memory") if self.remembers else MOMENT
        self.output_names = tuple(
            name for kind in self.finds for name in (*OUTPUTS[kind], f"raw_{kind}_logits", f"raw_{kind}_places")
        ) + (("new_memory",) if self.remembers else ())
        self.resized = raw_size is not None
        if raw_size is not None:
            rows, columns, img_from_raw = fitting_matrices(raw_size, network.config.image_size)
            self.register_buffer("rows", rows)
            self.register_buffer("columns", columns)
            self.register_buffer("img_from_raw", img_from_raw)

    def forward(
        self,
        images: Tensor,
        img_from_cam: Tensor,
        ego_from_cam: Tensor,
        present: Tensor,
        ego_from_prev: Tensor,
        seconds_since_prev: Tensor,
        is_first: Tensor,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Arguments in the order of `input_names`, results in that of `output_names`; shapes in `example_inputs`."""
        pixels = images.float().permute(0, 3, 1, 2)  # [N, 3, H, W]; TensorRT can only cast bytes
        if self.resized:
            pixels = fit_pixels(pixels, self.rows, self.columns)
            img_from_cam = self.img_from_raw @ img_from_cam
        frame = Frame(
            pixels[None],
            CameraRig(img_from_cam[None], ego_from_cam[None], present[None]),
            ego_from_prev[None],
            seconds_since_prev,
            is_first,
        )
        state = self.network.initial_state(1) if memory is None else State(memory)
        prediction, state = self.network(frame, state)
        scene = self.network.decode(prediction)
        results = []
        for kind in self.finds:
            noun = scene.boxes if kind == "box" else scene.lines
            for name in OUTPUTS[kind]:
                result = getattr(noun, name.removeprefix(f"{kind}_"))[0]
                results.append(result.int() if name.endswith("label") else result)
            results += [raw[-1, 0] for raw in raw_outputs(prediction, kind)]
        return (*results, state.bev) if self.remembers else tuple(results)


def raw_outputs(prediction: Prediction | RawBoxes | RawLines, kind: str) -> tuple[Tensor, Tensor]:
    """Logits and places (parameters of boxes, points of lines) of all layers, [L, B, Q, ...]."""
    if not isinstance(prediction, Prediction):
        return prediction
    if kind == "box":
        return prediction.box_logits, prediction.box_params
    return prediction.line_logits, prediction.line_points


def fit_pixels(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images [N, 3, raw H, raw W] at the network's size, with the matrices of `fitting_matrices`.

    Bit for bit what Pillow makes of them: it counts in whole multiples of 2^-22 and rounds to whole grey values after
    each of the two directions. Weights are split into two halves of 11 bits each, so that all products and sums are
    exact in float32, and in TF32 too.
    """

    def narrowed(pixels: Tensor, weights: Tensor) -> Tensor:
        coarse, fine = weights[0] @ pixels + 0.5, weights[1] @ pixels
        whole = coarse.floor()
        return (whole + (coarse - whole + fine).floor()).clamp(0, 255)

    # The matrices stand first: what is multiplied by weights from the right is halved in half precision.
    across = narrowed(pixels.transpose(2, 3), columns).transpose(2, 3)
    return narrowed(across, rows)


def fitting_matrices(raw_size: tuple[int, int], image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """What `perception.data.loader.fit_image` does, as products with constant matrices.

    Pillow's bilinear filter is a triangle as wide as the scale; every row of a matrix holds the weights of one pixel.

    Args:
        raw_size, image_size: height and width given and wanted.

    Returns:
        rows [2, H, raw H], columns [2, W, raw W], the coarse and the fine part of each, and img_from_raw [3, 3] for the
        calibration.
    """
    (H, W), (raw_h, raw_w) = image_size, raw_size
    scale = max(W / raw_w, H / raw_h)
    left, top = (raw_w - W / scale) / 2, raw_h - H / scale
    img_from_raw = torch.tensor([[scale, 0, -left * scale], [0, scale, -top * scale], [0, 0, 1]])

    def weights(count: int, given: int, start: float, end: float) -> Tensor:
        start, end = np.float32(start), np.float32(end)  # as Pillow keeps them
        step = float(end - start) / count
        middle = float(start) + (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) * step
        reach = max(step, 1.0)
        distance = (torch.arange(given, dtype=torch.float64) + 0.5 - middle) / reach
        triangle = (1 - distance.abs()).clamp(min=0)
        share = (triangle / triangle.sum(1, keepdim=True) * 2**22 + 0.5).floor()  # in 2^-22
        coarse = (share / 2**11).floor() * 2**11
        return (torch.stack([coarse, share - coarse]) / 2**22).float()

    return weights(H, raw_h, top, raw_h), weights(W, raw_w, left, raw_w - left), img_from_raw


def example_inputs(network: Network, cameras: int, raw_size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
    """Arguments of `DeployedNetwork.forward` for a first frame of cameras that look in all directions.

    The memory is the last; a network without one has none.
    """
    H, W = raw_size or network.config.image_size
    angle = torch.arange(cameras) * (2 * torch.pi / cameras)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(cameras)
    ego_from_cam = torch.eye(4).repeat(cameras, 1, 1)
    ego_from_cam[:, :3, 0] = torch.stack([sin, -cos, zero], -1)
    ego_from_cam[:, :3, 1] = torch.tensor([0.0, 0.0, -1.0])
    ego_from_cam[:, :3, 2] = torch.stack([cos, sin, zero], -1)
    ego_from_cam[:, 2, 3] = 1.6
    img_from_cam = torch.tensor([[0.7 * W, 0.0, W / 2], [0.0, 0.7 * W, H / 2], [0.0, 0.0, 1.0]]).repeat(cameras, 1, 1)
    memory = network.initial_state(1).bev
    return (
        torch.randint(0, 256, (cameras, H, W, 3), dtype=torch.uint8), img_from_cam, ego_from_cam,
        torch.ones(cameras, dtype=torch.bool), torch.eye(4), torch.zeros(1), torch.ones(1, dtype=torch.bool),
        *((memory,) if memory.numel() else ()),
    )  # fmt: skip


def export_onnx(
    network: Network,
    folder: str | Path,
    *,
    cameras: int = 6,
    raw_size: tuple[int, int] | None = None,
    precision: str = "fp32",
    for_cpu: bool = False,
    calibration: NuScenesDataset | None = None,
    graph: onnx.ModelProto | None = None,
) -> Path:
    """Writes `model.onnx` and `contract.json`.

    Args:
        network: in evaluation mode, on the CPU.
        folder: is made where it is missing.
        cameras: how many images are given at a time; a camera that is missing is told by `present`.
        raw_size: height and width of the images that are given, all alike; None where they come as the network takes
            them.
        precision: "fp32"; "fp16" for halves wherever geometry, normalisation and softmax allow; "int8" or "fp8" for
            eight bits in the layers with weights that bear it, and halves in the others.
        for_cpu: "int8" as CPUs want it, with bytes from zero up between the layers and float32 instead of halves.
        calibration: streets for the ranges of eight bits, images as the export takes them.
        graph: what `trace` made of the same network, cameras and sizes, which takes longest; made here where not given.

    Returns:
        The folder.

    Raises:
        ConfigError: the network is none that is exported, precision or cameras cannot be, or a weight is too large for
            float16.
    """
    if isinstance(network, MapTRv2):
        raise ConfigError("MapTRv2 is not exported: it sums up features where their depths say, which depends on data")
    wanted = getattr(network.config, "cameras", cameras)
    if cameras != wanted:
        raise ConfigError(f"cameras is {cameras}; this {type(network).__name__} was trained with {wanted}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is not known; use one of {', '.join(PRECISIONS)}")
    if precision in KINDS and calibration is None:
        raise ConfigError(
            f"precision {precision} needs a dataset for the ranges of its numbers; give one as calibration"
        )
    if for_cpu and precision not in ("fp32", "int8"):
        raise ConfigError(f"precision {precision} is slow on CPUs; take fp32 or int8")
    if cameras < 1:
        raise ConfigError(f"cameras is {cameras}; give at least 1")
    halved = precision != "fp32" and not for_cpu
    for module_name, module in network.named_modules() if halved else ():
        # A convolution without a bias has a batch norm behind it, which the trace folds into its weight.
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            for name, parameter in module.named_parameters(recurse=False):
                check_weight(f"{module_name}.{name}", _array(parameter))
    folder = Path(folder)
    model = DeployedNetwork(network, raw_size).eval()
    inputs = example_inputs(network, cameras, raw_size)
    graph = trace(model, inputs) if graph is None else graph
    quantization = {}
    if precision in KINDS:
        if halved:
            halve_graph(graph)  # refuses a weight that the trace has folded before the long work
        kind = "uint8" if for_cpu else precision
        graph, quantization = quantize_graph(graph, record(graph, calibration), kind)
    if halved:
        graph = halve_graph(graph)
    strange = sorted({node.op_type for node in graph.graph.node if node.domain not in ("", "ai.onnx")})
    if strange:
        raise ConfigError(f"the graph holds operators that are no standard ones: {', '.join(strange)}")
    graph = lower_graph(graph, OPSET_FP8 if precision == "fp8" else OPSET)
    content = graph.SerializeToString()
    with torch.inference_mode():
        outputs = dict(zip(model.output_names, model(*inputs), strict=True))
    with replacing(folder / MODEL) as beside:
        beside.write_bytes(content)
    write_contract(
        folder / CONTRACT,
        inputs=dict(zip(model.input_names, map(_array, inputs), strict=True)),
        outputs={name: _array(tensor) for name, tensor in outputs.items()},
        sha256={MODEL: hashlib.sha256(content).hexdigest()},
        network=type(network).__name__,
        image_size=network.config.image_size,
        raw_size=raw_size,
        precision=precision,
        opset=graph.opset_import[0].version,
        layers=layer_types(graph),
        quantization=quantization,
        version=metadata.version("perception"),
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


def trace(model: DeployedNetwork, inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
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
