"""ONNX files in onnxruntime, element by element beside the packed network; and their bad input."""

import copy
import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from oracle import U, assert_within, gamma
from subbyte import SubbyteError
from subbyte.export import EXPORTERS, base
from subbyte.models import NETWORKS
from test_artifact import packed
from test_cli import file, in_process  # noqa: F401 - a fixture
from test_program import CASES, images, leaves, network

for package in ("onnx", "onnxscript", "onnx_ir", "onnxruntime"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install 'subbyte[export]'", allow_module_level=True)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from subbyte.export.base import Request  # noqa: E402
from subbyte.export.onnx.build import Graph  # noqa: E402
from subbyte.export.onnx.fast import Fast, small  # noqa: E402
from subbyte.export.onnx.ranges import Range, ranges_of  # noqa: E402
from subbyte.export.onnx.ready import prepared  # noqa: E402

QUICK = ("digitsnet", "resnet20")


def session(data, optimized=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(data, *inputs, optimized=None):
    onnx.checker.check_model(data, full_check=b"com.microsoft" not in data)
    made = session(data, optimized)
    names = [value.name for value in made.get_inputs()]
    found = made.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(np.array(y)) for y in found]


def graph_of(net, example):
    return Graph.of(prepared(Request(net, "net", "small", example).read()))


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def in_float32(net):
    for layer in net.modules():
        if "precision" in vars(layer):
            layer.precision = "float32"
    return net.eval()


# ---------------------------------------------------------------- single layers, derived bounds

UNEVEN = (-1.0, -0.25, 0.5, 2.0)
FLOAT16, TWO = sb.ScaleDomain.FLOAT16, sb.ScaleDomain.POWER_OF_TWO
PER = {"tensor": sb.PerTensor(), "channel": sb.PerChannel(0), "inputs": sb.PerChannel(1)}


def grid_of(levels, sharing, domain=sb.ScaleDomain.FLOAT32):
    granularity = PER[sharing] if sharing in PER else sb.PerGroup(sharing)
    if levels == "uneven":
        return sb.Grid(UNEVEN, granularity, domain)
    return sb.uniform(levels, granularity, domain)


def quantized(layer, grid, adapter=None, seed=0):
    """Random codes and scales; adapter: a dtype of its factors."""
    generator = torch.Generator().manual_seed(seed)
    shape, axis = tuple(layer.weight.shape), 1 if isinstance(layer, TRANSPOSED) else 0
    codes = torch.randint(grid.n_levels, shape, generator=generator, dtype=torch.uint8)
    n = sb.core.functional.n_groups(shape, grid)
    scale = 2.0 ** torch.randint(-3, 2, (n,), generator=generator)
    low_rank = None
    if adapter is not None:
        out, groups = shape[axis], getattr(layer, "groups", 1) if axis == 0 else 1
        up = torch.randint(-9, 9, (out, 2), generator=generator).to(adapter)
        width = codes.numel() // out
        down = torch.randint(-9, 9, (2 * groups, width), generator=generator).to(adapter)
        low_rank = sb.LowRank(up, down, torch.full((2 * groups,), 2.0**-6))
    bias = None if getattr(layer, "bias", None) is None else layer.bias.detach()
    return sb.QuantizedLayer(sb.QuantizedTensor(codes, scale, grid), bias, low_rank)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Apart(nn.Module):
    """Each layer on an input of its own; subclasses name as many inputs."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def each(self, *inputs):
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def apart(layers):
    names = ", ".join(f"x{i}" for i in range(len(layers)))
    forward = eval(f"lambda self, {names}: self.each({names})")  # no program has *inputs
    return type("Apart", (Apart,), {"forward": forward})(layers)


LINEAR = [
    (2, "channel"), (3, "tensor"), (4, "channel"), (4, 32), (5, "channel"), (6, 8), (9, 32),
    (11, "tensor"), (15, "channel"), (16, "channel"), (16, 64), (17, "channel"), (255, "channel"),
    (256, "tensor"), ("uneven", "channel"), (7, 48),
]  # fmt: skip
IN, OUT = 200, 9


def linears():
    rows = [(nn.Linear(IN, OUT), grid_of(*case), None) for case in LINEAR]
    rows.append((nn.Linear(IN, OUT, bias=False), grid_of(3, "channel", FLOAT16), torch.int8))
    rows.append((nn.Linear(IN, OUT), grid_of(15, "channel", TWO), torch.float16))
    return rows, [torch.randn(3, IN) if i % 2 else torch.randn(3, 2, IN) for i in range(len(rows))]


def convs():
    per, rows, inputs = "channel", [], []

    def add(layer, grid, x, adapter=None):
        rows.append((layer, grid, adapter))
        inputs.append(x)

    add(nn.Conv1d(4, 6, 3, padding=1), grid_of(3, per), torch.randn(2, 4, 9))
    add(nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2), grid_of(4, per),
        torch.randn(2, 4, 7, 8), torch.int8)  # fmt: skip
    add(nn.Conv2d(4, 4, 3, padding="same", groups=4), grid_of(5, "tensor"), torch.randn(2, 4, 6, 6))
    add(nn.Conv2d(3, 5, 2, dilation=2, padding="same"), grid_of(16, 4), torch.randn(2, 3, 6, 7))
    add(nn.Conv3d(2, 3, 2, bias=False), grid_of("uneven", per), torch.randn(2, 2, 4, 3, 5))
    for mode in ("reflect", "replicate", "circular"):
        layer = nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode=mode)
        add(layer, grid_of(9, per), torch.randn(2, 3, 6, 5))
    add(nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), grid_of(3, "inputs"), torch.randn(2, 4, 5))
    add(nn.ConvTranspose2d(4, 6, 3, (2, 3), (0, 1), (1, 0), groups=2, dilation=(1, 2)),
        grid_of(7, "tensor"), torch.randn(2, 4, 5, 4))  # fmt: skip
    add(nn.ConvTranspose2d(4, 6, 2), grid_of(4, "tensor"), torch.randn(2, 4, 5, 4), torch.int8)
    add(nn.ConvTranspose3d(3, 2, 2, 2), grid_of(5, "tensor"), torch.randn(2, 3, 3, 4, 2))
    return rows, inputs


def packed_apart(rows):
    made = {
        f"layers.{i}": quantized(layer, grid, adapter, i)
        for i, (layer, grid, adapter) in enumerate(rows)
    }
    model = apart([layer for layer, _, _ in rows])
    return sb.pack(sb.Quantized(model, made), precision="float32").eval()


def exact_parts(layer):
    """The weight and a bound of its parts' magnitudes, float64, from the stored parts alone."""
    packed_, shape = layer.packed, tuple(layer.packed.shape)
    codes, grid = packed_.codes().long(), packed_.grid
    scale = packed_.quantized().scale.double()
    if isinstance(grid.granularity, sb.PerGroup):
        rows = scale.reshape(shape[0], -1)
        scale = rows[:, torch.arange(codes[0].numel()) // grid.granularity.size].reshape(shape)
    elif isinstance(grid.granularity, sb.PerChannel):
        scale = scale.reshape([-1 if d == grid.granularity.axis else 1 for d in range(len(shape))])
    weight = torch.tensor(grid.levels, dtype=torch.float32).double()[codes] * scale
    size = weight.abs()
    if packed_.up is not None:
        up, down = (factor.double() for factor in (packed_.up, packed_.down))
        groups = down.shape[0] // up.shape[1]
        parts = up.reshape(groups, -1, up.shape[1]), down.reshape(groups, up.shape[1], -1)
        factor, axis = packed_.adapter_scale[0].double(), packed_.channel_axis
        for total, (a, b) in ((weight, parts), (size, [p.abs() for p in parts])):
            moved = [shape[axis], *(n for d, n in enumerate(shape) if d != axis)]
            total += (a @ b * factor).reshape(moved).movedim(0, axis)
    return weight, size


def applied(layer, x, weight, bias):
    """The layer's own float operation in float64."""
    double = copy.copy(layer.__dict__)
    if isinstance(layer, sb.modules.linear.PackedLinear):
        return F.linear(x, weight, bias)
    if "output_padding" in double and "Transpose" in type(layer).__name__:
        return type(layer).function(x, weight, bias, layer.stride, layer.padding,
                                    layer.output_padding, layer.groups, layer.dilation)  # fmt: skip
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer.pads, mode=layer.padding_mode), 0
    return type(layer).function(x, weight, bias, layer.stride, padding, layer.dilation,
                                layer.groups)  # fmt: skip


def terms(layer):
    """Of one sum: products, bias, the adapter's own, and roundings of the weight."""
    n = layer.packed.n_weights // layer.packed.shape[0] * max(1, getattr(layer, "groups", 1))
    return n + (0 if layer.packed.up is None else layer.packed.up.shape[1]) + 8


def exact(layer, x):
    """Result and float32 bound of a layer, float64."""
    weight, size = exact_parts(layer)
    bias = None if layer.bias is None else layer.bias.double()
    y = applied(layer, x.double(), weight, bias)
    magnitude = applied(layer, x.double().abs(), size, None if bias is None else bias.abs())
    return y, gamma(terms(layer)) * magnitude


@pytest.fixture(scope="module")
def all_linears():
    torch.manual_seed(0)
    rows, inputs = linears()
    net = packed_apart(rows)
    return net, inputs, graph_of(net, tuple(inputs))


def test_small_linear_layers_of_every_grid(all_linears):
    net, inputs, graph = all_linears
    data, layers = graph.lowered(small)
    assert {stored for _, stored in layers} == {"codes, float32 once loaded"}
    for layer, x, y in zip(net.layers, inputs, run(data, *inputs), strict=True):
        assert_within(y, *exact(layer, x))


def test_small_weights_are_folded_when_the_file_is_loaded(all_linears, tmp_path):
    _, inputs, graph = all_linears
    run(graph.lowered(small)[0], *inputs, optimized=tmp_path / "optimized.onnx")
    assert set(operators(tmp_path / "optimized.onnx")) <= {"Gemm", "MatMul", "Add", "FusedMatMul"}


def test_fast_linear_layers_round_activations_and_nothing_else(all_linears):
    net, inputs, graph = all_linears
    fast = Fast(graph.ready, None)
    data, layers = graph.lowered(fast)
    kinds = dict(layers)
    for i, (layer, x, y) in enumerate(zip(net.layers, inputs, run(data, *inputs), strict=True)):
        wanted, bound = exact(layer, x)
        served = kinds[f"layers.{i}"].startswith("MatMulNBits")
        grid, adapter = layer.packed.grid, layer.packed.up is not None
        other = adapter or grid.levels == UNEVEN or grid.granularity == PER8
        assert served is not other, (i, grid)
        if served:  # int8 activations: each is off by at most 1/254 of the largest of its block
            block = 16 if grid.granularity == sb.PerGroup(48) else 128
            tops = F.pad(x.double().abs(), (0, -IN % block)).unflatten(-1, (-1, block)).amax(-1)
            off = tops.repeat_interleave(block, -1)[..., :IN] / 254
            whole = exact_parts(layer)[1] + layer.packed.quantized().scale.double().max()
            bound = 4 * bound + F.linear(off, whole) * (1 + 1e-5)
        assert_within(y, wanted, bound)
    assert len(fast.reasons) == 4
    assert any("an adapter" in note for note in fast.notes(layers))


PER8 = sb.PerGroup(8)


@pytest.mark.parametrize(("levels", "bits"), [(2, 2), (4, 2), (5, 4), (16, 4), (17, 8)])
def test_codes_have_the_fewest_bits_that_hold_them(all_linears, levels, bits):
    _, _, graph = all_linears
    layers = dict(graph.lowered(Fast(graph.ready, None))[1])
    found = [layers[f"layers.{i}"] for i, (n, _) in enumerate(LINEAR) if n == levels]
    assert f"MatMulNBits, {bits} bits" in found


@pytest.fixture(scope="module")
def all_convs():
    torch.manual_seed(0)
    rows, inputs = convs()
    net = packed_apart(rows)
    return net, inputs, graph_of(net, tuple(inputs))


def test_small_convolutions_of_every_kind(all_convs):
    net, inputs, graph = all_convs
    for layer, x, y in zip(net.layers, inputs, run(graph.lowered(small)[0], *inputs), strict=True):
        assert_within(y, *exact(layer, x))


def test_int8_convolutions_are_off_by_the_steps_that_they_round_to(all_convs):
    net, inputs, graph = all_convs
    fast = Fast(graph.ready, [tuple(inputs)])
    data, layers = graph.lowered(fast)
    kinds, n = dict(layers), 0
    for i, (layer, x, y) in enumerate(zip(net.layers, inputs, run(data, *inputs), strict=True)):
        wanted, bound = exact(layer, x)
        if "int8" in kinds[f"layers.{i}"]:
            seen, n = fast.int8.ranges[f"layers.{i}"], n + 1
            weight, size = exact_parts(layer)
            if kinds[f"layers.{i}"].startswith("int8"):  # 1/128 of a channel's largest weight
                top = weight.abs().flatten(1).amax(1) / 128
                step = top.reshape(-1, *[1] * (weight.ndim - 1)).expand_as(weight)
                bound = bound + applied(layer, x.double().abs() + seen.x.scale, step, None)
                size = size + step
            whole = torch.full_like(x, seen.x.scale * (0.5 + 1e-4)).double()
            bound = bound + applied(layer, whole, size, None) + 0.51 * seen.result.scale
            bound = bound + seen.x.scale * float(size.max())  # of the bias
        assert_within(y, wanted, bound)
    assert n == 8
    rounded = [i for i in range(n) if kinds[f"layers.{i}"].startswith("int8")]
    assert rounded == [1, 3, 4]  # an adapter, scales of groups, uneven levels


# ---------------------------------------------------------------- whole networks


def float64_of(net, inputs):
    """The network's exact outputs, nearly."""
    double = copy.deepcopy(net).double()
    given = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        return [y for y in leaves(double(*given)) if isinstance(y, torch.Tensor)]


def check_small(net, inputs, graph):
    """Off the exact outputs by what the packed network itself is off in float32, times 16."""
    data, _ = graph.lowered(small)
    for n in (1, 3):
        given = inputs(n)
        with torch.no_grad():
            own = [y for y in leaves(net(*given)) if isinstance(y, torch.Tensor)]
        wanted = float64_of(net, given)
        for y, mine, right in zip(run(data, *given), own, wanted, strict=True):
            right = right.double()
            off = float((mine.double() - right).abs().max())
            bound = 16 * off + 64 * U * float(right.abs().max())
            assert_within(y, right, torch.full_like(right, bound))


def check_fast(net, inputs, graph, tmp_path):
    """Everything that can be is in integers, and no output is far off."""
    torch.manual_seed(5)
    batch = inputs(6)
    fast = Fast(graph.ready, [batch])
    data, layers = graph.lowered(fast)
    found = run(data, *batch, optimized=tmp_path / "optimized.onnx")
    kinds = [stored for _, stored in layers]
    done = operators(tmp_path / "optimized.onnx")
    assert done.count("QLinearConv") == sum("int8 products" in kind for kind in kinds)
    assert done.count("MatMulNBits") == sum("MatMulNBits" in kind for kind in kinds)
    assert "Conv" not in done
    with torch.no_grad():
        wanted = [y for y in leaves(net(*batch)) if isinstance(y, torch.Tensor)]
    for y, right in zip(found, wanted, strict=True):
        assert y.shape == right.shape
        assert float((y - right).abs().max()) <= 0.06 * float(right.abs().max())
    return done


def whole(name):
    net, inputs = network(name)
    net = in_float32(net)
    return net, inputs, graph_of(net, inputs(2))


@pytest.mark.parametrize("name", [*CASES, *QUICK])
def test_networks(name, tmp_path):
    net, inputs, graph = whole(name)
    check_small(net, inputs, graph)
    done = check_fast(net, inputs, graph, tmp_path)
    if name == "resnet20":  # a sum between two integer products is one too
        assert done.count("QLinearAdd") == 9


def test_pads_become_the_convolutions(tmp_path):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.b(F.pad(self.a(F.pad(x, (0, 1, 2, 1))), (1, 1)))

    torch.manual_seed(0)
    net = in_float32(packed(Padded()))
    inputs = images(3, 8, 8)
    graph = graph_of(net, inputs(2))
    check_small(net, inputs, graph)
    assert "Pad" not in check_fast(net, inputs, graph, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in QUICK])
