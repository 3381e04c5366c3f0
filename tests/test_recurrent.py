"""LSTM, GRU and RNN: packed, trained, quantized after training, saved; what their weights see."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import subbyte as sb
from oracle import assert_within, gamma
from subbyte import CoRa, LowRes
from subbyte.bench.floats import float_twin
from subbyte.modules import SEVERAL
from subbyte.ptq.evidence.recurrent import weight_inputs

CASES = {
    "lstm": (nn.LSTM, {}),
    "lstm, batch first": (nn.LSTM, {"batch_first": True}),
    "lstm, two layers, both directions": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm, projected": (nn.LSTM, {"proj_size": 3}),
    "gru, two layers": (nn.GRU, {"num_layers": 2}),
    "gru, no bias, both directions": (nn.GRU, {"bias": False, "bidirectional": True}),
    "rnn, relu": (nn.RNN, {"nonlinearity": "relu"}),
}
cases = pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


def layer(kind, options):
    torch.manual_seed(0)
    return kind(5, 6, **options).eval()


def packed(net, levels=5):
    net = copy.deepcopy(net)
    sb.prepare(net, LowRes(levels=levels))
    return sb.pack(sb.freeze(net), precision="float32")


def states(module, batch=None):
    """Hidden states to start with, as the module takes them."""
    directions = 2 if module.bidirectional else 1
    lead = (module.num_layers * directions, *(() if batch is None else (batch,)))
    h = torch.randn(*lead, module.proj_size or module.hidden_size)
    return (h, torch.randn(*lead, module.hidden_size)) if isinstance(module, nn.LSTM) else h


def flat(found):
    """Tensors of an output: y, h and maybe c."""
    y, rest = found
    y = y if isinstance(y, torch.Tensor) else y.data
    return [y, *(rest if isinstance(rest, tuple) else (rest,))]


def test_every_kind_that_holds_several_weights_is_swept():
    assert {kind for kind, _ in CASES.values()} | {nn.MultiheadAttention} == set(SEVERAL)


@cases
def test_a_packed_layer_computes_what_torch_does_with_its_weights(kind, options):
    """It is torch's own forward, on the decoded weights; they may lie otherwise in memory."""
    net = layer(kind, options)
    small = packed(net)
    twin = small.float_layer().eval()
    for name, weight in twin.named_parameters():
        if name.startswith("weight_"):
            found = small.get_submodule(name).quantized()
            assert_within(weight.detach(), found.dequantize().double(), 0 * weight.abs().double())
    steps = torch.randn(4, 3, 5)
    ragged = pack_padded_sequence(steps, [4, 1, 3], enforce_sorted=False)
    calls = [(steps,), (steps[:, 0],), (ragged,), (steps, states(net, 4 if net.batch_first else 3))]
    for given in calls:
        if net.batch_first and given[0] is ragged:
            continue
        with torch.no_grad():
            pairs = zip(flat(small(*given)), flat(twin(*given)), strict=True)
            for a, b in pairs:
                assert_within(a, b.double(), 64 * gamma(16) * b.abs().max().double())


