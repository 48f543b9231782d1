"""Line instances of SparseDrive: encoding, key points, refinement, motion and decoding.

A line is x and y of its points, one after the other, in metres in the LiDAR frame.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perception.models.decoding import topk_pairs
from perception.models.published.geometry import constants
from perception.models.sparse4d.blocks import Scale, mlp
from perception.models.sparse4d.config import LineHeadConfig

# The published order of the classes, as indices into LINE_CLASSES: crossing, divider, boundary.
PUBLISHED_LINE_CLASSES = (1, 0, 2)
INITIAL_LENGTH = 8.0  # metres, of the anchors of a network that has not been trained


class LineEncoder(nn.Module):
    """Encodes the points of lines, in metres."""

    def __init__(self, config: LineHeadConfig, channels: int) -> None:
        super().__init__()
        self.pos_fc = nn.Sequential(*mlp(2 * config.points, channels, 2))

    def forward(self, lines: Tensor) -> Tensor:
        """Encodes [B, Q, 2 P] to [B, Q, C]."""
        return self.pos_fc(lines)


class LineKeyPoints(nn.Module):
    """Makes the key points of lines: each point at several heights above the ground, with learned offsets in metres."""

    def __init__(self, config: LineHeadConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.count = config.points * len(config.heights) * config.learned_points
        self.learnable_fc = nn.Linear(channels, 2 * self.count)

    def forward(self, lines: Tensor, feature: Tensor) -> Tensor:
        """Returns points [B, Q, S, 3] in metres, in the order point, height, offset.

        Args:
            lines: [B, Q, 2 P].
            feature: [B, Q, C].
        """
        config = self.config
        shape = (config.points, len(config.heights), config.learned_points, 2)
        points = lines.float().unflatten(-1, (config.points, 1, 1, 2))
        xy = points + self.learnable_fc(feature).float().unflatten(-1, shape)  # [B, Q, P, heights, offsets, 2]
        z = constants(config.heights, xy) + config.ground
        return torch.cat([xy, z[:, None, None].expand(*xy.shape[:-1], 1)], -1).flatten(2, 4)


class LineRefinement(nn.Module):
    """Refines lines and predicts their class."""

    def __init__(self, config: LineHeadConfig, channels: int) -> None:
        super().__init__()
        values = 2 * config.points
        self.layers = nn.Sequential(*mlp(channels, channels, 2, 2), nn.Linear(channels, values), Scale(values))
        self.cls_layers = nn.Sequential(*mlp(channels, channels, 2), nn.Linear(channels, config.classes))

    def forward(self, feature: Tensor, lines: Tensor, encoding: Tensor, interval: Tensor) -> Tensor:
        """Refines lines [B, Q, 2 P], which do not depend on the interval."""
        return lines.float() + self.layers(feature + encoding).float()

    def scores(self, feature: Tensor, encoding: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts class logits [B, Q, K] from the features, and no quality [B, Q, 0]."""
        logits = self.cls_layers(feature)
        return logits, logits[..., :0]


def move_lines(lines: Tensor, now_from_prev: Tensor, seconds: Tensor) -> Tensor:
    """Moves lines [B, T, 2 P] to the present frame by the ego motion in the plane; `seconds` is not used."""
    rotation, translation = now_from_prev[:, None, None, :2, :2], now_from_prev[:, None, None, :2, 3]
    points = lines.unflatten(-1, (-1, 2))
    return ((rotation @ points[..., None])[..., 0] + translation).flatten(2)


def initial_lines(config: LineHeadConfig) -> Tensor:
    """Returns anchors [Q, 2 P], straight lines along y over the range, for a network that has not been trained.

    The published code starts from clusters of the ground truth.
    """
    index = torch.arange(config.anchors) + 0.5
    width, length = config.size
    x = (index * (5**0.5 - 1) / 2 % 1 - 0.5) * width  # low discrepancy: multiples of the golden ratio
    y = (index / config.anchors - 0.5) * length
    along = torch.linspace(-INITIAL_LENGTH / 2, INITIAL_LENGTH / 2, config.points)
    return torch.stack([x[:, None].expand(-1, config.points), y[:, None] + along], -1).flatten(1)


def rank_lines(logits: Tensor, lines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks the pairs of line and class, as published: as many as there are lines, so that a line may repeat.

    Args:
        logits: [B, Q, K].
        lines: [B, Q, 2 P].

    Returns:
        Scores [B, Q], highest first; labels [B, Q] in the published order of classes; points [B, Q, P, 2].
    """
    score, line, label = topk_pairs(logits, logits.shape[1])
    chosen = lines.gather(1, line[..., None].expand(-1, -1, lines.shape[-1]))
    return score, label, chosen.unflatten(-1, (-1, 2))


def to_library_line_classes(label: Tensor) -> Tensor:
    """Converts labels in the published order of classes to indices into LINE_CLASSES."""
    return constants(PUBLISHED_LINE_CLASSES, label)[label]
