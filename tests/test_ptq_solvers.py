"""Post-training solvers against their definitions: statistics, codes, adapters."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from nets import Mixed, mixed_input
from oracle import assert_within, exact_weight, gamma
from subbyte import SubbyteError
from subbyte.core.functional import encode
from subbyte.core.rtn import rtn
from subbyte.core.sites import sites
from subbyte.core.tensors import LowRank, QuantizedLayer, as_matrix, as_weight
from subbyte.ptq.evidence.sensitivity import sensitivity
from subbyte.ptq.evidence.statistics import Statistics, input_statistics
from subbyte.ptq.solvers import SOLVERS
from subbyte.ptq.solvers.codes import (
    _compensate,
    _descend,
    _ordered_factors,
    _refit,
    channel_grid,
    damped,
    gptq,
    k_sigma,
    row_errors,
    tensor_grid,
)
from subbyte.ptq.solvers.lowrank import Metric, adapter_bytes, fit_adapter, largest_rank, reclaimed
from subbyte.tasks import Classification

CONVS = [
    nn.Conv2d(3, 4, 3),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 4, 3, padding=1, groups=4),
    nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"),
    nn.Conv1d(4, 6, 3, padding=2, stride=2, groups=2),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def correlated(groups, width, seed=0):
    """A gram of correlated inputs, one of them never seen."""
    x = torch.randn(groups, 4 * width, width, generator=generator(seed), dtype=torch.float64)
    x = x @ torch.randn(groups, width, width, generator=generator(seed + 1), dtype=torch.float64)
    x[:, :, width // 2] = 0
    return x.transpose(1, 2) @ x / x.shape[1]


# ---------------------------------------------------------------- statistics


def brute_force(conv, x):
    """The mean of x x' over all positions, patch by patch, in float64."""
    two = isinstance(conv, nn.Conv2d)
    x = x.double() if two else x.double()[:, :, None]
    pads = conv._reversed_padding_repeated_twice
    pads = list(pads) + ([] if two else [0, 0])
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, pads, mode=mode)
    kernel = conv.kernel_size if two else (1, *conv.kernel_size)
    stride = conv.stride if two else (1, *conv.stride)
    dilation = conv.dilation if two else (1, *conv.dilation)
    per_group = x.shape[1] // conv.groups
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    grams = []
    for g in range(conv.groups):
        total, count = 0.0, 0
        part = x[:, g * per_group : (g + 1) * per_group]
        for image in part:
            for i in range(0, x.shape[2] - extent[0] + 1, stride[0]):
                for j in range(0, x.shape[3] - extent[1] + 1, stride[1]):
                    rows = slice(i, i + extent[0], dilation[0])
                    columns = slice(j, j + extent[1], dilation[1])
                    patch = image[:, rows, columns].flatten()
                    total, count = total + patch[:, None] * patch[None, :], count + 1
        grams.append(total / count)
    return torch.stack(grams), count


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_statistics_of_a_convolution_are_those_of_a_loop(conv):
    shape = (3, conv.in_channels, 7, 8) if isinstance(conv, nn.Conv2d) else (3, 4, 9)
    x = torch.randn(shape, generator=generator())
    net = nn.Sequential(conv)
    found = input_statistics(net, sites(net), [x[:2], x[2:]])["0"]
    expected, count = brute_force(conv, x)
    assert found.patches == count
    assert torch.allclose(found.gram, expected, rtol=1e-5, atol=1e-6)


def test_statistics_come_in_the_order_of_execution_and_in_passes():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(6, 3), nn.Linear(5, 6)
            self.never = nn.Linear(2, 2)

        def forward(self, x):
            return self.second(self.first(x))

    net, x = Crossed(), torch.randn(9, 2, 5)
    whole = input_statistics(net, sites(net), [x])
    assert list(whole) == ["first", "second"]
    rows = x.double().reshape(-1, 5)
    assert torch.allclose(whole["first"].gram[0], rows.T @ rows / 18, atol=1e-6)
    parts = input_statistics(net, sites(net), [x], limit=1)  # a pass a layer
    assert all(torch.equal(parts[name].gram, whole[name].gram) for name in whole)


