"""The tuning step by step: what is drawn, what is minimized, how fast, and what is kept of it."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import subbyte as sb
from subbyte.core.ready import copied
from subbyte.core.sites import bias_of, sites
from subbyte.core.tensors import LowRank, as_matrix
from subbyte.ptq.solvers import SOLVERS, weight_of
from subbyte.ptq.solvers.lowrank import Metric, fit_adapter
from subbyte.ptq.steps import tune as tuning
from subbyte.ptq.steps.tune import LR, _balanced, _draw, _learning, _read, _Weight, tune
from subbyte.tasks import Classification


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


def quantized(net, levels=4, rank=2, bits=16, codes="rtn"):
    layers = {}
    for site in sites(net):
        owner = net.get_submodule(site.owner)
        matrix = as_matrix(owner.weight.detach(), site.channel_axis)
        groups = getattr(owner, "groups", 1)
        solved = SOLVERS[codes]().solve(matrix, None, levels)
        adapter = None
        if rank:
            error, plain = matrix - solved.dequantize(), Metric(None, None, groups, matrix.shape[1])
            adapter = fit_adapter(error, plain, rank, bits)
        layers[site.name] = sb.QuantizedLayer(weight_of(solved, site), bias_of(net, site), adapter)
    return sb.Quantized(net, layers)


def learning(start):
    """The student of a tuning that has not begun, its weights, and the sites."""
    own = {site.name: site for site in sites(start.model)}
    student = copied(start.model)
    return student, _learning(student, start.layers, own), own


# ---------------------------------------------------------------- what is drawn


def test_every_example_is_drawn_once_before_any_is_drawn_again():
    x = torch.arange(96.0)[:, None]
    drawn = [batch.flatten().tolist() for batch in _draw(x, 9, Classification(), generator())]
    assert [len(batch) for batch in drawn] == [32] * 9
    for epoch in (drawn[:3], drawn[3:6], drawn[6:]):
        assert sorted(value for batch in epoch for value in batch) == x.flatten().tolist()
    assert len({tuple(batch) for batch in drawn}) == 9
    few = [batch.flatten().tolist() for batch in _draw(x[:40], 2, Classification(), generator())]
    assert len(set(few[0])) == len(set(few[1])) == 32  # 8 are left over, too few for a batch


def test_every_other_batch_of_images_is_blended_in_pairs():
    """Images of one value each, which mirrors and shifts leave in the middle."""
    values = 1 + torch.arange(64.0)
    x = values[:, None, None, None].expand(-1, 2, 8, 8)
    for i, batch in enumerate(_draw(x, 6, Classification(), generator())):
        middle = batch[:, :, 3:5, 3:5].flatten(1)
        assert torch.allclose(middle, middle[:, :1].expand_as(middle), rtol=1e-5)
        pure = torch.isin(middle[:, 0], values)
        assert bool(pure.all()) if not i % 2 else int(pure.sum()) <= 1
        assert values.min() <= middle.min() <= middle.max() <= values.max()


def test_images_are_mirrored_and_shifted():
    x = torch.arange(64.0).reshape(1, 1, 8, 8).expand(32, -1, -1, -1)
    batch = next(iter(_draw(x, 1, Classification(), generator())))
    rows = batch[:, 0, 4, 2:6]
    rising = (rows[:, 1:] > rows[:, :-1]).all(1)
    assert 4 < int(rising.sum()) < 28
    assert len({tuple(row) for row in rows.tolist()}) > 4


# ---------------------------------------------------------------- what is minimized, how fast


class Watched(torch.optim.Adam):
    rates = ()

    def step(self, *args, **kwargs):
        Watched.rates.append(self.param_groups[0]["lr"])
        return super().step(*args, **kwargs)


def relative(a, b):
    return float((a - b).double().square().sum() / b.double().square().sum())


def test_the_first_loss_and_all_rates_are_those_of_the_formulas(monkeypatch):
    """Of 32 flat examples every batch is all of them, so that the sums can be written down."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).eval()
    x = torch.randn(32, 12)
    start = quantized(net, levels=3, rank=0)
    monkeypatch.setattr(Watched, "rates", [])
    monkeypatch.setattr(torch.optim, "Adam", Watched)
    losses = []
    tune(start, net, x, 8, Classification(), generator(), step=lambda i, loss: losses.append(loss))
    rough = sb.pack(start, precision="float32")
    with torch.no_grad():
        y, target, hidden = rough(x), net(x), net[:2](x)
        inner = relative(rough[:2](x), hidden)
    apart = (0 + inner + relative(y, target)) / 3  # inputs of both layers, and the logits
    p, q = (target.double() / 4).log_softmax(-1), (y.double() / 4).log_softmax(-1)
    divergence = 16 * float((p.exp() * (p - q)).sum(-1).mean())
    assert losses[0] == pytest.approx(divergence + apart, rel=1e-4)
    assert Watched.rates == pytest.approx(
        [LR * math.sqrt(apart) * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)], rel=1e-4
    )
    assert min(losses[-3:]) < losses[0]


