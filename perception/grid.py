"""The bird's-eye-view grid: `bev[b, c, i, j]` with i along ego +x and j along ego +y, no flips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import ConfigError
from perception.geometry import invert_rigid, transform_points


@dataclass(frozen=True)
class BEVGrid:
    """A regular grid on the ego frame's xy plane.

    Args:
        x_range: lowest and highest x in metres (cell edges).
        y_range: lowest and highest y in metres (cell edges).
        shape: number of cells along x and along y.
    """

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        for name, (low, high) in (("x_range", self.x_range), ("y_range", self.y_range)):
            if not low < high:
                raise ConfigError(f"BEVGrid.{name} is ({low}, {high}); the first number must be below the second")
        if min(self.shape) < 1:
            raise ConfigError(f"BEVGrid.shape is {self.shape}; both numbers must be at least 1")

    @property
    def cell_size(self) -> tuple[float, float]:
        """Extent of one cell along x and y, metres."""
        return (
            (self.x_range[1] - self.x_range[0]) / self.shape[0],
            (self.y_range[1] - self.y_range[0]) / self.shape[1],
        )

    def cell_centers(self, device=None) -> Tensor:
        """Centres of all cells, [X, Y, 2] metres in the ego frame."""
        (cell_x, cell_y), (X, Y) = self.cell_size, self.shape
        x = self.x_range[0] + (torch.arange(X, device=device, dtype=torch.float32) + 0.5) * cell_x
        y = self.y_range[0] + (torch.arange(Y, device=device, dtype=torch.float32) + 0.5) * cell_y
        return torch.stack(torch.meshgrid(x, y, indexing="ij"), -1)  # [X, Y, 2]

    def normalize(self, points_ego: Tensor) -> Tensor:
        """Metres to 0..1 over the grid's extent: [..., 2+] -> [..., 2], first along x."""
        # With plain numbers, not with a tensor made of them: that would have to travel to a GPU every time.
        return torch.stack(
            [
                (points_ego[..., axis] - low) / (high - low)
                for axis, (low, high) in enumerate((self.x_range, self.y_range))
            ],
            -1,
        )

    def cells(self, points_ego: Tensor) -> Tensor:
        """Metres to fractional cell coordinates: [..., 2+] -> [..., 2]; the centre of cell (i, j) is (i, j)."""
        place = self.normalize(points_ego)
        return torch.stack([place[..., axis] * count - 0.5 for axis, count in enumerate(self.shape)], -1)

    def sample(self, bev: Tensor, points_ego: Tensor) -> Tensor:
        """Bilinear reading of a map at points, zero outside.

        Args:
            bev: [B, C, X, Y].
            points_ego: [B, Q, P, 2] metres.

        Returns:
            [B, C, Q, P].
        """
        xy = self.normalize(points_ego) * 2 - 1
        # grid_sample wants (along the last axis, along the one before): that is (y, x) here.
        # In the precision of the points: eight bits of bfloat16 would round them to decimetres.
        return F.grid_sample(bev.to(xy.dtype), xy.flip(-1), align_corners=False)

    def warp(self, bev: Tensor, ego_from_prev: Tensor) -> Tensor:
        """Carries a map from the previous ego frame into the current one, zero where nothing was known.

        Args:
            bev: [B, C, X, Y] in the previous ego frame.
            ego_from_prev: [B, 4, 4]; only its motion in the xy plane is used.

        Returns:
            [B, C, X, Y] in the current ego frame.
        """
        prev_from_ego = invert_rigid(ego_from_prev.float())
        centers = F.pad(self.cell_centers(bev.device), (0, 1))  # [X, Y, 3] at z = 0
        points_prev = transform_points(prev_from_ego[:, None], centers)  # [B, X, Y, 3]
        return self.sample(bev, points_prev)
