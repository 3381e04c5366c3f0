"""A network as data: traced, kept in the file, opened without its class, equal to the bit."""

import copy
import json
import pickle
import random
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import subbyte as sb
from nets import Mixed, Tied, mixed_input
from subbyte import LowRes, SubbyteError
from subbyte.graph.layers import LAYERS
from subbyte.graph.network import skeleton
from subbyte.graph.operators import NUMBERS, OPERATORS
from subbyte.graph.program import Program
from subbyte.graph.trace import trace
from subbyte.models import NETWORKS, build
from test_artifact import edit, packed


class UNet(nn.Module):
    """Skips, a transposed convolution, resizing, padding, a dict with a list inside."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.mix = nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect")
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = F.relu(self.norm(self.a(x)))
        y = torch.cat([a, self.up(F.gelu(self.down(a)))], 1)
        y = F.interpolate(F.silu(self.mix(y)), scale_factor=2, mode="bilinear")
        return {"map": self.out(y), "all": [y.mean((2, 3)), F.pad(y, (1, 1, 0, 0))[:, :, ::2]]}


class Odd(nn.Module):
    """Every other packed layer, a buffer, a constant, masked attention, a size in arithmetic."""

    def __init__(self):
        super().__init__()
        self.one, self.three = nn.Conv1d(4, 6, 3), nn.Conv3d(1, 2, 2)
        self.back = nn.ConvTranspose1d(6, 4, 3)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("mask", torch.ones(8, 8).triu(1).bool())
        self.register_buffer("hidden", torch.arange(4.0), persistent=False)
        self.free = nn.Parameter(torch.randn(4))

    def forward(self, x, y):
        z = self.back(self.one(x)).transpose(1, 2) * self.hidden + self.free
        z, weights = self.attend(z, z, z, attn_mask=self.mask)
        cube = self.three(y).reshape(x.size(0) * 2, -1)
        return z, weights, cube.sum(1) / cube.size(1), torch.tensor([1.0, 2.0]) * x.size(0)


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


def images(*shape):
    return lambda n: (torch.randn(n, *shape),)


CASES = {
    "unet": (UNet, images(3, 8, 8)),
    "encoder": (encoder, images(5, 16)),
    "mixed": (Mixed, lambda n: mixed_input(n=n)),
    "odd": (Odd, lambda n: (torch.randn(n, 4, 8), torch.randn(n, 1, 3, 3, 3))),
    "tied": (Tied, lambda n: (torch.randint(0, 7, (n, 3)),)),
    "linear": (lambda: nn.Linear(3, 2), images(3)),
}


def network(name):
    """A packed network by name, and what makes n inputs of it."""
    torch.manual_seed(0)
    if name in CASES:
        build_, inputs = CASES[name]
        rules = (sb.Rule("table"), sb.Rule("head")) if name == "tied" else ()
        return packed(build_(), sb.Recipe((*rules, sb.Rule(method=LowRes(levels=5))))), inputs
    net = build(name)
    preprocess = net.preprocess
    return packed(net), images(len(preprocess.mean), *(preprocess.size or (32, 32)))


def leaves(value):
    return pytree.tree_leaves(dict(value) if isinstance(value, dict) else value)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


SMALL = [*CASES, *(n for n in NETWORKS if n not in ("resnet32", "resnet44", "resnet56"))]
OPEN = """
import sys, torch, subbyte as sb
inputs, outputs = torch.load(sys.argv[2])
net = sb.load(sys.argv[1])
for i, o in zip(inputs, outputs):
    got = net(*i)
    flat = torch.utils._pytree.tree_leaves(got)
    want = torch.utils._pytree.tree_leaves(o)
    assert len(flat) == len(want) and all(map(torch.equal, flat, want)), "differs"
