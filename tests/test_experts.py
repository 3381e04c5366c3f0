"""Stacks of experts in the form of `transformers`: quantized as linear layers, and loaded into
their own class.

The class here is written anew; `test_zoo_ptq.py` has networks of `transformers` themselves.
"""

import copy

import pytest
import torch
from torch import nn

import subbyte as sb
from subbyte import CoRa
from subbyte.core.as_linear import with_linears
from subbyte.core.experts import Experts, is_experts

pytest.importorskip("subbyte._native", reason="the C++ core was not built")

EXPERTS, WIDTH, INNER, PER_TOKEN = 4, 8, 12, 2
FORMS = [  # has_gate, has_bias, is_transposed
    (True, False, False),
    (True, True, True),
    (False, False, False),
    (False, True, False),
]


class Stacked(nn.Module):
    """Computes in float64, each token and expert by itself: the oracle."""

    def __init__(self, has_gate, has_bias, is_transposed):
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = has_gate, has_bias, is_transposed
        self.act_fn = nn.SiLU()
        first = "gate_up_proj" if has_gate else "up_proj"
        shapes = {first: (INNER * (1 + has_gate), WIDTH), "down_proj": (WIDTH, INNER)}
        for name, (n_out, n_in) in shapes.items():
            shape = (n_in, n_out) if is_transposed else (n_out, n_in)
            setattr(self, name, nn.Parameter(torch.randn(EXPERTS, *shape)))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, n_out)))

    def _apply_gate(self, x):
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _times(self, name, expert, x):
        w = getattr(self, name)[expert].double()
        y = x @ (w if self.is_transposed else w.t())
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def forward(self, hidden_states, top_k_index, top_k_weights):
        rows = []
        for x, experts, weights in zip(hidden_states, top_k_index, top_k_weights, strict=True):
            own = torch.zeros(WIDTH, dtype=torch.float64)
            for expert, weight in zip(experts.tolist(), weights, strict=True):
                h = self._times("gate_up_proj" if self.has_gate else "up_proj", expert, x.double())
                h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
                own += weight * self._times("down_proj", expert, h)
            rows.append(own)
        return torch.stack(rows).to(hidden_states.dtype)


class Mixture(nn.Module):
    """never: an expert that no token reaches."""

    def __init__(self, form=FORMS[0], never=None):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), Stacked(*form)
        self.head = nn.Linear(WIDTH, 3)
        if never is not None:
            with torch.no_grad():
                self.router.bias[never] = -1000.0

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(PER_TOKEN)
        return self.head(x + self.experts(x, chosen, weights))


def tokens(n=64, seed=1):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def quantized(net, *rules):
    method = CoRa(levels=16, tune=0)
    recipe = sb.Recipe((*rules, sb.Rule(method=method))) if rules else method
    return sb.quantize(net, recipe, calibration=[tokens()])


@pytest.mark.parametrize("form", FORMS)
def test_experts_one_by_one_compute_what_the_stack_computes(form):
    torch.manual_seed(0)
    stacked = Stacked(*form)
    assert is_experts(stacked)
    weights, chosen = torch.rand(20, EXPERTS).topk(PER_TOKEN)
    x = torch.randn(20, WIDTH)
    experts = Experts(stacked)
    assert not is_experts(experts)
    assert not any(is_experts(part) for part in experts.modules())
    # two products of at most 12 terms of size 1, rounded once a term, through functions of slope
    # at most 1.1, and a sum of two: float32 errors of some 1e-5 where values are below 100
    found, wanted = experts(x, chosen, weights), stacked(x, chosen, weights)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-4)
    assert sum(p.numel() for p in experts.parameters()) == sum(
        p.numel() for p in stacked.parameters()
    )


def test_an_index_of_no_expert_adds_nothing():
    torch.manual_seed(0)
    experts = Experts(Stacked(*FORMS[0]))
    x, weights = torch.randn(3, WIDTH), torch.ones(3, 2)
    both = experts(x, torch.tensor([[0, EXPERTS], [1, 2], [EXPERTS, EXPERTS]]), weights)
    assert torch.equal(both[0], experts(x[:1], torch.tensor([[0]]), weights[:1, :1])[0])
    assert not both[2].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_mixture_through_quantize_and_a_file(form, tmp_path):
    torch.manual_seed(0)
    net, path = Mixture(form), tmp_path / "net.safetensors"
    before = copy.deepcopy(net.state_dict())
    done = quantized(net)
    first = "gate_up_proj" if form[0] else "up_proj"
    inside = {f"experts.{i}.{name}" for i in range(EXPERTS) for name in (first, "down_proj")}
    assert set(done.layers) == {"router", "head"} | inside
    for name in inside:
        _, index, stack = name.split(".")
        w = getattr(net.experts, stack).detach()[int(index)]
        w = w.t() if form[2] else w
        error = (done.layers[name].weight.dequantize() - w).norm() / w.norm()
        assert error < 0.2, name
    packed = sb.pack(done)
    sb.save(packed, path)
    assert torch.equal(sb.load(path, Mixture(form))(tokens()), packed(tokens()))
    assert is_experts(net.experts)  # what was given stays
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_one_expert_kept_float_and_a_stack_kept_float(tmp_path):
    torch.manual_seed(0)
    net, path = Mixture(), tmp_path / "net.safetensors"
    one = quantized(net, sb.Rule("experts.2.*", method=None))
    assert "experts.2.down_proj" not in one.layers
    assert "experts.1.down_proj" in one.layers
    packed = sb.pack(one)
    sb.save(packed, path)
    assert torch.equal(sb.load(path, Mixture())(tokens()), packed(tokens()))
    whole = quantized(net, sb.Rule("experts.*", method=None))
    assert set(whole.layers) == {"router", "head"}
    assert is_experts(whole.model.experts)
    assert any("a stack of experts stays float" in note for note in whole.notes)
    sb.save(sb.pack(whole), path)
    assert is_experts(sb.load(path, Mixture()).experts)


def test_an_expert_that_no_token_reaches_is_named():
    torch.manual_seed(0)
    done = quantized(Mixture(never=3))
    notes = " ".join(done.notes)
    assert "experts.3.gate_up_proj" in notes
    assert "experts.1.gate_up_proj" not in notes


def test_what_has_more_than_stacks_stays_as_it_is():
    torch.manual_seed(0)
    more = Stacked(*FORMS[0])
    more.scale = nn.Parameter(torch.ones(1))
    flat = Stacked(*FORMS[0])
    flat.down_proj = nn.Parameter(torch.randn(WIDTH, INNER))
    norm = Stacked(*FORMS[0])
    norm.has_post_expert_norm = True
    plain = nn.Module()
    plain.gate_up_proj = plain.down_proj = nn.Parameter(torch.randn(2, 3, 3))
    assert not any(map(is_experts, (more, flat, norm, plain)))


def test_names_of_other_layers_leave_the_stack():
    net = Mixture()
    assert with_linears(net, {"router", "head"}) is net
    assert isinstance(with_linears(net, {"experts.0.down_proj"}).experts, Experts)
