import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle import U
from subbyte import Grid, PerChannel, ScaleDomain, uniform
from subbyte.core import functional as fn

UNEVEN = Grid((-2.0, -0.3, 0.0, 0.1, 5.0))
ASYMMETRIC = Grid(tuple(float(i) for i in range(-3, 13)))
GRIDS = [*(uniform(n) for n in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 256)), UNEVEN, ASYMMETRIC]
name = lambda grid: f"{grid.n_levels} levels from {grid.levels[0]:.3g}"  # noqa: E731


@pytest.mark.parametrize("grid", GRIDS, ids=name)
@pytest.mark.parametrize("scale", [1.0, 0.037, 3e-6, 1e20])
def test_encode_takes_a_nearest_level(grid, scale):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4000, generator=generator) * grid.levels[-1] * scale
    codes = fn.encode(w, torch.tensor([scale]), grid).long()
    x = w.double() / torch.tensor(scale, dtype=torch.float32).double()
    distance = (x[:, None] - torch.tensor(grid.levels, dtype=torch.float64)).abs()
    chosen = distance.gather(1, codes[:, None])[:, 0]
    # three float32 roundings of the position, whose size is at most the level count
    span = grid.levels[-1] - grid.levels[0]
    slack = 4 * U * (x.abs() + span)
    assert (chosen <= distance.min(dim=1).values + slack).all()


@pytest.mark.parametrize("n", [2, 3, 5, 9, 17])
def test_an_exact_tie_takes_the_upper_level(n):
    grid = uniform(n)  # a power of two between the levels: midpoints are exact
    middles = torch.tensor(
        [(a + b) / 2 for a, b in zip(grid.levels, grid.levels[1:], strict=False)]
    )
    codes = fn.encode(middles * 0.5, torch.tensor([0.5]), grid)
    assert codes.tolist() == list(range(1, n))


def test_an_exact_tie_on_an_uneven_grid_takes_the_upper_level():
    grid = Grid((-1.0, 0.0, 4.0))
    assert fn.encode(torch.tensor([-0.5, 2.0]), torch.ones(1), grid).tolist() == [1, 2]


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_codes_survive_decode_and_encode(grid):
    codes = torch.arange(grid.n_levels).to(torch.uint8)
    scale = torch.tensor([0.37])
    w = fn.decode(codes, scale, grid)
    assert torch.equal(fn.encode(w, scale, grid), codes)
    table = torch.tensor(grid.levels, dtype=torch.float32) * scale
    assert torch.equal(w, table)


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_fake_quantize_has_the_bits_of_decode_of_encode(grid):
    w = torch.randn(50, 7)
    before = w.clone()
    scale = torch.tensor([0.21])
    expected = fn.decode(fn.encode(w, scale, grid), scale, grid)
    assert torch.equal(fn.fake_quantize(w, scale, grid), expected)
    assert torch.equal(w, before), "the weight was written to"
    assert torch.equal(fn.snap(w, grid), fn.decode(fn.encode(w, torch.ones(1), grid),
                                                   torch.ones(1), grid))  # fmt: skip


def test_weights_beyond_the_grid_clamp_to_its_ends():
    w = torch.tensor([-1e30, 1e30, math.inf, -math.inf])
    for grid in (uniform(5), UNEVEN):
        codes = fn.encode(w, torch.ones(1), grid).tolist()
        assert codes == [0, 4, 4, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_scales_apply_along_their_axis(axis):
    grid = uniform(5, PerChannel(axis))
    w = torch.randn(3, 4, 5)
    scale = torch.rand(w.shape[axis]) + 0.1
    whole = fn.decode(fn.encode(w, scale, grid), scale, grid)
    for i in range(w.shape[axis]):
        part = w.select(axis, i)
        alone = fn.decode(
            fn.encode(part, scale[i : i + 1], uniform(5)), scale[i : i + 1], uniform(5)
        )
        assert torch.equal(whole.select(axis, i), alone)


def test_scale_rules_match_numpy():
    w = torch.randn(6, 5, 3)
    a = w.double().numpy()
    for axis in range(3):
        others = tuple(d for d in range(3) if d != axis)
        grid = uniform(3, PerChannel(axis))
        assert np.allclose(fn.mean_abs_scale(w, grid), np.abs(a).mean(others), rtol=1e-6)
        assert np.allclose(fn.std_scale(w, grid), a.std(others), rtol=1e-5)
    assert np.allclose(fn.mean_abs_scale(w, uniform(3)), [np.abs(a).mean()], rtol=1e-6)
    assert np.allclose(fn.std_scale(w, uniform(3)), [a.std()], rtol=1e-5)


def test_std_scale_of_equal_weights_has_a_finite_gradient():
    w = torch.full((4,), 0.5, requires_grad=True)
    scale = fn.std_scale(w, uniform(3))
    scale.sum().backward()
    assert scale.item() == 0.0
    assert w.grad.isfinite().all()


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_power_of_two_is_the_nearest_in_log(value):
    rounded = fn.round_scale(torch.tensor([value]), ScaleDomain.POWER_OF_TWO).item()
    exponent = math.log2(rounded)
    assert exponent == int(exponent)
    assert abs(math.log2(value) - exponent) <= 0.5 + 1e-6


def test_float16_rounding_is_that_of_the_dtype():
    every = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    between = (every[1:] + every[:-1]) / 2  # ties, which go to even
    x = torch.cat([every, between, between * (1 + 2e-7), between * (1 - 2e-7)])
    assert torch.equal(fn.round_scale(x, ScaleDomain.FLOAT16), x.half().float())


def test_domains_round_and_limit_scales():
    scale = torch.tensor([0.0, 1e-45, 0.1, 1e30])
    assert torch.equal(fn.round_scale(scale, ScaleDomain.FLOAT32), scale)
    half = fn.round_scale(scale, ScaleDomain.FLOAT16)
    assert half.tolist() == [0.0, 0.0, float(np.float16(0.1)), 65504.0]
    two = fn.round_scale(scale, ScaleDomain.POWER_OF_TWO)
    assert two.tolist() == [2.0**-126, 2.0**-126, 0.125, 2.0**100]


def test_a_zero_scale_decodes_to_zero_and_never_to_nan():
    for n in (2, 3, 4, 5):
        codes = fn.encode(torch.zeros(7), torch.zeros(1), uniform(n))
        assert (fn.decode(codes, torch.zeros(1), uniform(n)) == 0).all()


def test_straight_through_is_exact_and_passes_the_full_gradient():
    w = torch.randn(1000, requires_grad=True)
    q = fn.fake_quantize(w, torch.tensor([0.1]), uniform(2))
    out = fn.straight_through(w, q)
    assert out.unique().numel() == 2
    g = torch.randn(1000)
    out.backward(g)
    assert torch.equal(w.grad, g)


def test_straight_through_works_under_vmap():
    w = torch.randn(3, 4)
    out = torch.func.vmap(lambda v: fn.straight_through(v, v.round()))(w)
    assert torch.equal(out, w.round())


def test_entropy_and_shares():
    codes = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2], dtype=torch.uint8)
    assert fn.level_shares(codes, 4).tolist() == [0.25, 0.125, 0.625, 0.0]
    expected = -sum(p * math.log2(p) for p in (0.25, 0.125, 0.625))
    assert fn.entropy(codes, 4) == pytest.approx(expected, rel=1e-12)
    assert fn.entropy(codes[:0], 4) == 0.0
    assert fn.entropy(codes[:2], 4) == 0.0
