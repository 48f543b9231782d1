"""Box instances of Sparse4D: encoding, key points, refinement, motion and ranking.

A box is x, y, z of its centre, logarithms of length, width and height (the published code names the slots W, L, H, but
fills them in this order), sin and cos of its yaw from LiDAR x towards y, and its velocity x, y, z: metres and m/s in
the LiDAR frame. Sin and cos are not normalised.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perception.models.published.geometry import constants
from perception.models.sparse4d.blocks import Scale, mlp
from perception.models.sparse4d.config import BoxHeadConfig

BOX_VALUES = 11
CENTER, SIZE, YAW, VELOCITY = slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 11)
# The published order of the classes, as indices into BOX_CLASSES: car, truck, construction vehicle, bus, trailer,
# barrier, motorcycle, bicycle, pedestrian, traffic cone.
PUBLISHED_CLASSES = (0, 1, 4, 3, 2, 9, 6, 5, 7, 8)
INITIAL_RADIUS = 55.0  # metres, of the anchors of a network that has not been trained
INITIAL_SIZE = (4.2, 1.8, 1.7)  # metres


class BoxEncoder(nn.Module):
    """Encodes boxes: position, size, yaw and velocity apart, then concatenated."""

    def __init__(self, config: BoxHeadConfig) -> None:
        super().__init__()
        position, size, yaw, velocity = config.encoder
        loops = config.encoder_loops
        self.pos_fc = nn.Sequential(*mlp(3, position, loops))
        self.size_fc = nn.Sequential(*mlp(3, size, loops))
        self.yaw_fc = nn.Sequential(*mlp(2, yaw, loops))
        self.vel_fc = nn.Sequential(*mlp(3, velocity, loops))

    def forward(self, boxes: Tensor) -> Tensor:
        """Encodes [B, Q, 11] to [B, Q, C]."""
        parts = ((self.pos_fc, CENTER), (self.size_fc, SIZE), (self.yaw_fc, YAW), (self.vel_fc, VELOCITY))
        return torch.cat([layers(boxes[..., part]) for layers, part in parts], -1)


class BoxKeyPoints(nn.Module):
    """Makes the key points of boxes: fixed parts of their sides, and points that depend on the instance."""

    def __init__(self, config: BoxHeadConfig, channels: int) -> None:
        super().__init__()
        self.fix_scale = nn.Parameter(torch.tensor(config.fixed_points), requires_grad=False)
        self.learnable_fc = nn.Linear(channels, 3 * config.learned_points)
        self.count = len(config.fixed_points) + config.learned_points

    def forward(self, boxes: Tensor, feature: Tensor) -> Tensor:
        """Returns points [B, Q, P, 3] in metres for boxes [B, Q, 11] and features [B, Q, C]."""
        boxes = boxes.float()
        learned = self.learnable_fc(feature).float().unflatten(-1, (-1, 3)).sigmoid() - 0.5
        fixed = self.fix_scale.expand(*learned.shape[:2], -1, -1)
        x, y, z = (torch.cat([fixed, learned], 2) * boxes[..., None, SIZE].exp()).unbind(-1)  # [B, Q, P]
        sin, cos = boxes[..., YAW, None].unbind(-2)  # [B, Q, 1]
        return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1) + boxes[..., None, CENTER]


class BoxRefinement(nn.Module):
    """Refines boxes and predicts their class and quality (centerness and yawness)."""

    def __init__(self, config: BoxHeadConfig, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*mlp(channels, channels, 2, 2), nn.Linear(channels, BOX_VALUES), Scale(BOX_VALUES))
        self.cls_layers = nn.Sequential(*mlp(channels, channels, 2), nn.Linear(channels, config.classes))
        self.quality_layers = nn.Sequential(*mlp(channels, channels, 2), nn.Linear(channels, 2))

    def forward(self, feature: Tensor, boxes: Tensor, encoding: Tensor, interval: Tensor) -> Tensor:
        """Refines boxes [B, Q, 11]; the predicted change of velocity is a distance per `interval` [B] in seconds."""
        change = self.layers(feature + encoding).float()
        velocity = change[..., VELOCITY] / interval[:, None, None]
        return boxes.float() + torch.cat([change[..., : VELOCITY.start], velocity], -1)

    def scores(self, feature: Tensor, encoding: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts class logits [B, Q, K] from the features, and quality logits [B, Q, 2] with the encoding."""
        return self.cls_layers(feature), self.quality_layers(feature + encoding)


