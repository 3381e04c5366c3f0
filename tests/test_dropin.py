"""A packed layer stands in for the torch.nn layer: attributes, calls, casts, state, other homes."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import subbyte as sb
from nets import Mixed, Tied
from subbyte import LowRes, SubbyteError
from subbyte.modules import PACKED
from test_artifact import packed

LAYERS = {
    nn.Linear: (lambda: nn.Linear(6, 4), (2, 6)),
    nn.Conv1d: (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7)),
    nn.Conv2d: (lambda: nn.Conv2d(3, 4, 3, stride=2), (2, 3, 7, 7)),
    nn.Conv3d: (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
    nn.ConvTranspose1d: (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 7)),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (2, 3, 5, 5)),
    nn.ConvTranspose3d: (lambda: nn.ConvTranspose3d(3, 4, 2, stride=2), (2, 3, 3, 4, 3)),
    nn.Embedding: (lambda: nn.Embedding(9, 4, padding_idx=0), None),
}


def example(kind):
    shape = LAYERS[kind][1]
    return torch.tensor([[1, 2], [0, 8]]) if shape is None else torch.rand(shape) - 0.5


def both(kind):
    """A float layer and the packed one that was made of it."""
    layer = LAYERS[kind][0]()
    return layer, packed(copy.deepcopy(layer))


def test_every_packed_layer_is_swept():
    assert set(LAYERS) == set(PACKED)


@pytest.mark.parametrize("kind", LAYERS)
def test_constructor_arguments_are_attributes(kind):
    layer, small = both(kind)
    for name in inspect.signature(kind.__init__).parameters:
        if name in vars(layer):  # `bias` and `device` are none
            assert getattr(small, name) == getattr(layer, name), name
    assert set(kind.__constants__) <= set(vars(small))


def test_attention_keeps_its_attributes():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, dropout=0.1)
    small = packed(nn.ModuleDict({"a": copy.deepcopy(attention)}))["a"]
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first"):
        assert getattr(small, name) == getattr(attention, name)


@pytest.mark.parametrize("kind", LAYERS)
def test_torchs_name_of_the_argument_works(kind):
    _, small = both(kind)
    x = example(kind)
    assert torch.equal(small(input=x), small(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_parameters_tell_type_and_device_and_take_no_gradient(kind):
    _, small = both(kind)
    found = list(small.parameters())
    assert found
    assert not any(p.requires_grad for p in found)
    assert next(small.parameters()).device.type == "cpu"


def test_a_network_without_biases_has_a_parameter_and_follows_casts():
    net = packed(nn.Sequential(nn.Linear(3, 3, bias=False)))
    assert next(net.parameters()).dtype is torch.float32
    assert next(net.half().parameters()).dtype is torch.float16
    assert not any("dtype_of" in name for name in net.state_dict())


@pytest.mark.parametrize("size", [1e-7, 1e7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_cast_and_back_changes_nothing(kind, dtype, size):
    layer, _ = both(kind)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(size)
    small = packed(layer)
    x = example(kind)
    wanted = small(x)
    assert torch.equal(copy.deepcopy(small).to(dtype).float()(x), wanted)


@pytest.mark.parametrize("kind", [k for k in LAYERS if k is not nn.Embedding])
def test_a_half_network_computes_what_float32_does_to_half_precision(kind):
    layer, _ = both(kind)
    with torch.no_grad():
        layer.weight.mul_(1e6)  # beyond float16's 65504
    small = packed(layer)
    x = 1e-5 * example(kind)
    x = x.half()
    got = copy.deepcopy(small).half()(x)
    small.precision = "float32"
    exact = small(x.float())
    assert got.dtype is torch.float16
    # one rounding of the result, and the order of float32 sums of at most 28 terms up to max |w x|
    bound = 2**-11 * exact.abs() + 2**-18 * (small.weight.abs().max() * x.float().abs().max() * 28)
    assert ((got.float() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])
def test_activations_that_are_no_floats_are_refused(kind, bias, dtype):
    sizes = (3, 4) if kind is nn.Linear else (3, 4, 1)
    small = packed(kind(*sizes, bias=bias))
    x = torch.ones(1, 3, *[1] * {nn.Linear: 0, nn.Conv1d: 1}.get(kind, 2)).to(dtype)
    with pytest.raises(SubbyteError, match=r"activations are \w+; a packed layer takes floating"):
        small(x)


def test_integer_tokens_do_not_reach_attention():
    net = packed(nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, bias=False)}))
    x = torch.ones(2, 1, 4, dtype=torch.int64)
    with pytest.raises(SubbyteError, match="activations are int64"):
        net["a"](x, x, x)


@pytest.mark.parametrize("change", [LowRes(levels=4), LowRes(levels=5, granularity="channel")])
def test_the_state_of_another_grid_is_refused_before_a_word_is_written(change):
    layer = nn.Linear(27, 1)
    five, other = packed(copy.deepcopy(layer)), packed(copy.deepcopy(layer), change)
    before = other.packed.words.clone()
    with pytest.raises(SubbyteError, match="the state dict is of a weight"):
        other.load_state_dict(five.state_dict())
    assert torch.equal(other.packed.words, before)
    five.load_state_dict(packed(copy.deepcopy(layer)).state_dict())  # its own grid


class Gain(nn.Linear):
    def __init__(self, *size):
        super().__init__(*size)
        self.gain = nn.Parameter(torch.ones(size[1]))


class Twice(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class More(nn.Linear):
    def norm(self):
        return self.weight.norm()


class Child(nn.Linear):
    def __init__(self, *size):
        super().__init__(*size)
        self.scale = nn.Linear(1, 1)


class Harmless(nn.Linear):
    """Only another start."""

    def __init__(self, *size):
        super().__init__(*size)
        nn.init.zeros_(self.bias)

    def extra_repr(self):
        return "harmless"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Gain, "it has a gain of its own"),
        (Twice, "overrides Linear.__call__"),
        (More, "adds Linear.norm"),
        (Child, "has a scale of its own"),
    ],
)
def test_a_subclass_that_packing_would_cut_down_is_named(kind, says):
    net = nn.Sequential(kind(3, 3), nn.Linear(3, 3))
    plan = sb.prepare(net, LowRes())
    assert "0" not in [layer.name for layer in plan.quantized]
    assert says in str(plan)
    asked = sb.Recipe((sb.Rule("0", method=LowRes()), sb.Rule()))
    with pytest.raises(SubbyteError, match=says):
        sb.prepare(nn.Sequential(kind(3, 3), nn.Linear(3, 3)), asked)


def test_a_forward_of_ones_own_on_one_layer_is_named():
    layer = nn.Linear(3, 3)
    layer.forward = functools.partial(nn.Linear.forward, layer)
    with pytest.raises(SubbyteError, match="has a forward of its own"):
        sb.prepare(nn.Sequential(layer), LowRes())


def test_a_subclass_that_only_starts_differently_packs():
    assert type(packed(nn.Sequential(Harmless(3, 3)))[0]).__name__ == "PackedLinear"


def test_packed_networks_pickle_and_copy():
    net = packed(Mixed())
    for twin in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        for name, value in net.state_dict().items():
            assert torch.equal(twin.state_dict()[name], value)


# ---------------------------------------------------------------- layers with a second home


class Homes(nn.Module):
    """Forward reaches its layers through `way`, not through the module tree."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.way = way
        self.home = {
            "list": lambda: [self.b, self.a],
            "tuple": lambda: (self.b, self.a),
            "dict": lambda: {0: self.b, 1: self.a},
            "nested": lambda: {"all": [(self.b,), [self.a]]},
        }[way]()

    def layers(self):
        if self.way == "dict":
            return self.home.values()
        if self.way == "nested":
            return [self.home["all"][0][0], self.home["all"][1][0]]
        return self.home

    def forward(self, x):
        for layer in self.layers():
            x = layer(x)
        return x


