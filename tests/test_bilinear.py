"""The fast implementations of sampling against the plain one in float64, forward and backward.

Triton's kernels run on the GPU if there is one, else in Triton's interpreter (see conftest.py).
"""

from contextlib import nullcontext

import pytest
import torch

from perception.errors import ConfigError
from perception.grid import BEVGrid
from perception.ops import bilinear, sample_bev, sample_cameras
from perception.ops.bilinear import choose_implementation, exporting_for_cpu, preferred_implementation
from perception.ops.deformable import deformable_attention

TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(not bilinear.HAS_TRITON, reason="Triton or its compiler is not here")
)
FAST = pytest.mark.parametrize("fast", ["embedding_bag", TRITON])
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def device_of(implementation: str) -> str:
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


def smooth_locations(shape, size, generator):
    """Draws locations on and around maps of (h, w), away from pixel centres and borders, where gradients jump."""
    locations = []
    for side in (size[1], size[0]):
        pixel = torch.randint(-3, side + 3, shape, generator=generator) + 0.1
        locations.append((pixel + 0.8 * torch.rand(shape, generator=generator) + 0.5) / side)
    return torch.stack(locations, -1)


def drawn_weight(shape, generator):
    """Draws weights of which a third are zero, and all of those of the first query."""
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 1 / 3)
    weight[:, 0] = 0
    return weight


def results(sample, device, floats, dtype):
    """Returns the output, and the gradients of all floats, the last of which are the weights."""
    floats = [x.to(device, dtype if i == 0 else None).requires_grad_() for i, x in enumerate(floats)]
    found = sample(*floats)
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(7)).to(found)
    return [x.detach().cpu() for x in (found, *torch.autograd.grad(found, floats, noise))]


def compare(sample, fast, floats, dtype):
    """Compares `sample(implementation, *floats)` with maps rounded to `dtype` with the same in float64."""
    floats = [floats[0].to(dtype).float(), *floats[1:]]
    exact = results(lambda *x: sample("plain", *x), "cpu", [x.double() for x in floats], torch.float64)
    found = results(lambda *x: sample(fast, *x), device_of(fast), floats, dtype)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    assert exact[0].abs().max() > 0.1 and all(gradient.abs().max() > 0.1 for gradient in exact[1:])
    # A sample of weight zero is not read, so its weight has no gradient.
    used = floats[-1] != 0
    assert (found[-1][~used] == 0).all()
    exact[-1] = exact[-1] * used
    rounding = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for name, ours, theirs in zip(("output", "maps", "locations", "weight"), found, exact, strict=True):
        tolerance = (rounding if name == "maps" else 1e-4) * float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@FAST
@HALF
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 4, 7, 37, 3), (1, 6, 64, 3, 5, 60, 1), (2, 1, 1, 1, 6, 70, 2), (1, 2, 300, 5, 1, 6, 4)],
    ids=["odd", "one sample", "one row, one channel", "many channels"],
)
def test_cameras(shape, dtype, fast):
    B, N, C, h, w, Q, S = shape
    generator = torch.Generator().manual_seed(sum(shape))
    camera = torch.randint(0, N, (B, Q, S), generator=generator)
    floats = [
        torch.randn(B, N, C, h, w, generator=generator),
        smooth_locations((B, Q, S), (h, w), generator),
        drawn_weight((B, Q, S), generator),
    ]

    def sample(implementation, features, uv, weight):
        return sample_cameras(features, uv, camera.to(uv.device), weight, implementation)

    if min(h, w) == 1:  # an axis of one pixel has no gradient, but the other axis has
        assert results(lambda *x: sample(fast, *x), device_of(fast), floats, dtype)[2].abs().amax((0, 1, 2)).min() == 0
    compare(sample, fast, floats, dtype)


@FAST
@HALF
def test_bev(dtype, fast):
    generator = torch.Generator().manual_seed(3)
    B, heads, C, Q, S, size = 2, 3, 4, 11, 4, (8, 5)
    grid = BEVGrid((-6.0, 6.0), (-4.0, 4.0), size)
    share = smooth_locations((B, Q, heads, S), size, generator).flip(-1)  # along x and along y
    floats = [
        torch.randn(B, heads * C, *size, generator=generator),
        share * torch.tensor([12.0, 8.0]) - torch.tensor([6.0, 4.0]),
        drawn_weight((B, Q, heads, S), generator),
    ]
    compare(lambda implementation, *x: sample_bev(x[0], grid, *x[1:], implementation), fast, floats, dtype)