@cases
def test_training_packing_and_files_agree(kind, options, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn = kind(5, 6, **options)
            self.head = nn.LazyLinear(3)

        def forward(self, x):
            return self.head(self.rnn(x)[0].mean(0))

    net, x = Net(), torch.randn(4, 4, 5)
    net(x)
    like = copy.deepcopy(net)
    names = [own.name for own in sb.prepare(net, LowRes(levels=3)).quantized]
    assert names == [f"rnn.{n}" for n in net.rnn._flat_weights_names if "weight" in n] + ["head"]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = [net.rnn.parametrizations[n.split(".")[1]].original.clone() for n in names[:-1]]
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    for name, old in zip(names, before, strict=False):  # its gradient arrives
        assert not torch.equal(net.rnn.parametrizations[name.split(".")[1]].original, old)
    small = sb.pack(sb.freeze(net), precision="float32")
    with torch.no_grad():
        trained = net.eval()(x)
    assert_within(small(x), trained.double(), 64 * gamma(64) * trained.abs().max())
    sb.save(small, tmp_path / "net.safetensors")
    again = sb.load(tmp_path / "net.safetensors", model=like, precision="float32")
    assert torch.equal(again(x), small(x))
    assert_within(float_twin(again).rnn(x)[0], small.rnn(x)[0].double(), 1e-6)


@cases
def test_what_each_weight_is_given_explains_the_outputs(kind, options):
    """Against the formula, a step at a time in float64: with the inputs and states that are
    reported, the gates of every step give the state of the next."""
    net = layer(kind, options).double()
    steps, hx = torch.randn(4, 3, 5).double(), states(net, 4 if net.batch_first else 3)
    hx = tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
    found = dict(weight_inputs(net, steps, hx))
    y = net(steps, hx)[0]
    last = net.num_layers - 1
    for direction, end in enumerate(("", "_reverse") if net.bidirectional else ("",)):
        before = found[f"weight_hh_l{last}{end}"]
        own = y.chunk(2, -1)[direction] if net.bidirectional else y
        major = (lambda t: t.transpose(0, 1)) if net.batch_first else (lambda t: t)
        before, own = major(before), major(own)
        first = (hx[0] if isinstance(hx, tuple) else hx)[last * (1 + net.bidirectional) + direction]
        order = range(len(own)) if not direction else range(len(own) - 1, -1, -1)
        state = first
        for t in order:
            assert torch.equal(before[t], state)
            state = own[t]
    inputs = {n: x for n, x in found.items() if "_ih_" in n}
    assert torch.equal(inputs["weight_ih_l0"], steps)
    if last and not net.bidirectional:
        assert torch.equal(
            inputs["weight_ih_l1"], found["weight_hh_l1"].new_tensor(0) + _hidden(net, steps, hx)
        )


def _hidden(net, steps, hx):
    """Outputs of the first of two layers."""
    first = type(net)(5, 6).double()
    first.load_state_dict({n: w for n, w in net.state_dict().items() if "_l0" in n})
    return first(steps, hx[:1])[0]


def test_padding_of_a_packed_sequence_is_no_input():
    net = layer(nn.GRU, {"bidirectional": True})
    steps, lengths = torch.randn(4, 3, 5), [4, 1, 3]
    h = states(net, 3)
    ragged = pack_padded_sequence(steps, lengths, enforce_sorted=False)
    found = dict(weight_inputs(net, ragged, h))
    y, _ = pad_packed_sequence(net(ragged, h)[0])
    for direction, end in enumerate(("", "_reverse")):
        rows = found[f"weight_hh_l0{end}"]
        assert len(rows) == sum(lengths)
        wanted = []
        for i, n in enumerate(lengths):
            own = y[:n, i].chunk(2, -1)[direction]
            start = h[direction, i][None]
            wanted.append(
                torch.cat([start, own[:-1]]) if not direction else torch.cat([own[1:], start])
            )
        key = lambda rows: sorted(map(tuple, rows.tolist()))  # noqa: E731
        assert key(rows) == key(torch.cat(wanted))


def test_quantizing_after_training_measures_every_weight():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn = nn.LSTM(8, 16, num_layers=2, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    net, x = Net(), torch.randn(80, 6, 8)

    def error(**options):
        done = sb.quantize(net, CoRa(levels=4, tune=0, **options), calibration=[x])
        assert not any("no input statistics" in note for note in done.notes)
        assert set(done.layers) == {
            "head",
            *(f"rnn.{n}" for n in net.rnn._flat_weights_names if "weight" in n),
        }
        fresh = torch.randn(200, 6, 8)
        wanted = net(fresh)
        return float((sb.pack(done, precision="float32")(fresh) - wanted).norm() / wanted.norm())

    assert error() < 0.7 * error(codes="rtn", in_order=False)


def test_a_rule_may_name_the_layer_or_one_of_its_weights():
    def plan(*rules):
        net = nn.ModuleDict({"rnn": nn.GRU(4, 4), "head": nn.Linear(4, 4)})
        return [own.name for own in sb.prepare(net, sb.Recipe(rules)).quantized]

    every = sb.Rule(method=LowRes())
    assert plan(sb.Rule("rnn"), every) == ["head"]
    assert plan(sb.Rule("rnn.weight_hh_l0"), every) == ["rnn.weight_ih_l0", "head"]
    assert plan(sb.Rule(types="GRU"), every) == ["head"]


def test_a_weight_that_stays_float_is_computed_with_as_it_is():
    net = nn.ModuleDict({"rnn": layer(nn.LSTM, {})})
    like = copy.deepcopy(net)
    sb.prepare(net, sb.Recipe((sb.Rule("rnn.weight_hh_l0"), sb.Rule(method=LowRes(levels=3)))))
    small = sb.pack(sb.freeze(net)).rnn
    assert torch.equal(small.weight_hh_l0, like.rnn.weight_hh_l0)
    assert small.float_layer().weight_ih_l0.unique().numel() <= 3


def test_threads_do_not_share_a_call():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        _check_threads()
    finally:
        sys.setswitchinterval(before)


def _check_threads():
    small, other = packed(layer(nn.LSTM, {})), packed(layer(nn.GRU, {}), 3)
    x = torch.randn(50, 4, 5)
    wanted, faults = [small(x)[0], other(x)[0]], []

    def work(net, expected):
        for _ in range(100):
            if not torch.equal(net(x)[0], expected):
                faults.append(net)

    threads = [
        threading.Thread(target=work, args=pair)
        for pair in zip((small, other, small, other), wanted * 2, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_whole_numbers_are_refused():
    with pytest.raises(sb.SubbyteError, match=r"activations are int64; .* call x.float\(\) first"):
        packed(layer(nn.LSTM, {}))(torch.ones(3, 2, 5, dtype=torch.int64))
