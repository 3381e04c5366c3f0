"""The C++ runtime beside PyTorch's packed network: every operation on its own inputs, and whole."""

import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import subbyte as sb
from subbyte import SubbyteError
from subbyte.core.functional import n_groups
from subbyte.graph.operators import ITEM
from subbyte.graph.program import LAYER
from test_artifact import edit
from test_program import SMALL, leaves, network

pytest.importorskip("subbyte._native", reason="the C++ core was not built")

import subbyte.runtime as rt
from subbyte.runtime.library import library

ROOT = Path(__file__).resolve().parents[1]
EPS = 2.0**-23
# Whole networks of integer products, sums, maxima and ReLUs: the same in any order of summation.
TO_THE_BIT = ("digitsnet", "cvnn1", "cvnn2", "fcnn1", "fcnn2", "lenet5", "vgg7", "linear")
LARGE = ("mobilenetv1", "squeezenet11", "vit2", "vgg7", "cvnn2", "fcnn2")
# Operations that move values, choose among them, or round once.
EXACT = {"Relu", "Clip", "MaxPool2d", "Add", "Sub", "Mul", "Div", "Concat", "Slice", "Select",
         "Reshape", "ReshapeCopy", "Flatten", "Transpose", "SwapAxes", "Unsqueeze", "Squeeze",
         "Expand", "Pad", "ConstantPad", "Gather", "Identity", "Contiguous", "Dropout", "Split",
         "Chunk", "Equal", "Where", "MaskedFill", "Cast", "CastCopy", "ResizeNearest"}  # fmt: skip


def saved(net, inputs, path):
    """A file that opens by its program alone, and what PyTorch opens it as."""
    sb.save(net, path, example=inputs(1))
    edit(path, lambda manifest: manifest.update(network=None))
    return sb.load(path, precision="int8")


def arrays(inputs):
    return [x.numpy() for x in inputs]


def results(value):
    return list(value.values()) if isinstance(value, dict) else [value]


def same(found, wanted):
    return found.shape == tuple(wanted.shape) and np.array_equal(
        found, wanted.numpy(), equal_nan=found.dtype.kind == "f"
    )


class Beside(fx.Interpreter):
    """Runs a loaded program node by node, each on the runtime's own values."""

    def __init__(self, net, seen):
        super().__init__(net)
        self.seen, self.program, self.place = seen, net.meta["program"], 0
        self.compared = []

    def run_node(self, node):
        wanted = super().run_node(node)
        if node.op not in ("call_function", "call_module", "call_method"):
            return wanted
        made = self.program.nodes[self.place]
        self.place += 1
        if not isinstance(wanted, torch.Tensor):
            return self.listed(made, wanted)
        assert made.out in self.seen, f"the runtime does not show {made.out} ({made.op})"
        found = self.seen[made.out]
        self.check(node, made, found, wanted)
        return torch.from_numpy(found.copy())

    def listed(self, made, wanted):
        if not isinstance(wanted, list | tuple):
            return wanted  # a size
        parts = [self.seen.get(f"{made.out}.{i}") for i in range(len(wanted))]
        return type(wanted)(
            w if p is None or w is None else torch.from_numpy(p.copy())
            for p, w in zip(parts, wanted, strict=True)
        )

    def check(self, node, made, found, wanted):
        args, _ = self.fetch_args_kwargs_from_env(node)
        exact = made.op in EXACT or wanted.dtype != torch.float32
        limit = 0.0
        if made.op == LAYER:
            layer = self.module.get_submodule(made.layer)
            exact = exact or by_kernels(layer, args[0])
            limit = 0.0 if exact else layer_bound(layer, wanted, *args)
        elif not exact:
            limit = bound(made.op, wanted, args)
        self.compared.append((made.op, exact))
        what = f"{made.op} {made.layer} {made.out}"
        assert found.shape == tuple(wanted.shape), what
        if exact:
            assert same(found, wanted), f"{what} is not the same to the bit"
            return
        error = np.abs(found.astype(np.float64) - wanted.double().numpy())
        assert (error <= np.asarray(limit)).all(), f"{what}: off by {error.max():.3g}"


