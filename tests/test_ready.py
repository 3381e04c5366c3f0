"""The short way of a packed layer: the same bits as the long one, or left to it."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from subbyte import kernels
from subbyte.core.grids import PerChannel, uniform
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor
from subbyte.errors import SubbyteError
from subbyte.modules import PackedConv2d, PackedLinear

core = pytest.importorskip("subbyte._native")


def layer_of(rows=10, k=64, seed=0, bias=True, precision="int8"):
    generator = torch.Generator().manual_seed(seed)
    grid = uniform(3, PerChannel(0))
    codes = torch.randint(0, 3, (rows, k), dtype=torch.uint8, generator=generator)
    weight = QuantizedTensor(codes, torch.rand(rows, generator=generator) + 0.5, grid)
    with torch.device("meta"):
        like = nn.Linear(k, rows, bias=bias)
    offset = torch.randn(rows, generator=generator) if bias else None
    layer = PackedLinear(like, QuantizedLayer(weight, offset))
    layer.precision = precision
    return layer.eval()


def conv_of(seed=0, channels=8, rows=20, groups=1):
    generator = torch.Generator().manual_seed(seed)
    grid, shape = uniform(3, PerChannel(0)), (rows, channels // groups, 3, 3)
    codes = torch.randint(0, 3, shape, dtype=torch.uint8, generator=generator)
    weight = QuantizedTensor(codes, torch.rand(rows, generator=generator) + 0.5, grid)
    with torch.device("meta"):
        like = nn.Conv2d(channels, rows, 3, 2, 1, groups=groups)
    layer = PackedConv2d(like, QuantizedLayer(weight, torch.randn(rows, generator=generator)))
    layer.precision = "int8"
    return layer.eval()


def short_way(layer, x):
    """What the short way answers; the layer was called before."""
    held = layer.packed.ready_for(layer)
    return None if held is None else kernels.answer(x, held)


def long_way(layer, x):
    """By a copy that was never called."""
    return copy.deepcopy(layer)(x)


@pytest.mark.parametrize("precision", ["int8", "int16", "float32"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (64,), (5, 64), (2, 3, 64), (40, 64)])
def test_the_short_way_gives_the_bits_of_the_long_one(precision, bias, shape):
    layer, x = layer_of(bias=bias, precision=precision), torch.randn(*shape)
    with torch.no_grad():
        first = layer(x)
        again = short_way(layer, x)
        assert again is not None
        assert again.shape == (*shape[:-1], 10)
        assert torch.equal(again, first)
        assert torch.equal(layer(x), first)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("size", [(1, 9, 7), (3, 1, 1), (2, 2, 12)])
def test_convolutions_have_the_bits_and_the_layout_of_the_long_way(layout, groups, size):
    layer = conv_of(rows=20 if groups == 1 else 8, groups=groups)
    x = torch.randn(size[0], 8, *size[1:]).contiguous(memory_format=layout)
    with torch.no_grad():
        first = layer(x)
        again = short_way(layer, x)
        assert torch.equal(again, first)
        assert again.stride() == first.stride()
        layer.activation = "relu6"
        assert torch.equal(layer(x), first.clamp(0, 6))
        assert torch.equal(layer(x), first.clamp(0, 6))


def test_images_that_are_not_plain_are_left_to_the_long_way():
    layer, x = conv_of(), torch.randn(2, 8, 6, 5)
    layer(x)
    for other in (x[0], x[:, :, :, ::2], x.permute(0, 1, 3, 2), x.double(), x[:0]):
        assert short_way(layer, other) is None
        assert torch.equal(layer(other), long_way(layer, other))
    for wrong in (x[:, :7].contiguous(), x[0, 0], x.reshape(1, 2, 8, 6, 5)):
        with pytest.raises((SubbyteError, RuntimeError)):
            layer(wrong)
    assert torch.allclose(layer(x, torch.ones(2, 20, 3, 3)), layer(x) + 1, atol=1e-5)
    x[1, 0, 0, 0] = float("nan")
    assert short_way(layer, x) is None
    assert torch.equal(layer(x)[0], long_way(layer, x)[0])


def test_an_activation_is_applied_and_its_change_is_seen():
    layer, x = layer_of(), torch.randn(4, 64)
    plain = layer(x)
    layer.activation = "relu"
    assert short_way(layer, x) is None
    assert torch.equal(layer(x), plain.relu())
    assert torch.equal(layer(x), plain.relu())


CHANGES = {
    "words, another tensor": lambda layer, other: setattr(
        layer.packed, "words", other.packed.words.clone()
    ),
    "words in place": lambda layer, other: layer.packed.words.copy_(other.packed.words),
    "words past the counter": lambda layer, other: layer.packed.words.data.copy_(
        other.packed.words
    ),
    "words by NumPy": lambda layer, other: layer.packed.words.numpy().__setitem__(
        slice(None), other.packed.words.numpy()
    ),
    "scale, another tensor": lambda layer, other: setattr(
        layer.packed, "scale", other.packed.scale.clone()
    ),
    "scale in place": lambda layer, other: layer.packed.scale.mul_(2),
    "scale past the counter": lambda layer, other: layer.packed.scale.data.mul_(2),
    "bias, another one": lambda layer, other: setattr(
        layer, "bias", nn.Parameter(other.bias.detach().clone(), requires_grad=False)
    ),
    "bias in place": lambda layer, other: layer.bias.data.add_(1),
    "no bias": lambda layer, other: setattr(layer, "bias", None),
    "precision": lambda layer, other: setattr(layer, "precision", "float32"),
    "window": lambda layer, other: setattr(
        layer, "window", dataclasses.replace(layer.window, stride=(1, 1))
    ),
    "padding mode": lambda layer, other: setattr(layer, "padding_mode", "reflect"),
    "state dict": lambda layer, other: layer.load_state_dict(other.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [layer_of, conv_of])
def test_a_change_is_seen_at_once(change, mode, make):
    layer, other = make(), make(seed=1)
    if make is layer_of and change in (CHANGES["window"], CHANGES["padding mode"]):
        return  # a Linear layer has neither
    x = torch.randn(3, 64) if make is layer_of else torch.randn(3, 8, 5, 5)
    with mode():
        before = layer(x)
        assert torch.equal(layer(x), before)
        change(layer, other)
        wanted = long_way(layer, x)
        assert wanted.shape != before.shape or not torch.equal(wanted, before)
        assert torch.equal(layer(x), wanted)
        assert torch.equal(layer(x), wanted)


def test_versions_count_where_bytes_are_not_looked_at():
    """A few bytes of a large weight are not among the blocks of one call; its version is."""
    layer, x = layer_of(512, 2048), torch.randn(1, 2048)
    with torch.no_grad():
        for place in range(0, layer.packed.words.numel(), 4096):
            layer(x)
            layer.packed.words[place : place + 8] = 0
            assert torch.equal(layer(x), long_way(layer, x))


def test_tensors_that_no_longer_fit_are_an_error_with_a_remedy():
    layer, x = layer_of(), torch.randn(3, 64)
    layer(x)
    layer.packed.scale.resize_(5)
    with pytest.raises(SubbyteError, match="scale"):
        layer(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e-39])
def test_rows_without_a_scale_take_the_long_way(bad):
    layer, x = layer_of(), torch.randn(3, 64)
    layer(x)
    x[1] = bad
    assert short_way(layer, x) is None
    got, wanted = layer(x), long_way(layer, x)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got[[0, 2]], wanted[[0, 2]])
    assert torch.allclose(got, wanted, rtol=0, atol=0, equal_nan=True)


OTHERS = {
    "gaps": torch.randn(64, 3).t(),
    "every second": torch.randn(6, 64)[::2],
    "float64": torch.randn(3, 64).double(),
    "float16": torch.randn(3, 64).half(),
    "no rows": torch.randn(0, 64),
    "many dimensions": torch.randn(1, 1, 1, 1, 1, 2, 64),
}


@pytest.mark.parametrize("x", OTHERS.values(), ids=OTHERS)
def test_other_activations_are_left_to_the_long_way(x):
    layer = layer_of()
    layer(torch.randn(2, 64))
    assert short_way(layer, x) is None
    assert torch.equal(layer(x), long_way(layer, x))


def test_a_wrong_width_is_the_long_way_s_error():
    layer = layer_of()
    layer(torch.randn(2, 64))
    for shape in [(2, 63), (64, 2), ()]:
        with pytest.raises(SubbyteError, match="64"):
            layer(torch.randn(shape))


def test_gradients_traces_and_transforms_take_the_long_way():
    layer, x = layer_of(), torch.randn(3, 64)
    layer(x)
    asked = x.clone().requires_grad_()
    layer(asked).sum().backward()
    assert torch.allclose(asked.grad, layer.weight.sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)
    mapped = torch.func.vmap(layer)(x)
    assert torch.allclose(mapped, layer(x), rtol=1e-6, atol=1e-6)
    exported = torch.export.export(layer, (x,))
    assert any("subbyte.linear" in str(node.target) for node in exported.graph.nodes)
    traced = make_fx(layer)(x)
    assert any("subbyte.linear" in str(node.target) for node in traced.graph.nodes)
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((10,), 3.0))


def test_another_instruction_set_is_seen():
    layer, x = layer_of(), torch.randn(3, 64)
    before, now = layer(x), core.tier()
    last = now
    try:
        for tier in core.tiers():
            core.select_tier(tier)
            assert (short_way(layer, x) is None) == (tier != last)
            last = tier
            assert torch.equal(layer(x), before)
            assert layer.packed.ready_for(layer).call.holds()
    finally:
        core.select_tier(now)


def test_an_adapter_and_a_sum_take_the_long_way():
    layer, x, plus = layer_of(), torch.randn(3, 64), torch.randn(3, 10)
    alone = layer(x)
    assert torch.allclose(layer(x, plus), alone + plus, rtol=1e-6, atol=1e-6)
    layer.packed.up, layer.packed.down = torch.ones(10, 1), torch.ones(1, 64)
    layer.packed.adapter_scale = torch.ones(1)
    assert torch.allclose(layer(x), alone + x.sum(1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_make_their_own():
    layer, x = layer_of(), torch.randn(3, 64)
    wanted = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.packed._ready is None
        twin.packed.scale.mul_(2)
        assert not torch.equal(twin(x), wanted)
        assert torch.equal(layer(x), wanted)
