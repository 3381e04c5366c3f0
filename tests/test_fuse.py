"""Fused networks compute what the packed ones compute, in fewer passes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from subbyte.core.tensors import LowRank, QuantizedLayer
from subbyte.modules import PackedConv2d

EPS = 2.0**-24


class Block(nn.Module):
    """A residual block with everything that can be fused, and a head."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down, self.bn3 = nn.Conv2d(8, 16, 1, stride=2), nn.BatchNorm2d(16)
        self.depth, self.bn4 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.relu6, self.linear = nn.ReLU6(), nn.Linear(16, 10)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=self.in_place)
        y, z = self.bn2(self.conv2(y)), self.bn3(self.down(x))
        if self.in_place:
            y += z
        else:
            y = z + y
        y = self.relu6(self.bn4(self.depth(y.relu_() if self.in_place else torch.relu(y))))
        return self.linear(y.mean((2, 3))).relu()


def packed(model, method=None, **options):
    """With weights and norms that are not at their start, so that nothing is trivially right."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    sb.prepare(model, method or sb.LowRes(levels=3))
    return sb.pack(sb.freeze(model), **options)


def operations(net):
    return [str(node.target) for node in net.graph.nodes if node.op.startswith("call")]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("method", [sb.LowRes(levels=5), sb.SGM(bits=2)], ids=str)
@pytest.mark.parametrize("batchnorm", ["keep", "absorb"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_fused_network_computes_the_same(in_place, method, batchnorm, layout):
    torch.manual_seed(0)
    net = packed(Block(in_place), method, batchnorm=batchnorm, precision="float32")
    fused = sb.fuse(net)
    assert operations(fused) == ["conv1", "down", "conv2", "depth", "mean", "linear"]
    x = torch.randn(3, 8, 9, 9).contiguous(memory_format=layout)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == (
        batchnorm == "keep"
    )  # the network itself stays


@pytest.mark.parametrize("precision", ["int8", "int16"])
@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_layer_differs_by_float32_rounding_only(precision, groups, layout):
    torch.manual_seed(groups)
    like = nn.Sequential(nn.Conv2d(16, 32 if groups < 16 else 16, 3, groups=groups), nn.BatchNorm2d(
        32 if groups < 16 else 16), nn.ReLU())  # fmt: skip
    net = packed(like, precision=precision)
    fused = sb.fuse(net)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=layout)
    products, norm = net[0], net[1]
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None].abs()
    weight = products.packed().abs()
    reach = F.conv2d(x.abs(), weight, products.bias.abs(), groups=groups)
    bound = 32 * EPS * (gain * (reach + norm.running_mean.abs()[:, None, None])
                        + norm.bias.abs()[:, None, None])  # fmt: skip
    got, wanted = fused(x), net(x)
    assert ((got - wanted).abs() <= bound).all()
    assert (got == 0).any()
    assert (got > 0).any()


def test_adapters_are_scaled_with_their_weight():
    torch.manual_seed(0)
    like = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)).eval()
    nn.init.normal_(like[1].weight)
    sb.prepare(like, sb.LowRes(levels=3))
    (name, layer), *_ = sb.freeze(like).layers.items()
    adapter = LowRank(torch.randn(16, 2).half(), torch.randn(2, 72).half(), torch.rand(2) + 0.5)
    layer = QuantizedLayer(layer.weight, layer.bias, adapter)
    net = sb.pack(sb.Quantized(like, {name: layer}), precision="float32")
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(sb.fuse(net)(x), net(x), rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    """What lies between is read by something else."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Shared(nn.Module):
    """One layer, two norms."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.b(self.conv(self.a(self.conv(x))))


class Overwritten(nn.Module):
    """The product's input changes before the sum."""

    def __init__(self, write):
        super().__init__()
        self.conv, self.write = nn.Conv2d(8, 8, 1), write

    def forward(self, x):
        x = x + 0
        y = self.conv(x)
        return y + self.write(x)