@pytest.mark.parametrize("way", ["list", "tuple", "dict", "nested"])
def test_layers_in_plain_containers_run_packed(way, tmp_path):
    net, x = Homes(way), torch.randn(3, 8)
    small = packed(net)
    assert [id(layer) for layer in small.layers()] == [id(small.b), id(small.a)]
    assert torch.equal(small(x), small.a(small.b(x)))
    sb.save(small, tmp_path / "net.safetensors")
    assert torch.equal(sb.load(tmp_path / "net.safetensors", model=Homes(way))(x), small(x))


class Bound(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.how = {
            "method": lambda: self.a.forward,
            "partial": lambda: functools.partial(self.a),
            "object": lambda: type("Box", (), {})(),
        }[how]()
        if how == "object":
            self.how.layer = self.a


@pytest.mark.parametrize("how", ["method", "partial", "object"])
def test_a_float_twin_that_would_go_on_is_named(how):
    with pytest.raises(SubbyteError, match=r"attribute 'how' \(\w+\) holds a layer that is being"):
        packed(Bound(how))


# ---------------------------------------------------------------- ties


def tied():
    net = Tied()
    rules = (sb.Rule("table"), sb.Rule("head"), sb.Rule(method=LowRes(levels=5)))
    return packed(net, sb.Recipe(rules))


def test_a_tie_is_stored_once_and_tied_again(tmp_path):
    net, tokens = tied(), torch.tensor([[1, 3]])
    sb.save(net, tmp_path / "net.safetensors")
    again = sb.load(tmp_path / "net.safetensors", model=Tied())
    assert again.head.weight is again.table.weight
    assert torch.equal(again(tokens), net(tokens))
    stored = load_file(tmp_path / "net.safetensors")
    assert "table.weight" in stored
    assert "head.weight" not in stored


def test_a_shared_layer_is_stored_once(tmp_path):
    def build():
        one = nn.Linear(40, 40)
        return nn.Sequential(one, nn.ReLU(), one)

    net, x = packed(build()), torch.randn(2, 40)
    once = sb.save(packed(nn.Sequential(nn.Linear(40, 40))), tmp_path / "one.safetensors")
    assert sb.save(net, tmp_path / "two.safetensors") < once + 100
    again = sb.load(tmp_path / "two.safetensors", model=build())
    assert again[0] is again[2]
    assert torch.equal(again(x), net(x))


# ---------------------------------------------------------------- wrappers


def compiled(net):
    return torch.compile(net, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
def test_a_wrapper_leaves_no_prefix_in_the_file(wrap, tmp_path):
    net = nn.Sequential(nn.Linear(4, 4))
    small, path = packed(net), tmp_path / "net.safetensors"
    sb.save(wrap(small), path)
    assert torch.equal(sb.load(path, model=nn.Sequential(nn.Linear(4, 4)))[0].packed.words,
                       small[0].packed.words)  # fmt: skip


def test_a_prefix_inside_is_explained(tmp_path):
    net = nn.Sequential(compiled(nn.Sequential(nn.Linear(4, 4))))
    sb.save(packed(net), tmp_path / "net.safetensors")
    with pytest.raises(SubbyteError, match=r"prefix '_orig_mod\.' of torch\.compile"):
        sb.load(tmp_path / "net.safetensors", model=nn.Sequential(nn.Sequential(nn.Linear(4, 4))))


def test_a_name_with_brackets_is_matched_as_it_is():
    net = nn.ModuleDict({"block[1]": nn.Linear(4, 4), "block[2]": nn.GRUCell(4, 4)})
    recipe = sb.Recipe((sb.Rule("block[2]"), sb.Rule(method=LowRes())))
    assert [layer.name for layer in sb.prepare(net, recipe).quantized] == ["block[1]"]
