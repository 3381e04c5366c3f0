"""Packed layers under everything that traces, transforms or differentiates a call.

Each gives what a plain call gives, to the bit, or a SubbyteError; derivatives are those of the
decoded weight. Nothing may come back that was not written.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import subbyte as sb
from subbyte import LowRes, SubbyteError, kernels
from subbyte.kernels import traced

pytest.importorskip("subbyte._native", reason="the C++ core was not built")

KINDS = {
    "linear": (lambda: nn.Linear(12, 9), (4, 12)),
    "conv": (lambda: nn.Conv2d(4, 9, 3, padding=(1, 2), stride=2), (3, 4, 8, 7)),
    "groups": (lambda: nn.Conv2d(8, 16, 3, padding="same", groups=2), (2, 8, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, dilation=2), (2, 8, 7, 7)),
}
PRECISIONS = ["int8", "int16", "float32"]


@pytest.fixture(params=[(k, p) for k in KINDS for p in PRECISIONS], ids="-".join)
def case(request):
    """(packed network of one layer, an input, the layer with its decoded weight)."""
    kind, precision = request.param
    torch.manual_seed(0)
    make, size = KINDS[kind]
    model = nn.Sequential(make())
    sb.prepare(model, LowRes(levels=5, granularity="channel"))
    net = sb.pack(model, sb.freeze(model), precision=precision)
    twin = make()
    with torch.no_grad():
        twin.weight.copy_(net[0].weight)
        twin.bias.copy_(net[0].bias)
    return net, torch.randn(size), twin


def quiet(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- tracers


@pytest.mark.parametrize("grad", [False, True])
def test_jit_traces_compute_the_same(case, grad):
    net, x, _ = case
    with torch.set_grad_enabled(grad):
        net(x)
        graph = quiet(lambda: torch.jit.trace(net, x))
        for other in (torch.randn_like(x), x.repeat(2, *[1] * (x.ndim - 1))):
            assert torch.equal(graph(other), net(other))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operator(case, mode):
    net, x, _ = case
    graph = quiet(lambda: make_fx(net, tracing_mode=mode, _allow_non_fake_inputs=True)(x))
    assert any("subbyte." in str(node.target) for node in graph.graph.nodes)
    other = torch.randn_like(x)
    assert torch.equal(graph(other), net(other))


def test_export_with_a_dynamic_batch_computes_the_same(case):
    net, x, _ = case
    batch = torch.export.Dim("batch", min=2, max=64)
    for strict in (False, True):
        with torch.no_grad():
            program = quiet(
                lambda: torch.export.export(
                    net,
                    (x,),
                    dynamic_shapes=({0: batch},),
                    strict=strict,  # noqa: B023
                )
            )
            assert any("subbyte." in str(node.target) for node in program.graph.nodes)
            for other in (torch.randn_like(x), torch.randn(7, *x.shape[1:])):
                assert torch.equal(program.module()(other), net(other))
                decomposed = quiet(lambda: program.run_decompositions()).module()  # noqa: B023
                assert torch.equal(decomposed(other), net(other))
    assert torch.equal(net(x), copy.deepcopy(net)(x))


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_calls_compute_the_same(case, grad):
    net, x, _ = case
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        wanted = net(x)
        assert torch.equal(quiet(lambda: compiled(x)), wanted)
        if grad:
            a, b = (x.clone().requires_grad_() for _ in range(2))
            net(a).square().sum().backward()
            compiled(b).square().sum().backward()
            assert close(a.grad, b.grad)


def test_modes_see_the_operator(case):
    net, x, _ = case
    seen = []

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Called(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    wanted = net(x)
    for mode in (Dispatched(), Called()):
        seen.clear()
        with mode:
            assert torch.equal(net(x), wanted)
        assert any("subbyte" in name for name in seen)


def test_fake_and_meta_calls_have_the_shape_and_no_values(case):
    net, x, _ = case
    wanted = net(x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = net(mode.from_tensor(x))
    assert isinstance(got, torch._subclasses.FakeTensor)
    assert (got.shape, got.stride()) == (wanted.shape, wanted.stride())
    empty = copy.deepcopy(net).to("meta")
    assert empty(x.to("meta")).shape == wanted.shape
    with pytest.raises(SubbyteError, match="move them together"):
        empty(x)


def test_inference_mode_computes_the_same_inside_and_after(case):
    net, x, _ = case
    wanted = net(x)
    with torch.inference_mode():
        made = copy.deepcopy(net)
        assert torch.equal(net(x), wanted)
        assert torch.equal(made(x), wanted)
        made[0].packed.scale.mul_(2)  # an inference tensor: PyTorch does not count this
        made[0].bias.mul_(2)
        assert close(made(x), 2 * wanted)
    assert torch.equal(net(x), wanted)


def test_subclasses_go_by_the_operator(case):
    net, x, _ = case

    class Own(torch.Tensor):
        pass

    assert torch.equal(net(x.as_subclass(Own)).as_subclass(torch.Tensor), net(x))
    assert torch.equal(net(nn.Parameter(x)), net(x))


# ---------------------------------------------------------------- torch.func


def test_vmap_computes_the_same(case):
    net, x, _ = case
    wanted = net(x)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(net)(x[:, None])[:, 0], wanted)
        twice = torch.stack([x, 2 * x], dim=1)
        got = torch.func.vmap(net, in_dims=1, out_dims=1)(twice)
        assert torch.equal(got, torch.stack([wanted, net(2 * x)], dim=1))
        nested = torch.func.vmap(torch.func.vmap(net))(x[None, :, None])
        assert torch.equal(nested[0, :, 0], wanted)


def test_first_derivatives_are_those_of_the_decoded_weight(case):
    net, x, twin = case
    toward, one = torch.randn_like(net(x)), x[:1]
    fast, slow = (torch.func.grad(lambda v, m=m: (m(v) * toward).sum()) for m in (net, twin))
    assert close(fast(x), slow(x))
    y, tangent = torch.func.jvp(net, (x,), (x,))
    assert close(y, net(x))
    assert close(tangent, torch.func.jvp(twin, (x,), (x,))[1])
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert close(jacobian(net)(one), jacobian(twin)(one))
    y, back = torch.func.vjp(net, x)
    assert close(y, net(x))
    assert close(back(toward)[0], torch.func.vjp(twin, x)[1](toward)[0])
    _, linear = torch.func.linearize(net, x)
    assert close(linear(x), tangent)


def test_second_derivatives_are_those_of_the_decoded_weight(case):
    net, x, twin = case

    def energy(module):
        return lambda v: module(v).square().sum()

    for outer, inner in (
        (torch.func.jacfwd, torch.func.grad),
        (torch.func.jacrev, torch.func.grad),
    ):
        one = x[:1]
        assert close(outer(inner(energy(net)))(one), outer(inner(energy(twin)))(one))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    found = []
    for module, v in ((net, a), (twin, b)):
        (first,) = torch.autograd.grad(energy(module)(v), v, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), v)
        found.append((first, second))
    exact = net[0].precision == "float32"
    for fast, slow in zip(*found, strict=True):
        assert torch.allclose(fast, slow, rtol=1e-3 if exact else 0.1, atol=1e-4 if exact else 1.0)


def test_forward_derivatives_by_dual_numbers(case):
    net, x, twin = case
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        fast, slow = (forward_ad.unpack_dual(m(dual)).tangent for m in (net, twin))
        assert close(fast, slow)
        assert close(forward_ad.unpack_dual(net(dual)).primal, net(x))


def test_an_operator_that_would_lose_a_tangent_says_so(case):
    net, x, _ = case
    with torch.no_grad():
        graph = torch.export.export(net, (x,)).module()
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: torch.func.jvp(net, (v,), (v,))[1], backend="aot_eager")
    with pytest.raises(Exception, match="would lose its tangent"):  # dynamo wraps what it meets
        quiet(lambda: compiled(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(SubbyteError, match="would lose its tangent"):
            graph(dual)
    assert torch.equal(graph(x), net(x))


def test_functionalized_calls(case):
    net, x, _ = case
    assert torch.equal(torch.func.functionalize(net)(x), net(x))
    with pytest.raises(SubbyteError, match="functionalize around a derivative"):
        torch.func.functionalize(torch.func.grad(lambda v: net(v).sum()))(x)


def test_mapped_calls_keep_the_gradient_of_what_lies_outside(case):
    net, x, twin = case
    found = []
    for module in (net, twin):
        v = x.clone().requires_grad_()
        torch.func.vmap(module)(v[:, None]).square().sum().backward()
        found.append(v.grad)
    assert torch.allclose(*found, rtol=0.1, atol=0.2)


def test_per_sample_gradients(case):
    net, x, twin = case
    fast, slow = (
        torch.func.vmap(torch.func.grad(lambda v, m=m: m(v[None]).sum()))(x) for m in (net, twin)
    )
    assert close(fast, slow)


def test_gradients_to_the_bias_arrive(case):
    net, x, twin = case
    toward = torch.randn_like(net(x))
    net[0].bias.requires_grad_()
    (net(x) * toward).sum().backward()
    (twin(x) * toward).sum().backward()
    assert close(net[0].bias.grad, twin.bias.grad)

    def loss(buffers):
        return (torch.func.functional_call(net, buffers, (x,)) * toward).sum()

    buffers = {"0.bias": net[0].bias.detach()}
    assert close(torch.func.grad(loss)(buffers)["0.bias"], twin.bias.grad)


def test_a_weight_cannot_be_transformed_and_says_so(case):
    net, x, _ = case
    scale = net[0].packed.scale
    stacked = {"0.packed.scale": torch.stack([scale, scale])}
    with torch.no_grad():
        with pytest.raises(SubbyteError, match="only activations"):
            torch.func.vmap(lambda b: torch.func.functional_call(net, b, (x,)))(stacked)
        with pytest.raises(SubbyteError, match="only activations"):
            torch.func.vmap(lambda b, v: torch.func.functional_call(net, b, (v,)))(
                stacked, torch.stack([x, x])
            )
    with pytest.raises(SubbyteError, match="only activations"):
        torch.func.grad(lambda b: torch.func.functional_call(net, b, (x,)).sum())(
            {"0.packed.scale": scale}
        )
    net[0].packed.scale = scale.clone().requires_grad_()
    with pytest.raises(SubbyteError, match=r"requires a gradient.*prepare"):
        net(x)
    with torch.no_grad():
        net(x)


def test_functional_calls_use_the_tensors_they_are_given(case):
    net, x, _ = case
    double = {"0.packed.scale": 2 * net[0].packed.scale, "0.bias": 2 * net[0].bias}
    wanted = net(x)
    assert close(torch.func.functional_call(net, double, (x,)), 2 * wanted)
    assert torch.equal(net(x), wanted)


def test_hooks_on_saved_tensors_and_checkpoints(case):
    net, x, _ = case
    packed = []
    a, b, c = (x.clone().requires_grad_() for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        y = net(a).square().sum()
    y.backward()
    assert packed
    net(b).square().sum().backward()
    torch.utils.checkpoint.checkpoint(net, c, use_reentrant=False).square().sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(a.grad, c.grad)


def test_a_sum_that_is_watched_keeps_its_gradient(case):
    net, x, _ = case
    layer = net[0]
    plus = torch.randn_like(layer(x)).requires_grad_()
    layer.activation = "relu"
    layer(x, plus).sum().backward()
    assert torch.equal(plus.grad, (layer(x, plus.detach()) > 0).float())
    with torch.no_grad():
        mapped = torch.func.vmap(lambda p: layer(x, p))(plus[None])
        assert close(mapped[0], layer(x, plus))
        layer.activation = "none"
        assert close(mapped[0], F.relu(layer(x) + plus))


def test_plain_calls_are_not_seen():
    model = nn.Sequential(nn.Linear(4, 8))
    sb.prepare(model, LowRes(levels=3))
    packed = sb.pack(model, sb.freeze(model))[0].packed
    assert not traced.is_seen(torch.ones(2, 4), packed.matrix(), kernels.Epilogue())


# ---------------------------------------------------------------- values built once


def net_of(kind, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(KINDS[kind][0]())
    sb.prepare(model, LowRes(levels=5, granularity="channel"))
    return sb.pack(model, sb.freeze(model))


def held(net):
    return [*net.parameters(), *net.buffers()]


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_built_once_and_follow_the_buffers(kind):
    net, other, x = net_of(kind), net_of(kind, 1), torch.randn(KINDS[kind][1])
    layer = net[0]
    net(x)
    matrix = layer.packed.matrix()
    epilogue = layer.packed.epilogue(layer.bias, "none")
    net(x)
    assert layer.packed.matrix() is matrix
    assert layer.packed.epilogue(layer.bias, "none") is epilogue
    wanted = other(x)
    ways = {
        "in place": lambda n: n.load_state_dict(other.state_dict()),
        "assigned": lambda n: n.load_state_dict(copy.deepcopy(other).state_dict(), assign=True),
        "one by one": lambda n: [
            setattr(n[0], "bias", copy.deepcopy(other[0].bias)),
            setattr(n[0].packed, "words", other[0].packed.words.clone()),
            setattr(n[0].packed, "scale", other[0].packed.scale.clone()),
        ],
        "swapped": lambda n: [
            torch.utils.swap_tensors(mine, theirs)
            for mine, theirs in zip(held(n), held(copy.deepcopy(other)), strict=True)
        ],
        "data": lambda n: [
            setattr(mine, "data", theirs.clone())
            for mine, theirs in zip(held(n), held(other), strict=True)
        ],
        "data in place": lambda n: [
            mine.data.copy_(theirs) for mine, theirs in zip(held(n), held(other), strict=True)
        ],
        "numpy": lambda n: [
            mine.numpy().__setitem__(slice(None), theirs.numpy())
            for mine, theirs in zip(held(n), held(other), strict=True)
        ],
    }
    for name, change in ways.items():
        mine = copy.deepcopy(net)
        assert torch.equal(mine(x), net(x))
        change(mine)
        assert torch.equal(mine(x), wanted), name
    for name in ("words", "scale"):
        mine = copy.deepcopy(net)
        mine(x)
        setattr(mine[0].packed, name, getattr(other[0].packed, name).clone())
        assert torch.equal(mine(x), copy.deepcopy(mine)(x)), name
        assert torch.equal(mine[0].weight, copy.deepcopy(mine)[0].weight), name
    for same in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.copy(net)):
        assert torch.equal(same(x), net(x))
    there_and_back = copy.deepcopy(net).to(torch.float16).to(torch.float32)
    assert torch.allclose(there_and_back(x), net(x), rtol=0.01, atol=0.01)


def test_copies_carry_no_values_of_the_original():
    net, x = net_of("linear"), torch.randn(4, 12)
    net(x)
    assert "_matrix" in net[0].packed.__dict__
    assert net[0].packed.__getstate__()["_matrix"] is None
    assert len(pickle.dumps(net)) == len(pickle.dumps(net_of("linear")))


def test_windows_and_epilogues_are_frozen():
    net = net_of("conv")
    window = net[0].window
    assert window == kernels.Window((2, 2), (1, 1), (1, 1, 2, 2), 1)
    assert kernels.Window.from_plain(window.plain()) == window
    with pytest.raises(AttributeError):
        window.groups = 2
    with pytest.raises(AttributeError):
        net[0].packed.matrix().shape = (1,)
    with pytest.raises(AttributeError):
        kernels.Epilogue().bias = None