WRITES = [
    lambda x: x.mul_(2), lambda x: x.__iadd__(1), lambda x: torch.ops.aten.add_.Tensor(x, x),
    lambda x: F.relu(x, True), lambda x: F.hardtanh(x, -1, 1, inplace=True),
    lambda x: torch.add(x, x, out=x), lambda x: torch.sigmoid_(x),
]  # fmt: skip


@pytest.mark.parametrize("make", [Twice, Shared, *(lambda w=w: Overwritten(w) for w in WRITES)])
def test_what_something_else_reads_stays(make):
    torch.manual_seed(0)
    net = packed(make(), precision="float32")
    fused = sb.fuse(net)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-5)
    assert len(operations(fused)) == (3 if make is Twice else 4)


def test_sums_of_other_shapes_and_without_a_batch():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(8, 16, 1), nn.Linear(8, 16)

        def forward(self, x, shift):
            return torch.relu(self.conv(x) + shift), F.relu(self.linear(x.mT) + shift.flatten())

    torch.manual_seed(0)
    net = packed(Broadcast(), precision="int8")
    fused = sb.fuse(net)
    assert len(operations(fused)) == 4  # two layers, the transposition, flatten
    x, shift = torch.randn(8, 8, 8), torch.randn(16, 1, 1)
    for got, wanted in zip(fused(x, shift), net(x, shift), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_reach_both_terms_of_a_sum():
    torch.manual_seed(0)
    net = packed(Block(False), precision="int16")
    fused = sb.fuse(net)
    x = torch.randn(2, 8, 8, 8)
    grads = []
    for model in (net, fused):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(
        grads[1], grads[0], rtol=1e-2, atol=1e-3 * float(grads[0].abs().max())
    )


class Residual(nn.Module):
    """Sums of what may not be finite, after odd numbers of channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(5, 45, 3, padding=1), nn.BatchNorm2d(45)
        self.linear = nn.Linear(45, 37)

    def forward(self, x, y, z):
        y = torch.relu(self.bn(self.conv(x)) + y)
        return y, F.relu6(z + self.linear(y.mean((2, 3))))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["int8", "int16", "float32"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_sums_in_the_core_with_values_that_may_not_be_finite(bad, precision, layout):
    torch.manual_seed(0)
    net = packed(Residual(), precision=precision)
    fused = sb.fuse(net)
    assert operations(fused) == ["conv", "mean", "linear"]
    x, y, z = torch.randn(3, 5, 6, 7), torch.randn(3, 45, 6, 7), torch.randn(3, 37)
    x[1, 2, 3, 3] += bad
    x, y = x.contiguous(memory_format=layout), y.contiguous(memory_format=layout)
    got, wanted = fused(x, y, z), net(x, y, z)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=1e-4, equal_nan=True)
    direct = F.relu6(z + net.linear(got[0].mean((2, 3))))  # the same rounding as fused
    torch.testing.assert_close(got[1], direct, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert bool(wanted[0].isfinite().all()) == (bad == 0)
    for empty, full in zip(fused(x[:0], y[:0], z[:0]), got, strict=True):
        assert empty.shape == (0, *full.shape[1:])


def test_a_sum_may_have_a_number_or_a_tensor_of_another_type():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Conv2d(8, 16, 1)

        def forward(self, x, z):
            return self.a(x.mT) + x.shape[0], self.b(x) + z

    torch.manual_seed(0)
    for precision in ("int8", "float32"):
        net = packed(Sums(), precision=precision)
        fused, x = sb.fuse(net), torch.randn(8, 8, 8)
        for z in (torch.randn(16, 8, 8).double(), torch.randn(1, 8, 8).half()):
            for got, wanted in zip(fused(x, z), net(x, z), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises((RuntimeError, NotImplementedError)):
            fused(x, torch.zeros(16, 8, 8, device="meta")).sum().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_networks_of_other_types(dtype, bias):
    torch.manual_seed(0)
    like = nn.Sequential(nn.Conv2d(8, 16, 3, bias=bias), nn.BatchNorm2d(16), nn.ReLU())
    net = packed(like, precision="float32").to(dtype)
    x = torch.randn(2, 8, 6, 6, dtype=dtype)
    loose = 0.1 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(sb.fuse(net)(x), net(x), rtol=loose, atol=loose)


def test_fusing_again_changes_nothing():
    class More(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.bn = inner, nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(self.bn(self.inner(x)) + x)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x) + x))

    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5)
    first = packed(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.BatchNorm2d(8)),
                   precision="float32")  # fmt: skip
    second = packed(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU6(), nn.ReLU()), precision="float32")
    for net in (first, second, packed(Sum(), precision="float32")):
        fused = sb.fuse(net)
        again, outer = sb.fuse(fused), More(fused).eval()
        outer.bn.running_mean.normal_()
        torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(x), net(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sb.fuse(outer)(x), outer(x), rtol=1e-5, atol=1e-5)
    alone = packed(nn.Sequential(nn.Linear(4, 4)))[0]
    assert torch.equal(sb.fuse(alone)(x[0, 0, :2, :4]), alone(x[0, 0, :2, :4]))


class Encoder(nn.Module):
    """A layer called by itself and as a part."""

    def __init__(self):
        super().__init__()
        self.part = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)

    def forward(self, x):
        return F.relu(self.part.linear1(x)) + self.part(x)


class Bias(nn.Module):
    """A layer whose bias is read elsewhere."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x[..., None, None])) + self.conv.bias[:, None, None]


class Optional(nn.Module):
    """An argument that may be left out."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        y = self.linear(x)
        return y if mask is None else y * mask


@pytest.mark.parametrize("kind", [Encoder, Bias, Optional])
def test_layers_that_are_used_in_more_than_one_way(kind):
    torch.manual_seed(0)
    net = packed(kind(), precision="float32")
    x = torch.randn(3, 8) if kind is not Encoder else torch.randn(2, 3, 8)
    torch.testing.assert_close(sb.fuse(net)(x), net(x), rtol=1e-5, atol=1e-5)


def test_hooks_still_see_what_they_saw():
    torch.manual_seed(0)
    net = packed(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    net[2].register_forward_hook(lambda module, args, output: output + 1)
    fused, x = sb.fuse(net), torch.randn(2, 8, 4, 4)
    assert operations(fused) == ["0", "2"]
    torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-5)


def test_it_says_what_it_cannot_do(tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else x

    net = packed(Branches())
    with pytest.raises(sb.SubbyteError, match="cannot trace Branches, so it stays as it is"):
        sb.fuse(net)
    fused = sb.fuse(packed(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    with pytest.raises(sb.SubbyteError, match="the model is fused; give save an input"):
        sb.save(fused, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())
    assert "then relu" in repr(fused)


def test_a_whole_network_of_the_zoo():
    torch.manual_seed(0)
    from subbyte.models import build

    net = packed(build("resnet20"), precision="float32")
    fused = sb.fuse(net)
    left = {type(fused.get_submodule(n.target)) for n in fused.graph.nodes if n.op == "call_module"}
    assert nn.BatchNorm2d not in left
    assert PackedConv2d in left
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [3, 8, 24, 40])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_sums_of_depthwise_pixels_taken_together(channels, layout):
    """Neighbouring pixels share vectors; what is added to them is their own."""
    torch.manual_seed(channels)
    net = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
    layer, x = packed(net)[0], torch.randn(2, channels, 9, 37).contiguous(memory_format=layout)
    plus = torch.randn_like(x)
    wanted = (layer(x) + plus).relu()  # the core adds in this order, too
    layer.activation = "relu"
    assert torch.equal(layer(x, plus), wanted)
