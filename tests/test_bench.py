"""`bench` reports what it should, honestly; never how fast this machine is."""

import copy
import json
import math
from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
import torch
from torch import nn

import subbyte as sb
from nets import Mixed, mixed_input
from subbyte.bench import (
    BenchReport,
    Roofs,
    Spread,
    bench,
    from_shapes,
    in_turn,
    measure_roofs,
    spread,
    table,
)
from subbyte.bench.floats import float_twin
from subbyte.errors import SubbyteError
from subbyte.kernels import tier
from subbyte.models import build
from subbyte.report import size_report, size_text
from test_cli import in_process

SHORT = 0.01  # seconds: five rounds are made anyway
needs_core = pytest.mark.skipif(tier() is None, reason="no C++ core")


def packed(model, levels=3, **settings):
    sb.prepare(model, sb.LowRes(levels=levels))
    return sb.pack(sb.freeze(model), **settings)


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    return packed(build("digitsnet"))


@pytest.fixture(scope="module")
def file(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "net.safetensors"
    sb.save(digits, path)
    return path


@pytest.fixture(scope="module")
def report(digits):
    return bench(digits, torch.randn(1, 8, 8), batches=(1, 3), seconds=SHORT, target="digits")


@pytest.fixture(scope="module")
def in_int8(digits):
    """The report of a network that the kernels multiply on every instruction set."""
    net = copy.deepcopy(digits)
    for module in net.modules():
        if hasattr(module, "precision"):
            module.precision = "int8"
    return bench(net, torch.randn(1, 8, 8), batches=(1, 3), seconds=SHORT, target="digits")


# ---------------------------------------------------------------- timing


def test_every_call_is_timed_in_every_round_and_the_order_turns():
    order = []
    found = in_turn({name: lambda name=name: order.append(name) for name in "abc"}, 0.0)
    assert all(times.n == 5 and times.low <= times.median <= times.high for times in found.values())
    turns = [x for x, before in zip(order, [None, *order], strict=False) if x != before]
    assert "".join(turns) == "abc" + "abcbabcbabc"  # first to see how long each takes


def test_a_spread_scales_and_prints():
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert spread([1.0, 2.0, 3.0]) * 2 == Spread(4.0, 3.0, 5.0, 3)
    assert str(spread([1.0, 2.0, 3.0])) == "2.000 (quartiles 1.500 .. 2.500, n = 3)"


# ---------------------------------------------------------------- the report


def test_a_report_has_every_layer_at_every_batch_size(digits, report):
    names = [name for name, m in digits.named_modules() if type(m).__name__.startswith("Packed")]
    names = [name for name in names if not name.endswith("packed")]
    assert [(row.name, row.batch) for row in report.layers] == [
        (n, b) for b in (1, 3) for n in names
    ]
    assert [batch for batch, _ in report.networks] == [1, 3]
    assert report.target == "digits"
    assert report.precision == "auto"
    assert report.tier == tier()
    assert report.threads == torch.get_num_threads()


def test_operations_are_two_for_each_weight_and_position(report):
    by_name = {(row.name, row.batch): row for row in report.layers}
    last = by_name["classifier.4", 3]
    assert last.operations == 2 * math.prod(last.shape) * 3
    first = by_name["features.0", 1]
    assert first.operations == 2 * math.prod(first.shape) * 8 * 8


def test_rates_follow_from_the_times(report):
    for row in report.layers:
        t = row.times
        assert row.gops == pytest.approx(row.operations / t.packed.median / 1e9)
        assert row.gb_s == pytest.approx(row.panel_bytes / t.packed.median / 1e9)
        assert t.speedup == pytest.approx(t.float32.median / t.packed.median)
        if row.of_roof is not None:
            assert row.of_roof == pytest.approx(row.roof_seconds / t.packed.median)


@needs_core
def test_layers_that_the_kernels_serve_have_panels(in_int8):
    assert in_int8.fallbacks == {}
    assert all(row.panel_bytes > 0 and row.roof_seconds > 0 for row in in_int8.layers)


def test_values_are_frozen_and_json_has_them_all(report):
    assert is_dataclass(report)
    with pytest.raises(FrozenInstanceError):
        report.threads = 7
    assert {f.name for f in fields(BenchReport)} >= {"tier", "roofs", "layers", "networks"}
    value = json.loads(json.dumps(report.to_dict()))
    assert len(value["layers"]) == len(report.layers)
    assert value["network"][1]["batch"] == 3
    assert set(value["layers"][0]["seconds"]) == {"packed", "float32", "bfloat16", "fused"}
    assert value["layers"][0]["seconds"]["fused"] is None
    assert value["network"][1]["seconds"]["fused"]["median"] > 0


def test_bfloat16_is_timed_only_where_the_cpu_has_it(digits, monkeypatch):
    from subbyte.bench import measure

    example = torch.randn(1, 8, 8)
    monkeypatch.setattr(measure, "has_bfloat16", lambda: False)
    report = bench(digits, example, seconds=SHORT, whole=False)
    assert all(row.times.bfloat16 is None for row in report.layers)
    assert "bfloat16 is not timed" in table(report).caption
    monkeypatch.setattr(measure, "has_bfloat16", lambda: True)
    report = bench(digits, example, seconds=SHORT, whole=False)
    assert all(row.times.bfloat16.median > 0 for row in report.layers)
    assert "bfloat16" in [column.header for column in table(report).columns]


# ---------------------------------------------------------------- honest fallbacks


def test_a_layer_that_decodes_says_why():
    net = packed(build("digitsnet"), levels=256)
    report = bench(net, torch.randn(1, 8, 8), seconds=SHORT, whole=False)
    assert set(report.fallbacks.values()) == {"256 levels are integers up to 255; 127 fit"}
    assert all(row.panel_bytes == 0 and row.of_roof is None for row in report.layers)
    assert "127 fit: features.0" in table(report).caption


def test_float32_activations_have_no_roof_of_bytes():
    report = bench(
        packed(build("digitsnet"), precision="float32"), torch.randn(1, 8, 8), seconds=SHORT
    )
    assert report.precision == "float32"
    assert not report.fallbacks
    assert all(row.panel_bytes > 0 and row.of_roof is None for row in report.layers)


def test_layers_without_a_kernel_are_timed_and_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.tokens = packed(Mixed()), mixed_input(n=2)[1]

        def forward(self, x):
            return self.net(x, self.tokens[: len(x)])

    report = bench(Net(), torch.randn(3, 9, 9), seconds=SHORT)
    reasons = report.fallbacks
    assert reasons["net.up"] == "there is no kernel for ConvTranspose2d"
    assert "net.attn" not in reasons
    assert "net.table" not in {row.name for row in report.layers}  # a table multiplies nothing


def test_the_float_twin_computes_the_same():
    net = packed(Mixed(), precision="float32")
    x, tokens = mixed_input()
    twin = float_twin(net)
    assert not any(type(m).__name__.startswith("Packed") for m in twin.modules())
    assert torch.allclose(twin(x, tokens), net(x, tokens), atol=1e-5)


def test_the_float_twin_of_separate_projections():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    net = packed(nn.ModuleDict({"attention": attention}), precision="float32")["attention"]
    q, k, v = torch.randn(5, 8), torch.randn(7, 6), torch.randn(7, 4)
    assert torch.allclose(float_twin(net)(q, k, v)[0], net(q, k, v)[0], atol=1e-5)


# ---------------------------------------------------------------- roofs


@needs_core
def test_roofs_are_rates_of_this_machine():
    roofs = measure_roofs(1, SHORT)
    assert roofs.int8_gops > 0
    assert roofs.float32_gflops > 0
    assert all(rate > 0 for _, rate in roofs.read_gb_s)


def test_the_roof_of_a_layer_is_the_slower_of_reading_and_multiplying():
    roofs = Roofs(100.0, 10.0, ((1000, 50.0), (10_000, 20.0)))
    assert roofs.reading(1000) == 50
    assert roofs.reading(1001) == 20
    assert roofs.reading(10**9) == roofs.memory_gb_s == 20
    assert roofs.seconds(1000, 1) == pytest.approx(1000 / 50e9)
    assert roofs.seconds(1000, 10_000) == pytest.approx(10_000 / 100e9)


# ---------------------------------------------------------------- bad input


def test_settings_that_cannot_be(digits):
    x = torch.randn(1, 8, 8)
    for settings, words in [
        ({"batches": (0,)}, "batch=0; use 1 or more"),
        ({"threads": 0}, "threads=0; use 1 or more"),
        ({"seconds": 0.0}, "seconds=0.0"),
        ({"seconds": math.nan}, "seconds=nan"),
    ]:
        with pytest.raises(SubbyteError, match=words):
            bench(digits, x, **settings)
    with pytest.raises(SubbyteError, match="calls no packed layer"):
        bench(nn.Linear(3, 3), torch.randn(3))
    with pytest.raises(SubbyteError, match="does not take an input of"):
        bench(digits, torch.randn(5, 8, 8))


def test_threads_are_put_back(digits):
    before = torch.get_num_threads()
    report = bench(digits, torch.randn(1, 8, 8), threads=1, seconds=SHORT, whole=False)
    assert report.threads == 1
    assert torch.get_num_threads() == before


def test_shapes_make_layers_of_the_levels_asked_for():
    net, example = from_shapes([(40, 20), (8, 64)], 5)
    report = bench(net, example, seconds=SHORT, whole=False)
    assert [row.shape for row in report.layers] == [(40, 20), (8, 64)]
    assert {row.levels for row in report.layers} == {5}
    assert report.networks == ()


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_json(file, monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, "bench", file, "--seconds", SHORT)
    assert code == 0
    assert "features.0" in out
    assert "whole network" in out
    code, out, _ = in_process(monkeypatch, capsys, "bench", "--shapes", "64x32", "--levels", 5,
                              "--batch", "1,2", "--seconds", SHORT, "--json")  # fmt: skip
    assert code == 0
    value = json.loads(out)
    assert [row["batch"] for row in value["layers"]] == [1, 2]
    assert value["layers"][0]["levels"] == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "bench takes a packed file or --shapes OUTxIN"),
        (("FILE", "--shapes", "4x4"), "one of the two"),
        (("nowhere.safetensors",), "no such file"),
        (("--shapes", "4x"), "'4x' is no shape"),
        (("--shapes", "4x4,0x3"), "'0x3' is no shape"),
        (("--shapes", "999999x999999"), "use 1 to"),
        (("--shapes", "4x4", "--levels", "1"), "levels=1"),
        (("--shapes", "4x4", "--batch", "1,two"), "--batch 1,two"),
        (("--shapes", "4x4", "--input", "3,4,4"), "--input and --model go with a packed file"),
        (("--shapes", "4x4", "--precision", "int4"), "precision='int4'"),
        (("--shapes", "4x4", "--seconds", "0"), "seconds=0.0"),
        (("FILE", "--input", "1,a"), "--input 1,a"),
        (("FILE", "--input", "3,32,32"), "does not take an input of (1, 3, 32, 32)"),
    ],
)
def test_bad_input_ends_in_one_line(file, monkeypatch, capsys, arguments, words):
    arguments = [file if a == "FILE" else a for a in arguments]
    code, out, err = in_process(monkeypatch, capsys, "bench", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_network_for_any_size_asks_for_one(tmp_path, monkeypatch, capsys):
    path = tmp_path / "net.safetensors"
    sb.save(packed(build("resnet20")), path)
    code, _, err = in_process(monkeypatch, capsys, "bench", path)
    assert code == 2
    assert "--input 3,32,32" in err
    code, out, _ = in_process(monkeypatch, capsys, "bench", path, "--input", "3,8,8", "--seconds",
                              SHORT, "--json")  # fmt: skip
    assert code == 0
    assert len(json.loads(out)["layers"]) == 20


# ---------------------------------------------------------------- inspect


@needs_core
def test_inspect_says_what_the_panels_take(digits, file, in_int8):
    sizes = size_report(file)
    panels = {layer.name: layer.panel_bytes for layer in sizes.layers}
    assert panels == {row.name: row.panel_bytes for row in in_int8.layers if row.batch == 1}
    value = sizes.to_dict()
    assert value["panels"] == {"tier": tier(), "bytes": sum(panels.values())}
    assert [layer["panel_bytes"] for layer in value["layers"]] == list(panels.values())
    total = next(line for line in size_text(sizes).splitlines() if line.startswith("total"))
    assert f"{sum(panels.values()):,}" in total.split()


@needs_core
def test_inspect_shows_the_panels_inside_attention(tmp_path):
    sb.save(packed(build("vit1", image_size=8)), tmp_path / "vit.safetensors")
    sizes = {
        layer.name: layer.panel_bytes for layer in size_report(tmp_path / "vit.safetensors").layers
    }
    assert sizes["blocks.0.attention.in_proj"] > sizes["blocks.0.attention.out_proj"] > 0


def test_inspect_of_another_network_knows_no_panels(tmp_path):
    sb.save(packed(nn.Sequential(nn.Linear(4, 4))), tmp_path / "net.safetensors")
    sizes = size_report(tmp_path / "net.safetensors")
    assert sizes.panel_bytes is None
    assert sizes.layers[0].panel_bytes is None
    if tier() is not None:
        assert "panels: not known" in size_text(sizes)
