"""Packed products: every packing on every instruction set against float64, element by element.

The oracle rounds the activations itself, as docs/kernels.md states it, and multiplies in float64.
What is left is float32 rounding of the scales and of the result: a few units in the last place.
"""

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from subbyte import kernels
from subbyte.core.grids import Grid, PerChannel, PerTensor, ScaleDomain, uniform
from subbyte.core.tensors import LowRank, QuantizedLayer, QuantizedTensor
from subbyte.kernels import ops, panels
from subbyte.methods import LowRes

core = pytest.importorskip("subbyte._native", reason="the C++ core was not built")

LEVELS = [2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 33, 127, 128, 255]
EPS = 2.0**-24


pytestmark = pytest.mark.usefixtures("restored_tier")


def quantized(levels, shape, *, seed=0, grid=None, per_channel=True):
    generator = torch.Generator().manual_seed(seed)
    granularity = PerChannel(0) if per_channel else PerTensor()
    grid = grid or uniform(levels, granularity)
    codes = torch.randint(0, grid.n_levels, shape, generator=generator, dtype=torch.uint8)
    groups = shape[0] if isinstance(grid.granularity, PerChannel) else 1
    scale = 0.5 + torch.rand(groups, generator=generator)
    return QuantizedTensor(codes, scale, grid)


def rounded(x, dims, planes=1):
    """Activations as the kernels see them, float64: scale * integer, one scale over `dims`."""
    peak = x.abs().amax(dims, keepdim=True)
    scale, inverse = (peak / 127).double(), torch.full_like(peak, 127) / peak
    high = torch.round(x * inverse).double()
    if planes == 1:
        return high * scale
    low = torch.round((x.double() - high * scale) * 128 / scale)
    return (high + low / 128) * scale


def packed_linear(weight, bias, precision="int8"):
    like = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    model = nn.Sequential(like)
    net = sb.pack(sb.Quantized(model, {"0": QuantizedLayer(weight, bias)}), precision=precision)
    return net[0]


def packed_conv(weight, bias, like, precision="int8", adapter=None):
    layers = {"0": QuantizedLayer(weight, bias, adapter)}
    net = sb.pack(sb.Quantized(nn.Sequential(like), layers), precision=precision)
    return net[0]


def check(got, x, weight, bias, product, *, exact, slack, roundings=8):
    """|got - product(exact)| within float32 rounding of the terms' magnitudes, plus `slack`."""
    dense = weight.dequantize().double()
    wanted = product(exact, dense) + bias
    bound = roundings * EPS * (product(exact.abs(), dense.abs()) + bias.abs()) + slack
    assert got.isfinite().all()
    assert ((got.double() - wanted).abs() <= bound).all()


# ---------------------------------------------------------------- linear


@pytest.mark.parametrize("levels", LEVELS)
@given(
    rows=st.integers(1, 70), k=st.integers(1, 150), n=st.integers(1, 20), seed=st.integers(0, 99)
)
@settings(max_examples=12, deadline=None)
def test_linear_is_the_exact_product_of_rounded_activations_on_every_tier(levels, rows, k, n, seed):
    weight = quantized(levels, (rows, k), seed=seed, per_channel=seed % 2 == 0)
    torch.manual_seed(seed)
    x, bias = torch.randn(n, k), torch.randn(rows)
    layer = packed_linear(weight, bias)
    results = []
    for tier in core.tiers():
        core.select_tier(tier)
        results.append(layer(x))
    assert all(torch.equal(results[0], other) for other in results[1:])
    check(
        results[0], x, weight, bias.double(), lambda a, w: a @ w.T, exact=rounded(x, 1), slack=0.0
    )


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("rows", "k"), [(33, 43), (70, 201)])
def test_few_columns_are_exact_on_every_tier(levels, rows, k):
    """Each number of them has loops of its own, and each packing its last digits."""
    weight, zero = quantized(levels, (rows, k)), torch.zeros(rows)
    layer, x = packed_linear(weight, None), torch.randn(8, k)
    for n in range(1, 9):
        for tier in core.tiers():
            core.select_tier(tier)
            got = layer(x[:n])
            check(got, x[:n], weight, zero.double(), lambda a, w: a @ w.T,
                  exact=rounded(x[:n], 1), slack=0.0)  # fmt: skip


