"""Conv1D of `transformers` (GPT-2): quantized as a linear layer, loaded into its own class.

The class here is written anew; `test_zoo_ptq.py` has GPT-2 itself.
"""

import copy

import pytest
import torch
from torch import nn

import subbyte as sb
from subbyte import CoRa
from subbyte.core.as_linear import is_conv1d
from subbyte.ptq.entrance import float_twin

pytest.importorskip("subbyte._native", reason="the C++ core was not built")

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).reshape(
            *x.shape[:-1], self.nf
        )


def network(seed=0):
    """A wide layer, a square one, and one that is used twice."""
    torch.manual_seed(seed)
    shared = Conv1D(12, 12)
    return nn.Sequential(Conv1D(12, 8), nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(12, 3))


def quantized(net, *rules):
    method = CoRa(levels=16, tune=0)
    recipe = sb.Recipe((*rules, sb.Rule(method=method))) if rules else method
    return sb.quantize(net, recipe, calibration=[X])


def test_every_conv1d_is_a_packed_linear_layer_with_the_transposed_weight():
    net = network()
    done = quantized(net)
    assert set(done.layers) == {"0", "2", "5"}
    assert {p.name for p in done.parameters if p.levels} == {"0.weight", "2.weight", "5.weight"}
    assert is_conv1d(net[0])  # what was given stays
    assert not any("no input statistics" in note for note in done.notes)
    for name, layer in done.layers.items():
        w = getattr(net, name).weight.detach()
        w = w if name == "5" else w.t()
        error = (layer.weight.dequantize() - w).norm() / w.norm()
        assert error < 0.2, name
    assert done.model[2] is done.model[4]


def test_the_twin_computes_what_conv1d_computes():
    net = network().double()
    x = torch.randn(5, 7, 8, dtype=torch.float64)
    twin = float_twin(net)
    assert not any(is_conv1d(module) for module in twin.modules())
    # two products of at most 12 terms, each rounded at most once a step, through tanh (slope <= 1)
    y, wanted = twin.double()(x), net(x)
    assert torch.allclose(y, wanted, rtol=0, atol=1e-4)
    assert torch.equal(twin[0].weight.float(), net[0].weight.t().float())


def test_a_network_that_is_one_conv1d():
    done = quantized(Conv1D(6, 8))
    assert isinstance(done.model, nn.Linear)
    assert sb.pack(done)(X).shape == (64, 6)


@pytest.mark.parametrize("kept", [None, "0", "2"])
def test_a_file_loads_into_the_networks_own_class(kept, tmp_path):
    """Also with a square layer kept float, whose transpose would load as well."""
    rules = () if kept is None else (sb.Rule(kept),)
    done = quantized(network(), *rules)
    packed = sb.pack(done)
    sb.save(packed, tmp_path / "net.safetensors", example=X[:2])
    like = network(seed=5)
    before = copy.deepcopy(like.state_dict())
    for opened in (
        sb.load(tmp_path / "net.safetensors", like),
        sb.load(tmp_path / "net.safetensors"),
    ):
        assert torch.equal(opened(X), packed(X))
    assert all(torch.equal(value, before[name]) for name, value in like.state_dict().items())
    if kept is not None:
        reasons = {p.name: p.reason for p in done.parameters}
        assert "recipe or the plan" in reasons[f"{kept}.weight"]
        state = sb.load(tmp_path / "net.safetensors", like).state_dict()
        assert torch.equal(state[f"{kept}.weight"], getattr(network(), kept).weight)


def test_layers_of_the_twin_pack_onto_the_network_that_was_given():
    net = network()
    done = quantized(net)
    ours, theirs = sb.pack(done)[0].state_dict(), sb.pack(net, done.layers)[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert is_conv1d(net[0])


class Scaled(Conv1D):
    """Another class of another name."""

    def forward(self, x):
        return 2 * super().forward(x)


class Masked(Conv1D):
    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("mask", torch.ones(8))


Masked.__name__ = "Conv1D"


def test_what_only_looks_like_one_stays_float():
    assert is_conv1d(Conv1D(3, 4))
    assert not is_conv1d(Scaled(3, 4))
    assert not is_conv1d(Masked())
    assert not is_conv1d(nn.Conv1d(3, 4, 1))
