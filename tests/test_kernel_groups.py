"""Packed products where groups of inputs share scales: every packing on every instruction set.

The reference rounds the activations as docs/kernels.md states it and multiplies in float64. What is
left are roundings of float32: the stored scale, the sum of a group and its product with the scale,
one addition for each group, the activations' scale, and the bias.
"""

import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from subbyte import kernels
from subbyte.core.grids import Grid, PerGroup, ScaleDomain, uniform
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor

core = pytest.importorskip("subbyte._native", reason="the C++ core was not built")

LEVELS = [2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 33, 127, 128, 255]
SIZES = [4, 12, 32, 36, 64, 128]
STEPS = {"int8": 127, "int16": 127 * 128}
EPS = 2.0**-24


pytestmark = pytest.mark.usefixtures("restored_tier")


def on_every_tier(call):
    found = []
    for tier in core.tiers():
        core.select_tier(tier)
        found.append(call())
    return found


def grouped(levels, rows, k, size, *, seed=0, domain=ScaleDomain.FLOAT32):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(levels, (rows, k), generator=generator, dtype=torch.uint8)
    scale = 0.5 + torch.rand(rows * -(-k // size), generator=generator)
    scale = torch.round(scale * 512) / 512  # a float16, too
    return QuantizedTensor(codes, scale, uniform(levels, PerGroup(size), domain))


def packed_linear(weight, bias=None, precision="int8"):
    like = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    done = sb.Quantized(nn.Sequential(like), {"0": QuantizedLayer(weight, bias)})
    return sb.pack(done, precision=precision)[0]


def exact_weight(weight):
    """float64, by indices and no library code."""
    rows, k = weight.shape
    levels = torch.tensor(weight.grid.levels, dtype=torch.float64)[weight.codes.long()]
    of_input = torch.arange(k) // weight.grid.granularity.size
    return levels * weight.scale.double().reshape(rows, -1)[:, of_input]


def rounded(x):
    """Activations as int8 has them, float64."""
    peak = x.abs().amax(1, keepdim=True)
    return torch.round(x * (torch.full_like(peak, 127) / peak)).double() * (peak / 127).double()


def assert_close(got, x, weight, bias, roundings):
    dense = exact_weight(weight)
    wanted = x @ dense.T + bias.double()
    bound = roundings * EPS * (x.abs() @ dense.abs().T + bias.double().abs())
    assert got.isfinite().all()
    assert ((got.double() - wanted).abs() <= bound).all()


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("levels", LEVELS)
@given(
    rows=st.integers(1, 70), k=st.integers(1, 150), n=st.integers(1, 20),
    size=st.sampled_from(SIZES), seed=st.integers(0, 99),
)  # fmt: skip
@example(rows=37, k=135, n=1, size=32, seed=0)  # the last group of a row is short
@example(rows=40, k=147, n=7, size=64, seed=0)
@example(rows=33, k=147, n=20, size=64, seed=0)
@example(rows=70, k=149, n=17, size=36, seed=0)
@settings(max_examples=16, deadline=None)
def test_groups_have_the_exact_product_of_rounded_activations(levels, rows, k, n, size, seed):
    weight = grouped(levels, rows, k, size, seed=seed)
    torch.manual_seed(seed)
    x, bias = torch.randn(n, k), torch.randn(rows)
    layer = packed_linear(weight, bias)
    assert layer.why_not(x) is None
    found = on_every_tier(lambda: layer(x))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert_close(found[0], rounded(x), weight, bias, roundings=-(-k // size) + 8)


@pytest.mark.parametrize("levels", [2, 3, 5, 16, 17, 128])
@pytest.mark.parametrize("size", [4, 32, 64])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 17])
def test_groups_in_int16(levels, size, n):
    weight = grouped(levels, 37, 130, size)
    x, layer = torch.randn(n, 130), packed_linear(weight, precision="int16")
    dense = exact_weight(weight)
    reach = x.abs().amax(1, keepdim=True).double() * dense.abs().sum(1)
    bound = reach * (0.51 / STEPS["int16"] + (2 * -(-130 // size) + 12) * EPS)
    found = on_every_tier(lambda: layer(x))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert ((found[0].double() - x.double() @ dense.T).abs() <= bound).all()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("size", [4, 32, 64])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (37, 130, 1), (64, 77, 5), (45, 31, 30)])
def test_groups_in_float32(levels, size, rows, k, n):
    torch.manual_seed(levels)
    weight, bias = grouped(levels, rows, k, size), torch.randn(rows)
    layer, x = packed_linear(weight, bias, "float32"), torch.randn(n, k)
    for got in on_every_tier(lambda: layer(x)):
        assert_close(got, x.double(), weight, bias, roundings=k + 8)


@pytest.mark.parametrize("levels", [3, 5, 9, 17, 128, 255])
@pytest.mark.parametrize("size", [32, 128, 1024])
def test_sums_of_groups_hold_at_their_fullest(levels, size):
    """Random signs cancel before a sum overflows; these do not."""
    k = 1000
    grid = uniform(levels, PerGroup(size))
    for code in (0, levels - 1):
        codes = torch.full((33, k), code, dtype=torch.uint8)
        layer = packed_linear(QuantizedTensor(codes, torch.ones(33 * -(-k // size)), grid))
        wanted = 2.0 * k * (1 if code else -1)
        for n, sign in ((12, 1), (12, -1), (1, 1), (1, -1)):
            for got in on_every_tier(packed_call(layer, torch.full((n, k), 2.0 * sign))):
                assert torch.allclose(got, torch.full((n, 33), wanted * sign), rtol=1e-5)


@pytest.mark.parametrize("size", [4, 32, 64, 128])
def test_each_scale_reaches_its_own_weights_alone(size):
    """One scale of all is not 0: what comes out is that group's product, everywhere else 0."""
    k, rows = 300, 40
    per_row = -(-k // size)
    x = torch.randn(3, k)
    for place in (0, per_row - 1, per_row, 33 * per_row + per_row // 2, rows * per_row - 1):
        weight = grouped(5, rows, k, size)
        scale = torch.zeros_like(weight.scale)
        scale[place] = 1.0
        weight = QuantizedTensor(weight.codes, scale, weight.grid)
        for precision, activations in (("int8", rounded(x)), ("float32", x.double())):
            for got in on_every_tier(packed_call(packed_linear(weight, precision=precision), x)):
                assert got[:, torch.arange(rows) != place // per_row].count_nonzero() == 0
                assert_close(got, activations, weight, torch.zeros(rows), roundings=size + 8)


def packed_call(layer, x):
    return lambda: layer(x)


@pytest.mark.parametrize("precision", ["int8", "int16", "float32"])
@pytest.mark.parametrize("size", [12, 64])
def test_a_row_has_the_same_result_alone_and_in_any_batch(precision, size):
    layer = packed_linear(grouped(16, 50, 177, size), precision=precision)
    x = torch.randn(40, 177)
    whole = layer(x)
    for n in (1, 2, 3, 7, 8, 9, 31):
        assert torch.equal(layer(x[:n]), whole[:n])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("domain", [ScaleDomain.FLOAT16, ScaleDomain.POWER_OF_TWO])
def test_scales_of_every_domain_and_levels_around_no_zero(domain):
    x = torch.randn(11, 90)
    for levels in ((-2.0, -1.0, 0.0, 1.0, 2.0, 3.0), (-0.5, 0.0, 0.5, 1.0), (-0.5, 0.5, 1.5)):
        grid = Grid(levels, PerGroup(32), domain)
        codes = torch.randint(len(levels), (8, 90), dtype=torch.uint8)
        scale = 2.0 ** torch.randint(-4, 3, (24,)).float()
        weight = QuantizedTensor(codes, scale, grid)
        assert_close(packed_linear(weight)(x), rounded(x), weight, torch.zeros(8), roundings=11)


# ---------------------------------------------------------------- values that are not plain


@pytest.mark.parametrize("n", [1, 3, 12])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e-39, 0.0])
@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_values_without_a_scale_stay_in_their_row_and_follow_float(bad, n, precision):
    weight = grouped(5, 9, 40, 12)
    layer, x = packed_linear(weight, precision=precision), torch.randn(n, 40)
    clean = layer(x)
    x[-1] = bad if abs(bad) < 1 else x[-1]
    x[-1, 3] = bad
    got, wanted = layer(x), F.linear(x, weight.dequantize())
    assert torch.equal(got[:-1], clean[:-1])
    assert torch.equal(got[-1].isnan(), wanted[-1].isnan())
    # In float32 the grouped sums may cancel, so within their terms' roundings.
    reach = (x[-1].abs() @ weight.dequantize().abs().T) * 50 * EPS
    finite = wanted[-1].isfinite()
    assert ((got[-1] - wanted[-1]).abs() <= reach)[finite].all()


@pytest.mark.parametrize("precision", ["int8", "int16", "float32"])
@pytest.mark.parametrize(
    ("size", "scale"),
    [(1e30, 1e-3), (1e36, 1e-3), (3e38, 1e-37), (1e-30, 1e36), (1e-9, 1e36), (1e-3, 3e38)],
)
def test_values_near_the_end_of_float32_are_finite_where_the_product_is(precision, size, scale):
    """Groups are scaled before the activations' scale comes to them; that may not show."""
    weight = grouped(17, 40, 64, 16)
    weight = QuantizedTensor(weight.codes, weight.scale.clamp(max=1.0) * scale, weight.grid)
    x = torch.randn(12, 64).clamp(-1, 1)
    x[2, 7] = 1.0
    x *= size
    dense = exact_weight(weight)
    reach = x.abs().amax(1, keepdim=True).double() * dense.abs().sum(1)
    steps = {"int8": 254, "int16": 32000, "float32": 2**17}[precision]
    inside = x.double().abs() @ dense.abs().T + reach / steps < 3e38
    assert inside.any()
    for n in (12, 3):
        got = packed_linear(weight, precision=precision)(x[:n])
        assert got[inside[:n]].isfinite().all()
        error = (got.double() - x[:n].double() @ dense.T).abs()[inside[:n]]
        assert (error <= (reach / steps)[:n][inside[:n]] + 1e-44 * 64 * 127).all()


# ---------------------------------------------------------------- as a layer


def test_changed_scales_are_noticed():
    weight = grouped(5, 256, 512, 32)
    layer, x = packed_linear(weight), torch.randn(1, 512)
    before = layer(x)
    for place in (0, 17, 2000, 256 * 16 - 1):
        layer.packed.scale[place] *= 4
        got = layer(x)
        assert torch.equal(got, copy.deepcopy(layer)(x))
        changed = (got != before)[0].nonzero().flatten().tolist()
        assert changed == [place // 16]
        before = got


def test_gradients_and_exported_graphs_are_those_of_the_layer():
    weight = grouped(4, 20, 90, 32)
    layer, x = packed_linear(weight, torch.randn(20)), torch.randn(3, 90, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, exact_weight(weight).float().sum(0).expand(3, -1), atol=1e-4)
    exported = torch.export.export(nn.Sequential(layer), (x.detach(),))
    assert torch.equal(exported.module()(x.detach()), layer(x.detach()))


def test_a_layer_with_one_group_a_row_is_a_layer_with_a_scale_per_channel():
    weight = grouped(16, 30, 100, 128)
    one = QuantizedTensor(weight.codes, weight.scale, uniform(16, sb.PerChannel(0)))
    x = torch.randn(20, 100)
    bound = 4 * EPS * (x.abs() @ exact_weight(weight).abs().float().T)
    assert ((packed_linear(weight)(x) - packed_linear(one)(x)).abs() <= bound).all()


def test_panels_of_groups_waste_little():
    """A packing is chosen whose groups fit into those of the scales; those take a quarter bit."""
    for levels in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17):
        layer = packed_linear(grouped(levels, 64, 512, 64, domain=ScaleDomain.FLOAT16))
        layer(torch.randn(1, 512))
        bits = 8 * kernels.panel_bytes(layer.packed.words) / (64 * 512)
        assert bits <= math.log2(levels) + 1.2


def test_what_is_not_served_says_so():
    grid = uniform(4, PerGroup(32))
    x = torch.zeros(1)
    assert kernels.why_not(x, grid, 4096) is None
    assert kernels.why_not(x, uniform(255, PerGroup(64)), 10**6) is None
    assert "32 bits" in kernels.why_not(x, uniform(255, PerGroup(2**18)), 10**6)
    assert "per group" in kernels.why_not_conv(x, grid, (32, 32, 3, 3), 1, "zeros")
