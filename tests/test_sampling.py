"""The fast sampling against loops in numpy, forward and backward."""

import numpy as np
import pytest
import torch

from perception.grid import BEVGrid
from perception.ops import read_cameras, sample_bev, sample_cameras


def bilinear(image: np.ndarray, row: float, column: float, border: bool) -> np.ndarray:
    """Samples [C, h, w] bilinearly; row and column in pixels with centres at whole numbers."""
    C, h, w = image.shape
    if border:
        row, column = np.clip(row, 0, h - 1), np.clip(column, 0, w - 1)
    top, left = int(np.floor(row)), int(np.floor(column))
    value = np.zeros(C)
    for r in (top, top + 1):
        for c in (left, left + 1):
            if 0 <= r < h and 0 <= c < w:
                value += image[:, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return value


def test_sample_cameras_equals_a_loop():
    rng = np.random.default_rng(0)
    B, N, C, h, w, Q, S = 2, 3, 4, 5, 7, 6, 3
    features = rng.normal(size=(B, N, C, h, w))
    uv = rng.uniform(-0.2, 1.2, size=(B, Q, S, 2))
    camera = rng.integers(0, N, size=(B, Q, S))
    weight = rng.uniform(size=(B, Q, S))
    expected = np.zeros((B, Q, C))
    for b, q, s in np.ndindex(B, Q, S):
        u, v = uv[b, q, s]
        value = bilinear(features[b, camera[b, q, s]], v * h - 0.5, u * w - 0.5, border=True)
        expected[b, q] += weight[b, q, s] * value
    result = sample_cameras(*(torch.from_numpy(x) for x in (features, uv, camera, weight)))
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("implementation", ["plain", "embedding_bag"])
def test_read_cameras_equals_a_loop(implementation):
    rng = np.random.default_rng(2)
    B, N, C, h, w, Q, S = 2, 3, 4, 5, 7, 6, 3
    features = rng.normal(size=(B, N, C, h, w))
    uv = rng.uniform(-0.2, 1.2, size=(B, Q, S, 2))
    camera = rng.integers(0, N, size=(B, Q, S))
    result = read_cameras(*(torch.from_numpy(x) for x in (features, uv, camera)), implementation)
    assert result.shape == (B, C, Q, S)
    for b, q, s in np.ndindex(B, Q, S):
        u, v = uv[b, q, s]
        value = bilinear(features[b, camera[b, q, s]], v * h - 0.5, u * w - 0.5, border=True)
        np.testing.assert_allclose(result[b, :, q, s].numpy(), value, atol=1e-6)


def test_sample_bev_equals_a_loop():
    rng = np.random.default_rng(1)
    B, heads, C, Q, S = 2, 2, 6, 5, 3
    grid = BEVGrid((-6.0, 6.0), (-4.0, 4.0), (8, 10))
    bev = rng.normal(size=(B, C, 8, 10))
    points = rng.uniform(-7, 7, size=(B, Q, heads, S, 2))
    weight = rng.uniform(size=(B, Q, heads, S))
    expected = np.zeros((B, Q, C))
    for b, q, head, s in np.ndindex(B, Q, heads, S):
        x, y = points[b, q, head, s]
        channels = slice(head * 3, head * 3 + 3)
        value = bilinear(bev[b, channels], (x + 6) / 1.5 - 0.5, (y + 4) / 0.8 - 0.5, border=False)
        expected[b, q, channels] += weight[b, q, head, s] * value
    result = sample_bev(torch.from_numpy(bev), grid, torch.from_numpy(points), torch.from_numpy(weight))
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-10)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    features = torch.randn(1, 2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    # Inside the image and away from pixel centres, where bilinear sampling is not differentiable.
    uv = (torch.rand(1, 3, 2, 2, dtype=torch.float64) * 0.5 + 0.25).requires_grad_()
    camera = torch.randint(0, 2, (1, 3, 2))
    weight = torch.rand(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f, p, w: sample_cameras(f, p, camera, w), (features, uv, weight))


def test_locations_keep_their_precision_with_bfloat16_maps():
    """Samples a ramp along x at 0.03 m steps on a 100 m grid: locations rounded to bfloat16 would give stairs."""
    grid = BEVGrid((-50.0, 50.0), (-50.0, 50.0), (50, 50))
    ramp = torch.linspace(-1, 1, 50).bfloat16()[None, None, :, None].expand(1, 1, 50, 50)
    x = torch.arange(40.0, 41.0, 0.03)
    points = torch.stack([x, torch.zeros_like(x)], -1)[None, None]
    assert grid.sample(ramp, points).flatten().diff().min() > 0
    rows = torch.linspace(0.90, 0.91, 20)
    uv = torch.stack([torch.full_like(rows, 0.5), rows], -1)[None, None]
    tall = torch.linspace(-1, 1, 40).bfloat16().view(1, 1, 1, 40, 1).expand(1, 6, 1, 40, 72)
    last = torch.full((1, 1, 20), 5)
    sampled = sample_cameras(tall, uv.transpose(1, 2), last.transpose(1, 2), torch.ones(1, 20, 1))
    assert sampled.flatten().diff().min() > 0