def test_attention_is_seen_at_all_its_projections():
    torch.manual_seed(0)
    net = Mixed().eval()
    x, tokens = mixed_input()
    wrapped = nn.Module()
    wrapped.net = net
    wrapped.forward = lambda _: net(x, tokens)
    found = input_statistics(wrapped, sites(wrapped), [x])
    assert {"net.attn.in_proj", "net.attn.out_proj", "net.head", "net.conv"} <= set(found)
    e = net.table(tokens).double()
    rows = e.reshape(-1, 16)
    expected = rows.T @ rows / len(rows)
    assert torch.allclose(found["net.attn.in_proj"].gram[0], expected, atol=1e-5)
    attn = net.attn.double()
    heads = attn.num_heads
    q, k, v = (e @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, -1)
    split = [t.reshape(4, 7, heads, 4).transpose(1, 2) for t in (q, k, v)]
    mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(-1, 16)
    expected = mixed.T @ mixed / len(mixed)
    assert torch.allclose(found["net.attn.out_proj"].gram[0], expected, atol=1e-4)


def test_shrunk_statistics_are_those_of_more_patches():
    """A width of them, each of one value, which leave every mean square as it was."""
    x = torch.randn(2, 7, 4, generator=generator(), dtype=torch.float64)
    gram = x.mT @ x / 7
    more = torch.diag_embed((4 * gram.diagonal(dim1=1, dim2=2)).sqrt())
    whole = torch.cat([x, more], 1)
    found = Statistics(gram, 7).shrunk()
    assert torch.allclose(found.gram, whole.mT @ whole / 11)
    assert found.patches == 7