@pytest.mark.parametrize("levels", [2, 3, 5, 16, 17, 128])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 17])
def test_int16_is_128_times_finer(levels, n):
    weight = quantized(levels, (37, 130))
    x = torch.randn(n, 130)
    layer = packed_linear(weight, None, "int16")
    for tier in core.tiers():
        core.select_tier(tier)
        wanted = x.double() @ weight.dequantize().double().T
        reach = x.abs().amax(1, keepdim=True).double() * weight.dequantize().double().abs().sum(1)
        error = (layer(x).double() - wanted).abs()
        assert (error <= reach * (0.51 / 127 / 128 + 8 * EPS)).all()


@pytest.mark.parametrize("levels", [3, 5, 9, 17, 128])
@pytest.mark.parametrize("k", [60, 100, 200, 400, 1000])
def test_sums_hold_at_their_fullest(levels, k):
    """Random signs cancel before a sum overflows; these do not."""
    grid = uniform(levels)
    for code in (0, levels - 1):
        codes = torch.full((33, k), code, dtype=torch.uint8)
        layer = packed_linear(QuantizedTensor(codes, torch.ones(1), grid), None)
        wanted = torch.full((12, 33), k * (1.0 if code else -1.0))
        for tier in core.tiers():
            core.select_tier(tier)
            for n, sign in ((12, 1), (12, -1), (1, 1), (1, -1)):
                got = layer(torch.full((n, k), 2.0 * sign))
                assert torch.allclose(got, 2 * sign * wanted[:n], rtol=1e-5)


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_sums_of_long_rows_hold(levels):
    """Digits that stay where they lie in their bytes weigh up to 84 times as much."""
    k = 460_000
    codes = torch.full((1, k), levels - 1, dtype=torch.uint8)
    layer = packed_linear(QuantizedTensor(codes, torch.ones(1), uniform(levels)), None)
    for tier in core.tiers():
        core.select_tier(tier)
        for n in (1, 2, 3, 4):
            got = layer(torch.full((n, k), -2.0))
            assert torch.allclose(got, torch.full((n, 1), -2.0 * k), rtol=1e-5)


def test_int8_is_within_half_a_step_of_the_float_product():
    weight = quantized(5, (64, 300))
    x = torch.randn(9, 300)
    wanted = x.double() @ weight.dequantize().double().T
    reach = x.abs().amax(1, keepdim=True).double() * weight.dequantize().double().abs().sum(1)
    error = (packed_linear(weight, None)(x).double() - wanted).abs()
    assert (error <= reach * (0.5 / 127 + 8 * EPS)).all()
    assert error.max() > 1e-4  # it did round


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (37, 130, 1), (64, 77, 5), (45, 31, 30)])
def test_float32_rounds_no_activation_on_any_tier(levels, rows, k, n):
    torch.manual_seed(levels)
    weight, bias = quantized(levels, (rows, k)), torch.randn(rows)
    layer, x = packed_linear(weight, bias, "float32"), torch.randn(n, k)
    for tier in core.tiers():
        core.select_tier(tier)
        got = layer(x)
        assert layer.why_not(x) is None
        check(got, x, weight, bias.double(), lambda a, w: a @ w.T,
              exact=x.double(), slack=0.0, roundings=k + 6)  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stay_where_float_has_them(bad):
    weight, like = quantized(3, (40, 5, 3, 3)), nn.Conv2d(5, 40, 3, padding=1, bias=False)
    x = torch.randn(2, 5, 9, 9)
    x[1, 4, 3, 3] = bad
    for layout in (torch.contiguous_format, torch.channels_last):
        got = packed_conv(weight, None, like, "float32")(x.contiguous(memory_format=layout))
        wanted = F.conv2d(x, weight.dequantize(), padding=1)
        assert torch.equal(got.isfinite(), wanted.isfinite())
        assert torch.equal(got.isnan(), wanted.isnan())
        assert 0 < int((~got.isfinite()).sum()) <= 9 * 40


