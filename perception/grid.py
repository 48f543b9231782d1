"""Defines the bird's-eye-view grid: `bev[b, c, i, j]` with i along ego +x and j along ego +y, no flips."""

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
        """Size of one cell along x and y, metres."""
        return (
            (self.x_range[1] - self.x_range[0]) / self.shape[0],
            (self.y_range[1] - self.y_range[0]) / self.shape[1],
        )

    def cell_centers(self, device: torch.device | str | None = None) -> Tensor:
        """Returns the centres of all cells, [X, Y, 2] metres in the ego frame."""
        (cell_x, cell_y), (X, Y) = self.cell_size, self.shape
        x = self.x_range[0] + (torch.arange(X, device=device, dtype=torch.float32) + 0.5) * cell_x
        y = self.y_range[0] + (torch.arange(Y, device=device, dtype=torch.float32) + 0.5) * cell_y
        return torch.stack(torch.meshgrid(x, y, indexing="ij"), -1)  # [X, Y, 2]

    def normalize(self, points_ego: Tensor) -> Tensor:
        """Converts metres to 0..1 over the grid: [..., 2+] -> [..., 2], first along x."""
        # Plain numbers instead of a tensor, which would be copied to the GPU in every call.
        return torch.stack(
            [
                (points_ego[..., axis] - low) / (high - low)
                for axis, (low, high) in enumerate((self.x_range, self.y_range))
            ],
            -1,
        )

    def cells(self, points_ego: Tensor) -> Tensor:
        """Converts metres to fractional cell coordinates: [..., 2+] -> [..., 2]; (i, j) is the centre of that cell."""
        normalized = self.normalize(points_ego)
        return torch.stack([normalized[..., axis] * count - 0.5 for axis, count in enumerate(self.shape)], -1)

    def sample(self, bev: Tensor, points_ego: Tensor) -> Tensor:
        """Samples a BEV map at points with bilinear interpolation and zeros outside.

        Args:
            bev: [B, C, X, Y].
            points_ego: [B, Q, P, 2] metres.

        Returns:
            [B, C, Q, P].
        """
        xy = self.normalize(points_ego) * 2 - 1
        # grid_sample takes (last axis, second last axis), which is (y, x) here. It runs in the precision of the points,
        # because bfloat16 would round them to decimetres.
        return F.grid_sample(bev.to(xy.dtype), xy.flip(-1), align_corners=False)

    def warp(self, bev: Tensor, ego_from_prev: Tensor) -> Tensor:
        """Warps a BEV map from the previous ego frame into the current one, with zeros outside the previous map.

        Args:
            bev: [B, C, X, Y] in the previous ego frame.
            ego_from_prev: [B, 4, 4]; only the motion in the xy plane is used.

        Returns:
            [B, C, X, Y] in the current ego frame.
        """
        prev_from_ego = invert_rigid(ego_from_prev.float())
        centers = F.pad(self.cell_centers(bev.device), (0, 1))  # [X, Y, 3] at z = 0
        points_prev = transform_points(prev_from_ego[:, None], centers)  # [B, X, Y, 3]
        return self.sample(bev, points_prev)
