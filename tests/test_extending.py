"""What CONTRIBUTING says it takes to add one of each, done from outside of the package."""

import dataclasses

import torch
from torch import nn

import subbyte as sb
from subbyte.core.functional import mean_abs_scale, straight_through
from subbyte.core.grids import PerChannel, uniform
from subbyte.core.rtn import rtn
from subbyte.core.sites import CHANNEL_AXIS
from subbyte.core.tensors import QuantizedTensor
from subbyte.methods import METHODS
from subbyte.methods.base import WeightQuantizer
from subbyte.models import NETWORKS, build
from subbyte.models.base import Network, image_spec
from subbyte.models.preprocess import centred
from subbyte.modules.build import PACKED
from subbyte.modules.weight import PackedWeight, frozen_bias, take_attributes
from subbyte.ptq.solvers import SOLVERS
from subbyte.tasks import TASKS, Task

# ---------------------------------------------------------------- a training method


@dataclasses.dataclass(frozen=True)
class Signs:
    """Two levels, -s and s, with s the mean of |w| (arXiv:1603.05279 without its activations)."""

    def quantizer(self, w, site):
        return SignsQuantizer()


class SignsQuantizer(WeightQuantizer):
    def forward(self, w):
        return straight_through(w, self.quantize(w.detach()).dequantize())

    def quantize(self, w):
        grid = uniform(2)
        return QuantizedTensor((w >= 0).to(torch.uint8), mean_abs_scale(w, grid), grid)


def test_a_training_method(monkeypatch):
    monkeypatch.setitem(METHODS, "signs", Signs)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    sb.prepare(net, METHODS["signs"]())
    net(torch.randn(4, 6)).sum().backward()
    weight = net[0].parametrizations.weight.original
    assert weight.grad.abs().sum() > 0
    packed = sb.pack(sb.freeze(net))
    x = torch.randn(5, 6)
    assert torch.allclose(packed(x), net(x), atol=0.05 * float(net(x).abs().max()))
    assert packed[0].packed.grid.n_levels == 2


# ---------------------------------------------------------------- a solver


@dataclasses.dataclass(frozen=True)
class Coarse:
    """Nearest levels, whatever the inputs."""

    compensates = False

    def solve(self, matrix, gram, levels, group=None):
        return rtn(matrix, None, uniform(levels, PerChannel(0)))


def test_a_solver(monkeypatch):
    monkeypatch.setitem(SOLVERS, "coarse", Coarse)
    torch.manual_seed(0)
    net = nn.Linear(6, 4)
    x = torch.randn(40, 6)
    done = sb.quantize(net, sb.CoRa(levels=4, codes="coarse", tune=0), calibration=[x])
    expected = rtn(net.weight.detach(), None, uniform(4, PerChannel(0)))
    assert torch.equal(done.layers[""].weight.codes, expected.codes)


# ---------------------------------------------------------------- a task


class Largest(Task):
    """Networks of which only the largest value counts."""

    name = "largest"

    def outputs(self, y, batch):
        return y.amax(-1)

    def distance(self, y, wanted):
        return (y - wanted).square()


def test_a_task(monkeypatch):
    monkeypatch.setitem(TASKS, "largest", Largest)
    torch.manual_seed(0)
    net = nn.Linear(6, 4)
    done = sb.quantize(
        net, sb.CoRa(levels=4, tune=5), calibration=[torch.randn(40, 6)], task="largest"
    )
    assert done.evidence.task == "largest"
    assert done.evidence.agreement is None


# ---------------------------------------------------------------- a network


class Tiny(Network):
    def __init__(self, *, in_channels=3, image_size=8, classes=4):
        spec = image_spec("tiny", in_channels=in_channels, image_size=image_size, classes=classes)
        super().__init__(spec, centred(in_channels, image_size), classes)
        self.head = nn.Linear(in_channels * image_size**2, classes)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_a_network(monkeypatch, tmp_path):
    monkeypatch.setitem(NETWORKS, "tiny", Tiny)
    net = build("tiny", image_size=4)
    x = net.preprocess(torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8))
    packed = sb.pack(sb.quantize(net, sb.CoRa(levels=4, tune=0), calibration=[x]))
    sb.save(packed, tmp_path / "net.safetensors")
    assert torch.equal(sb.load(tmp_path / "net.safetensors")(x), packed(x))


# ---------------------------------------------------------------- a packed layer


class Scaled(nn.Module):
    """A layer of a kind that the package does not know: y = x * weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 1))

    def forward(self, input):
        return input * self.weight[:, 0]


class PackedScaled(nn.Module):
    def __init__(self, like, layer):
        super().__init__()
        take_attributes(self, like)
        self.bias = frozen_bias(layer.bias)
        self.packed = PackedWeight(layer)

    def forward(self, input):
        return input * self.packed()[:, 0]


def test_a_packed_layer(monkeypatch, tmp_path):
    monkeypatch.setitem(PACKED, Scaled, PackedScaled)
    monkeypatch.setitem(CHANNEL_AXIS, Scaled, 0)
    torch.manual_seed(0)
    net = nn.Sequential(Scaled(6), nn.Linear(6, 4))
    x = torch.randn(40, 6)
    done = sb.quantize(net, sb.CoRa(levels=16, tune=0), calibration=[x])
    assert set(done.layers) == {"0", "1"}
    packed = sb.pack(done)
    assert isinstance(packed[0], PackedScaled)
    sb.save(packed, tmp_path / "net.safetensors")
    assert torch.equal(sb.load(tmp_path / "net.safetensors", net)(x), packed(x))