@pytest.mark.parametrize("precision", ["int8", "int16", "float32"])
def test_a_row_has_the_same_result_alone_and_in_any_batch(precision):
    weight = quantized(3, (50, 77))
    layer, x = packed_linear(weight, None, precision), torch.randn(40, 77)
    whole = layer(x)
    for n in (1, 2, 3, 7, 8, 9, 31):
        assert torch.equal(layer(x[:n]), whole[:n])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (2, 3, 8)])
def test_linear_takes_any_leading_dimensions_and_none(shape):
    weight = quantized(3, (5, 8))
    layer = packed_linear(weight, torch.ones(5))
    x = torch.randn(*shape)
    got = layer(x)
    assert got.shape == (*shape[:-1], 5)
    if x.numel():
        assert torch.allclose(got, F.linear(x, weight.dequantize(), torch.ones(5)), atol=0.2)


def test_inputs_need_not_be_contiguous():
    layer = packed_linear(quantized(3, (6, 10)), None)
    x = torch.randn(10, 20).t()[::2]
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("n", [1, 3, 12])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e-39, 0.0])
def test_values_without_a_scale_stay_in_their_row_and_follow_float(bad, n):
    weight = quantized(5, (9, 12))
    layer, x = packed_linear(weight, None), torch.randn(n, 12)
    clean = layer(x)
    x[-1] = bad if abs(bad) < 1 else x[-1]
    x[-1, 3] = bad
    got, wanted = layer(x), F.linear(x, weight.dequantize())
    assert torch.equal(got[:-1], clean[:-1])
    assert torch.equal(got[-1].isnan(), wanted[-1].isnan())
    assert torch.allclose(got[-1], wanted[-1], rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", ["int8", "int16", "float32"])
@pytest.mark.parametrize("size", [1e30, 1e36, 3e38])
@pytest.mark.parametrize("scale", [1e-37, 1e-3, 1.0, 1e3])
def test_values_near_the_end_of_float32_are_finite_where_the_product_is(precision, size, scale):
    """Sums are taken before they are scaled, and scales multiplied first; neither may show."""
    weight, like = quantized(17, (40, 64)), nn.Conv2d(16, 40, 2, bias=False)
    weight = QuantizedTensor(weight.codes, torch.full((40,), scale), weight.grid)
    kernel = QuantizedTensor(weight.codes.reshape(40, 16, 2, 2), weight.scale, weight.grid)
    x = torch.randn(5, 64).clamp(-1, 1)
    x[2, 7] = 1.0
    x[2] *= size
    linear, conv = (
        packed_linear(weight, None, precision),
        packed_conv(kernel, None, like, precision),
    )
    dense = weight.dequantize().double()
    wanted = x.double() @ dense.T
    reach = x.abs().amax(1, keepdim=True).double() * dense.abs().sum(1)
    steps = {"int8": 254, "int16": 32000, "float32": 2**18}[precision]
    inside = x.double().abs() @ dense.abs().T + reach / steps < 3e38  # in any order of sums
    assert inside[[0, 1, 3, 4]].all()
    for got in (linear(x), conv(x.reshape(5, 16, 2, 2)).flatten(1)):
        assert got[inside].isfinite().all()
        error = (got.double() - wanted).abs()[inside]
        assert (error <= (reach / steps)[inside] + 1e-44 * 64 * 127).all()
    alone = linear(x[[0, 1, 3, 4]])
    assert torch.equal(linear(x)[[0, 1, 3, 4]], alone)


def test_grids_that_are_not_symmetric_and_scales_of_every_domain():
    asymmetric = Grid(tuple(float(i - 2) for i in range(7)))
    half = Grid((-0.5, 0.0, 0.5, 1.0), PerChannel(0), ScaleDomain.FLOAT16)
    power = Grid((-1.0, 0.0, 1.0), PerTensor(), ScaleDomain.POWER_OF_TWO)
    x = torch.randn(11, 40)
    for grid in (asymmetric, half, power):
        weight = quantized(0, (8, 40), grid=grid)
        scale = torch.full_like(weight.scale, 0.25)
        weight = QuantizedTensor(weight.codes, scale, grid)
        got = packed_linear(weight, None)(x)
        zero = torch.zeros(8).double()
        check(got, x, weight, zero, lambda a, w: a @ w.T, exact=rounded(x, 1), slack=0.0)


# ---------------------------------------------------------------- convolution

CONVS = [
    {"ci": 3, "co": 16, "k": (3, 3), "padding": 1},
    {"ci": 5, "co": 9, "k": (3, 2), "stride": (2, 1)},
    {"ci": 8, "co": 40, "k": (1, 1)},
    {"ci": 8, "co": 12, "k": (3, 3), "stride": (1, 2), "dilation": (2, 2), "padding": 2},
    {"ci": 6, "co": 10, "k": (3, 3), "dilation": (2, 1), "padding": (2, 1)},
    {"ci": 8, "co": 16, "k": (3, 3), "groups": 2, "padding": 1},
    {"ci": 12, "co": 12, "k": (3, 3), "groups": 12, "padding": 1},
    {"ci": 35, "co": 35, "k": (5, 3), "stride": 2, "groups": 35, "dilation": (1, 2)},
    {"ci": 24, "co": 24, "k": (3, 3), "groups": 24, "padding": 1},
    {"ci": 3, "co": 10, "k": (7, 7), "stride": 2, "padding": 3},
    {"ci": 4, "co": 8, "k": (2, 2), "padding": "same"},
    {"ci": 4, "co": 8, "k": (3, 3), "padding": 1, "padding_mode": "reflect"},
    {"ci": 4, "co": 6, "k": (3, 3), "groups": 2},
]


def convolution(spec, levels, seed=0):
    spec = dict(spec)
    like = nn.Conv2d(spec.pop("ci"), spec.pop("co"), spec.pop("k"), **spec)
    return like, quantized(levels, tuple(like.weight.shape), seed=seed)


def exact_product(like):
    """(x, w) -> the convolution in float64, without a bias."""

    def product(x, w):
        with torch.no_grad():
            double = copy.deepcopy(like).double()
            double.weight.copy_(w)
            double.bias.zero_()
            return double(x)

    return product


@pytest.mark.parametrize("spec", CONVS, ids=str)
@pytest.mark.parametrize("levels", [2, 3, 5, 8, 16, 17, 128])
def test_conv_is_the_exact_product_of_rounded_activations_on_every_tier(spec, levels):
    like, weight = convolution(spec, levels)
    reason = kernels.why_not_conv(
        torch.zeros(1), weight.grid, weight.shape, like.groups, like.padding_mode
    )
    torch.manual_seed(levels)
    bias = torch.randn(like.out_channels)
    layer = packed_conv(weight, bias, like)

    product = exact_product(like)
    for size in [(1, 9, 11), (3, 8, 8)]:
        x = torch.randn(size[0], like.in_channels, *size[1:])
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=layout)
            results = []
            for tier in core.tiers():
                core.select_tier(tier)
                results.append(layer(x))
            assert all(torch.equal(results[0], other) for other in results[1:])
            depthwise = like.groups == like.in_channels == like.out_channels  # in float32
            exact = x.double() if reason or depthwise else rounded(x, (1, 2, 3))
            terms = bias.double()[:, None, None]
            slack = 1e-4 if reason else 0.0
            roundings = weight.codes[0].numel() + 4 if depthwise else 8
            check(
                results[0], x, weight, terms, product,
                exact=exact, slack=slack, roundings=roundings,
            )  # fmt: skip
            assert results[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("spec", CONVS, ids=str)
@pytest.mark.parametrize("levels", [2, 3, 5, 17])
def test_conv_in_float32(spec, levels):
    torch.manual_seed(levels)
    like, weight = convolution(spec, levels)
    layer, bias = packed_conv(weight, like.bias.detach(), like, "float32"), like.bias.double()

    product = exact_product(like)
    x = torch.randn(2, like.in_channels, 9, 10)
    for layout in (torch.contiguous_format, torch.channels_last):
        for tier in core.tiers():
            core.select_tier(tier)
            got = layer(x.contiguous(memory_format=layout)).detach()
            check(got, x, weight, bias.detach()[:, None, None], product, exact=x.double(),
                  slack=0.0, roundings=weight.codes[0].numel() + 6)  # fmt: skip


@pytest.mark.parametrize("spec", CONVS[:10], ids=str)
def test_conv_in_int16(spec):
    like, weight = convolution(spec, 5)
    like.bias = None
    x = torch.randn(2, like.in_channels, 9, 9)
    dense = weight.dequantize().double()
    got = packed_conv(weight, None, like, "int16")(x).double()
    double = copy.deepcopy(like).double()
    with torch.no_grad():
        double.weight.copy_(dense)
        wanted = double(x.double())
        double.weight.copy_(dense.abs())
        reach = double(x.abs().amax((1, 2, 3), keepdim=True).double().expand_as(x))
    assert ((got - wanted).abs() <= reach * (0.51 / 127 / 128 + 8 * EPS)).all()


def test_an_image_has_the_same_result_alone_and_in_a_batch_and_keeps_its_nan():
    _like, weight = convolution(CONVS[0], 3)
    layer, x = packed_conv(weight, None, nn.Conv2d(3, 16, 3, padding=1, bias=False)), None
    x = torch.randn(5, 3, 10, 10)
    whole = layer(x)
    assert torch.equal(layer(x[2:3])[0], whole[2])
    assert torch.equal(layer(x[2]), whole[2])  # without a batch dimension
    x[1, 0, 4, 4] = float("nan")
    got, wanted = layer(x), F.conv2d(x, weight.dequantize(), padding=1)
    assert torch.equal(got[[0, 2, 3, 4]], whole[[0, 2, 3, 4]])
    assert torch.equal(got[1].isnan(), wanted[1].isnan())
    assert 0 < int(got[1].isnan().sum()) < got[1].numel()


def test_adapters_are_added_in_float():
    torch.manual_seed(0)
    for groups in (1, 2):
        like = nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=groups)
        weight = quantized(3, tuple(like.weight.shape))
        width = weight.codes[0].numel()
        adapter = LowRank(
            torch.randn(16, 2).half(), torch.randn(2 * groups, width).half(),
            torch.rand(2 * groups) + 0.5,
        )  # fmt: skip
        bias, x = torch.randn(16), torch.randn(2, 8, 7, 7)
        fast = packed_conv(weight, bias, like, adapter=adapter)(x)
        plain = packed_conv(weight, bias, like)(x)
        extra = adapter.product().reshape(weight.shape)
        wanted = plain + F.conv2d(x, extra, None, 2, 1, 1, groups)
        assert torch.allclose(fast, wanted, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------- as a PyTorch citizen


def small_net(precision="int8"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)
    )
    sb.prepare(model, LowRes(levels=3))
    return sb.pack(sb.freeze(model), precision=precision)


