"""A frozen fixed-point network in integers against the packed one: exact, or within rounding."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from oracle import assert_within, exact_weight, gamma
from subbyte import SGM, LowRes, SubbyteError
from subbyte.graph.integer import integer_network, integer_weight, to_fixed_point
from subbyte.modules.absorb import absorb_batchnorm

CONVS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 2), "padding": (2, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 1, "groups": 4, "bias": False},
    {"kernel_size": (2, 3), "padding": 2, "stride": (3, 2), "groups": 2, "bias": False},
]


def frozen(net, bits=2):
    sb.prepare(net, SGM(bits=bits))
    return sb.pack(sb.freeze(net), precision="float32")


def integers(shape, seed=0, top=9):
    """Activations that any format with 0 bits behind the point holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-top, top + 1, shape, generator=generator).float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_a_convolution_in_integers_is_exact_on_exact_activations(options, bits):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(4, 8, **options))
    if net[0].bias is not None:
        net[0].bias.data.mul_(64).round_().div_(64)  # a bias that the sum's step holds
    net[0].weight.data.mul_(0.3)
    packed = frozen(net, bits)
    x = integers((2, 4, 9, 8))
    exact = packed.double()(x.double())
    assert torch.equal(integer_network(packed, fraction=6)(x.double()), exact)
    assert torch.equal(packed.float()(x).double(), exact)  # float32 holds these sums too


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 12), (3, 1, 12), (0, 12)])
def test_a_linear_layer_in_integers_is_exact_on_exact_activations(bits, shape):
    torch.manual_seed(2)
    packed = frozen(nn.Linear(12, 7, bias=False), bits)
    x = integers(shape)
    got = integer_network(packed, fraction=0)(x.double())
    assert torch.equal(got, packed.double()(x.double()))


@pytest.mark.parametrize("fraction", [2, 5, 11])
def test_other_activations_differ_by_their_rounding_only(fraction):
    torch.manual_seed(3)
    packed = frozen(nn.Linear(40, 6))
    x = torch.randn(17, 40)
    tensor = packed.packed.quantized()
    w = exact_weight(tensor)
    bias = packed.bias.double()
    step = 2.0 ** -(fraction + 1)  # half a step of the input
    bias_step = step * float(tensor.scale)
    bound = (step * w.abs().sum(1) + bias_step).expand(17, 6)
    got = integer_network(packed, fraction=fraction)(x.double())
    assert_within(got, F.linear(x.double(), w, bias), bound)
    magnitude = F.linear(x.double().abs(), w.abs(), bias.abs())
    assert_within(got, packed(x).double(), bound + gamma(42) * magnitude)
    assert (got - F.linear(x.double(), w, bias)).abs().max() > 0  # it did round


def test_a_whole_network_is_exact_when_every_activation_is():
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 4, 5),
    )  # fmt: skip
    net[8].bias.data.zero_()
    packed = absorb_batchnorm(frozen(net), rounded=True)
    for norm in (packed[1], packed[5]):
        norm.scale = torch.tensor([0.5, 1.0, -2.0, 0.25] * 2)[: norm.scale.numel()]
        norm.shift = torch.tensor([1.0, -0.5, 3.0, 0.0] * 2)[: norm.shift.numel()]
    x = integers((3, 1, 8, 8)).double()
    exact = packed.double()(x)
    got = integer_network(packed, fraction=24, bits=32)(x)
    assert torch.equal(got, exact)
    assert exact.unique().numel() > 5
    assert not torch.equal(integer_network(packed, fraction=1)(x), exact)


def test_the_integers_of_a_weight_are_its_codes():
    torch.manual_seed(5)
    packed = frozen(nn.Linear(9, 4), bits=3)
    weight = integer_weight(packed.packed)
    assert weight.values.dtype == np.int64
    assert set(np.unique(weight.values)) <= set(range(-3, 4))
    value = torch.from_numpy(np.ldexp(weight.values.astype(float), weight.exponent))
    assert torch.equal(value, packed.weight.double())


def test_channels_of_different_exponents_are_shifted_to_one():
    layer = nn.Linear(6, 3)
    layer.weight.data.mul_(torch.tensor([[1.0], [9.0], [0.1]]))
    sb.prepare(layer, LowRes(levels=3, granularity="channel", scale_domain="power_of_two"))
    packed = sb.pack(sb.freeze(layer), precision="float32")
    assert len(packed.packed.scale.unique()) == 3
    weight = integer_weight(packed.packed)
    value = torch.from_numpy(np.ldexp(weight.values.astype(float), weight.exponent))
    assert torch.equal(value, packed.weight.double())


def test_rounding_is_half_up_and_saturates():
    x = np.array([0.124, 0.125, -0.125, -0.126, 1e9, -1e9])
    fixed = to_fixed_point(x, fraction=2, bits=4)
    assert fixed.values.tolist() == [0, 1, 0, -1, 7, -8]
    assert fixed.to_float().tolist() == [0, 0.25, 0, -0.25, 1.75, -2]


def test_what_cannot_be_run_is_named():
    layer = nn.Sequential(nn.Linear(4, 4))
    sb.prepare(layer, LowRes(levels=5))
    with pytest.raises(SubbyteError, match=r"layer '0'.*not fixed point"):
        integer_network(sb.pack(sb.freeze(layer)))
    table = frozen(nn.Sequential(nn.Embedding(4, 4)))
    with pytest.raises(SubbyteError, match=r"layer '0' \(PackedEmbedding\) has no integer run"):
        integer_network(table)
    mirror = frozen(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")))
    with pytest.raises(SubbyteError, match=r"layer '0' \(PackedConv2d\)"):
        integer_network(mirror)
    with pytest.raises(SubbyteError, match="NaN or infinite"):
        integer_network(frozen(nn.Linear(2, 2)))(torch.tensor([[1.0, float("nan")]]).double())
    for options, says in (({"bits": 1}, "bits=1"), ({"fraction": 99}, "fraction=99")):
        with pytest.raises(SubbyteError, match=says):
            integer_network(frozen(nn.Linear(2, 2)), **options)(torch.ones(1, 2).double())
