"""Layers solved in order: what a later layer makes up for, and what norms and biases take."""

import torch
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from subbyte.core.rtn import rtn
from subbyte.core.sites import sites
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor, as_matrix, as_weight
from subbyte.ptq.evidence.statistics import input_statistics
from subbyte.ptq.plan.search import Layer
from subbyte.ptq.solvers.codes import channel_grid
from subbyte.ptq.solvers.lowrank import Metric, fit_adapter
from subbyte.ptq.steps.in_order import _spans, _stages, solve_in_order


def known(net, x):
    found = input_statistics(net, sites(net), [x])
    return [
        Layer(site, as_matrix(net.get_submodule(site.owner).weight.detach()),
              len(found[site.name].gram), found[site.name], None)
        for site in sites(net)
    ]  # fmt: skip


def nearly(layer, matrix=None):
    """256 levels, of another matrix if there is one."""
    codes = rtn(layer.matrix if matrix is None else matrix, None, channel_grid(256, 0))
    return QuantizedLayer(
        QuantizedTensor(as_weight(codes.codes, layer.site.shape), codes.scale, codes.grid)
    )


def damaging_the_first(damaged):
    return lambda layer: nearly(layer, damaged if layer.site.name == "0" else None)


def test_thinned_patches_stand_for_all():
    """Every position counts alike, those at the edges too: images start at different ones."""
    x = torch.ones(64, 2, 12, 12)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1))
    whole = input_statistics(net, sites(net), [x])["0"]
    thin = input_statistics(net, sites(net), [x], patches=64 * 144 // 4)["0"]
    assert (whole.patches, thin.patches) == (64 * 144, 64 * 36)
    assert torch.allclose(whole.gram, thin.gram, atol=1e-6)
    lines = nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.Linear(5, 2))
    found = input_statistics(lines, sites(lines), [torch.randn(40, 2, 11)], patches=80)
    assert [found[name].patches for name in "01"] == [67, 120]


def test_a_layer_makes_up_for_the_layers_before_it():
    """The second layer comes close to what least squares make of the damaged first one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6)).eval()
    x = torch.randn(2000, 8) + 1
    damaged = 0.7 * net[0].weight.detach() + 0.05 * torch.randn(16, 8)
    done = solve_in_order(
        sb.Quantized(net, {}), known(net, x), damaging_the_first(damaged), x.split(500)
    )
    with torch.no_grad():
        wanted = net(x)
        got = sb.pack(done, precision="float32")(x)
        first = done.layers["0"]
        z = F.linear(x, first.weight.dequantize(), first.bias).relu()
        naive = net[2](z)
        z = torch.cat([z, torch.ones(len(z), 1)], 1)
        best = z @ torch.linalg.lstsq(z, wanted).solution
    loss, worst, least = ((y - wanted).square().mean() for y in (got, naive, best))
    assert loss < 0.5 * worst
    assert loss < 1.1 * least
    assert torch.allclose(got.mean(0), wanted.mean(0), atol=1e-3)
    assert torch.equal(done.model[2].bias, done.layers["2"].bias)


def test_few_images_teach_what_holds_for_others():
    """Fewer vectors than inputs: least squares would learn the damage to these by heart."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 6)).eval()
    damaged = 0.6 * net[0].weight.detach() + 0.1 * torch.randn(48, 8)
    x, new = torch.randn(40, 8), torch.randn(2000, 8)
    done = solve_in_order(sb.Quantized(net, {}), known(net, x), damaging_the_first(damaged), [x])
    with torch.no_grad():
        first = done.layers["0"]

        def hidden(images):
            return F.linear(images, first.weight.dequantize(), first.bias).relu()

        wanted, got = net(new), sb.pack(done, precision="float32")(new)
        untaught = net[2](hidden(new))
        by_heart = hidden(new) @ torch.linalg.lstsq(hidden(x), net(x)).solution
    loss, naive, heart = ((y - wanted).square().mean() for y in (got, untaught, by_heart))
    assert loss < 0.6 * naive
    assert loss < 0.6 * heart


def test_the_norm_behind_takes_the_shift_of_the_mean():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4)).eval()
    x = torch.randn(50, 4, 6, 6) + 2
    half = 0.5 * as_matrix(net[0].weight.detach())
    done = solve_in_order(
        sb.Quantized(net, {}), known(net, x), lambda layer: nearly(layer, half), [x]
    )
    with torch.no_grad():
        mean = net[0](x).mean((0, 2, 3))
    assert torch.allclose(done.model[1].running_mean, -0.5 * mean, atol=0.02)
    assert torch.equal(done.model[1].running_var, net[1].running_var)
    assert torch.equal(net[1].running_mean, torch.zeros(4))


