"""Scales per group of inputs: grid, codes, solvers, file, modules."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import subbyte as sb
from subbyte.core.functional import decode, encode, fake_quantize, in_groups, n_groups, spread
from subbyte.core.grids import Grid, PerGroup, ScaleDomain, uniform
from subbyte.core.rtn import COARSE, rtn
from subbyte.core.sites import sites
from subbyte.core.tensors import QuantizedTensor
from subbyte.errors import SubbyteError
from subbyte.ptq.evidence.statistics import Statistics
from subbyte.ptq.plan.search import Layer, grouped_options, sampled_rows
from subbyte.ptq.solvers.codes import gptq, quick_errors, row_errors

SHAPES = [(5, 16), (3, 18), (4, 5, 3, 3), (7, 130), (2, 4)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def grid_of(levels, size, domain=ScaleDomain.FLOAT32):
    return uniform(levels, PerGroup(size), domain)


def by_loop(codes, scale, grid):
    """levels[code] * scale in float64, one weight at a time."""
    size = grid.granularity.size
    matrix = codes.reshape(len(codes), -1)
    per_row = -(-matrix.shape[1] // size)
    found = torch.zeros(matrix.shape, dtype=torch.float64)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            level = grid.levels[int(matrix[i, j])]
            found[i, j] = level * float(scale[i * per_row + j // size])
    return found.reshape(codes.shape)


# ---------------------------------------------------------------- the grid


@given(size=st.integers(-8, 300))
def test_a_group_is_a_multiple_of_4(size):
    if size >= 4 and size % 4 == 0:
        grid = grid_of(3, size)
        assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid
        assert grid.to_dict()["group"] == size
    else:
        with pytest.raises(SubbyteError, match=f"PerGroup size is {size}; give a multiple of 4"):
            PerGroup(size)


def test_other_grids_say_nothing_of_groups():
    assert set(uniform(3).to_dict()) == {"levels", "channel_axis", "scale_domain"}
    both = {**grid_of(3, 8).to_dict(), "channel_axis": 0}
    with pytest.raises(SubbyteError, match="channel_axis 0 and group 8; give one"):
        Grid.from_dict(both)
    for size in (True, 8.0, "8", 2**30, [8]):
        with pytest.raises(SubbyteError, match="PerGroup size"):
            Grid.from_dict({**grid_of(3, 8).to_dict(), "group": size})
    with pytest.raises(SubbyteError, match="without dimensions"):
        n_groups((), grid_of(3, 8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [4, 8, 64])
@pytest.mark.parametrize("levels", [2, 3, 16])
def test_codes_mean_what_a_loop_says(shape, size, levels):
    grid = grid_of(levels, size)
    codes = torch.randint(levels, shape, generator=generator(), dtype=torch.uint8)
    width = math.prod(shape[1:])
    assert n_groups(shape, grid) == shape[0] * -(-width // size)
    scale = torch.rand(n_groups(shape, grid), generator=generator(1)) + 0.1
    found = decode(codes, scale, grid)
    # One rounding of the level and one of the product: 2^-24 each.
    exact = by_loop(codes, scale, grid)
    assert ((found.double() - exact).abs() <= 2**-22 * exact.abs()).all()
    assert torch.equal(encode(found, scale, grid), codes)
    w = torch.randn(shape, generator=generator(2))
    assert torch.equal(fake_quantize(w, scale, grid), decode(encode(w, scale, grid), scale, grid))


def test_the_last_group_of_a_row_is_a_group_of_its_own():
    grid = grid_of(3, 4)
    w = torch.tensor([[1.0, 1, 1, 1, 9, 9], [2.0, 2, 2, 2, 5, 5]])
    assert in_groups(w, 4).tolist() == [[1, 1, 1, 1], [9, 9, 0, 0], [2, 2, 2, 2], [5, 5, 0, 0]]
    assert spread(torch.tensor([1.0, 2, 3, 4]), w.shape, grid).tolist() == [
        [1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 4, 4],
    ]  # fmt: skip
    found = rtn(w, None, grid)
    assert torch.allclose(found.dequantize(), w, rtol=1e-6)


# ---------------------------------------------------------------- solvers


def problem(rows=12, width=40, seed=0):
    g = generator(seed)
    mix = torch.randn(width, width, generator=g)
    x = torch.randn(500, width, generator=g) @ mix / width**0.5
    w = torch.randn(rows, width, generator=g) * (1 + 4 * torch.rand(width, generator=g))
    return w, (x.double().t() @ x.double() / len(x))[None]


@pytest.mark.parametrize("levels", [2, 3, 5, 16])
def test_groups_never_lose_and_gptq_is_never_worse_than_rounding(levels):
    w, gram = problem()
    grid = grid_of(levels, 8)
    rounded, solved = rtn(w, gram, grid), gptq(w, gram, grid)
    a, b = (row_errors(w - q.dequantize(), gram) for q in (rounded, solved))
    assert b.sum() < a.sum()
    wide = gptq(w, gram, uniform(levels, sb.PerChannel(0)))
    assert b.sum() < row_errors(w - wide.dequantize(), gram).sum()


def test_scales_of_a_row_are_fitted_together():
    """With the right codes, the scales come out as they were, though the groups are correlated."""
    from subbyte.ptq.solvers.codes import _refit, damped

    w, gram = problem(rows=6, width=22)
    grid = grid_of(5, 8)
    codes = torch.randint(5, w.shape, generator=generator(4), dtype=torch.uint8)
    true = torch.rand(18, generator=generator(5)) + 0.5
    matrix = decode(codes, true, grid)
    found = _refit(matrix, codes, torch.ones(18), damped(gram), grid)
    assert torch.allclose(found, true, rtol=1e-4)


def test_metrics_of_several_groups_of_channels_keep_apart():
    """Two groups of rows, each with a metric of its own, as a grouped convolution has."""
    (w, gram), (v, other) = problem(seed=1), problem(seed=2)
    grid = grid_of(4, 8)
    both = gptq(torch.cat([w, v]), torch.cat([gram, other]), grid)
    alone = gptq(v, other, grid)
    assert torch.equal(both.codes[len(w) :], alone.codes)
    assert torch.equal(both.scale[len(both.scale) // 2 :], alone.scale)


@pytest.mark.parametrize("levels", [2, 3, 16])
@pytest.mark.parametrize("size", [None, 8, 16])
def test_quick_errors_are_those_of_one_pass(levels, size):
    w, gram = problem()
    w = w.half().float()
    found = quick_errors(w, gram, [(levels, size), (5, 4)])[0]
    from subbyte.ptq.solvers.codes import _compensate, _ordered_factors, damped, matrix_grid

    grid = matrix_grid(w, levels, size)
    start = rtn(w, gram, grid, COARSE)
    codes = _compensate(w, start.scale[None], grid, _ordered_factors(damped(gram)))[0]
    exact = row_errors(w - decode(codes, start.scale, grid), damped(gram))
    assert torch.allclose(found, exact, rtol=1e-2)


def test_some_rows_stand_for_all():
    effect = torch.rand(1000, generator=generator(), dtype=torch.float64) ** 4
    rows, weights = sampled_rows(effect, 1000)
    assert len(rows) == len(rows.unique()) == 128
    assert float(weights.sum()) == pytest.approx(float(effect.sum()))
    few = sampled_rows(effect[:20], 20)
    assert torch.equal(few[0], torch.arange(20))
    assert torch.equal(few[1], effect[:20])


def test_smaller_groups_cost_more_and_lose_less():
    w, gram = problem(rows=64, width=512)
    site = sites(nn.Sequential(nn.Linear(512, 64)))[0]
    layer = Layer(site, w, 1, Statistics(gram, 5000), torch.ones(64, dtype=torch.float64))
    found = grouped_options(layer, [3, 16], [None, 128, 32])
    for own in (found[:3], found[3:]):
        assert [o.group for o in own] == [None, 128, 32]
        assert own[0].n_bytes < own[1].n_bytes < own[2].n_bytes
        assert own[0].loss > own[2].loss


# ---------------------------------------------------------------- networks and files


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 24)
        self.body = nn.Sequential(nn.Linear(24, 70), nn.ReLU(), nn.Linear(70, 24))
        self.conv = nn.Conv1d(24, 24, 3, groups=3)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, ids):
        x = self.body(self.embed(ids))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.head(x.mean(1))


IDS = torch.randint(40, (64, 9), generator=torch.Generator().manual_seed(1))


def quantized(**options):
    options = {"levels": 16, "group": 8, "tune": 0, **options}
    return sb.quantize(Net().eval(), sb.CoRa(**options), calibration=[IDS])


def test_a_network_with_groups_is_saved_and_loaded_to_the_bit(tmp_path):
    done = quantized(tune=5)
    grouped = {n for n, x in done.layers.items() if isinstance(x.weight.grid.granularity, PerGroup)}
    assert grouped >= {"embed", "body.0", "body.2", "head", "attention.in_proj"}
    net = sb.pack(done)
    path = tmp_path / "net.safetensors"
    sb.save(net, path, example=IDS[:2])
    for again in (sb.load(path), sb.load(path, Net())):
        assert torch.equal(again(IDS), net(IDS))
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["subbyte"])
    assert manifest["version"] == 2
    plain = sb.pack(sb.quantize(Net().eval(), sb.CoRa(levels=16, tune=0), calibration=[IDS]))
    sb.save(plain, path)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["subbyte"])["version"] == 1


def test_packed_layers_compute_with_the_weights_that_were_found():
    done = quantized()
    net = sb.pack(done, precision="float32").double()
    twin = Net().eval()
    twin.load_state_dict(done.model.state_dict())
    with torch.no_grad():
        for site in sites(twin):
            weight = getattr(twin.get_submodule(site.owner), site.parameter)
            weight.copy_(done.layers[site.name].dequantize(site.channel_axis))
    twin = twin.double()
    # Kernels and float32 weights: a few roundings of sums of at most 72 values.
    assert torch.allclose(net(IDS).double(), twin(IDS), atol=1e-4)


def test_every_scale_is_counted():
    done = quantized()
    layer = done.layers["body.2"].weight
    assert layer.grid.scale_domain is ScaleDomain.FLOAT16
    assert len(layer.scale) == 24 * 9
    assert layer.n_bytes == 8 * -(-24 * 70 // 16) + 2 * 24 * 9


def test_the_search_chooses_groups_within_the_budget():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 128)).eval()
    with torch.no_grad():
        net[0].weight[:, :64] *= 8  # columns of other sizes: one scale per row suits them badly
    x = torch.randn(600, 256)
    x[:, :64] /= 8
    done = sb.quantize(net, sb.CoRa(target_bits=3.5, tune=0), calibration=[x])
    assert done.layer_bits_per_weight <= 3.5
    assert {layer.group for layer in done.plan.layers} & {32, 64, 128}


def test_a_plan_keeps_groups(tmp_path):
    done = quantized()
    done.plan.save(tmp_path / "plan.json")
    plan = sb.Plan.load(tmp_path / "plan.json")
    assert plan == done.plan
    again = sb.quantize(Net().eval(), sb.CoRa(levels=4, tune=0), calibration=[IDS], plan=plan)
    for name, layer in done.layers.items():
        assert torch.equal(again.layers[name].weight.codes, layer.weight.codes)
        assert again.layers[name].weight.grid == layer.weight.grid


def test_a_grouped_batchnorm_network_fuses():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
    net[1].running_var.uniform_(0.5, 2)
    x = torch.randn(8, 8, 9, 9)
    done = sb.quantize(net, sb.CoRa(levels=8, group=24, tune=0), calibration=[x], task="regression")
    packed = sb.pack(done, precision="float32")
    assert torch.allclose(sb.fuse(packed)(x), packed(x), atol=1e-4)


def test_scales_that_do_not_fit_are_refused():
    codes = torch.zeros(4, 10, dtype=torch.uint8)
    with pytest.raises(SubbyteError, match=r"this grid need \(12,\)"):
        QuantizedTensor(codes, torch.ones(4), grid_of(3, 4))
    with pytest.raises(SubbyteError, match="multiple of 4"):
        sb.CoRa(levels=4, group=6)
    with pytest.raises(SubbyteError, match="one scale per tensor"):
        sb.CoRa(levels=4, group=8, codes="k-sigma")
