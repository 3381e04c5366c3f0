"""What `quantize` and `prepare` accept, and what they refuse in one line before any work starts."""

import copy
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import subbyte as sb
from subbyte import CoRa, LowRes, PublishedCoRa, SubbyteError
from subbyte.methods import METHODS

PLAIN = CoRa(levels=4, tune=0)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


def inputs(n=40, width=16, seed=1):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    """The same codes, scales and biases to the bit."""
    assert list(a.layers) == list(b.layers)
    for name, layer in a.layers.items():
        other = b.layers[name]
        assert torch.equal(layer.weight.codes, other.weight.codes)
        assert torch.equal(layer.weight.scale, other.weight.scale)
        assert (layer.bias is None) or torch.equal(layer.bias, other.bias)


class Ear:
    def __init__(self):
        self.heard = []

    def progress(self, step, done, total):
        pass

    def note(self, text):
        self.heard.append(text)


def refused(model, calibration, says, method=PLAIN):
    ear = Ear()
    with pytest.raises(SubbyteError, match=says) as error:
        sb.quantize(model, method, calibration=calibration, listener=ear)
    assert "\n" not in str(error.value)
    assert ear.heard == [], "it had started to work"


# ---------------------------------------------------------------- calibration batches


class Named(nn.Module):
    """As `mlp`, with arguments by name, a flag, and a second input that may be left out."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, shift=None, negate=False):
        x = x if shift is None else x + shift
        return self.body(-x if negate else x)


class Two(Named):
    def forward(self, x, shift):
        return self.body(x + shift)


X, SHIFT = inputs(), inputs(seed=2)
CLASSES = torch.arange(40) % 5


@pytest.mark.parametrize(
    ("network", "batches", "meant"),
    [
        (mlp, [X[:25], X[25:]], X),
        (mlp, [X[:0], X], X),
        (mlp, (x for x in X.split(7)), X),
        (mlp, [(X, CLASSES)], X),
        (mlp, [[X, CLASSES]], X),
        (mlp, [(X,)], X),
        (mlp, [(X, None)], X),
        (mlp, [{"input": X}], X),
        (mlp, [X.numpy()], X),
        (mlp, [(X, SHIFT[:, 0])], X),  # labels of any type: Sequential takes one input
        (mlp, DataLoader(TensorDataset(X, CLASSES), batch_size=16), X),
        (Named, [{"x": X, "shift": SHIFT}], X + SHIFT),
        (Named, [UserDict({"x": X[:9], "shift": SHIFT[:9]}), {"x": X[9:], "shift": SHIFT[9:]}],
         X + SHIFT),
        (Named, [(X, SHIFT)], X + SHIFT),
        (Named, [(X, SHIFT, CLASSES)], X + SHIFT),
        (Named, [{"x": X, "negate": True, "shift": None}], -X),
        (Named, [(X, SHIFT, True)], -X - SHIFT),
        (Named, [(X, SHIFT, True, CLASSES)], -X - SHIFT),
        (Two, [(X, SHIFT)], X + SHIFT),
        (Two, [(X, SHIFT, CLASSES)], X + SHIFT),
        (Two, [{"shift": SHIFT, "x": X}], X + SHIFT),
        (Two, [namedtuple("Batch", "x shift")(X, SHIFT)], X + SHIFT),
    ],
)  # fmt: skip
def test_batches_are_what_the_network_takes(network, batches, meant):
    """To the bit what the plain network makes of what these batches mean."""
    got = sb.quantize(network(), PLAIN, calibration=batches)
    wanted = sb.quantize(mlp(), PLAIN, calibration=[meant])
    prefix = "" if network is mlp else "body."
    for name, layer in wanted.layers.items():
        assert torch.equal(got.layers[prefix + name].weight.codes, layer.weight.codes)
        assert torch.equal(got.layers[prefix + name].bias, layer.bias)


def test_whole_numbers_that_forward_could_take_are_labels_and_a_note_says_so():
    done = sb.quantize(Named(), PLAIN, calibration=[(X, CLASSES)])
    plain = sb.quantize(Named(), PLAIN, calibration=[X])
    same(done, plain)
    assert any("is taken for labels" in note for note in done.notes)
    assert not any("is taken for labels" in note for note in plain.notes)


def test_labels_reach_the_published_search_from_every_form():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    x, y = torch.randn(64, 1, 6, 6), torch.arange(64) % 5
    method = PublishedCoRa(bits=3, iterations=3)
    pair = sb.quantize(net, method, calibration=[(x, y)])
    same(pair, sb.quantize(net, method, calibration=[[{"input": x}, y]]))
    refused(net, [x], "learns from labels and the calibration has none", method)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 5)

    def forward(self, input_ids, attention_mask=None):
        e = self.table(input_ids)
        return self.head(e if attention_mask is None else e * attention_mask[..., None])


def test_padded_batches_may_differ_in_length():
    """With the last tokens masked or cut: the same sums, but for those of the masked zeros."""
    ids = torch.randint(0, 50, (30, 6))
    batches = [{"input_ids": ids[:20, :4]}, {"input_ids": ids[20:]}, {"input_ids": ids[:5, :4]}]
    done = sb.quantize(Tokens(), CoRa(target_bits=5, tune=2), calibration=batches)
    assert set(done.layers) == {"table", "head"}
    assert 0 <= done.evidence.agreement <= 100


@pytest.mark.parametrize(
    ("network", "batches", "says"),
    [
        (mlp, X, "calibration is one Tensor; give an iterable of batches"),
        (mlp, {"input": X}, "calibration is one dict"),
        (mlp, None, "calibration is one NoneType; .* or a DataLoader"),
        (mlp, TensorDataset(X), "calibration is one TensorDataset; .* or a DataLoader"),
        (mlp, [], "no calibration images"),
        (mlp, [X[:0]], "no calibration images"),
        (mlp, ["words"], "a calibration batch is a str without tensors"),
        (mlp, [X[:, :3]], "cannot run the calibration batches: RuntimeError: mat1 and mat2"),
        (mlp, [(X, SHIFT, SHIFT)], r"cannot run the calibration batches: TypeError: .*positional"),
        (mlp, [(X, CLASSES[:3])], "has 40 inputs and 3 labels"),
        (Two, [X], r"cannot run the calibration batches: TypeError: .*shift"),
        (Named, [{"y": X}], "cannot run the calibration batches"),
    ],
)
def test_batches_that_the_network_cannot_run_are_one_line(network, batches, says):
    refused(network(), batches, says)


# ---------------------------------------------------------------- networks


def test_frozen_parameters_change_nothing():
    method = CoRa(target_bits=3.4, tune=5)
    frozen, half = mlp().requires_grad_(False), mlp()
    half[0].requires_grad_(False)
    wanted = sb.quantize(mlp(), method, calibration=[X])
    same(sb.quantize(frozen, method, calibration=[X]), wanted)
    same(sb.quantize(half, method, calibration=[X]), wanted)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_quantized_in_float32(dtype):
    wanted = sb.quantize(mlp().to(dtype).float(), PLAIN, calibration=[X.to(dtype).float()])
    same(sb.quantize(mlp().to(dtype), PLAIN, calibration=[X.to(dtype)]), wanted)


def test_the_callers_modes_and_graphs_do_not_matter():
    method = CoRa(target_bits=3.4, tune=3)
    wanted = sb.quantize(mlp(), method, calibration=[X])
    with torch.inference_mode():
        made, own = mlp(), X.clone()
        same(sb.quantize(mlp(), method, calibration=[{"input": own}]), wanted)
    same(sb.quantize(made, method, calibration=[own]), wanted)
    same(sb.quantize(made, method, calibration=[{"input": own}]), wanted)
    with torch.no_grad():
        same(sb.quantize(mlp(), method, calibration=[X.clone().requires_grad_()]), wanted)


def test_a_norm_that_needs_two_examples_gets_them():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(32, track_running_stats=False)
    net = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), norm, nn.Linear(32, 5))
    assert set(sb.quantize(net, PLAIN, calibration=[X]).layers) == {"0", "3"}


def test_volumes_and_shared_modules_work():
    torch.manual_seed(0)
    twice = nn.Conv3d(2, 2, 3, padding=1)
    net = nn.Sequential(nn.Conv3d(1, 2, 3), twice, nn.ReLU(), twice, nn.Flatten(), nn.Linear(16, 5))
    done = sb.quantize(net, CoRa(levels=17, tune=3), calibration=[torch.randn(20, 1, 4, 4, 4)])
    packed = sb.pack(done)
    assert set(done.layers) == {"0", "1", "5"}
    assert packed[1] is packed[3]


COMPUTED = {
    "old weight norm": lambda layer: nn.utils.weight_norm(layer),
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "old spectral norm": lambda layer: nn.utils.spectral_norm(layer),
    "spectral norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: nn.utils.parametrizations.orthogonal(layer),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("tuned", [0, 3])
def test_computed_weights_are_what_they_compute(name, tuned):
    """The same plan and codes as for the plain network of these weights, which stays as it is."""
    net = mlp()
    for i in (0, 2):
        COMPUTED[name](net[i])
    net(X).sum().backward()  # a pass leaves results behind, which no deepcopy takes
    net.eval()
    y = net(X).detach()
    plain = mlp()
    with torch.no_grad():
        for i in (0, 2):
            plain[i].weight.copy_(net[i].weight)
            plain[i].bias.copy_(net[i].bias)
    method = CoRa(target_bits=2.5, tune=tuned)
    got = sb.quantize(net, method, calibration=[X])
    wanted = sb.quantize(plain, method, calibration=[X])
    assert [x.levels for x in got.evidence.plan.layers] == [
        x.levels for x in wanted.evidence.plan.layers
    ]
    for layer, other in zip(got.layers.values(), wanted.layers.values(), strict=True):
        torch.testing.assert_close(layer.dequantize(), other.dequantize(), rtol=1e-3, atol=1e-4)
    assert torch.equal(net(X), y)
    net(X).sum().backward()  # and it still learns
    fault = "has a parametrization|is computed from other|already has a parametrization"
    with pytest.raises(SubbyteError, match=fault):
        sb.prepare(net, LowRes())


def test_a_layer_with_weight_norm_can_be_kept_float():
    net = mlp()
    nn.utils.parametrizations.weight_norm(net[0])
    sb.prepare(net, sb.Recipe((sb.Rule("0"), sb.Rule(method=LowRes()))))
    packed = sb.pack(sb.freeze(net), precision="float32")
    torch.testing.assert_close(packed(X), net(X))


def test_wrappers_are_taken_off():
    wanted = sb.quantize(mlp(), PLAIN, calibration=[X])
    for wrapped in (nn.DataParallel(mlp()), torch.compile(mlp())):
        same(sb.quantize(wrapped, PLAIN, calibration=[X]), wanted)


def test_a_copy_of_a_prepared_network_shares_nothing_with_it():
    net = mlp()
    y = net(X).detach()
    sb.prepare(net, LowRes(levels=5))
    before = net(X).detach()
    done = sb.freeze(net)
    assert torch.equal(done.model(X), y)  # the float network
    assert not any(hasattr(m, "parametrizations") for m in done.model.modules())
    assert torch.equal(net(X), before)  # still prepared
    net(X).sum().backward()
    with torch.no_grad():
        net[0].parametrizations.weight.original.zero_()
        net[0].bias.zero_()
    assert torch.equal(done.model(X), y)
    with pytest.raises(SubbyteError, match="is prepared for training; freeze it"):
        sb.quantize(net, PLAIN, calibration=[X])


def nan_in(part, name):
    def change(net):
        getattr(net[part], name).data[0] = float("nan")

    return change


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).eval()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda net: net.to("meta"), "on the meta device; load its values"),
        (nan_in(2, "bias"), "'2.bias' has NaN values"),
        (nan_in(2, "weight"), "weight of '2' has 8 NaN"),
        (nan_in(1, "running_var"), "'1.running_var' has NaN values"),
        (nan_in(1, "weight"), "'1.weight' has NaN values"),
        (lambda net: net[2].register_forward_hook(lambda *_: None), "layer '2' has 1 hooks"),
        (lambda net: net[2].register_forward_pre_hook(lambda *_: None), "layer '2' has 1 hooks"),
        (lambda net: net[2].register_full_backward_hook(lambda *_: None), "layer '2' has 1 hooks"),
        (lambda net: net.append(nn.LazyLinear(3)), "layer '3' has no shape yet"),
        (lambda net: net.append(nn.Linear(5, 0)), "weight of '3' is empty"),
    ],
)
def test_both_roads_refuse_the_same_before_they_start(change, says):
    net = normed()
    change(net)
    before = [type(module) for module in net.modules()]
    refused(net, [X], says)
    with pytest.raises(SubbyteError, match=says) as error:
        sb.prepare(net, LowRes())
    assert "\n" not in str(error.value)
    assert [type(module) for module in net.modules()] == before


@pytest.mark.parametrize("name", METHODS)
def test_a_network_trained_in_bfloat16_is_frozen_in_float32(name):
    net = mlp()
    sb.prepare(net, METHODS[name]())
    done = sb.freeze(net.bfloat16())
    assert all(layer.weight.scale.dtype == torch.float32 for layer in done.layers.values())
    packed = sb.pack(done, precision="float32")
    assert packed(X).dtype == torch.float32
    assert torch.equal(done.layers["2"].bias, net[2].bias.float())


# ---------------------------------------------------------------- outputs


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.body, self.make = mlp(), make

    def forward(self, x):
        return self.make(self.body(x))


class WithLogits:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (lambda y: y[:, :1], "regression"),
        (lambda y: y[:, 0], "regression"),
        (lambda y: y[:, :, None, None].expand(-1, -1, 4, 4), "dense"),
        (lambda y: y[:, :1, None, None].expand(-1, -1, 4, 4), "regression"),
        (lambda y: nn.functional.normalize(y, dim=-1), "embedding"),
        (lambda y: (y, 3 * y[:, :2]), "regression"),
        (lambda y: {"logits": y}, "classification"),
        (lambda y: {"boxes": y, "scores": y[:, 0]}, "regression"),
        (lambda y: y, "classification"),
        (WithLogits, "classification"),
    ],
)
def test_the_task_is_guessed_from_the_outputs(make, task):
    done = sb.quantize(Returning(make), CoRa(levels=16, tune=0), calibration=[X])
    assert done.evidence.task == task
    named = [note for note in done.notes if f"task '{task}'" in note]
    assert len(named) == (not isinstance(make(torch.ones(2, 4)), torch.Tensor))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda y: y.argmax(-1), r"torch\.int64|int64"),
        (lambda y: y * float("nan"), "NaN values"),
        (lambda y: "text", "a str without a tensor of floats"),
    ],
)
def test_outputs_that_no_task_can_read_are_refused(make, says):
    refused(Returning(make), [X], says, CoRa(target_bits=3.4))


def test_the_published_search_is_for_classifiers():
    net = Returning(lambda y: y[:, 0])
    refused(net, [X], "for classifiers, not for the task 'regression'", PublishedCoRa(labels=False))


# ---------------------------------------------------------------- routed experts


class Routed(nn.Module):
    """Each token goes to one of four experts, so what an expert sees follows the codes before."""

    def __init__(self, open_experts=4):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.router = nn.Linear(16, 16), nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.router.bias[open_experts:] = -100

    def forward(self, x):
        x = self.first(x)
        which = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            y[which == k] = expert(x[which == k])
        return self.head(y)


@pytest.mark.parametrize("method", [CoRa(levels=3, tune=3), CoRa(target_bits=2.4, tune=3)], ids=str)
def test_experts_whose_tokens_change_are_quantized(method):
    x = inputs(256)
    done = sb.quantize(Routed(), method, calibration=[x])
    assert len(done.layers) == 7
    assert any("got other numbers of vectors in the quantized network" in n for n in done.notes)
    assert sb.pack(done)(x).isfinite().all()
    lazy = sb.quantize(Routed(3), method, calibration=[x])
    assert any("layer 'experts.3' (Linear) has no input statistics" in n for n in lazy.notes)
    assert set(lazy.layers) == set(done.layers)


# ---------------------------------------------------------------- scales outside float16


@pytest.mark.parametrize("factor", [1e-9, 1e-7, 1e6, 1e8])
@pytest.mark.parametrize("codes", ["gptq", "rtn"])
def test_scales_that_float16_has_not_are_float32_and_noted(factor, codes):
    net = mlp()
    with torch.no_grad():
        net[0].weight.mul_(factor)
        net[0].bias.zero_()
        net[2].weight.div_(factor)
    method = CoRa(levels=17, codes=codes, tune=0, in_order=False)
    done = sb.quantize(net, method, calibration=[X])
    for name, i in (("0", 0), ("2", 2)):
        w, got = net[i].weight.detach(), done.layers[name].dequantize()
        assert float((got - w).norm() / w.norm()) < 0.1
        assert any(f"layer '{name}' has float32 scales" in note for note in done.notes)
    y, got = net(X), sb.pack(done, precision="float32")(X)
    assert float((got - y).norm() / y.norm()) < 0.1
    plain = sb.quantize(mlp(), method, calibration=[X])
    assert not any("float32 scales" in note for note in plain.notes)
    for planned in done.evidence.plan.layers:
        assert planned.n_bytes == done.layers[planned.name].n_bytes


def test_one_tiny_channel_among_others_does_not_vanish():
    net = mlp()
    with torch.no_grad():
        net[0].weight[3] *= 1e-8
        net[0].weight[5] = 0
    done = sb.quantize(net, CoRa(levels=17, tune=0, in_order=False), calibration=[X])
    w, got = net[0].weight.detach(), done.layers["0"].dequantize()
    assert float((got[3] - w[3]).norm() / w[3].norm()) < 0.1
    assert not got[5].any()


@pytest.mark.parametrize("factor", [1e-9, 1e8])
def test_prepare_names_a_layer_whose_float16_scales_would_not_do(factor):
    net = mlp()
    with torch.no_grad():
        net[2].weight.mul_(factor)
    with pytest.raises(SubbyteError, match=r"layer '2': .*scale"):
        sb.prepare(net, LowRes(scale_domain="float16"))
    sb.prepare(net, LowRes(scale_domain="float32"))


# ---------------------------------------------------------------- the account


class Conv1D(nn.Module):
    """As GPT-2's: a linear layer with a transposed weight that is no nn.Linear."""

    def __init__(self, out, width):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, out)),
            nn.Parameter(torch.ones(out)),
        )

    def forward(self, x):
        return x @ self.weight + self.bias