def test_many_layers_share_passes_in_their_order():
    names = [str(i) for i in range(70)]
    stages = list(_stages(names))
    assert len(stages) <= 32
    assert [name for stage in stages for name in stage] == names


def test_stages_share_the_float_networks_pass_within_a_limit():
    needs = {"a": 3, "b": 4, "c": 2, "d": 9, "e": 1}
    stages = [["a"], ["b", "c"], ["d"], ["e"]]
    assert list(_spans(stages, needs, 9)) == [[["a"], ["b", "c"]], [["d"]], [["e"]]]
    assert list(_spans(stages, needs, 1)) == [[stage] for stage in stages]
    assert list(_spans([], {}, 1)) == []


def test_the_limit_changes_no_layer(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(), nn.Linear(128, 5),
    ).eval()  # fmt: skip
    x = torch.randn(200, 3, 8, 8)
    layers = known(net, x)
    together = solve_in_order(sb.Quantized(net, {}), layers, nearly, x.split(50))
    monkeypatch.setattr("subbyte.ptq.steps.in_order.AHEAD_BYTES", 1)
    alone = solve_in_order(sb.Quantized(net, {}), layers, nearly, x.split(50))
    for name, layer in together.layers.items():
        assert torch.equal(layer.weight.codes, alone.layers[name].weight.codes)
        assert torch.equal(layer.weight.scale, alone.layers[name].weight.scale)


def test_a_layer_called_twice_among_others():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(self.again(self.again(self.first(x).relu())).relu())

    torch.manual_seed(0)
    net, x = Twice().eval(), torch.randn(500, 6)
    done = solve_in_order(sb.Quantized(net, {}), known(net, x), nearly, x.split(100))
    with torch.no_grad():
        got, wanted = sb.pack(done, precision="float32")(x), net(x)
    assert (got - wanted).square().mean() < 1e-3 * wanted.square().mean()


def seen_by(net, x, solve):
    """The matrix that each layer is solved for, and what came out."""
    matrices = {}

    def watched(layer):
        matrices[layer.site.name] = layer.matrix
        return solve(layer)

    done = solve_in_order(sb.Quantized(net, {}), known(net, x), watched, x.split(500))
    return matrices, done


def test_an_adapter_is_carried_on_to_the_layers_behind():
    """Two levels and a full adapter are the float weight: nothing is left to make up for."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)).eval()

    def solve(layer):
        codes = rtn(layer.matrix, None, channel_grid(2, 0))
        error = layer.matrix - codes.dequantize()
        adapter = fit_adapter(error, Metric(None, None, 1, 8), min(error.shape), 16)
        return QuantizedLayer(codes, None, adapter)

    matrices, done = seen_by(net, torch.randn(2000, 8), solve)
    assert done.layers["0"].adapter is not None
    torch.testing.assert_close(matrices["1"], net[1].weight.detach(), rtol=0, atol=2e-3)


def test_each_group_makes_up_for_its_own_inputs():
    """T = W (1 + t (C - H) h^-1) of each group, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(6, 6, 1, bias=False), nn.Conv1d(6, 4, 1, groups=2, bias=False)
    ).eval()
    damaged = 0.7 * as_matrix(net[0].weight.detach()) + 0.2 * torch.randn(6, 6)
    x = torch.randn(500, 6, 4)
    matrices, _ = seen_by(net, x, damaging_the_first(damaged))
    rows = x.transpose(0, 1).flatten(1).double()
    taken = nearly(known(net, x)[0], damaged).weight.dequantize().double().reshape(6, 6)
    exact, got = as_matrix(net[0].weight.detach()).double() @ rows, taken @ rows
    trust = 2000 / (2000 + 3)
    w = as_matrix(net[1].weight.detach()).double()
    for g in range(2):
        own, z = exact[3 * g : 3 * g + 3], got[3 * g : 3 * g + 3]
        h, c = z @ z.T / 2000, own @ z.T / 2000
        shrunk = trust * h + (1 - trust) * h.diag().diag()
        metric = shrunk + 0.01 * shrunk.diag().mean() * torch.eye(3).double()
        wanted = w[2 * g : 2 * g + 2] @ (torch.eye(3) + trust * (c - h) @ metric.inverse())
        found = matrices["1"][2 * g : 2 * g + 2].double()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_layers_that_few_examples_do_not_reach_keep_their_place():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.rare = nn.Linear(6, 3), nn.Linear(6, 6)

        def forward(self, x):
            some = x[:, :1] > 0
            return self.last(torch.where(some, self.rare(x), x) if some.any() else x)

    torch.manual_seed(0)
    net, x = Gated().eval(), torch.randn(200, 6)
    x[:2, 0] = -1
    matrices, done = seen_by(net, x, nearly)
    assert list(matrices) == ["rare", "last"]
    assert set(done.layers) == {"rare", "last"}