@FAST
@HALF
@pytest.mark.parametrize("sizes", [[(6, 9), (3, 5), (1, 2)], [(6, 9)]], ids=["three levels", "one level"])
def test_deformable_attention(sizes, dtype, fast):
    generator = torch.Generator().manual_seed(4)
    B, heads, C, Q, P = 2, 2, 3, 5, 4
    locations = torch.stack([smooth_locations((B, Q, heads, P), size, generator) for size in sizes], 3)
    floats = [
        torch.randn(B, sum(h * w for h, w in sizes), heads, C, generator=generator),
        locations,
        drawn_weight((B, Q, heads, len(sizes), P), generator),
    ]
    compare(lambda implementation, *x: deformable_attention(x[0], sizes, *x[1:], implementation), fast, floats, dtype)


@FAST
def test_borders_and_locations_far_away(fast):
    device = device_of(fast)
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(1, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    sides = torch.tensor([-1e9, -1.0, 0.0, 0.5 / 6, 0.5 / 5, 0.5, 1 - 0.5 / 5, 1 - 0.5 / 6, 1.0, 2.0, 1e9]).double()
    uv = torch.cartesian_prod(sides, sides)[None, :, None].expand(-1, -1, 3, -1)
    camera = torch.arange(3).expand(1, uv.shape[1], 3)
    weight = torch.rand(uv.shape[:3], generator=generator, dtype=torch.float64)
    exact = sample_cameras(features, uv, camera, weight)
    floats = (x.to(device, torch.float32) for x in (features, uv))
    found = sample_cameras(*floats, camera.to(device), weight.to(device, torch.float32), fast)
    torch.testing.assert_close(found.cpu().double(), exact, rtol=0, atol=1e-5)

    value = features.permute(0, 1, 3, 4, 2).flatten(1, 3)[:, :, None]  # three levels
    locations, weight = uv[:, :, None, :, None], weight[:, :, None, :, None]
    exact = deformable_attention(value, [(5, 6)] * 3, locations, weight)
    assert 0 < (exact == 0).double().mean() < 0.9  # locations outside sample zero
    value, locations, weight = (x.to(device, torch.float32) for x in (value, locations, weight))
    found = deformable_attention(value, [(5, 6)] * 3, locations, weight, fast)
    torch.testing.assert_close(found.cpu().double(), exact, rtol=0, atol=1e-5)


@FAST
def test_samples_of_weight_zero_are_not_read(fast):
    device = device_of(fast)
    features = torch.ones(1, 2, 3, 4, 5)
    features[:, 1] = torch.nan
    uv = torch.rand(1, 7, 2, 2)
    uv[:, :, 1, 0] = torch.nan
    weight = torch.tensor([2.0, 0.0]).expand(1, 7, 2)
    floats = [x.to(device).requires_grad_() for x in (features, uv, weight)]
    camera = torch.tensor([0, 1], device=device).expand(1, 7, 2)
    found = sample_cameras(floats[0], floats[1], camera, floats[2], fast)
    torch.testing.assert_close(found.cpu(), torch.full((1, 7, 3), 2.0))
    gradients = torch.autograd.grad(found.sum(), floats)
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(gradients[2].cpu(), torch.tensor([3.0, 0.0]).expand(1, 7, 2))


@FAST
def test_all_weights_are_zero(fast):
    device = device_of(fast)
    features = torch.randn(2, 2, 3, 4, 5, device=device, requires_grad=True)
    uv, camera = torch.rand(2, 7, 2, 2, device=device), torch.zeros(2, 7, 2, dtype=torch.int64, device=device)
    found = sample_cameras(features, uv, camera, torch.zeros(2, 7, 2, device=device), fast)
    assert found.shape == (2, 7, 3) and (found == 0).all()
    assert (torch.autograd.grad(found.sum(), features)[0] == 0).all()
    assert sample_cameras(features, uv[:, :0], camera[:, :0], uv[:, :0, :, 0], fast).shape == (2, 0, 3)


@pytest.mark.skipif(not bilinear.HAS_TRITON, reason="Triton or its compiler is not here")
def test_the_operator_passes_pytorchs_checks():
    """Checks fake tensors, autograd, and hidden mutation or aliasing, which torch.compile and CUDA graphs rely on."""
    device = device_of("triton")
    maps = torch.randn(1, 2, 3, 4, 1, 5, device=device, requires_grad=True)
    locations = torch.rand(1, 6, 1, 2, 2, device=device, requires_grad=True)
    index = torch.zeros(1, 6, 1, 2, dtype=torch.int64, device=device)
    weight = torch.rand(1, 6, 1, 2, device=device, requires_grad=True)
    rules = ("test_schema", "test_faketensor", "test_autograd_registration")  # the others take long
    torch.library.opcheck(bilinear._fused, (maps, locations, index, weight, True, torch.float32), test_utils=rules)
    half = maps.detach().half().requires_grad_()
    torch.library.opcheck(bilinear._fused, (half, locations, None, weight, False, torch.float16), test_utils=rules)
    grad = torch.randn(1, 6, 1, 5, device=device)
    inputs = (grad, half.detach(), locations.detach(), None, weight.detach(), False)
    torch.library.opcheck(bilinear._fused_backward, inputs, test_utils=rules[:2])


@FAST
def test_compiled_sampling_is_the_same(fast):
    """On CPUs a compiled graph also reads samples of weight zero, because their number depends on data."""
    device = device_of(fast)
    generator = torch.Generator().manual_seed(6)
    camera = torch.randint(0, 2, (2, 9, 3), generator=generator).to(device)
    floats = [
        torch.randn(2, 2, 3, 4, 5, generator=generator),
        smooth_locations((2, 9, 3), (4, 5), generator),
        drawn_weight((2, 9, 3), generator),
    ]

    def sample(features, uv, weight):
        return sample_cameras(features, uv, camera, weight, fast)

    compiled = torch.compile(sample, backend="eager", fullgraph=True)
    expected, found = (results(call, device, floats, torch.float32) for call in (sample, compiled))
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    used = floats[2] != 0
    torch.testing.assert_close(found[3][used], expected[3][used], rtol=0, atol=1e-5)


def test_exports_use_the_plain_implementation():
    class Sampler(torch.nn.Module):
        def forward(self, features, uv, camera, weight):
            return sample_cameras(features, uv, camera, weight)

    floats = torch.rand(1, 2, 3, 4, 5), torch.rand(1, 6, 2, 2)
    inputs = (*floats, torch.zeros(1, 6, 2, dtype=torch.int64), torch.rand(1, 6, 2))
    for manager, wanted in ((nullcontext(), "grid_sampler"), (exporting_for_cpu(), "aten.embedding")):
        with manager:
            graph = torch.export.export(Sampler(), inputs).graph
        names = " ".join(str(node.target) for node in graph.nodes)
        assert ("grid_sampler" in names) != ("aten.embedding" in names) and wanted in names
        assert "perception" not in names and "embedding_bag" not in names


@pytest.mark.parametrize("at_once", [1, 500, 2**24], ids=["one by one", "in parts", "all at once"])
def test_gathered_rows_sum_to_the_same(monkeypatch, at_once):
    """Also where locations are outside: of cameras at the border, of maps zero."""
    monkeypatch.setattr(bilinear, "GATHERED", at_once)
    generator = torch.Generator().manual_seed(1)
    features, uv = torch.randn(2, 3, 5, 4, 7, generator=generator), smooth_locations((2, 37, 3), (4, 7), generator)
    camera, weight = torch.randint(0, 3, (2, 37, 3), generator=generator), drawn_weight((2, 37, 3), generator)
    found = sample_cameras(features, uv, camera, weight, "gather").double()
    wanted = sample_cameras(features.double(), uv.double(), camera, weight.double(), "plain")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    value, sizes = torch.randn(2, 4 * 7 + 2 * 3, 2, 5, generator=generator), ((4, 7), (2, 3))
    locations = torch.stack([smooth_locations((2, 11, 2, 3), size, generator) for size in sizes], 3)
    weight = torch.rand(2, 11, 2, 2, 3, generator=generator)
    found = deformable_attention(value, sizes, locations, weight, "gather").double()
    wanted = deformable_attention(value.double(), sizes, locations.double(), weight.double(), "plain")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_an_unknown_implementation_is_refused():
    features, uv = torch.rand(1, 2, 3, 4, 5), torch.rand(1, 6, 2, 2)
    with pytest.raises(ConfigError, match="'cuda'; use one of plain, embedding_bag, gather, triton"):
        sample_cameras(features, uv, torch.zeros(1, 6, 2, dtype=torch.int64), uv[..., 0], "cuda")


def test_a_preferred_implementation_is_the_default():
    maps = torch.zeros(1)
    with preferred_implementation("plain"):
        assert choose_implementation(maps, None, "embedding_bag") == "plain"
        assert choose_implementation(maps, "triton", "embedding_bag") == "triton"
    assert choose_implementation(maps, None, "embedding_bag") == "embedding_bag"
    with pytest.raises(ConfigError, match="'grid'; use one of plain"), preferred_implementation("grid"):
        pass