# ---------------------------------------------------------------- what learns, what is kept


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("codes", SOLVERS)
def test_the_student_starts_as_the_quantized_network(rank, codes):
    start = quantized(network(), rank=rank, codes=codes)
    student, _, _ = learning(start)
    x = torch.randn(4, 3, 6, 6)
    wanted = sb.pack(start, precision="float32")(x)
    torch.testing.assert_close(student(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("codes", SOLVERS)
def test_what_was_learnt_is_what_is_kept(rank, codes):
    """Scales, factors, biases and norms moved at random: the result computes what the student does,
    but for how they are stored (float16 scales and factors: 2^-11 of each)."""
    start = quantized(network(), rank=rank, codes=codes)
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    student, weights, own = learning(start)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if not name.endswith("original"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(7)))
    done = _read(student, start, weights, own)
    x = torch.randn(4, 3, 6, 6)
    wanted, got = student(x).detach(), sb.pack(done, precision="float32")(x)
    first = sb.pack(start, precision="float32")(x)
    assert relative(got, wanted) < 1e-5
    assert relative(first, wanted) > 1e-2
    for name, layer in done.layers.items():
        assert torch.equal(layer.weight.codes, start.layers[name].weight.codes)
        assert not torch.equal(layer.weight.scale, start.layers[name].weight.scale)
    assert not torch.equal(done.model[1].weight, start.model[1].weight)
    assert not torch.equal(done.model[0].bias, start.model[0].bias)
    assert all(torch.equal(v, before[name]) for name, v in start.model.state_dict().items())


def test_a_scale_that_learns_to_be_negative_is_0_in_both():
    start = quantized(network(), rank=0)
    site = sites(start.model)[0]
    weight = _Weight(start.layers[site.name], site)
    with torch.no_grad():
        weight.scale[:2] = torch.tensor([-1.5, 0.25])
    read = weight.read(None)
    assert read.weight.scale[0] == 0
    torch.testing.assert_close(read.dequantize(), weight(torch.empty(0)), rtol=1e-3, atol=0)
    old = start.layers[site.name].weight.scale[1]
    assert float(read.weight.scale[1] / old) == pytest.approx(1.25, rel=1e-3)


def test_factors_start_in_balance_with_the_same_product():
    torch.manual_seed(0)
    adapter = LowRank(torch.randn(6, 3).half(), 1000 * torch.rand(6, 8).half(), torch.rand(6) * 1e3)
    up, down = _balanced(adapter)
    torch.testing.assert_close((up @ down).reshape(6, 8), adapter.product(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(up.norm(dim=1), down.norm(dim=2), rtol=1e-4, atol=0)


def test_matrices_that_stay_float_do_not_learn():
    start = quantized(network())
    few = sb.Quantized(start.model, {"0": start.layers["0"]})
    done = tune(few, start.model, torch.randn(40, 3, 6, 6), 4, Classification(), generator())
    for i in (3, 6):
        assert torch.equal(done.model[i].weight, start.model[i].weight)
    assert not torch.equal(done.model[6].bias, start.model[6].bias)
    assert not any(parametrize.is_parametrized(m) for m in done.model.modules())


def test_rates_and_temperature_are_those_documented():
    assert Classification().temperature == 4.0
    assert tuning.rate(0.5, 0, 10) == LR * 0.5
    assert tuning.rate(0.5, 5, 10) == pytest.approx(LR * 0.25)
    assert tuning.rate(0.5, 10, 10) == pytest.approx(0.0, abs=1e-12)