def test_compile_export_and_eager_agree():
    net, x = small_net(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        wanted = net(x)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), wanted)
        exported = torch.export.export(net, (x,))
        assert torch.equal(exported.module()(x), wanted)
    assert any("subbyte.conv2d" in str(node.target) for node in exported.graph.nodes)
    assert any("subbyte.linear" in str(node.target) for node in exported.graph.nodes)
    with torch.inference_mode():
        assert torch.equal(net(x), wanted)


def test_the_ops_pass_pytorchs_own_checks():
    linear = packed_linear(quantized(3, (6, 8)), torch.randn(6))
    packed = linear.packed
    x = torch.randn(3, 8, requires_grad=True)
    arguments = (packed.words, packed.scale, linear.bias, *ops.plain(packed.grid), [6, 8])
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.linear_op, (x, *arguments, "int8"), test_utils=tests)


@pytest.mark.parametrize("spec", [*CONVS[:9], None], ids=str)
def test_gradients_are_those_of_the_decoded_weight(spec):
    """Of PyTorch's own layer, in float64: 490 terms at most, so 1e-4 is far above rounding."""
    if spec is None:
        like, weight, x = nn.Linear(12, 7), quantized(5, (7, 12)), torch.randn(4, 12)
        layer = packed_linear(weight, None)
    else:
        like, weight = convolution(spec, 5)
        layer = packed_conv(weight, torch.zeros(like.out_channels), like)
        x = torch.randn(2, like.in_channels, 9, 9)
    like.weight.data = weight.dequantize()
    given, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    toward = torch.randn_like(layer(x))
    (layer(given) * toward).sum().backward()
    (like.double()(exact) * toward).sum().backward()
    assert torch.allclose(given.grad, exact.grad.float(), rtol=1e-4, atol=1e-4)


