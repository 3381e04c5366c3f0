"""Tables of embeddings, padding, and chains of blocks in post-training."""

import pytest
import torch
from torch import nn

import subbyte as sb
from subbyte.core.sites import sites
from subbyte.core.tensors import QuantizedLayer, as_matrix
from subbyte.ptq.evidence.sensitivity import sensitivity
from subbyte.ptq.evidence.statistics import input_statistics
from subbyte.ptq.plan.search import Layer
from subbyte.ptq.solvers import SOLVERS, weight_of
from subbyte.ptq.steps import in_order
from subbyte.ptq.steps.chain import Chain, blocks_of, recomputed
from subbyte.ptq.steps.in_order import solve_in_order
from subbyte.tasks import Language, Regression
from subbyte.tasks.batches import Inputs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """A table and a head: everything about it is known exactly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.table(ids))[:, 0]


class Squares(Regression):
    """Half of the squared error: its Hessian is the identity."""

    def outputs(self, y, batch):
        return y

    def distance(self, y, wanted):
        return 0.5 * (y - wanted).square().sum(-1)

    def direction(self, y, generator):
        return torch.randint(2, y.shape, generator=generator).float() * 2 - 1


def test_a_table_is_measured_by_its_reads_and_what_follows():
    """H = A'A for the head's matrix A, of one output; a row matters as often as it is read."""
    net = Linear()
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])[:, None].repeat(500, 1)
    effects, tables = sensitivity(net, sites(net), {}, ids.split(8), Squares(), generator())
    a = net.head.weight.detach().double()
    gram = tables["table"].gram[0]
    assert torch.allclose(gram, a.t() @ a, rtol=0.1, atol=0.02)
    # Reads: 4, 2, 1, 1 of 8, all read often in all; rows 4 and 5 never, and no row once.
    expected = torch.tensor([4.0, 2, 1, 1, 0, 0]).double() / 8
    assert torch.allclose(effects["table"], expected, rtol=0.1, atol=0.01)


def test_unread_rows_share_what_rows_read_once_have():
    net = Linear()
    ids = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])[:, None]  # two of eight reads are of new rows
    effects, _ = sensitivity(net, sites(net), {}, [ids], Squares(), generator())
    row = effects["table"]
    assert row[3] == row[4] == row[5] > 0
    assert float(row[3:].sum() / row.sum()) == pytest.approx(2 / 8)


def test_padding_is_no_input_of_any_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, input_ids, attention_mask):
            return self.net(input_ids)

    ids = torch.randint(1, 9, (12, 6), generator=generator())
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    whole = Inputs((), {"input_ids": ids * mask, "attention_mask": mask}, 12)
    short = Inputs((), {"input_ids": ids[:, :4], "attention_mask": mask[:, :4]}, 12)
    model = Masked()
    a, b = (input_statistics(model, sites(model), [x], task=Language()) for x in (whole, short))
    for name in ("net.1", "net.2"):
        assert a[name].patches == b[name].patches == 48
        assert torch.allclose(a[name].gram, b[name].gram)


# ---------------------------------------------------------------- chains of blocks


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden, mask, scale=1.0):
        x = self.norm(hidden)
        return (hidden + scale * self.down(self.up(x) * self.gate(x).sigmoid() * mask),)


class Deep(nn.Module):
    def __init__(self, width=12, depth=5):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 20)
        self.switch = False

    def forward(self, input_ids, attention_mask):
        x, mask = self.table(input_ids), attention_mask[:, :, None].float()
        for block in self.blocks:
            x = block(x, mask, scale=0.7)[0]
            x = x * 1.0 if self.switch else x
        return self.head(x)


def batches():
    ids = torch.randint(1, 20, (48, 7), generator=generator())
    mask = (torch.arange(7) < torch.randint(3, 8, (48, 1), generator=generator(1))).long()
    whole = Inputs((), {"input_ids": ids * mask, "attention_mask": mask}, 48)
    return whole.split(16)


def solved(net, given):
    task = Language()
    own = sites(net)
    found = input_statistics(net, own, given, task=task)
    solver = SOLVERS["gptq"]()

    def solve(layer):
        gram = None if layer.statistics is None else layer.statistics.gram
        return QuantizedLayer(weight_of(solver.solve(layer.matrix, gram, 4), layer.site))

    known = [
        Layer(s, as_matrix(net.get_submodule(s.owner).weight.detach()), 1, found.get(s.name), None)
        for s in own
    ]
    return solve_in_order(sb.Quantized(net, {}), known, solve, given, task=task)


def test_a_chain_is_solved_as_the_whole_network_would_be(monkeypatch):
    net, given = Deep().eval(), batches()
    assert blocks_of(net, given[0]) == tuple(f"blocks.{i}" for i in range(5))
    by_block = solved(net, given)
    monkeypatch.setattr(in_order, "blocks_of", lambda *_: ())
    monkeypatch.setattr(in_order, "STAGES", 10**6)
    by_network = solved(net, given)
    assert set(by_block.layers) == set(by_network.layers) == {s.name for s in sites(net)}
    for name, layer in by_block.layers.items():
        assert torch.equal(layer.weight.codes, by_network.layers[name].weight.codes), name


def test_a_chain_stands_where_the_network_would():
    net, given = Deep().eval(), batches()
    chain = Chain(net, blocks_of(net, given[0]), given)
    seen = {}
    for i in range(5):
        handle = net.blocks[i].register_forward_hook(
            lambda _, args, y, i=i: seen.setdefault(i, (args[0], y[0]))
        )
        with torch.no_grad():
            net(**given[1].kwargs)
        handle.remove()
        assert torch.equal(chain.hidden[1], seen[i][0])
        chain.pass_block(i)
        assert torch.equal(chain.hidden[1], seen[i][1])


def test_blocks_that_are_run_again_give_the_same_gradients_and_keep_no_activations():
    net, given = Deep().eval(), batches()
    own, runs, kept = list(net.parameters()), [], []

    def gradients():
        held = []  # bytes of what the pass back needs
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: held.append(x.nbytes) or x, lambda x: x
        ):
            y = net(**given[0].kwargs)
            y = y.logits if hasattr(y, "logits") else y
            kept.append(sum(held))
        return torch.autograd.grad(y.square().sum(), own, allow_unused=True)

    net.blocks[2].register_forward_hook(lambda *_: runs.append(1))
    plain = gradients()
    with recomputed(net, blocks_of(net, given[0])):
        again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True) if a is not None)
    assert kept[1] < 0.7 * kept[0]
    assert not any("forward" in vars(module) for module in net.modules())


def test_what_is_no_chain_is_not_taken_for_one():
    net, given = Deep().eval(), batches()
    net.switch = True  # between the blocks something happens
    assert blocks_of(net, given[0]) == ()
    assert blocks_of(nn.Sequential(nn.Linear(3, 3)), torch.ones(2, 3)) == ()


class InPlace(nn.Module):
    """Two layers that are given the same tensor, which changes in between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = x.clone()
        return self.a(x) + self.b(x) + self.c(x.relu_())


