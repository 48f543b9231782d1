"""Cell centres, sampling and warping of the BEV grid."""

import numpy as np
import pytest
import torch

from perception.errors import ConfigError
from perception.geometry import rigid_from_yaw
from perception.grid import BEVGrid

GRID = BEVGrid(x_range=(-8.0, 8.0), y_range=(-4.0, 4.0), shape=(16, 8))


def test_cell_centers_by_hand():
    centers = GRID.cell_centers()
    assert centers.shape == (16, 8, 2)
    assert centers[0, 0].tolist() == [-7.5, -3.5]
    assert centers[15, 2].tolist() == [7.5, -1.5]
    assert GRID.cells(torch.tensor([7.5, -1.5, 9.0])).tolist() == [15.0, 2.0]


def test_sampling_at_centers_reads_the_cells_and_zero_outside():
    bev = torch.randn(1, 3, 16, 8)
    read = GRID.sample(bev, GRID.cell_centers()[None])
    torch.testing.assert_close(read, bev)
    assert GRID.sample(bev, torch.tensor([[[[20.0, 0.0]]]])).abs().max() == 0


def test_warp_forward_motion_moves_the_world_backwards():
    bev = torch.zeros(1, 1, 16, 8)
    bev[0, 0, 12, 3] = 1.0  # an object 4.5 m ahead
    ego_from_prev = torch.eye(4)[None].clone()
    ego_from_prev[0, 0, 3] = -3.0  # the ego drove 3 m
    warped = GRID.warp(bev, ego_from_prev)
    assert warped[0, 0, 9, 3] == pytest.approx(1.0)  # now 1.5 m ahead
    assert warped.sum() == pytest.approx(1.0)


def test_warp_left_turn_moves_objects_ahead_to_the_right():
    grid = BEVGrid((-8.0, 8.0), (-8.0, 8.0), (16, 16))
    bev = torch.zeros(1, 1, 16, 16)
    bev[0, 0, 12, 7] = 1.0  # at x = 4.5, y = -0.5
    ego_from_prev = torch.from_numpy(rigid_from_yaw(-np.pi / 2)).float()[None]  # the ego turned left by 90 degrees
    warped = grid.warp(bev, ego_from_prev)
    # (4.5, -0.5) rotated by -90 degrees is (-0.5, -4.5)
    assert warped[0, 0, 7, 3] == pytest.approx(1.0, abs=1e-5)


def test_invalid_grids_are_rejected():
    with pytest.raises(ConfigError, match="x_range"):
        BEVGrid((1.0, 1.0), (0.0, 1.0), (1, 1))
    with pytest.raises(ConfigError, match="shape"):
        BEVGrid((0.0, 1.0), (0.0, 1.0), (0, 1))
    assert BEVGrid((0.0, 1.0), (0.0, 2.0), (1, 1)).cell_size == (1.0, 2.0)
