"""Two query decoders on the BEV features, one for boxes and one for lines, and their post-processing.

Both are DETR-like sets of queries (https://arxiv.org/abs/2005.12872) with deformable attention on the BEV and a
refinement per layer. Box queries start at the peaks of the dense centre heat map, as in TransFusion
(https://arxiv.org/abs/2203.11496); line queries are instances times points, as in MapTR
(https://arxiv.org/abs/2208.14437), and start from anchor lines that are learned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.cameras import choose_cameras
from perception.grid import BEVGrid
from perception.models.bev_transformer.encoder import depth_bin
from perception.models.decoding import LOG_UNCERTAINTY_RANGE, close_rings, topk_pairs
from perception.ops import sample_bev, sample_cameras
from perception.types import Boxes, CameraRig, FrameObjects, LaneRange, Polylines, Prediction

LOG_SIZE_RANGE = (-3.0, 4.0)  # of the logarithm of a length in metres: 5 cm to 55 m
PRIOR_LOGIT = -4.0  # initial class logits: almost everything is background
# Subtracted from the logit of a cell that is no local maximum when start cells are ranked. A wide object gets one query
# before it gets a second one, and two objects in neighbouring cells still get one each before noise does.
PEAK_BONUS = 3.0
# Circle NMS: the radius of a class is its usual width, but at least this many metres. Positions are no better than a
# cell of the grid, so small objects are often predicted more than once.
MIN_NMS_RADIUS = 1.5
# Iterations of circle NMS: exact for chains of up to so many boxes, each too close to the one before.
NMS_ITERATIONS = 16
# Usual length, width and height of BOX_CLASSES in metres, from which sizes are refined.
USUAL_SIZES = (
    (4.6, 1.95, 1.7), (6.9, 2.5, 2.8), (12.3, 2.9, 3.9), (11.0, 2.9, 3.5), (6.4, 2.9, 3.2),
    (1.7, 0.6, 1.3), (2.1, 0.8, 1.5), (0.7, 0.7, 1.8), (0.4, 0.4, 1.1), (0.5, 2.5, 1.0),
)  # fmt: skip


def _mlp(channels_in: int, channels: int, channels_out: int, bias: float | None = None) -> nn.Sequential:
    first, last = nn.Linear(channels_in, channels), nn.Linear(channels, channels_out)
    if bias is not None:
        nn.init.constant_(last.bias, bias)
    return nn.Sequential(first, nn.ReLU(inplace=True), last)


def _dense_head(channels: int, classes: int) -> nn.Sequential:
    first, last = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, classes, 1)
    assert last.bias is not None
    nn.init.constant_(last.bias, PRIOR_LOGIT)
    return nn.Sequential(first, nn.ReLU(inplace=True), last)


def encode_position(position: Tensor, channels: int) -> Tensor:
    """Sines and cosines of positions: [..., 2] in 0..1 to [..., channels], channels divisible by 4."""
    frequency = torch.pi * 2.0 ** torch.linspace(0, 6, channels // 4, device=position.device)
    phase = position[..., None].float() * frequency  # [..., 2, channels / 4]
    return torch.cat([phase.sin(), phase.cos()], -1).flatten(-2)


def _yaw_from_observation_angle(sin_cos: Tensor, center: Tensor) -> Tensor:
    """Turns (sin, cos) of angles to the line from the ego origin to `center` [..., 2] into those of angles to ego x."""
    x, y = (center / center.norm(dim=-1, keepdim=True).clamp(min=1e-3)).unbind(-1)
    sin, cos = sin_cos.unbind(-1)
    return torch.stack([sin * x + cos * y, cos * x - sin * y], -1)


def _rotate_by_heading(along: Tensor, heading: Tensor) -> Tensor:
    """Rotates vectors [..., 2] from frames whose x axes point along `heading` (sin, cos of any length) to the ego
    frame."""
    sin, cos = F.normalize(heading, dim=-1).unbind(-1)
    x, y = along.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


class BEVAttention(nn.Module):
    """Deformable attention from queries with a reference point to the BEV features.

    Args:
        grid: of the BEV features.
        channels: of queries and BEV features.
        heads: number of heads.
        samples: sampling locations per head.
        reach: metres. The initial offsets of a head are spread over this distance, in one direction per head.
    """

    def __init__(self, grid: BEVGrid, channels: int, heads: int, samples: int, reach: float) -> None:
        super().__init__()
        self.grid, self.heads, self.samples = grid, heads, samples
        self.offset = nn.Linear(channels, heads * samples * 2)
        self.weight = nn.Linear(channels, heads * samples)
        self.output = nn.Linear(channels, channels)
        nn.init.normal_(self.offset.weight, std=1e-3)
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.weight.bias)
        angle = torch.arange(heads) * (2 * torch.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)[:, None]  # [heads, 1, 2]
        radius = torch.arange(samples)[None, :, None] * (reach / max(samples - 1, 1))
        with torch.no_grad():
            self.offset.bias.copy_((direction * radius).reshape(-1))

    def forward(self, query: Tensor, reference: Tensor, value: Tensor) -> Tensor:
        """query [B, Q, C], reference [B, Q, 2] metres in the ego frame, value [B, C, X, Y] -> [B, Q, C]."""
        B, Q, C = query.shape
        offset = self.offset(query).float().reshape(B, Q, self.heads, self.samples, 2)
        weight = self.weight(query).float().reshape(B, Q, self.heads, self.samples).softmax(-1)
        points_ego = reference[:, :, None, None] + offset  # [B, Q, heads, S, 2]
        return self.output(sample_bev(value, self.grid, points_ego, weight))


class ImageSampling(nn.Module):
    """Samples image features at the centre of a box and at the centres of its six faces, as Sparse4D does.

    A box with a wrong depth or yaw does not fit the image features there (https://arxiv.org/abs/2211.10581). The depths
    of the points are encoded too. Compared with the depth in the image features they show whether the box is occluded.

    Args:
        channels: of the image features and of the result.
    """

    offsets: Tensor  # [G, 3]
    OFFSETS = ((0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))  # in half sizes

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor(self.OFFSETS, dtype=torch.float32) / 2, persistent=False)  # [G, 3]
        self.output = _mlp(len(self.OFFSETS) * (channels + 2), channels, channels)

    def forward(self, params: Tensor, value: Tensor, rig: CameraRig, image_size: tuple[int, int]) -> Tensor:
        """Boxes [B, Q, 10] as in `Prediction.box_params`, value [B, N, C, h, w], rig [B, N] -> [B, Q, C]."""
        size = params[..., None, 3:6].clamp(*LOG_SIZE_RANGE).exp()  # [B, Q, 1, 3]
        x, y, z = (self.offsets * size).unbind(-1)  # [B, Q, G]
        sin, cos = F.normalize(params[..., 6:8], dim=-1).chunk(2, -1)  # [B, Q, 1]
        points_ego = params[..., None, :3] + torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)
        uv, depth, seen, camera = choose_cameras(rig, points_ego, image_size, 2)  # [B, Q, G, K, ...]
        weight = seen / seen.sum(-1, keepdim=True).clamp(min=1)  # [B, Q, G, K]
        sampled = sample_cameras(value, uv.flatten(1, 2), camera.flatten(1, 2), weight.flatten(1, 2))
        sampled = sampled.unflatten(1, depth.shape[1:3])  # [B, Q, G, C]
        geometry = torch.stack([(depth_bin(depth, 2) * weight).sum(-1), weight.sum(-1)], -1)  # [B, Q, G, 2]
        return self.output(torch.cat([sampled, geometry], -1).flatten(2))


class SelfAttention(nn.Module):
    """Pre-norm multi-head self-attention, with position embeddings added to queries and keys."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query_key = nn.Linear(channels, 2 * channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, query: Tensor, position: Tensor) -> Tensor:
        """Attends: query and position [B, Q, C] -> residual of the query [B, Q, C]."""
        x = self.norm(query)
        q, k = self.query_key(x + position).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, self.value(x)))
        # Not the fused kernel: it is slower for short sequences, and softmax stays in float32 here.
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(-1)  # [B, heads, Q, Q]
        return self.output((attention.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class BoxDecoderLayer(nn.Module):
    """The parts of one decoder layer of boxes: attention, and heads for class, box and uncertainty."""

    def __init__(self, grid: BEVGrid, channels: int, heads: int, classes: int) -> None:
        super().__init__()
        self.reading = ImageSampling(channels)
        self.self_attention = SelfAttention(channels, heads)
        self.norm = nn.LayerNorm(channels)
        self.bev_attention = BEVAttention(grid, channels, heads, samples=4, reach=3.0)
        self.feed_forward = nn.Sequential(nn.LayerNorm(channels), _mlp(channels, 2 * channels, channels))
        self.to_class = _mlp(channels, channels, classes)
        self.to_box = _mlp(channels, channels, 12)
        self.to_uncertainty = _mlp(channels, channels, 9)
        for head in (self.to_box, self.to_class):
            for parameter in head[-1].parameters():
                nn.init.zeros_(parameter)


class BoxDecoder(nn.Module):
    """Predicts boxes: queries start at the peaks of a centre heat map and are refined layer by layer.

    Args:
        grid: of the BEV features.
        channels_in: of the image features.
        channels, heads, layers: size of the decoder.
        queries: number of start cells.
        classes: number of box classes.
    """

    def __init__(
        self, grid: BEVGrid, channels_in: int, channels: int, heads: int, layers: int, queries: int, classes: int
    ) -> None:
        super().__init__()
        self.grid, self.queries = grid, queries
        self.heatmap = _dense_head(channels, classes)
        self.content = nn.Linear(channels + classes, channels)
        self.position = _mlp(channels, channels, channels)
        self.value = nn.Conv2d(channels, channels, 1)
        self.image_value = nn.Conv2d(channels_in, channels, 1)
        self.layers: Any = nn.ModuleList(BoxDecoderLayer(grid, channels, heads, classes) for _ in range(layers))
        self.register_buffer("usual_log_sizes", torch.tensor(USUAL_SIZES).log(), persistent=False)  # [K, 3]

    def forward(
        self, bev: Tensor, images: Tensor, rig: CameraRig, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predicts boxes from BEV and image features.

        Args:
            bev: [B, C, X, Y].
            images: [B, N, channels_in, h, w].
            rig: leading [B, N].
            image_size: height and width in pixels of the images that the rig is calibrated for.

        Returns:
            box_logits [L, B, Q, K], box_params [L, B, Q, 10], box_log_uncertainty [L, B, Q, 9] and heatmap_logits
            [B, K, X, Y] as in `perception.types.Prediction`.
        """
        B, C, X, Y = bev.shape
        heatmap_logits = self.heatmap(bev)
        heat = heatmap_logits.detach().float().amax(1, keepdim=True)  # [B, 1, X, Y]
        # A cell that equals the maximum of its 3x3 neighbourhood is a peak.
        peak = torch.where(heat == F.max_pool2d(heat, 3, 1, 1), heat, heat - PEAK_BONUS)
        cell = peak.flatten(1).topk(self.queries, dim=1).indices  # [B, Q]
        logits = heatmap_logits.detach().flatten(2).gather(2, cell[:, None].expand(-1, heatmap_logits.shape[1], -1))
        logits = logits.transpose(1, 2).float()  # [B, Q, K]
        feature = bev.flatten(2).gather(2, cell[:, None].expand(-1, C, -1)).transpose(1, 2)  # [B, Q, C]
        center = self.grid.cell_centers(bev.device).reshape(-1, 2)[cell]  # [B, Q, 2]
        query = self.content(torch.cat([feature, logits.sigmoid().to(feature.dtype)], -1))
        query = query + self.position(encode_position(self.grid.normalize(center), C))
        value = self.value(bev)
        image_value = self.image_value(images.flatten(0, 1)).unflatten(0, images.shape[:2])

        # A box starts on the ground with the usual size of its class, zero yaw and zero velocity.
        log_size = (logits.softmax(-1)[..., None] * self.usual_log_sizes).sum(-2)  # [B, Q, 3]
        z = log_size[..., 2:].exp() / 2
        rest = F.pad(torch.ones_like(z), (1, 2))  # sin, cos and two speeds
        params = torch.cat([center, z, log_size, rest], -1)
        speed = torch.zeros_like(params[..., 8:])
        all_logits, all_params, all_log_uncertainties = [], [], []
        for layer in self.layers:
            reference = params[..., :2]
            position = self.position(encode_position(self.grid.normalize(reference), C))
            query = query + layer.reading(params, image_value, rig, image_size)
            query = query + layer.self_attention(query, position)
            query = query + layer.bev_attention(layer.norm(query) + position, reference, value)
            query = query + layer.feed_forward(query)
            logits = logits + layer.to_class(query).float()
            # Yaw is the sum of two parts: relative to ego x (from the road) and to the line of sight (from the image).
            change, along, observed = layer.to_box(query).float().split([8, 2, 2], -1)
            refined = params[..., :8] + change + F.pad(_yaw_from_observation_angle(observed, reference), (6, 0))
            # Objects move along their heading, so speed is predicted along and across it.
            speed = speed.detach() + along  # along the heading and across, m/s
            refined = torch.cat([refined, _rotate_by_heading(speed, refined[..., 6:].detach())], -1)
            all_logits.append(logits)
            all_params.append(refined)
            # The query is detached: learning the uncertainty does not change the boxes.
            all_log_uncertainties.append(layer.to_uncertainty(query.detach()).float())
            params = refined.detach()
        return torch.stack(all_logits), torch.stack(all_params), torch.stack(all_log_uncertainties), heatmap_logits


def anchor_lines(count: int, points: int, lane_range: LaneRange) -> Tensor:
    """Makes the initial lines of the queries: straight lines and rings over the lane range, [count, P, 2] metres.

    Half of them run along x (where the ego drives), on the rear or the front half of the range; a quarter run along y;
    a quarter are rings the size of a crossing.
    """
    along, across = count // 2, count // 4
    length_x, length_y = lane_range
    rear, right = -length_x / 2, -length_y / 2
    lines = []
    t = torch.linspace(0, 1, points)
    for k in range(along):
        lane_y = right + length_y * (k // 2 + 0.5) / ((along + 1) // 2)
        x = rear + length_x * (0.5 * t + 0.5 * (k % 2))
        lines.append(torch.stack([x, torch.full_like(t, lane_y)], -1))
    for k in range(across):
        lane_x = rear + length_x * (k + 0.5) / across
        lines.append(torch.stack([torch.full_like(t, lane_x), right + length_y * t], -1))
    rings = count - len(lines)
    for k in range(rings):
        center_x = rear + length_x * (k + 0.5) / rings
        center_y = 0.2 * length_y if k % 2 else -0.2 * length_y
        angle = 2 * torch.pi * t
        lines.append(torch.stack([center_x + 2.0 * angle.cos(), center_y + 4.0 * angle.sin()], -1))
    return torch.stack(lines)


class LineDecoderLayer(nn.Module):
    """The parts of one decoder layer of lines: attention, and heads for class, shift of points and uncertainty."""

    def __init__(self, grid: BEVGrid, channels: int, heads: int, classes: int) -> None:
        super().__init__()
        self.between = SelfAttention(channels, heads)
        self.along = SelfAttention(channels, heads)
        self.norm = nn.LayerNorm(channels)
        self.bev_attention = BEVAttention(grid, channels, heads, samples=4, reach=4.0)
        self.feed_forward = nn.Sequential(nn.LayerNorm(channels), _mlp(channels, 2 * channels, channels))
        self.to_class = nn.Sequential(nn.LayerNorm(channels), _mlp(channels, channels, classes, PRIOR_LOGIT))
        self.to_shift = _mlp(channels, channels, 2)
        self.to_uncertainty = _mlp(channels, channels, 2)
        for parameter in self.to_shift[-1].parameters():
            nn.init.zeros_(parameter)


class LineDecoder(nn.Module):
    """Predicts vector lines: queries are instances times points, with attention between instances and along each line.

    Args:
        grid: of the BEV features.
        channels, heads, layers: size of the decoder.
        queries: number of line instances; points: points per line.
        classes: number of line classes.
        lane_range: that the initial lines cover.
    """

    def __init__(
        self,
        grid: BEVGrid,
        channels: int,
        heads: int,
        layers: int,
        queries: int,
        points: int,
        classes: int,
        lane_range: LaneRange,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.bev_seg = _dense_head(channels, classes)
        self.value = nn.Conv2d(channels + classes, channels, 1)
        # [Q, P, 2] in units of 10 m, so that they learn at the rate of the other parameters.
        self.anchors = nn.Parameter(anchor_lines(queries, points, lane_range) / 10)
        self.instance = nn.Parameter(0.1 * torch.randn(queries, 1, channels))
        self.point = nn.Parameter(0.1 * torch.randn(1, points, channels))
        self.position = _mlp(channels, channels, channels)
        self.layers: Any = nn.ModuleList(LineDecoderLayer(grid, channels, heads, classes) for _ in range(layers))

    def forward(self, bev: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predicts lines from BEV features [B, C, X, Y].

        Returns:
            line_logits [L, B, Q, K], line_points and line_log_uncertainty [L, B, Q, P, 2], bev_seg_logits [B, K, X, Y].
        """
        B, C, X, Y = bev.shape
        Q, P, _ = self.anchors.shape
        bev_seg_logits = self.bev_seg(bev)
        value = self.value(torch.cat([bev, bev_seg_logits.detach().sigmoid()], 1))

        query = (self.instance + self.point).expand(B, -1, -1, -1)  # [B, Q, P, C]
        points = (10 * self.anchors).expand(B, -1, -1, -1)  # [B, Q, P, 2]
        all_logits, all_points, all_log_uncertainties = [], [], []
        for layer in self.layers:
            position = self.position(encode_position(self.grid.normalize(points), C))  # [B, Q, P, C]
            # Between instances, point by point; then along each instance.
            across, across_position = (x.transpose(1, 2).flatten(0, 1) for x in (query, position))  # [B * P, Q, C]
            query = query + layer.between(across, across_position).unflatten(0, (B, P)).transpose(1, 2)
            query = query + layer.along(query.flatten(0, 1), position.flatten(0, 1)).unflatten(0, (B, Q))
            flat = (layer.norm(query) + position).flatten(1, 2)  # [B, Q * P, C]
            query = query + layer.bev_attention(flat, points.flatten(1, 2), value).unflatten(1, (Q, P))
            query = query + layer.feed_forward(query)
            refined = points + 10 * layer.to_shift(query).float()
            all_logits.append(layer.to_class(query.mean(2)).float())
            all_points.append(refined)
            all_log_uncertainties.append(layer.to_uncertainty(query.detach()).float())
            points = refined.detach()
        return torch.stack(all_logits), torch.stack(all_points), torch.stack(all_log_uncertainties), bev_seg_logits


def decode(prediction: Prediction) -> FrameObjects:
    """Decodes the last layer: top-k pairs of query and class, best score first, and circle NMS of boxes.

    You get as many boxes and lines as there are queries. A query may appear under several classes. Boxes that circle
    NMS drops are not `valid`. No score threshold is applied.

    Args:
        prediction: with leading [L, B]; velocities, sizes and frames as in `Prediction`.

    Returns:
        Objects with leading [B]. `attribute` is -1: the network does not predict it.
    """
    logits, params = prediction.box_logits[-1].float(), prediction.box_params[-1].float()
    score, query, label = topk_pairs(logits, logits.shape[1])
    params = params.gather(1, query[..., None].expand(-1, -1, params.shape[-1]))  # [B, M, 10]
    uncertainty = prediction.box_log_uncertainty[-1].float().gather(1, query[..., None].expand(-1, -1, 9))
    valid = circle_nms(params[..., :2], label)
    boxes = Boxes(
        center=params[..., 0:3],
        size=params[..., 3:6].clamp(*LOG_SIZE_RANGE).exp(),
        yaw=torch.atan2(params[..., 6], params[..., 7]),
        velocity=params[..., 8:10],
        label=label,
        attribute=torch.full_like(label, -1),
        score=score,
        valid=valid,
        uncertainty=uncertainty.clamp(*LOG_UNCERTAINTY_RANGE).exp(),
    )
    points = prediction.line_points[-1].float()  # [B, Q, P, 2]
    score, query, label = topk_pairs(prediction.line_logits[-1].float(), prediction.line_logits.shape[2])
    pick = query[..., None, None].expand(-1, -1, *points.shape[2:])
    points = points.gather(1, pick)
    uncertainty = prediction.line_log_uncertainty[-1].float().gather(1, pick).clamp(*LOG_UNCERTAINTY_RANGE).exp()
    points, uncertainty, closed = close_rings(points, uncertainty)
    lines = Polylines(points, closed, label, score, torch.ones_like(closed), uncertainty)
    return FrameObjects(boxes, lines)


def circle_nms(center: Tensor, label: Tensor) -> Tensor:
    """Circle NMS (CenterPoint, https://arxiv.org/abs/2006.11275): False for a box too close to a better one of its
    class.

    Dropped boxes suppress nothing. The sequential rule is computed as a fixed number of matrix products, so that it
    exports with static shapes.

    Args:
        center: [B, M, 2] metres, best score first.
        label: [B, M].

    Returns:
        [B, M] bool.
    """
    radius = torch.zeros_like(center[..., 0])  # [B, M]
    for k, size in enumerate(USUAL_SIZES):
        radius = radius + max(min(size[:2]), MIN_NMS_RADIUS) * (label == k)
    distance = (center[:, :, None] - center[:, None]).norm(dim=-1)  # [B, M, M]
    rival = (distance < radius[..., None]) & (label[..., None] == label[:, None])
    rank = torch.arange(center.shape[1], device=center.device)
    rival = (rival & (rank[:, None] > rank)).to(center.dtype)  # no tril: parsers of TensorRT take none of booleans
    keep = torch.ones_like(center[..., 0])
    for _ in range(NMS_ITERATIONS):
        keep = 1 - (rival @ keep[..., None])[..., 0].clamp(max=1)
    return keep > 0.5