def test_codes_for_few_patches_suit_others_better_when_shrunk():
    mix = torch.randn(32, 64, generator=generator(), dtype=torch.float64)
    x = torch.randn(432, 32, generator=generator(1), dtype=torch.float64) @ mix
    seen, new = (x + torch.randn(x.shape, generator=generator(2))).relu().split([32, 400])
    matrix = torch.randn(32, 64, generator=generator())
    few = Statistics((seen.T @ seen / 32)[None], 32)
    gram = (new.T @ new / len(new))[None]

    def error(gram_seen):
        return row_errors(
            matrix - gptq(matrix, gram_seen, channel_grid(8, 0)).dequantize(), gram
        ).sum()

    assert error(few.shrunk().gram) < 0.7 * error(few.gram)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_effects_are_the_fisher_information_of_the_rows(temperature):
    """A linear classifier: the Fisher information of its weights is known exactly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(40_000, 4)
    statistics = input_statistics(net, sites(net), [x])
    batches = x.split(4)
    task = Classification(temperature)
    got = sensitivity(net, sites(net), statistics, batches, task, generator())[0]["0"]
    p = (net(x) / temperature).softmax(-1).double().detach()
    per_row = (p * (1 - p) * x.double().square().sum(1, keepdim=True)).mean(0)
    trace = statistics["0"].gram[0].diagonal().sum()
    assert torch.allclose(got, per_row / trace, rtol=0.05)


def test_what_cannot_be_measured_is_named():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(SubbyteError, match="no calibration batches"):
        input_statistics(net, sites(net), [])
    with torch.no_grad():
        net[0].weight.fill_(math.nan)
    with pytest.raises(SubbyteError, match="input of layer '2' has NaN"):
        input_statistics(net, sites(net), [torch.ones(2, 3)])


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 17, 256])
@pytest.mark.parametrize(("groups", "rows", "width"), [(1, 6, 20), (3, 6, 9), (1, 5, 150)])
def test_gptq_is_never_worse_than_round_to_nearest(levels, groups, rows, width):
    w = torch.randn(rows, width, generator=generator(levels))
    gram, grid = correlated(groups, width), channel_grid(levels, 0)
    metric = damped(gram)
    nearest, got = rtn(w, gram, grid), gptq(w, gram, grid)
    before = row_errors(w - nearest.dequantize(), metric)
    after = row_errors(w - got.dequantize(), metric)
    assert (after <= before).all()
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("width", [40, 300])
def test_without_refinement_compensation_itself_is_right(width):
    """Against the textbook: a column at a time in float64, the whole inverse updated each time."""
    w, gram = torch.randn(4, width, generator=generator()), correlated(1, width)
    grid = channel_grid(5, 0)
    scale = rtn(w, gram, grid).scale
    got = _compensate(w, scale[None], grid, _ordered_factors(damped(gram)))[0]
    inverse = torch.linalg.inv(damped(gram)[0])
    rest, left = (
        (w / scale[:, None]).double(),
        list(damped(gram)[0].diagonal().argsort(descending=True, stable=True)),
    )
    expected = torch.empty(w.shape, dtype=torch.uint8)
    while left:
        j = left.pop(0)
        code = encode(rest[:, j].float(), torch.ones(4), grid)
        expected[:, j] = code
        value = torch.tensor(grid.levels)[code.long()].double()
        error = (rest[:, j] - value) / inverse[j, j]
        rest = rest - error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
    # float32 against float64: a weight beside a tie may differ, and then those after it
    assert (got == expected).float().mean() > 0.99


def test_a_large_matrix_is_solved_in_parts_of_its_rows(monkeypatch):
    from subbyte.ptq.solvers import codes

    w, gram, grid = (
        torch.randn(12, 40, generator=generator()),
        correlated(1, 40),
        channel_grid(5, 0),
    )
    whole = gptq(w, gram, grid)
    monkeypatch.setattr(codes, "_AT_ONCE", 5 * 40)  # 5, 5 and 2 rows
    parts = gptq(w, gram, grid)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scale, whole.scale)


def test_each_refinement_only_lowers_the_error():
    w, gram = torch.randn(8, 40, generator=generator()), damped(correlated(2, 40))
    grid = channel_grid(3, 0)
    start = rtn(w, gram, grid)
    codes, scale = start.codes, start.scale
    error = row_errors(w - start.dequantize(), gram)
    for _ in range(3):
        codes = _descend(w, codes, scale, gram, grid)
        moved = row_errors(w - sb.QuantizedTensor(codes, scale, grid).dequantize(), gram)
        assert (moved <= error * (1 + 1e-5)).all()
        scale = _refit(w, codes, scale, gram, grid)
        error = row_errors(w - sb.QuantizedTensor(codes, scale, grid).dequantize(), gram)
        assert (error <= moved * (1 + 1e-3)).all()  # float16 rounds the fitted scale


def test_with_uncorrelated_inputs_of_one_size_gptq_leaves_nearest_codes():
    w = torch.randn(5, 30, generator=generator())
    got = gptq(w, torch.eye(30)[None].double(), channel_grid(4, 0), sweeps=0, factors=(1.0,))
    expected = rtn(w, None, channel_grid(4, 0))
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scale, expected.scale)


@pytest.mark.parametrize("levels", [2, 3, 5, 16])
def test_the_scale_of_rtn_is_that_of_least_squares(levels):
    w = torch.randn(4, 200, generator=generator(3))
    got = rtn(w, None, channel_grid(levels, 0))
    error = (w - got.dequantize()).square().sum(1)
    top = w.abs().amax(1)
    for factor in torch.linspace(0.05, 1.2, 231):
        scale = (top * factor).half().float()
        other = sb.QuantizedTensor(encode(w, scale, got.grid), scale, got.grid).dequantize()
        assert (error <= (w - other).square().sum(1) * 1.01).all()


def test_one_scale_for_a_tensor():
    w = torch.randn(4, 50, generator=generator())
    got = rtn(w, None, tensor_grid(5))
    assert got.scale.shape == (1,)
    assert (w - got.dequantize()).square().mean() < 0.1


def test_dead_inputs_and_rank_deficient_statistics_work():
    w = torch.randn(3, 12, generator=generator())
    x = torch.randn(2, 12, dtype=torch.float64)  # fewer patches than inputs
    for gram in (x.T @ x / 2, torch.zeros(12, 12, dtype=torch.float64)):
        got = gptq(w, gram[None], channel_grid(3, 0))
        assert got.dequantize().isfinite().all()
        adapter = fit_adapter(w - got.dequantize(), Metric(gram[None], None, 1, 12), 2, 16)
        assert adapter.product().isfinite().all()


def test_k_sigma_is_the_published_quantizer():
    """By hand: mean 0.5, standard deviation sqrt(5/3) (n - 1), range 0.5 -+ 3 sqrt(5/3)."""
    w = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    got = k_sigma(w, levels=4, k=3.0)
    step = 6 * math.sqrt(5 / 3) / 3
    zero = int((3 * math.sqrt(5 / 3) - 0.5) / step)  # 1.306 -> 1
    assert zero == 1
    assert got.codes.tolist() == [[1, 1, 1, 2]]  # 0.61, 1, 1.39, 1.77
    assert got.grid.levels == (-1.0, 0.0, 1.0, 2.0)
    assert float(got.scale) == pytest.approx(step, rel=1e-6)
    whole = k_sigma(w, levels=4, k=None)
    assert whole.dequantize().tolist() == w.tolist()
    assert whole.grid.levels == (-1.0, 0.0, 1.0, 2.0)
    with pytest.raises(SubbyteError, match="levels=257"):
        k_sigma(w, levels=257, k=3.0)
    assert k_sigma(torch.full((2, 2), 0.0), 16, 3.0).dequantize().abs().max() == 0


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_data_aware_adapter_is_optimal(groups, rank):
    """No random change of either factor, small or large, does better in its metric."""
    error = torch.randn(8, 15, generator=generator(), dtype=torch.float64)
    gram = correlated(groups, 15)
    effect = torch.rand(8, generator=generator(), dtype=torch.float64) + 0.1
    metric = Metric(gram, effect, groups, 15)
    adapter = fit_adapter(error, metric, rank, 16)

    def left(up, down):
        product = (up @ down).reshape(8, 15)
        return float((effect * row_errors(error - product, metric.gram)).sum())

    up = (adapter.up.double().reshape(groups, -1, rank)) * adapter.scale.reshape(groups, 1, rank)
    down = adapter.down.double().reshape(groups, rank, 15)
    best = left(up, down)
    expected = float(reclaimed(error, metric, rank)[rank])
    assert best == pytest.approx(expected, rel=1e-3)
    draws = generator(9)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(40):
            du = torch.randn(up.shape, generator=draws, dtype=torch.float64) * up.std() * size
            dd = torch.randn(down.shape, generator=draws, dtype=torch.float64) * down.std() * size
            assert left(up + du, down + dd) >= best * (1 - 1e-4)
    plain = fit_adapter(error, Metric(None, None, groups, 15), rank, 16)
    product = plain.product().double()
    assert float((effect * row_errors(error - product, metric.gram)).sum()) > best


def test_what_is_left_at_each_rank_falls_to_nothing():
    error = torch.randn(6, 9, generator=generator())
    metric = Metric(correlated(1, 9), None, 1, 9)
    left = reclaimed(error, metric, 8)
    assert left.shape == (9,)
    assert (left.diff() <= 0).all()
    assert float(left[0]) == pytest.approx(float(row_errors(error, metric.gram).sum()))
    assert float(left[6]) == pytest.approx(0, abs=1e-9)
    whole = fit_adapter(error, metric, 6, 16)
    assert torch.allclose(whole.product(), error, atol=2e-2)


@pytest.mark.parametrize("bits", [8, 16])
def test_bytes_of_an_adapter_are_those_it_has(bits):
    error = torch.randn(8, 10, generator=generator())
    adapter = fit_adapter(error, Metric(None, None, 2, 10), 3, bits)
    assert adapter.n_bytes == adapter_bytes(8, 10, 2, 3, bits)
    assert adapter.up.dtype == (torch.int8 if bits == 8 else torch.float16)
    assert (adapter.rank, adapter.groups) == (3, 2)
    assert largest_rank(8, 10, 2) == 4


CASES = [
    (nn.Linear(12, 7), (3, 12)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 7)),
    (nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2), (2, 4, 9, 9)),
    (nn.Conv1d(4, 6, 3, groups=2, bias=False), (2, 4, 9)),
]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("layer", "shape"), CASES, ids=str)
def test_an_adapter_runs_as_two_small_layers_would(tmp_path, layer, shape, bits):
    """y = W x + B (A x): A the layer's own kind into `rank` channels a group, B 1 x 1."""
    torch.manual_seed(0)
    groups = getattr(layer, "groups", 1)
    matrix = as_matrix(layer.weight.detach())
    codes = rtn(matrix, None, channel_grid(3, 0))
    metric = Metric(None, None, groups, matrix.shape[1])
    adapter = fit_adapter(matrix - codes.dequantize(), metric, 2, bits)
    weight = sb.QuantizedTensor(
        as_weight(codes.codes, layer.weight.shape), codes.scale, channel_grid(3, 0)
    )
    bias = None if layer.bias is None else layer.bias.detach()
    net = nn.Sequential(layer)
    done = sb.Quantized(net, {"0": QuantizedLayer(weight, bias, adapter)})
    packed = sb.pack(done, precision="float32")
    x = torch.randn(shape)

    def run(value, w, b, g):
        if isinstance(layer, nn.Linear):
            return F.linear(value, w, b)
        function = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        return function(value, w, b, layer.stride, layer.padding, layer.dilation, g)

    def small(value, w, g):
        if isinstance(layer, nn.Linear):
            return F.linear(value, w)
        function = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        return function(value, w.reshape(*w.shape, *[1] * (value.ndim - 2)), groups=g)

    down = (adapter.down.double() * adapter.scale.double()[:, None]).reshape(
        -1, *layer.weight.shape[1:]
    )
    up, x64, w64 = adapter.up.double(), x.double(), exact_weight(weight)
    b64 = None if bias is None else bias.double()
    exact = run(x64, w64, b64, groups) + small(run(x64, down, None, groups), up, groups)
    size = run(x64.abs(), w64.abs(), None if b64 is None else b64.abs(), groups)
    size = size + small(run(x64.abs(), down.abs(), None, groups), up.abs(), groups)
    assert_within(packed(x), exact, gamma(matrix.shape[1] + 2 + 6) * size)
    sb.save(packed, tmp_path / "net.safetensors")
    again = sb.load(tmp_path / "net.safetensors", model=net, precision="float32")
    assert torch.equal(again(x), packed(x))
    assert again[0].packed.adapter().rank == 2


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    half = torch.float16
    good = (torch.ones(4, 2, dtype=half), torch.ones(2, 3, dtype=half), torch.ones(2))
    LowRank(*good)
    for parts, says in (
        ((good[0].float(), good[1], good[2]), "float32 and torch.float16"),
        ((good[0][:, :0], good[1], good[2]), "rank of 1 or more"),
        ((good[0], torch.ones(3, 3, dtype=half), torch.ones(3)), "no number of groups"),
        ((good[0], good[1], torch.ones(1)), "adapter scale is"),
        ((good[0] * math.inf, good[1], good[2]), "NaN or infinite"),
    ):
        with pytest.raises(SubbyteError, match=says):
            LowRank(*parts)
    weight = rtn(torch.randn(5, 3), None, channel_grid(3, 0))
    with pytest.raises(SubbyteError, match=r"product is 4 x 3.*shape \(5, 3\)"):
        QuantizedLayer(weight, None, LowRank(*good))
    wrong = rtn(torch.randn(6, 2), None, channel_grid(3, 0))
    layer = QuantizedLayer(wrong, None, LowRank(*good))
    with pytest.raises(SubbyteError, match=r"adapter of '0' has 4 rows.*6 output"):
        sb.pack(sb.Quantized(nn.Sequential(nn.Linear(2, 6, bias=False)), {"0": layer}))
    with pytest.raises(SubbyteError, match="rank=9"):
        fit_adapter(torch.randn(4, 3), Metric(None, None, 1, 3), 9, 8)
    with pytest.raises(SubbyteError, match="adapter bits=4"):
        fit_adapter(torch.randn(4, 3), Metric(None, None, 1, 3), 1, 4)