def by_kernels(layer, x):
    """Whether a layer multiplies by the kernels that the two sides share, without an adapter."""
    if not isinstance(layer, sb.modules.PackedConv2d | sb.modules.PackedLinear):
        return False
    return layer.why_not(x) is None and layer.packed.up is None


def layer_bound(layer, wanted, x, plus=None):
    """Of the difference of two float32 sums of k products in any orders: 2 k eps sum |x| |w|."""
    if isinstance(layer, sb.modules.PackedEmbedding):
        return 0.0 if layer.packed.up is None else 4 * layer.packed.up.shape[1] * EPS
    if not hasattr(layer, "packed"):  # a norm: two roundings of each term, and of the factors
        return 16 * EPS * (wanted.abs().max().item() + x.abs().max().item() * norm_factor(layer))
    weight = layer.weight.double().abs()
    x = x.double().abs()
    bias = 0.0 if layer.bias is None else layer.bias.double().abs().max().item()
    k = weight.numel() // min(weight.shape[:2]) + 4
    if isinstance(layer, sb.modules.PackedLinear):
        total = F.linear(x, weight)
    elif "Transpose" in type(layer).__name__:
        total = type(layer).function(
            x, weight, None, layer.stride, layer.padding, layer.output_padding, layer.groups,
            layer.dilation,
        )  # fmt: skip
    else:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer.pads, mode=layer.padding_mode), 0
        total = type(layer).function(
            x, weight, None, layer.stride, padding, layer.dilation, layer.groups
        )
    side = 0.0 if plus is None else plus.abs().max().item()
    return (2 * k * EPS * (total + bias + side)).numpy()


def norm_factor(norm):
    if hasattr(norm, "scale"):
        return norm.scale.abs().max().item()
    weight = 1.0 if norm.weight is None else norm.weight.abs()
    return (weight / (norm.running_var + norm.eps).sqrt()).max().item()


