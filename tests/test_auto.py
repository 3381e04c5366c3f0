"""precision="auto": the fastest way of the machine, within the error that int8 states."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from subbyte import kernels
from subbyte.bench import bench, table
from subbyte.bench.report import LayerBench, Times
from subbyte.bench.timing import Spread

core = pytest.importorskip("subbyte._native")
EPS = 2.0**-24


def packed(layer, precision="auto"):
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(layer))
    sb.prepare(model, sb.LowRes(levels=3))
    return sb.pack(sb.freeze(model), precision=precision)[0]


@pytest.fixture(autouse=True)
def same_tier_afterwards():
    before = core.tier()
    yield
    core.select_tier(before)


def test_it_is_the_default_everywhere():
    from subbyte.commands.bench import bench as command
    from subbyte.commands.evaluate import evaluate
    from subbyte.storage.pretrained import load_pretrained

    for function in (sb.pack, sb.load, load_pretrained, command, evaluate):
        assert inspect.signature(function).parameters["precision"].default == "auto"


LAYERS = {
    "linear": (nn.Linear(50, 20), lambda n: (n, 50)),
    "conv": (nn.Conv2d(8, 20, 3, padding=1), lambda n: (1, 8, 1, n)),
    "depthwise": (nn.Conv2d(24, 24, 3, padding=1, groups=24), lambda n: (1, 24, 1, n)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("n", [1, 8, 9, 40])
def test_it_is_int8_or_the_float_product_of_the_decoded_weight(name, n):
    like, size = LAYERS[name]
    layer, x = packed(like), torch.randn(size(n))
    with torch.no_grad():
        for tier in core.tiers():
            core.select_tier(tier)
            layer.precision = "int8"
            wanted = layer(x)
            layer.precision = "auto"
            decoded = tier == "portable" and n > 8 and name != "depthwise"
            assert kernels.decodes("auto", n) == (tier == "portable" and n > 8)
            for _ in range(2):  # the long way, and the short one
                assert torch.equal(layer(x), wanted) or decoded
            if decoded:
                assert not torch.equal(layer(x), wanted)
                exact = F.linear if name == "linear" else F.conv2d
                more = {} if name == "linear" else {"padding": 1}
                assert torch.equal(layer(x), exact(x, layer.weight, layer.bias, **more))


def test_its_error_is_within_that_of_int8():
    layer, x = packed(nn.Linear(300, 64)), torch.randn(20, 300)
    weight = layer.weight.double()
    wanted = x.double() @ weight.T + layer.bias.double()
    reach = x.abs().amax(1, keepdim=True).double() * weight.abs().sum(1) + layer.bias.abs()
    for tier in core.tiers():
        core.select_tier(tier)
        error = (layer(x).double() - wanted).abs()
        assert (error <= reach * (0.5 / 127 + 300 * EPS)).all()


def test_whoever_looks_on_sees_the_same_bits():
    layer, x = packed(nn.Linear(50, 20)), torch.randn(30, 50)
    exported = torch.export.export(layer, (x,)).module()
    for tier in core.tiers():
        core.select_tier(tier)
        assert torch.equal(exported(x), layer(x))


def test_bench_says_what_ran_and_what_would_be_faster():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 20, 3), nn.Conv1d(4, 4, 1))
    sb.prepare(net, sb.LowRes(levels=3))
    done = sb.pack(sb.freeze(net[:2]))
    for tier in core.tiers():
        core.select_tier(tier)
        report = bench(done, torch.randn(8, 9, 9), seconds=0.01)
        product = "PyTorch float32, decoded" if tier == "portable" else f"{tier} int8"
        assert [row.ran for row in report.layers] == [f"{tier} float32", product]
        assert report.to_dict()["layers"][0]["ran"] == f"{tier} float32"
        for row in report.layers:
            slower = row.times.float32.median < row.times.packed.median
            assert (row.faster is not None) >= slower
            shown = [column.header for column in table(report).columns]
            assert "ran on" in shown


@pytest.mark.parametrize(
    ("packed_s", "float_s", "narrow_s", "wanted"),
    [
        (1.0, 2.0, None, None),
        (2.0, 1.0, None, "PyTorch float32"),
        (2.0, 1.5, 1.0, "PyTorch bfloat16"),
        (2.0, 3.0, 2.5, None),
    ],
)
def test_what_would_be_faster_is_the_fastest(packed_s, float_s, narrow_s, wanted):
    times = [None if s is None else Spread(s, s, s, 1) for s in (packed_s, float_s, narrow_s)]
    row = LayerBench("a", "Linear", (1, 1), 3, 1, Times(*times), 1, 1, None, None, "avx2 int8")
    assert row.faster == wanted