# ---------------------------------------------------------------- every solver


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("levels", [2, 3, 5, 16, 256])
@pytest.mark.parametrize("seen", [False, True])
def test_every_solver_keeps_the_protocol(name, levels, seen):
    """Codes fit the levels, the input stays, and there is less error than without any weight."""
    torch.manual_seed(levels)
    matrix = torch.randn(8, 12)
    gram = correlated(2, 12) if seen else None
    before = matrix.clone()
    found = SOLVERS[name]().solve(matrix, gram, levels)
    again = SOLVERS[name]().solve(matrix, gram, levels)
    assert torch.equal(matrix, before)
    assert torch.equal(found.codes, again.codes)
    assert found.shape == matrix.shape
    assert found.grid.n_levels == levels
    error = row_errors(matrix - found.dequantize(), gram).sum()
    if (name, levels) != ("k-sigma", 2):  # as published, 1 bit has the levels 0 and 6 sigma
        assert error < row_errors(matrix, gram).sum()
    if levels >= 16:
        assert error < 0.05 * row_errors(matrix, gram).sum()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("layer", [nn.Linear(16, 6), nn.ConvTranspose1d(16, 6, 3, padding=1)])
def test_every_solver_goes_through_quantize_and_packs(name, layer):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer if isinstance(layer, nn.Linear) else nn.Sequential(nn.Unflatten(1, (16, 1)), layer),
        nn.Flatten(), nn.ReLU(), nn.Linear(6, 4),
    )  # fmt: skip
    x = torch.randn(60, 16)
    done = sb.quantize(net, sb.CoRa(levels=64, codes=name, tune=4), calibration=[x])
    packed = sb.pack(done, precision="float32")
    y = net.eval()(x)
    assert float((packed(x) - y).norm() / y.norm()) < 0.2
    for planned in done.evidence.plan.layers:
        assert planned.n_bytes == done.layers[planned.name].n_bytes


def test_only_what_compensates_is_solved_in_order():
    for name, solver in SOLVERS.items():
        x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
        done = sb.quantize(nn.Linear(16, 6), sb.CoRa(levels=4, codes=name, tune=0), calibration=[x])
        noted = any("solved in order" in note for note in done.notes)
        assert noted == solver.compensates
