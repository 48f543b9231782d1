"""A network in one file, as docs/add-a-network.md explains it: every BEV cell reads one camera and may hold one box."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.cameras import choose_cameras
from perception.grid import BEVGrid
from perception.matching import focal_cost, focal_loss, hungarian
from perception.models.backbone import FPNEncoder
from perception.models.decoding import empty_lines, topk_pairs
from perception.ops import sample_cameras
from perception.targets import encode_boxes
from perception.types import BOX_CLASSES, DEFAULT_LANE_RANGE, Boxes, Frame, FrameObjects, LaneRange, State


@dataclass(frozen=True)
class ToyConfig:
    image_size: tuple[int, int] = (64, 112)
    channels: int = 16
    max_boxes: int = 20
    cameras: ClassVar[None] = None  # any number
    line_points: ClassVar[int] = 20  # of the ground truth; this network predicts no lines
    lane_range: ClassVar[LaneRange] = DEFAULT_LANE_RANGE

    @classmethod
    def presets(cls) -> dict[str, Callable[[], ToyConfig]]:
        return {"toy": cls}


class ToyPrediction(NamedTuple):
    logits: Tensor  # [B, X * Y, K]
    params: Tensor  # [B, X * Y, 10] see `perception.targets.encode_boxes`


class ToyNetwork(nn.Module):
    finds = ("box",)
    loss_weights: ClassVar[dict[str, float]] = {"box_class": 1.0, "box_params": 0.25}
    image_loss = None
    needs_gt = tracks = False
    raw_names = ("box_logits", "box_params")
    extra_inputs = ()
    no_export = ""
    recomputable = ("head",)
    published_prefixes: ClassVar[dict[str, str]] = {}

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = FPNEncoder("resnet18", stages=2, stride=8, channels=config.channels)
        centers = BEVGrid((-51.2, 51.2), (-51.2, 51.2), (32, 32)).cell_centers().reshape(-1, 1, 2)
        self.register_buffer("points_ego", F.pad(centers, (0, 1), value=0.8), persistent=False)  # [X * Y, 1, 3]
        self.head = nn.Sequential(nn.Linear(config.channels, 64), nn.ReLU(), nn.Linear(64, len(BOX_CLASSES) + 10))

    def initial_state(self, batch_size: int) -> State:
        return State(self.points_ego.new_zeros(batch_size, 0, 1, 1))  # no memory

    def forward(self, frame: Frame, state: State) -> tuple[ToyPrediction, State]:
        B, N, _, H, W = frame.images.shape
        features = self.image_encoder(frame.images.flatten(0, 1)).unflatten(0, (B, N))  # [B, N, C, h, w]
        uv, _, seen, camera = (x.flatten(1, 2) for x in choose_cameras(frame.rig, self.points_ego, (H, W), 1))
        cells = sample_cameras(features, uv, camera, seen.float())  # [B, X * Y, C]
        logits, params = self.head(cells).float().split([len(BOX_CLASSES), 10], -1)
        return ToyPrediction(logits, torch.cat([params[..., :3] + self.points_ego[:, 0], params[..., 3:]], -1)), state

    def loss(self, prediction: ToyPrediction, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        boxes, targets = gt.boxes, encode_boxes(gt.boxes)[..., :8]  # without velocity, which may be unknown
        with torch.no_grad():
            cost = focal_cost(prediction.logits, boxes.label) + torch.cdist(prediction.params[..., :8], targets, p=1)
            match = hungarian(cost, boxes.valid)
        wanted = torch.zeros_like(prediction.logits)
        wanted[match.batch, match.query, boxes.label[match.batch, match.target]] = 1.0
        error = (prediction.params[match.batch, match.query, :8] - targets[match.batch, match.target]).abs()
        count = max(len(match.query), 1)
        return {
            "box_class": focal_loss(prediction.logits, wanted).sum() / count,
            "box_params": self.loss_weights["box_params"] * error.sum() / count,
        }

    def raw_outputs(self, prediction: ToyPrediction) -> tuple[Tensor, ...]:
        return tuple(prediction)

    def decode(self, prediction: ToyPrediction) -> FrameObjects:
        score, cell, label = topk_pairs(prediction.logits, self.config.max_boxes)
        params = prediction.params.gather(1, cell[..., None].expand(-1, -1, 10))
        boxes = Boxes(
            center=params[..., :3], size=params[..., 3:6].clamp(-3, 4).exp(),
            yaw=torch.atan2(params[..., 6], params[..., 7]), velocity=params[..., 8:], label=label,
            attribute=torch.full_like(label, -1), score=score, valid=torch.ones_like(score, dtype=torch.bool),
            uncertainty=torch.ones(*score.shape, 9, device=score.device),
        )  # fmt: skip
        return FrameObjects(boxes, empty_lines(len(score), score.device))