class Odd(nn.Module):
    """Every kind of parameter that stays float."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.own, self.rnn = Conv1D(16, 16), nn.LSTMCell(16, 16)
        self.experts = nn.Parameter(torch.randn(4, 16, 16) / 4)
        self.norm, self.body = nn.LayerNorm(16), nn.Linear(16, 16)
        self.table = nn.Embedding(5, 16)
        self.head = nn.Linear(16, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        y = self.rnn(self.own(x))[0]
        return self.head(self.norm(self.body(y) + torch.einsum("eij,nj->ni", self.experts, y)))


def test_every_parameter_is_accounted_for_and_the_number_is_of_the_whole(tmp_path):
    net = Odd()
    done = sb.quantize(net, CoRa(target_bits=4, tune=0), calibration=[X])
    found = {p.name: p for p in done.parameters}
    assert len(found) == len(done.parameters) == len(list(net.parameters()))
    assert sum(p.n_values for p in found.values()) == sum(p.numel() for p in net.parameters())
    assert {p.name for p in found.values() if p.levels} == {"body.weight", "table.weight"}
    assert {name: p.reason for name, p in found.items() if name in (
        "own.weight", "rnn.weight_hh", "experts", "norm.weight", "body.bias",
    )} == {
        "own.weight": "Conv1D is no layer that can be quantized",
        "rnn.weight_hh": "LSTMCell: there is no packed layer of this kind",
        "experts": "Odd is no layer that can be quantized",
        "norm.weight": "a bias, norm or other vector of LayerNorm",
        "body.bias": "a bias, norm or other vector of Linear",
    }  # fmt: skip
    notes = "\n".join(done.notes)
    for name in ("own.weight", "rnn.weight_ih", "experts"):
        assert f"'{name}'" in notes
    assert "no less than" in notes
    n_bytes = sum(p.n_bytes for p in found.values())
    n_values = sum(p.n_values for p in found.values())
    assert done.bits_per_weight == pytest.approx(8 * n_bytes / n_values)
    assert done.layer_bits_per_weight <= 4 < 16 < done.bits_per_weight
    size = sb.save(sb.pack(done), tmp_path / "net.safetensors")
    assert n_bytes <= size <= n_bytes + 6000


def test_both_roads_name_the_same_and_count_the_same():
    """But for a table that a head shares, which training keeps in float."""
    net, untied = Odd(), Odd()
    for own in (net, untied):
        own.head.weight = nn.Parameter(own.head.weight.detach().clone())
    plan = sb.prepare(net, LowRes(levels=4, granularity="channel", scale_domain="float16"))
    frozen = sb.freeze(net)
    quantized = sb.quantize(untied, PLAIN, calibration=[X])
    assert {p.name: p.reason for p in frozen.parameters} == {
        p.name: p.reason for p in quantized.parameters
    }
    assert frozen.bits_per_weight == quantized.bits_per_weight
    assert [note for note in quantized.notes if "stay" in note] == list(frozen.notes)
    assert [(x.name, x.reason) for x in plan.layers] == [
        (x.name, x.reason) for x in quantized.evidence.plan.layers
    ]
    assert "float: experts, 1,024 values: Odd is no layer" in str(plan)


def test_layers_of_the_users_own_are_kept_when_a_rule_says_so():
    done = sb.quantize(mlp(), sb.Recipe((sb.Rule("0"), sb.Rule(method=PLAIN))), calibration=[X])
    reasons = {p.name: p.reason for p in done.parameters}
    assert reasons["0.weight"] == "the recipe or the plan keeps it float"
    assert torch.equal(sb.pack(done)[0].weight, mlp()[0].weight)


def test_the_network_that_was_given_is_not_changed():
    net = normed().train()
    before = copy.deepcopy(net.state_dict())
    sb.quantize(net, CoRa(levels=3, tune=3), calibration=[X])
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert np.all([not hasattr(m, "parametrizations") for m in net.modules()])