def move_boxes(boxes: Tensor, now_from_prev: Tensor, seconds: Tensor, swaps_yaw: bool) -> Tensor:
    """Moves boxes to the present frame.

    Args:
        boxes: [B, T, 11] in the previous LiDAR frame.
        now_from_prev: [B, 4, 4] between the LiDAR frames.
        seconds: [B] since the previous frame.
        swaps_yaw: see `BoxHeadConfig`.
    """
    rotation, translation = now_from_prev[:, None, :3, :3], now_from_prev[:, None, :3, 3]
    velocity = boxes[..., VELOCITY]
    center = (rotation @ (boxes[..., CENTER] + velocity * seconds[:, None, None])[..., None])[..., 0] + translation
    heading = (rotation[..., :2, :2] @ boxes[..., YAW].flip(-1)[..., None])[..., 0]  # cos, sin
    yaw = heading if swaps_yaw else heading.flip(-1)
    return torch.cat([center, boxes[..., SIZE], yaw, (rotation @ velocity[..., None])[..., 0]], -1)


def initial_boxes(count: int) -> Tensor:
    """Returns anchors [count, 11] on a spiral around the vehicle, for a network that has not been trained.

    The published code starts from clusters of the ground truth.
    """
    index = torch.arange(count) + 0.5
    radius, angle = INITIAL_RADIUS * (index / count).sqrt(), index * (math.pi * (3 - math.sqrt(5)))  # sunflower
    boxes = torch.zeros(count, BOX_VALUES)
    boxes[:, 0], boxes[:, 1], boxes[:, 2] = radius * angle.cos(), radius * angle.sin(), -1.0
    boxes[:, SIZE] = torch.tensor(INITIAL_SIZE).log()
    boxes[:, 7] = 1.0
    return boxes


class RankedBoxes(NamedTuple):
    """Boxes of one decoder layer by score, as published."""

    boxes: Tensor  # [B, M, 11]
    score: Tensor  # [B, M] class score * sigmoid(centerness), highest first
    label: Tensor  # [B, M] in the published order of classes
    instance: Tensor  # [B, M] index of the instance
    # [B, M] class scores, highest first: NOT in the order of the boxes. The published filter for tracking compares
    # these with its threshold, so it keeps the first boxes by `score`, as many as have this class score.
    class_score: Tensor


def rank_boxes(class_score: Tensor, label: Tensor, quality: Tensor, boxes: Tensor, count: int) -> RankedBoxes:
    """Ranks the boxes of one decoder layer: the best by class score, then sorted by class score times centerness.

    Args:
        class_score: [B, Q, K] scores that compete: the best class of each instance (K = 1, as the released code does
            with ids), or all classes.
        label: [B, Q, K] their classes.
        quality: [B, Q, 2] logits of centerness and yawness.
        boxes: [B, Q, 11].
        count: M, the number of boxes.
    """
    K = class_score.shape[-1]
    best, pair = class_score.flatten(1).topk(min(count, class_score[0].numel()), dim=1)
    instance = torch.div(pair, K, rounding_mode="floor")
    score, order = (best * quality[..., 0].sigmoid().gather(1, instance)).sort(dim=1, descending=True)
    pair, instance = pair.gather(1, order), instance.gather(1, order)
    chosen = boxes.gather(1, instance[..., None].expand(-1, -1, boxes.shape[-1]))
    return RankedBoxes(chosen, score, label.flatten(1).gather(1, pair), instance, best)


def decoded(boxes: Tensor) -> Tensor:
    """Returns boxes [..., 11] as x, y, z, length, width, height, yaw, velocity [..., 10] in the LiDAR frame."""
    sin, cos = boxes[..., YAW].unbind(-1)
    yaw = torch.atan2(sin, cos)[..., None]
    return torch.cat([boxes[..., CENTER], boxes[..., SIZE].exp(), yaw, boxes[..., VELOCITY]], -1)


def to_library_classes(label: Tensor) -> Tensor:
    """Converts labels in the published order of classes to indices into BOX_CLASSES."""
    return constants(PUBLISHED_CLASSES, label)[label]