"""


@pytest.mark.parametrize("name", [*CASES, "digitsnet"])
def test_a_fresh_process_opens_the_file_without_the_class(name, tmp_path):
    net, inputs = network(name)
    sb.save(net, tmp_path / "net.safetensors", example=inputs(2))
    if name not in CASES:  # a zoo network knows its class: take that away
        edit(tmp_path / "net.safetensors", lambda manifest: manifest.update(network=None))
    given = [inputs(n) for n in (2, 1, 5)]
    torch.save((given, [net(*x) for x in given]), tmp_path / "data.pt")
    code = [
        sys.executable,
        "-c",
        OPEN,
        str(tmp_path / "net.safetensors"),
        str(tmp_path / "data.pt"),
    ]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", SMALL)
def test_a_loaded_program_equals_to_the_bit_for_any_batch(name, tmp_path):
    net, inputs = network(name)
    path = tmp_path / "net.safetensors"
    sb.save(net, path, example=inputs(1))
    edit(path, lambda manifest: manifest.update(network=None))
    again = sb.load(path)
    for n in (1, 2, 3):
        x = inputs(n)
        assert equal(again(*x), net(*x))
    own = {k for k in net.state_dict() if "_extra_state" not in k}
    assert own <= set(again.state_dict())


@pytest.mark.parametrize("name", ["unet", "odd", "vit1"])
def test_a_loaded_program_is_a_module_like_any_other(name, tmp_path):
    net, inputs = network(name)
    path, other = tmp_path / "net.safetensors", tmp_path / "other.safetensors"
    sb.save(net, path, example=inputs(2))
    edit(path, lambda manifest: manifest.update(network=None))
    again, x = sb.load(path), inputs(2)
    wanted = net(*x)
    with torch.no_grad():
        assert equal(copy.deepcopy(again)(*x), wanted)
        assert equal(pickle.loads(pickle.dumps(again))(*x), wanted)
        assert equal(torch.compile(again, backend="eager", fullgraph=True)(*x), wanted)
        assert equal(torch.export.export(again, x, strict=False).module()(*x), wanted)
    sb.save(again, other)  # the program stays with it
    assert equal(sb.load(other)(*x), wanted)
    assert not again.training


@pytest.mark.parametrize("name", ["unet", "resnet20", "digitsnet", "mobilenetv1"])
def test_a_fused_network_is_saved_loaded_and_timed(name, tmp_path):
    net, inputs = network(name)
    fused, x = sb.fuse(net), inputs(2)
    sb.save(fused, tmp_path / "net.safetensors", example=inputs(1))
    again = sb.load(tmp_path / "net.safetensors")
    assert equal(again(*x), fused(*x))
    if name == "digitsnet":
        report = sb_bench(again, x[0][0])
        assert report.networks


def sb_bench(net, example):
    from subbyte.bench import bench

    return bench(net, example, seconds=0.05)


def test_a_loaded_program_fuses_as_its_network_does(tmp_path):
    net, inputs = network("unet")
    sb.save(net, tmp_path / "net.safetensors", example=inputs(1))
    x = inputs(2)
    assert equal(sb.fuse(sb.load(tmp_path / "net.safetensors"))(*x), sb.fuse(net)(*x))


def test_a_program_of_another_network_is_not_kept_by_fuse(tmp_path):
    net, inputs = network("unet")
    sb.save(net, tmp_path / "net.safetensors", example=inputs(1))
    fused = sb.fuse(sb.load(tmp_path / "net.safetensors"))
    with pytest.raises(SubbyteError, match="the model is fused; give save an input"):
        sb.save(fused, tmp_path / "fused.safetensors")


def test_adapters_are_saved_with_a_fused_network(tmp_path):
    torch.manual_seed(0)
    done = sb.quantize(build("digitsnet"), sb.CoRa(target_bits=2.6, tune=0),
                       calibration=[torch.rand(64, 1, 8, 8)])  # fmt: skip
    fused, x = sb.fuse(sb.pack(done)), torch.rand(3, 1, 8, 8)
    sb.save(fused, tmp_path / "net.safetensors", example=x)
    assert equal(sb.load(tmp_path / "net.safetensors")(x), fused(x))


def test_inputs_by_name_and_by_dict(tmp_path):
    net, inputs = network("odd")
    x, y = inputs(2)
    sb.save(net, tmp_path / "net.safetensors", example={"x": x, "y": y})
    again = sb.load(tmp_path / "net.safetensors")
    assert equal(again(y=y, x=x), net(x, y))


def test_the_class_still_loads_a_file_with_a_program(tmp_path):
    net, inputs = network("odd")
    sb.save(net, tmp_path / "net.safetensors", example=inputs(2))
    again, x = sb.load(tmp_path / "net.safetensors", model=Odd()), inputs(3)
    assert type(again).__name__ == "Odd"
    assert equal(again(*x), net(*x))


def test_images_become_inputs_as_before(tmp_path):
    net = packed(build("digitsnet"))
    sb.save(net, tmp_path / "net.safetensors", example=torch.rand(1, 1, 8, 8))
    edit(tmp_path / "net.safetensors", lambda manifest: manifest.update(network=None))
    pixels = torch.randint(0, 255, (2, 1, 8, 8), dtype=torch.uint8)
    again = sb.load(tmp_path / "net.safetensors")
    assert torch.equal(again.preprocess(pixels), net.preprocess(pixels))


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_says_so_and_is_saved_without(tmp_path):
    net, path = packed(Asks()), tmp_path / "net.safetensors"
    with pytest.warns(UserWarning, match="saved without a program: Asks cannot be traced"):
        sb.save(net, path, example=torch.randn(2, 4))
    with pytest.raises(SubbyteError, match="neither a zoo network nor a program"):
        sb.load(path)
    x = torch.randn(2, 4)
    assert torch.equal(sb.load(path, model=Asks())(x), net(x))
    for wrong in ("x", [3], {"x": None}):
        with pytest.raises(SubbyteError, match="the example holds a"):
            trace(net, wrong)
    assert "forward" not in vars(net.linear)  # nothing of the tracing stays


# ---------------------------------------------------------------- the program as data


def program_of(name):
    net, inputs = network(name)
    return trace(net, inputs(2)).to_dict()


@pytest.mark.parametrize("name", [*CASES, "vit1"])
def test_a_program_survives_json(name):
    value = program_of(name)
    assert Program.from_dict(json.loads(json.dumps(value))).to_dict() == value


def test_layers_have_the_float_networks_constructor_arguments():
    net, inputs = network("odd")
    program = trace(net, inputs(2))
    constants = {"_constants.c0": torch.zeros(4), "_constants.c1": torch.zeros(2)}
    built = skeleton(program, net.state_dict() | constants, "x")
    for name, layer in Odd().named_modules():
        if type(layer).__name__ in LAYERS and name in program.layers:
            for key, value in vars(layer).items():
                if not key.startswith("_") and key != "training":
                    assert getattr(built.get_submodule(name), key) == value, (name, key)


BAD = [
    (lambda p: p["nodes"][0].update(op="Eval"), "operator 'Eval' is unknown"),
    (lambda p: p["nodes"][0]["args"].update(code="x"), "has no argument 'code'"),
    (lambda p: p["nodes"].reverse(), "before it is made"),
    (lambda p: p["nodes"].append(dict(p["nodes"][0])), "used already"),
    (lambda p: p["nodes"][0].update(out="a.b"), "no word or used already"),
    (lambda p: p["nodes"][0].update(out="__import__('os')"), "no word or used already"),
    (lambda p: p["nodes"][0].update(layer="absent"), "calls layer 'absent', which it has not"),
    (lambda p: p.update(output={"value": "n999"}), "uses 'n999' before it is made"),
    (lambda p: p.update(output={"call": "os.system"}), "argument of kind 'call'"),
    (lambda p: p["inputs"][0].update(shape=[-1]), "input 'x' is float32"),
    (lambda p: p["inputs"][0].update(dtype="object"), "input 'x' is object"),
    (lambda p: p["layers"]["a"].update(type="Lambda"), "is of type 'Lambda'"),
    (lambda p: p["nodes"][0]["args"].update(x=[[[[[[[[1]]]]]]]]), "lists in lists"),
    (lambda p: p["nodes"][0]["args"].update(x=10**400), "has the number"),
    (lambda p: p.pop("nodes"), "the program is malformed"),
    (lambda p: p.update(nodes=5), "the program is malformed"),
]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_a_program_that_lies_is_refused(change, says, tmp_path):
    net, inputs = network("unet")
    path = tmp_path / "net.safetensors"
    sb.save(net, path, example=inputs(2))
    edit(path, lambda manifest: change(manifest["program"]))
    with pytest.raises(SubbyteError, match=says) as error:
        sb.load(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(in_channels=10**9), lambda s: s.update(kernel_size=[10**8, 10**8]),
        lambda s: s.update(groups=7), lambda s: s.update(stride="os"), lambda s: s.update(bias=0.5),
        lambda s: s.update(padding_mode="up"), lambda s: s.update(out_channels=-1),
        lambda s: s.update(activation="exec"), lambda s: s.pop("in_channels"),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit_the_file_are_refused_before_memory_is_taken(change, tmp_path):
    net, inputs = network("unet")
    path = tmp_path / "net.safetensors"
    sb.save(net, path, example=inputs(2))
    edit(path, lambda manifest: change(manifest["program"]["layers"]["a"]))
    with pytest.raises(SubbyteError) as error:
        sb.load(path)
    assert len(str(error.value)) < 600


def test_random_edits_of_a_program_end_in_one_line(tmp_path):
    net, inputs = network("unet")
    path = tmp_path / "net.safetensors"
    sb.save(net, path, example=inputs(2))
    with safe_open(path, framework="pt") as file:
        whole = json.loads(file.metadata()["subbyte"])["program"]
    draw = random.Random(0)
    for _ in range(400):
        value = copy.deepcopy(whole)
        holder, key = draw.choice(list(places(value)))
        holder[key] = draw.choice(
            [None, -1, 10**30, 1.5, "", "x", "n0", [], {}, {"value": "n1"}, {"state": "a"}, True]
        )
        said = fault_of(json.loads(json.dumps(value)), whole)
        assert len(said) < 400
        assert "\n" not in said


def fault_of(value, whole):
    """What is said of a program, '' if it is accepted; nothing but SubbyteError may come."""
    try:
        program = Program.from_dict(value)
        names = program.state_names | Program.from_dict(whole).state_names
        skeleton(program, {name: torch.zeros(2) for name in names}, "x")
    except SubbyteError as error:
        return str(error)
    return ""


def places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


@pytest.mark.parametrize("name", ["scale", "bias", "codes", "up"])
def test_a_parameter_may_have_the_name_of_a_layers_part(name, tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_parameter(name, nn.Parameter(torch.rand(3)))

        def forward(self, x):
            return self.linear(x) * getattr(self, name)

    net, x = packed(Scaled()), torch.randn(4, 3)
    sb.save(net, tmp_path / "net.safetensors", example=x)
    assert equal(sb.load(tmp_path / "net.safetensors")(x), net(x))


HOSTILE = ['training") or print("RAN', "a'b", "a\\", "a\nb", "class", "a.def", "x{y}", "\u2028",
           "a" * 999]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_code_is_refused(name, capsys):
    """fx writes source from names: what is no plain name must not get there."""
    state = program_of("odd")
    text = json.dumps(state).replace('"state": "free"', '"state": ' + json.dumps(name))
    assert text != json.dumps(state)
    layer = json.loads(json.dumps(state).replace('"one"', json.dumps(name)))
    for value in (json.loads(text), layer):
        with pytest.raises(SubbyteError, match=r"layer or tensor named") as error:
            Program.from_dict(value)
        assert "\n" not in str(error.value)
    with pytest.raises(SubbyteError):
        skeleton(Program.from_dict(state), {**tensors_of("odd"), name: torch.zeros(1)}, "x")
    assert "RAN" not in capsys.readouterr().out


def tensors_of(name):
    names = Program.from_dict(program_of(name)).state_names
    return {path: torch.zeros(1) for path in names}


def test_names_with_brackets_are_names(tmp_path):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleDict({"block[1] of-two": nn.Linear(4, 4)})

        def forward(self, x):
            return self.blocks["block[1] of-two"](x)

    net, x = packed(Blocks()), torch.randn(3, 4)
    sb.save(net, tmp_path / "net.safetensors", example=x)
    assert equal(sb.load(tmp_path / "net.safetensors")(x), net(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda layer, x: layer(x) / int(x.shape[0]) + torch.full((x.shape[0], 1), 2.0),
        lambda layer, x: layer(x) if x.shape[0] < 5 else layer(-x),
        lambda layer, x: layer(x).reshape(4, 4),
        lambda layer, x: layer(x)[:4] if x.shape[0] > 3 else layer(x),
    ],
)
def test_a_network_that_differs_by_batch_has_no_program(forward):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return forward(self.linear, x)

    with pytest.raises(SubbyteError, match="cannot be traced"):
        trace(packed(Net()), torch.randn(4, 4))


@pytest.mark.parametrize("layout", ["x", "float32", "ops", "load"])
def test_a_layout_is_a_layout(layout):
    value = program_of("unet")
    value["nodes"][0]["args"]["x"] = {"layout": layout}
    with pytest.raises(SubbyteError, match="has the layout"):
        Program.from_dict(value)


def test_a_program_makes_no_tensor_larger_than_it_may():
    value = program_of("unet")
    value["nodes"].insert(0, {"op": "Zeros", "out": "z", "args": {"shape": [2**20, 2**20]}})
    with pytest.raises(SubbyteError, match="makes a tensor of"):
        Program.from_dict(value)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_names_arguments_of_its_operation(name):
    op = OPERATORS[name]
    schema = [argument.name for argument in op.overload._schema.arguments]
    assert set(op.renamed) & set(schema) or not op.renamed
    assert len(op.arguments) == len(set(op.arguments.values()))
    assert set(op.arguments.values()) <= set(schema)


def test_the_format_document_lists_exactly_the_operators():
    from pathlib import Path

    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    rows = set()
    for line in text.split("## Operators", 1)[1].splitlines():
        if line.startswith("| `"):
            rows.add(line.split("`")[1])
    assert rows == {*OPERATORS, *NUMBERS, "Layer", "Item"}