def bound(op, wanted, args):
    """Sums of k terms in other orders: 2 k eps of the terms; functions: a few eps of the result."""
    tensors = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    largest = [t.abs().max().item() for t in tensors if t.numel()]
    most = max([1.0, *largest])
    if op in ("Linear", "MatMul", "BatchMatMul", "AddMatMul", "Conv2d"):
        k = tensors[0].shape[-1] if op != "Conv2d" else tensors[1][0].numel()
        return 2 * (k + 4) * EPS * k * most * most
    if op in ("ReduceMean", "ReduceSum", "AdaptiveAveragePool2d", "AveragePool2d"):
        k = max(1, tensors[0].numel() // max(1, wanted.numel()))
        return 4 * (k**0.5 + 8) * EPS * largest[0] * (k if op == "ReduceSum" else 1)
    if op == "Attention":
        return 4 * (tensors[1].shape[-2] + tensors[0].shape[-1]) * EPS * most * most
    return 64 * EPS * max(1.0, wanted.abs().max().item(), most)


def check_each(path, opened, inputs):
    """Every operation of the program, on the values that the runtime made before it."""
    seen = {}
    rt.open(path, threads=1).watch(lambda name, value: seen.update({name: value}), *arrays(inputs))
    beside = Beside(opened, seen)
    with torch.no_grad():
        beside.run(*inputs)
    return beside.compared


def check_whole(path, opened, inputs, precision="int8"):
    with torch.no_grad():
        wanted = leaves(opened(*inputs))
    found = results(rt.open(path, threads=1, precision=precision).run(*arrays(inputs)))
    assert len(found) == len(wanted)
    return found, wanted


@pytest.mark.parametrize("name", SMALL)
def test_every_operation_of_every_network_is_pytorchs(name, tmp_path):
    net, inputs = network(name)
    path = tmp_path / "net.safetensors"
    opened = saved(net, inputs, path)
    x = inputs(2)
    if not isinstance(opened, fx.GraphModule):  # one layer
        found, wanted = check_whole(path, opened, x)
        assert same(found[0], wanted[0])
        return
    compared = check_each(path, opened, x)
    assert len(compared) >= 1
    assert any(exact for _, exact in compared)
    if name in TO_THE_BIT:
        found, wanted = check_whole(path, opened, x)
        assert all(map(same, found, wanted))


@pytest.mark.parametrize("name", [n for n in SMALL if n not in LARGE])
def test_whole_networks_agree_without_rounding(name, tmp_path):
    """In float32 nothing jumps: what is left is the order of sums, some eps of the largest."""
    net, inputs = network(name)
    path = tmp_path / "net.safetensors"
    saved(net, inputs, path)
    found, wanted = check_whole(path, sb.load(path, precision="float32"), inputs(3), "float32")
    for f, w in zip(found, wanted, strict=True):
        assert np.abs(f - w.numpy()).max(initial=0) <= 1e-5 * max(1.0, w.abs().max().item())


@pytest.mark.parametrize("name", ["unet", "resnet20", "digitsnet"])
def test_fused_networks(name, tmp_path):
    net, inputs = network(name)
    path = tmp_path / "net.safetensors"
    opened = saved(sb.fuse(net), inputs, path)
    compared = check_each(path, opened, inputs(2))
    assert sum(exact for op, exact in compared if op == LAYER) >= 2


def layers(*, group=None, adapter=False):
    """A network with groups, or with adapters, on its layers."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 9), nn.LayerNorm(9))
    if adapter:
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2),
            nn.Flatten(), nn.Linear(16 * 16, 5),
        )  # fmt: skip
        batches = [torch.randn(8, 3, 6, 6) for _ in range(2)]
        done = sb.quantize(net, sb.CoRa(bits=2), calibration=batches)
        return sb.pack(done), lambda n: (torch.randn(n, 3, 6, 6),)
    grid = sb.uniform(5, sb.PerGroup(group))
    made = {}
    for name in ("0", "2"):
        codes = torch.randint(0, 5, net[int(name)].weight.shape, dtype=torch.uint8)
        scale = torch.rand(n_groups(codes.shape, grid)) + 0.1
        bias = net[int(name)].bias.detach()
        made[name] = sb.QuantizedLayer(sb.QuantizedTensor(codes, scale, grid), bias)
    return sb.pack(net, made), lambda n: (torch.randn(n, 20),)


@pytest.mark.parametrize("settings", [{"group": 8}, {"adapter": True}], ids=str)
def test_groups_and_adapters(settings, tmp_path):
    net, inputs = layers(**settings)
    path = tmp_path / "net.safetensors"
    opened = saved(net, inputs, path)
    for n in (1, 9):
        compared = check_each(path, opened, inputs(n))
        exact = [exact for op, exact in compared if op == LAYER]
        assert all(exact) if "group" in settings else len(exact) == 3


def test_odd_values_behave_as_in_pytorch(tmp_path):
    net, inputs = network("digitsnet")
    path = tmp_path / "net.safetensors"
    opened = saved(net, inputs, path)
    (x,) = inputs(4)
    x[1, 0, 2, 3], x[2, 0, 0, 0], x[3] = float("nan"), float("inf"), 1e-38
    found, wanted = check_whole(path, opened, (x,))
    wanted = wanted[0].numpy()
    assert np.array_equal(np.isnan(found[0]), np.isnan(wanted))
    good = ~np.isnan(wanted)
    assert np.allclose(found[0][good], wanted[good], rtol=1e-5, atol=1e-6)
    assert np.array_equal(found[0][0], wanted[0])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    net, inputs = network("digitsnet")
    path = tmp_path_factory.mktemp("runtime") / "net.safetensors"
    sb.save(net, path, example=inputs(1))
    return path, inputs


def test_threads_and_batches_share_a_network(digits):
    path, inputs = digits
    net = rt.open(path, threads=2)
    given = [inputs(n)[0].numpy() for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]
    alone = [rt.open(path, threads=1).run(x) for x in given]
    wrong = []

    def work(shift):
        for i in range(30):
            k = (i + shift) % len(given)
            if not np.array_equal(net.run(given[k]), alone[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_profile_names_every_step(digits):
    path, inputs = digits
    steps = rt.open(path).profile(inputs(1)[0].numpy())
    assert {step.how for step in steps if step.layer and step.op == LAYER} >= {"int8"}
    assert all(step.seconds >= 0 for step in steps)
    assert len({step.out for step in steps}) > 5


def test_inputs_by_name_and_with_strides(digits):
    path, inputs = digits
    x, net = inputs(4)[0].numpy(), rt.open(path)
    (own,) = net.inputs
    assert (own.shape, own.dtype) == ((None, 1, 8, 8), np.dtype("float32"))
    assert np.array_equal(net.run(**{own.name: x}), net.run(x))
    assert np.array_equal(net.run(x.swapaxes(2, 3)), net.run(x.swapaxes(2, 3).copy()))
    assert not np.array_equal(net.run(x.swapaxes(2, 3)), net.run(x))
    assert net.run(x[:0]).shape == (0, 10)


# The package by itself, without PyTorch: its folder, a file, inputs, outputs, threads.
APART = """
import importlib.util, sys, numpy as np
spec = importlib.util.spec_from_file_location("subbyte_runtime", sys.argv[1] + "/__init__.py",
                                              submodule_search_locations=[sys.argv[1]])
module = importlib.util.module_from_spec(spec)
sys.modules["subbyte_runtime"] = module
spec.loader.exec_module(module)
net = module.open(sys.argv[2], threads=int(sys.argv[5]))
np.save(sys.argv[4], net.run(np.load(sys.argv[3])))
assert "torch" not in sys.modules and "subbyte" not in sys.modules
"""


def test_a_process_without_torch_gives_the_same_bits(digits, tmp_path):
    path, inputs = digits
    x = inputs(3)[0]
    np.save(tmp_path / "x.npy", x.numpy())
    code = [sys.executable, "-c", APART, str(Path(rt.__file__).parent), str(path)]
    done = subprocess.run(
        [*code, str(tmp_path / "x.npy"), str(tmp_path / "y.npy"), "2"],
        capture_output=True, text=True, check=False,
        env={"SUBBYTE_RUNTIME": library()._name, "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert same(np.load(tmp_path / "y.npy"), sb.load(path, precision="int8")(x))


# ---------------------------------------------------------------- bad input


def refused(match, call):
    with pytest.raises(SubbyteError, match=match) as found:
        call()
    assert "\n" not in str(found.value)


def runs(path, x):
    """Whether a file runs; if not, it is refused in one line."""
    try:
        rt.open(path, verify=False).run(x)
    except SubbyteError as error:
        return "\n" in str(error) and pytest.fail(f"several lines: {error}")
    return True


def test_bad_inputs_are_one_line(digits, tmp_path):
    path, inputs = digits
    x = inputs(2)[0].numpy()
    net = rt.open(path)
    refused("float64", lambda: net.run(x.astype(np.float64)))
    refused(r"the network takes float32 \[-1, 1, 8, 8\]", lambda: net.run(x[:, :, :7]))
    refused("is missing", net.run)
    refused("each once", lambda: net.run(x, x))
    refused("cannot be opened", lambda: rt.open(tmp_path / "none.safetensors"))
    refused("precision='int4'", lambda: rt.open(path, precision="int4"))
    refused("over what is allowed|more memory", lambda: rt.open(path, memory=100).run(x))
    net.threads = 0
    refused("threads must be 1 or more", lambda: net.run(x))


def test_a_file_without_a_program_or_with_an_unknown_operator(digits, tmp_path):
    path, _ = digits
    broken = tmp_path / "net.safetensors"
    shutil.copy(path, broken)
    edit(broken, lambda manifest: manifest.pop("program"))
    refused("has no program", lambda: rt.open(broken))
    shutil.copy(path, broken)
    edit(broken, lambda manifest: manifest["program"]["nodes"][1].update(op="Magic"))
    refused("no operator 'Magic'", lambda: rt.open(broken))
    shutil.copy(path, broken)
    edit(broken, lambda manifest: manifest.update(version=99))
    refused("format version 99", lambda: rt.open(broken))
    shutil.copy(path, broken)
    edit(broken, lambda m: m["program"]["nodes"][1]["args"].update(x={"value": "later"}))
    refused("'later' before it is made", lambda: rt.open(broken))
    shutil.copy(path, broken)
    edit(broken, lambda m: m["program"]["nodes"][1]["args"].update(odd=3))
    refused("argument 'odd' is unknown", lambda: rt.open(broken).run(np.zeros((1, 1, 8, 8), "f")))


def test_a_file_that_was_cut_off_is_refused_wherever_it_ends(digits, tmp_path):
    path, _ = digits
    data, part = path.read_bytes(), tmp_path / "net.safetensors"
    for n in (0, 1, 7, 8, 9, 500, len(data) // 3, len(data) // 2, len(data) - 8, len(data) - 1):
        part.write_bytes(data[:n])
        refused("safetensors", lambda: rt.open(part))


def test_every_flipped_bit_is_found_by_the_checksums(digits, tmp_path):
    path, _ = digits
    data, part = path.read_bytes(), tmp_path / "net.safetensors"
    for place in range(0, len(data), max(1, len(data) // 60)):
        wrong = bytearray(data)
        wrong[place] ^= 1 << place % 8
        part.write_bytes(wrong)
        refused("net.safetensors: ", lambda: rt.open(part))


def test_without_checksums_a_flipped_bit_is_refused_or_runs(digits, tmp_path):
    path, inputs = digits
    data, part = path.read_bytes(), tmp_path / "net.safetensors"
    x = inputs(1)[0].numpy()
    (length,) = struct.unpack("<Q", data[:8])
    ran = 0
    for place in [*range(8, 8 + length, length // 150), *range(8 + length, len(data), 997)]:
        wrong = bytearray(data)
        wrong[place] ^= 1 << place % 7
        part.write_bytes(wrong)
        ran += runs(part, x)
    assert ran > 5


def test_codes_above_the_grid_are_refused(digits, tmp_path):
    path, inputs = digits
    broken = tmp_path / "net.safetensors"
    shutil.copy(path, broken)

    def spoil(tensors):
        name = next(name for name in tensors if name.endswith(".codes"))
        tensors[name] = tensors[name].clone()
        tensors[name][:8] = 255

    edit(broken, lambda manifest: None, spoil)
    x = inputs(1)[0].numpy()
    refused("a code is above the grid", lambda: rt.open(broken).run(x))


def test_a_shape_of_the_program_that_is_not_the_weights_is_refused(digits, tmp_path):
    path, inputs = digits
    broken = tmp_path / "net.safetensors"

    def change(manifest):
        first = next(iter(manifest["program"]["layers"].values()))
        first["groups"] = 7

    shutil.copy(path, broken)
    edit(broken, change)
    refused("groups|dimension 1", lambda: rt.open(broken).run(inputs(1)[0].numpy()))


# ---------------------------------------------------------------- C++

COMPILER = shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_example_in_cpp_builds_and_runs(digits, tmp_path):
    path, inputs = digits
    x = inputs(1)[0]
    x.numpy().tofile(tmp_path / "x.bin")
    own = Path(library()._name).resolve()
    made = subprocess.run(
        [COMPILER, "-std=c++17", "-Wall", "-Werror", f"-I{ROOT / 'native' / 'include'}",
         str(ROOT / "native" / "examples" / "classify.cpp"), "-o", str(tmp_path / "classify"),
         str(own), f"-Wl,-rpath,{own.parent}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    done = subprocess.run(
        [str(tmp_path / "classify"), str(path), str(tmp_path / "x.bin")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(int(sb.load(path, precision="int8")(x).argmax()))
    bad = subprocess.run(
        [str(tmp_path / "classify"), str(tmp_path / "x.bin"), str(tmp_path / "x.bin")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert bad.returncode == 1
    assert bad.stderr.count("\n") == 1


def test_the_operators_of_the_document_are_those_of_the_runtime():
    text = (ROOT / "docs" / "runtime.md").read_text()
    source = "".join(p.read_text() for p in (ROOT / "native" / "runtime").glob("ops_*.cpp"))
    from subbyte.graph.operators import NUMBERS, OPERATORS

    missing = [n for n in (*OPERATORS, *NUMBERS, ITEM, LAYER) if f'{{"{n}", ' not in source]
    line = next(line for line in text.splitlines() if line.startswith("Operators that do not run:"))
    assert line == "Operators that do not run: " + ", ".join(f"`{n}`" for n in missing) + "."
