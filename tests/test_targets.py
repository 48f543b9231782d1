"""Training targets against fine sampling and cases by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_losses import FRAME, one_box

from perception.grid import BEVGrid
from perception.targets import draw_bev_segmentation, line_orderings, ray_cast_boxes
from perception.types import Polylines


def polylines(lines: list[np.ndarray], labels: list[int], valid: list[bool]) -> Polylines:
    points = torch.from_numpy(np.stack(lines)).float()[None]
    score = torch.ones(1, len(lines))
    return Polylines(points, score < 0, torch.tensor([labels]), score, torch.tensor([valid]), torch.zeros_like(points))


@pytest.mark.parametrize("cells", [(60, 20), (20, 60)])
def test_every_cell_that_a_line_crosses_is_marked_and_no_other(cells):
    """Lines with edges of very different length on a grid whose cells are not square."""
    grid = BEVGrid((-30.0, 30.0), (-15.0, 15.0), cells)
    rng = np.random.default_rng(0)
    lines = [np.cumsum(rng.normal(scale=scale, size=(6, 2)), 0) for scale in (0.05, 2.0, 12.0)]
    lines.append(lines[1] + 1)  # not valid
    found = draw_bev_segmentation(polylines(lines, [0, 2, 2, 1], [True, True, True, False]), grid, 3)[0]
    crossed, touched = (torch.zeros(3, *cells, dtype=torch.bool) for _ in range(2))
    size = 60 / cells[0], 30 / cells[1]
    for line, label in zip(lines[:3], [0, 2, 2], strict=True):
        for start, end in itertools.pairwise(line):
            length = np.hypot(*(end - start))
            t = np.linspace(0, 1, max(2, math.ceil(length / 0.005)))[:, None]
            i, j = np.floor((start + (end - start) * t + [30, 15]) / size).astype(int).T
            inside = (i >= 0) & (i < cells[0]) & (j >= 0) & (j < cells[1])
            cell, count = np.unique(np.stack([i, j])[:, inside], axis=1, return_counts=True)
            touched[label, cell[0], cell[1]] = True
            # An edge that runs through a cell for more than a quarter of its side has a sample there.
            long = cell[:, count * length / len(t) > 1.05 * min(size) / 4]
            crossed[label, long[0], long[1]] = True
    assert crossed.sum() > 20
    assert not (crossed & (found == 0)).any() and not ((found > 0) & ~touched).any()


def test_a_box_is_seen_from_outside_only_however_near():
    inside = one_box([0.0, 0, 1.5], [4.0, 2, 2], 0.0)  # the camera is at 1.5 m height in the middle of it
    assert ray_cast_boxes(inside, FRAME.rig, (60, 100), (6, 10))[0].isinf().all()
    near = one_box([1.5, 0, 1.5], [2.0, 2, 2], 0.0)  # its face is half a metre away
    depth = ray_cast_boxes(near, FRAME.rig, (60, 100), (6, 10))[0][0, 0]
    assert depth.isfinite().all() and depth.max() < 0.5 and depth.min() > 0.2
    absent = near._replace(valid=torch.zeros(1, 1, dtype=torch.bool))
    assert ray_cast_boxes(absent, FRAME.rig, (60, 100), (6, 10))[0].isinf().all()


def test_a_long_diagonal_has_no_gaps():
    grid = BEVGrid((-30.0, 30.0), (-15.0, 15.0), (60, 30))
    line = np.array([[-14.7, -14.7], [0.3, 0.3], [14.7, 14.7]])
    found = draw_bev_segmentation(polylines([line], [0], [True]), grid, 1)[0, 0]
    assert found.nonzero().tolist() == [[i + 15, i] for i in range(30)]


def test_a_short_line_is_sampled_at_a_quarter_of_a_cell():
    grid = BEVGrid((0.0, 4.0), (0.0, 4.0), (4, 4))
    line = np.array([[0.66, 1.01], [1.006, 0.664]])  # 0.49 m, of which 0.47 m in cell (0, 0), where no end is
    found = draw_bev_segmentation(polylines([line], [0], [True]), grid, 1)[0, 0]
    assert found.nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]


def test_orderings_are_both_directions_of_a_line_and_all_turns_of_a_ring():
    open_line = np.array([[0.0, 0], [1, 0], [3, 1], [4, 4], [9, 9]])
    ring = np.array([[0.0, 0], [4, 0], [4, 2], [1, 3], [0, 0]])
    lines = polylines([open_line, ring], [0, 1], [True, True])
    lines = lines._replace(closed=torch.tensor([[False, True]]))
    points, exists = line_orderings(lines)
    assert points.shape == (1, 2, 8, 5, 2)

    def found(m: int) -> set[tuple]:
        return {tuple(map(tuple, ordering.tolist())) for ordering in points[0, m][exists[0, m]]}

    assert found(0) == {tuple(map(tuple, line.tolist())) for line in (open_line, open_line[::-1])}
    turns = [np.roll(ring[:-1], -k, 0) for k in range(4)]
    turns = [np.concatenate([turn, turn[:1]]) for turn in turns]
    assert found(1) == {tuple(map(tuple, turn.tolist())) for turn in turns + [turn[::-1] for turn in turns]}
    assert exists[0].sum(-1).tolist() == [2, 8]