def test_the_other_networks(name, tmp_path):
    net, inputs, graph = whole(name)
    check_small(net, inputs, graph)
    check_fast(net, inputs, graph, tmp_path)


class Attends(nn.Module):
    """Attention in each of its forms: masks, other widths, tokens first, rows that it adds."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(32, 4)
        self.wide = nn.MultiheadAttention(32, 2, batch_first=True, kdim=16, vdim=48, bias=False)
        self.more = nn.MultiheadAttention(
            32, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True
        )
        self.register_buffer("mask", torch.randn(5, 5))

    def forward(self, x, key, value, padding):
        swapped = x.transpose(0, 1)
        a, w = self.first(swapped, swapped, swapped, attn_mask=self.mask)
        b, _ = self.wide(x, key, value, need_weights=False)
        c, v = self.more(x, x + 1, x, key_padding_mask=padding, average_attn_weights=False)
        d, _ = self.more(x, x, x, attn_mask=self.mask > 1, need_weights=False)
        return a.transpose(0, 1), w, b, c, v, d


def attended(n):
    padding = torch.zeros(n, 5, dtype=torch.bool)
    padding[:, 4] = True
    return torch.randn(n, 5, 32), torch.randn(n, 5, 16), torch.randn(n, 5, 48), padding


def test_attention_in_each_of_its_forms():
    torch.manual_seed(0)
    net = in_float32(packed(Attends()))
    check_small(net, attended, graph_of(net, attended(2)))


# ---------------------------------------------------------------- size


def test_a_file_is_about_as_small_as_the_packed_one(tmp_path):
    torch.manual_seed(0)
    rows = [(nn.Linear(300, 800), grid_of(n, "channel"), None) for n in (2, 3, 4, 5, 9, 16)]
    net = packed_apart(rows)
    inputs = tuple(torch.randn(2, 300) for _ in rows)
    size = sb.save(net, tmp_path / "net.safetensors", example=inputs)
    made = sb.export(net, tmp_path / "net.onnx", example=inputs, form="small", check=False)
    assert made.n_bytes == (tmp_path / "net.onnx").stat().st_size
    assert made.n_bytes <= 1.06 * size


# ---------------------------------------------------------------- what a user meets


@pytest.fixture(scope="module")
def mixed():
    net, inputs = network("mixed")
    return net, inputs


def test_export_checks_the_file_at_once(mixed, tmp_path):
    net, inputs = mixed
    net.train()
    made = sb.export(net, tmp_path / "net.onnx", example=inputs(2), calibration=[inputs(4)])
    assert net.training
    assert made.form == "fast"
    assert {stored for _, stored in made.layers} == {
        "MatMulNBits, 4 bits", "codes, int8 products", "codes, float32 once loaded",
    }  # fmt: skip
    assert 0 < made.check.difference < 0.05
    assert made.check.agreement > 0.5
    assert min(made.check.ms, made.check.packed_ms, made.check.float_ms) > 0
    json.dumps(made.to_dict())


def test_a_network_by_names_of_its_inputs(mixed, tmp_path):
    net, inputs = mixed
    x, tokens = inputs(2)
    example = {"tokens": tokens, "x": x}
    made = sb.export(net, tmp_path / "net.onnx", example=example, form="small")
    assert made.check.difference < 1e-5
    names = {value.name for value in session((tmp_path / "net.onnx").read_bytes()).get_inputs()}
    assert names == {"x", "tokens"}


def test_a_file_with_a_program_needs_no_example(mixed, tmp_path):
    net, inputs = mixed
    sb.save(net, tmp_path / "net.safetensors", example=inputs(2))
    opened = sb.load(tmp_path / "net.safetensors", precision="float32")
    made = sb.export(opened, tmp_path / "net.onnx", form="small")
    assert made.check.difference < 1e-5
    assert made.check.packed_bytes == (tmp_path / "net.safetensors").stat().st_size


def test_outputs_keep_their_names(tmp_path):
    net, inputs = network("unet")
    sb.export(net, tmp_path / "net.onnx", example=inputs(2), check=False, form="small")
    names = [value.name for value in session((tmp_path / "net.onnx").read_bytes()).get_outputs()]
    assert names == ["map", "all_0", "all_1"]


def test_the_command(file, tmp_path, monkeypatch, capsys):  # noqa: F811
    code, out, _ = in_process(monkeypatch, capsys, "export", file, "--to", tmp_path / "net.onnx",
                              "--calibrate", "digits", "--samples", 32, "--json")  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert found["form"] == "fast"
    assert found["n_bytes"] == (tmp_path / "net.onnx").stat().st_size
    assert found["check"]["agreement"] > 0.9


def test_the_table_of_the_command():
    from subbyte.commands.export import rows
    from subbyte.export import Check, Exported

    check = Check("onnxruntime 1", 900, 0.01, 0.5, 1.0, 2.0, 3.0)
    made = Exported("net.onnx", "ONNX", "fast", 1000, (("a", "x"), ("b", "x"), ("c", "y")))
    assert ("checked", "no: nothing that runs it is installed here") in rows(made)
    shown = dict(rows(replace(made, check=check)))
    assert shown["layers as x"] == "2"
    assert shown["agreement of argmax"] == "50.00%"
    assert shown["ms of float32 in onnxruntime 1"] == "3.000"


# ---------------------------------------------------------------- bad input

LINE = nn.Sequential(nn.Linear(4, 3))


def refused(match, tmp_path, net=None, name="net.onnx", **options):
    net = packed(copy.deepcopy(LINE)) if net is None else net
    options = {"example": torch.randn(2, 4), **options}
    with pytest.raises(SubbyteError, match=match) as error:
        sb.export(net, tmp_path / name, **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_other_suffixes_and_forms(tmp_path):
    refused(r"kind '\.tflite'.*\.onnx \(ONNX\)", tmp_path, name="net.tflite")
    refused("form='tiny'.*auto, small, fast", tmp_path, form="tiny")


def test_a_form_that_serves_no_layer_says_why(tmp_path):
    refused("'0' runs in float32: 4 inputs fill no block of 16", tmp_path, form="fast")
    net = packed(nn.Sequential(nn.Conv2d(3, 4, 3)))
    refused("need calibration", tmp_path, net, example=torch.randn(2, 3, 5, 5), form="fast")


def test_without_calibration_convolutions_stay_float_with_a_note(tmp_path):
    net = packed(nn.Sequential(nn.Conv2d(3, 4, 3)))
    made = sb.export(net, tmp_path / "net.onnx", example=torch.randn(2, 3, 5, 5), check=False)
    assert made.form == "small"
    assert any("need calibration" in note for note in made.notes)


def test_calibration_that_says_nothing(tmp_path):
    net, x = packed(nn.Sequential(nn.Conv2d(3, 4, 3))), torch.randn(2, 3, 5, 5)
    refused("calibration holds no batch", tmp_path, net, example=x, calibration=[])
    x_nan = torch.full_like(x, torch.nan)
    refused("layer '0' values that are NaN", tmp_path, net, example=x, calibration=[x_nan])


def test_types_that_are_not_float32(tmp_path):
    net = packed(copy.deepcopy(LINE)).half()
    refused("input 'input' is float16; .*float32", tmp_path, net, example=torch.randn(2, 4).half())


def test_a_layer_that_no_program_holds_is_named(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.LSTM(8, 16)

        def forward(self, x):
            return self.steps(x)[0]

    net = packed(Recurrent())
    refused("layer 'steps' is a packed LSTM", tmp_path, net, example=torch.randn(2, 5, 8))


def test_a_network_without_a_program_asks_for_an_example(tmp_path):
    refused("give export an input as example=", tmp_path, example=None)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "is_installed", lambda package: package != "onnxscript")
    refused(r"'onnxscript': pip install 'subbyte\[export\]'", tmp_path)


def test_an_operator_that_onnx_lacks_is_named(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no translation of aten.mystery\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    refused("cannot be written as ONNX: RuntimeError: no translation of aten.mystery", tmp_path)


def test_a_range_holds_zero_and_its_codes_eight_bits():
    seen = Range().with_(torch.tensor([0.5, 2.0]))
    assert (seen.low, seen.high, seen.zero) == (0.0, 2.0, 0)
    seen = Range().with_(torch.tensor([-3.0, -1.0]))
    assert (seen.low, seen.high, seen.zero) == (-3.0, 0.0, 255)
    assert Range().scale == 1.0


def test_ranges_are_of_all_batches():
    torch.manual_seed(0)
    net = in_float32(packed(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())))
    x = torch.randn(3, 1, 4, 4)
    ready = prepared(Request(net, "net", "small", x).read())
    (seen,) = ranges_of(ready, [(10 * x, torch.zeros(3)), x]).values()
    assert (seen.x.low, seen.x.high) == (float(10 * x.min()), float(10 * x.max()))
    assert seen.result.low == 0.0
    assert seen.result.high == pytest.approx(float(net(10 * x).max()), rel=1e-5)


def test_every_exporter_says_what_it_needs():
    for suffix, exporter in EXPORTERS.items():
        assert suffix == exporter.suffix
        assert bool(exporter.packages) == bool(exporter.extra)
        assert "auto" in exporter.forms