def test_layers_that_share_an_input_share_its_sums_unless_it_changes():
    net, x = InPlace(), torch.randn(40, 6)
    found = input_statistics(net, sites(net), x.split(10))
    plain, bent = ((y.double().t() @ y.double() / 40) for y in (x, x.relu()))
    assert torch.allclose(found["a"].gram[0], plain, rtol=1e-5)
    assert torch.equal(found["a"].gram, found["b"].gram)
    assert torch.allclose(found["c"].gram[0], bent, rtol=1e-5)


class Parts(nn.Module):
    """As a decoder's block of T5: its parts in a list, called one after the other, not alike."""

    def __init__(self, *calls):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.calls = nn.Embedding(20, 12), calls
        self.blocks = nn.ModuleList(Block(12) for _ in calls)

    def forward(self, input_ids, attention_mask):
        x, mask = self.table(input_ids), attention_mask[:, :, None].float()
        for block, (args, kwargs) in zip(self.blocks, self.calls, strict=True):
            x = block(x, *(mask if a == "mask" else a for a in args), **kwargs)[0]
        return x


MASKED = (("mask",), {"scale": 0.5})


@pytest.mark.parametrize(
    "second",
    [((1.0,), {"scale": 0.5}), (("mask",), {"scale": 0.7}), (("mask",), {}), (("mask", 0.5), {})],
    ids=["no mask", "another scale", "no scale", "scale by position"],
)
def test_blocks_that_are_not_called_alike_are_no_chain(second):
    """The first one's call would be made for all."""
    given = batches()[0]
    assert len(blocks_of(Parts(MASKED, MASKED).eval(), given)) == 2
    assert blocks_of(Parts(MASKED, second).eval(), given) == ()


# ---------------------------------------------------------------- experts that nobody asks


class Gated(nn.Module):
    """Each token goes to the expert of its largest gate; the last gate is never the largest."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        with torch.no_grad():
            self.gate.bias[2] = -1e3

    def forward(self, x):
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            own = chosen == i
            if own.any():
                y[own] = expert(x[own])
        return y


def test_an_expert_that_no_token_reaches_is_quantized_and_named():
    net = Gated().eval()
    method = sb.CoRa(levels=16, tune=3)
    done = sb.quantize(net, method, calibration=[torch.randn(200, 8)], task="regression")
    assert {"experts.0", "experts.1", "experts.2"} <= set(done.layers)
    named = [note for note in done.notes if "no input statistics" in note]
    assert len(named) == 1
    assert "'experts.2'" in named[0]
    searched = sb.quantize(
        net, sb.CoRa(target_bits=5, tune=0), calibration=[torch.randn(200, 8)], task="regression"
    )
    assert "experts.2" in searched.layers