def test_changed_words_and_scales_are_noticed():
    net, other, x = small_net(), small_net(), torch.randn(2, 3, 6, 6)
    before = net(x)
    other[3].packed.scale.mul_(2)
    net.load_state_dict(other.state_dict())
    assert torch.equal(net(x), other(x))
    assert not torch.equal(net(x), before)
    again = copy.deepcopy(net)
    assert torch.equal(again(x), net(x))


def large_layer():
    """(packed layer whose words and scales are too large to be looked at in one call, an input)."""
    weight = quantized(5, (1024, 500), grid=uniform(5, PerChannel(0)))
    return packed_linear(weight, None), torch.randn(1, 500)


def decoded_product(layer, x):
    return rounded(x, 1) @ layer.weight.double().T


CHANGES = {  # each past PyTorch's counter of versions, and of most bytes
    "scale.data.mul_": lambda p: p.scale.data.mul_(2),
    "scale.numpy": lambda p: p.scale.numpy().__imul__(2),
    "words.data.copy_": lambda p: p.words.data.copy_(p.words.roll(8)),
    "words.data.zero_": lambda p: p.words.data.zero_(),
    "words.numpy": lambda p: p.words.numpy().__ixor__(1),
    "storage": lambda p: p.words.untyped_storage().copy_(p.words.roll(8).untyped_storage()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_past_pytorch_are_noticed(change):
    layer, x = large_layer()
    before = layer(x)
    versions = layer.packed.words._version, layer.packed.scale._version
    change(layer.packed)
    assert versions == (layer.packed.words._version, layer.packed.scale._version)
    got, wanted = layer(x), decoded_product(layer, x)
    assert not torch.equal(got, before)
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["words", "scale"])
def test_one_changed_byte_that_pytorch_counts_is_noticed_at_once(name):
    for place in (0, 1999, 4095):
        layer, x = large_layer()
        layer(x)
        getattr(layer.packed, name).view(torch.uint8)[place] ^= 1
        again = copy.deepcopy(layer)
        assert torch.equal(layer(x), again(x))


def test_one_byte_changed_past_pytorch_is_noticed_as_calls_go_round():
    layer, x = large_layer()
    for place in (0, 1999, 4095):
        before = layer(x)
        layer.packed.words.data[place] ^= 1
        blocks = -(-layer.packed.words.numel() // 256)
        results = [layer(x) for _ in range(-(-blocks // 4))]
        assert torch.equal(results[-1], copy.deepcopy(layer)(x))
        assert not torch.equal(results[-1], before)


def test_the_bytes_of_a_panel_are_looked_at_block_by_block():
    words, scale = torch.arange(7777).to(torch.uint8), torch.rand(300).half()
    origin = core.Origin(words, scale)
    rounds = -(-7777 // 256 // 4) + 1
    assert all(origin.glance(words, scale) for _ in range(2 * rounds))
    assert origin.same(words.clone(), scale.clone())
    assert not origin.glance(words.clone(), scale)  # it lies elsewhere
    assert not origin.same(words[:-1], scale)
    for place in (0, 255, 256, 7776):
        words[place] += 1
        assert not origin.same(words, scale)
        assert not all(origin.glance(words, scale) for _ in range(rounds))
        words[place] -= 1
    scale[299] += 1
    assert not origin.same(words, scale)


PANEL_BITS_OF_3_LEVELS = {  # docs/kernels.md; one table look-up by bytes packs five digits into one
    "portable": 2, "avx2": 2, "avxvnni": 2, "neon": 2, "avx512vnni": 2, "avx512vbmi": 1.6,
}  # fmt: skip


def test_panels_are_counted_and_die_with_their_words():
    net, x = small_net(), torch.randn(1, 3, 6, 6)
    words = net[3].packed.words
    assert kernels.panel_bytes(words) == 0
    net(x)
    bits = panels.panel_of(net[3].packed.matrix()).bits
    assert bits == PANEL_BITS_OF_3_LEVELS[kernels.tier()]
    group = round(4 * 8 / bits)  # k that are packed together
    padded = -(-576 // group) * group
    assert kernels.panel_bytes(words) == 32 * padded * bits / 8  # 10 rows in a block of 32
    before = len(panels._PANELS)
    del net, words
    assert len(panels._PANELS) == before - 2


def test_several_python_threads_may_call_at_once():
    net, x = small_net(), torch.randn(4, 3, 6, 6)
    wanted, wrong = net(x), []

    def work():
        for _ in range(30):
            if not torch.equal(net(x), wanted):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_number_of_threads_changes_nothing(threads):
    weight, like = quantized(3, (100, 4096)), nn.Conv2d(16, 40, 3)
    layer, x = packed_linear(weight, None), torch.randn(24, 4096)
    conv = packed_conv(quantized(5, tuple(like.weight.shape)), torch.ones(40), like)
    images = torch.randn(3, 16, 30, 30)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = layer(x), layer(x[:1]), conv(images)
        torch.set_num_threads(threads)
        got = layer(x), layer(x[:1]), conv(images)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


# ---------------------------------------------------------------- reasons and bad input


def test_why_not_says_it_in_words():
    grid, x = uniform(3), torch.zeros(1, 4)
    assert kernels.why_not(x, grid, 4) is None
    assert "bfloat16" in kernels.why_not(x.bfloat16(), grid, 4)
    assert "meta" in kernels.why_not(x.to("meta"), grid, 4)
    assert "256 levels" in kernels.why_not(x, uniform(256), 4)
    assert "step" in kernels.why_not(x, Grid((-1.0, 0.1, 1.0)), 4)
    assert "32 bits" in kernels.why_not(x, uniform(255), 10**6)
    reason = kernels.why_not_conv(torch.zeros(1), grid, (4, 2, 3, 3), 1, "reflect")
    assert "reflect" in reason
    assert "output channels" in kernels.why_not_conv(torch.zeros(1), grid, (8, 2, 3, 3), 4, "zeros")


def test_what_the_kernels_do_not_serve_runs_on_the_reference():
    weight = quantized(0, (4, 6), grid=Grid((-1.0, 0.1, 1.0)))
    bias, x = torch.randn(4), torch.randn(2, 6)
    layer = packed_linear(weight, bias)
    assert layer.why_not(x)
    assert torch.allclose(layer(x), F.linear(x, weight.dequantize(), bias), atol=1e-6)


def test_bad_input_names_what_was_expected():
    layer = packed_linear(quantized(3, (4, 6)), None)
    with pytest.raises(sb.SubbyteError, match=r"\(2, 5\).*must be 6"):
        layer(torch.randn(2, 5))
    conv = packed_conv(quantized(3, (8, 3, 3, 3)), None, nn.Conv2d(3, 8, 3, bias=False))
    with pytest.raises(sb.SubbyteError, match=r"must be 3"):
        conv(torch.randn(1, 4, 5, 5))
    with pytest.raises(sb.SubbyteError, match=r"smaller than the kernel"):
        conv(torch.randn(1, 3, 2, 2))
    with pytest.raises(sb.SubbyteError, match=r"\[n, c, h, w\]"):
        conv(torch.randn(3, 5))
    with pytest.raises(sb.SubbyteError, match=r"precision='int4'"):
        sb.pack(sb.Quantized(nn.Linear(2, 2), {}), precision="int4")


@pytest.mark.parametrize("name", ["portable", "avx1024"])
def test_the_environment_forces_a_tier(name):
    code = "from subbyte import kernels\nprint(kernels.tier())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "SUBBYTE_ISA": name},
    )  # fmt: skip
    if name == "portable":
        assert run.stdout.strip() == "portable"
    else:
        assert "SUBBYTE_ISA='avx1024': this machine has" in run.stderr
        assert "portable" in run.stderr
