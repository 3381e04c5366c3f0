"""`inspect` accounts for every layer and every byte, in a page that a terminal has room for."""

import itertools
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from torch import nn

import subbyte as sb
from subbyte import kernels
from subbyte.core.grids import PerChannel, PerTensor, uniform
from subbyte.kernels import tier
from subbyte.models import build
from subbyte.modules import PackedConv2d, PackedLinear
from subbyte.report import size_report, size_text
from subbyte.report.fold import MAX_RUNS, folds
from subbyte.report.size import FloatTensor, LayerSize, SizeReport
from subbyte.storage import packed_layers


class Encoder(nn.Module):
    """A transformer encoder of 30 blocks: 121 layers."""

    def __init__(self):
        super().__init__()
        block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(block, 30)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.transformer_encoder(x).mean(1))


class MobileNet(nn.Module):
    """Inverted residuals, as wide as MobileNetV2's and deeper: over a hundred layers."""

    def __init__(self):
        super().__init__()
        blocks, width = [nn.Conv2d(3, 16, 3, stride=2)], 16
        for out, n in ((16, 4), (24, 10), (32, 10), (64, 10)):
            for _ in range(n):
                blocks.append(inverted(width, out))
                width = out
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width, 10)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def inverted(width, out):
    inner = 2 * width
    return nn.Sequential(
        nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
        nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner),
        nn.ReLU6(), nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out),
    )  # fmt: skip


def saved(net, path, recipe=None, **options):
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    sb.prepare(net, recipe or sb.LowRes(levels=5))
    sb.save(sb.pack(sb.freeze(net)), path, **options)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    image = torch.randn(2, 3, 32, 32)
    return {
        "encoder": saved(Encoder(), folder / "encoder.safetensors"),
        "mobilenet": saved(MobileNet(), folder / "mobilenet.safetensors", example=image),
        "vit": saved(build("vit1", image_size=8), folder / "vit.safetensors"),
    }


def printed(monkeypatch, capsys, *arguments):
    from subbyte.cli import main

    monkeypatch.setattr(sys, "argv", ["subbyte", "inspect", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out


# ---------------------------------------------------------------- folds of names


def unfolded(name):
    """All names that a folded one stands for."""
    parts = re.split(r"\{([0-9a-z, -]+)\}", name)
    choices = [[part] if i % 2 == 0 else list(numbers(part)) for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def numbers(text):
    for run in text.split(","):
        ends, _, step = run.partition(" by ")
        first, _, last = ends.partition("-")
        yield from map(str, range(int(first), int(last or first) + 1, int(step or 1)))


NAMES = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 3), st.sampled_from(["q", "k", "7x", "a01"])),
    unique=True, max_size=60,
)  # fmt: skip


@given(NAMES)
def test_folded_names_stand_for_exactly_the_names_of_their_items(drawn):
    names = [f"layers.{a}.block{b}.{word}" for a, b, word in drawn]
    rows = folds(names, lambda name: name, len)
    for row in rows:
        assert sorted(unfolded(row.name)) == sorted(row.items)
        assert max((text.count(",") for text in re.findall(r"\{.*?\}", row.name)), default=0) < (
            MAX_RUNS
        )
    assert sorted(name for row in rows for name in row.items) == sorted(names)
    assert [row.items[0] for row in rows] == sorted((r.items[0] for r in rows), key=names.index)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([f"layers.{i}.attn.q" for i in range(30)], ["layers.{0-29}.attn.q"]),
        ([f"l{i}" for i in range(30) if i != 4], ["l{0-3,5-29}"]),
        ([f"f.{i}" for i in range(0, 30, 3)], ["f.{0-27 by 3}"]),
        (["f.1", "f.4"], ["f.{1,4}"]),
        (["f.01", "f.02", "", "head"], ["f.01", "f.02", "", "head"]),
        (["b.0.0", "b.1.0", "b.1.1", "b.2.0", "b.2.1"], ["b.0.0", "b.{1-2}.{0-1}"]),
        ([f"f.{i}" for i in (0, 1, 5, 9, 20, 22, 40)], ["f.{0-1,5,9,20}", "f.{22,40}"]),
    ],
)
def test_folds_of_typical_networks(names, wanted):
    assert [row.name for row in folds(names, lambda name: name, lambda name: 0)] == wanted


def test_what_is_not_alike_is_not_folded():
    rows = folds(range(6), lambda i: f"l.{i}", lambda i: i == 3)
    assert [row.name for row in rows] == ["l.{0-2,4-5}", "l.3"]


# ---------------------------------------------------------------- the page


def beside_names(page):
    """The lines of a page, figures that stand below a name put beside it."""
    return re.sub(r"\n {4,}", "  ", page).splitlines()


SIZE = LayerSize(
    "layers.0.q", "Linear", (8, 8), "radix64", 64, uniform(3, PerTensor()), 1.5, (0.25, 0.5, 0.25),
    0.1, 0.1, 1, 20, 20, 0, 0, 0,
)  # fmt: skip


def page(*layers, kept=(), **options):
    total = sum(layer.disk_bytes for layer in layers) + sum(t.n_bytes for t in kept)
    return SizeReport("net", None, layers, tuple(kept), total + 1000, **options)


@pytest.mark.parametrize("name", ["encoder", "mobilenet", "vit"])
@pytest.mark.parametrize("width", [None, 80, 132])
def test_no_line_is_wider_than_the_terminal(name, width, files, monkeypatch, capsys):
    if width is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(width))
    lines = printed(monkeypatch, capsys, files[name]).splitlines()
    assert len(lines) < 80
    assert max(map(cell_len, lines)) <= (width or 100)


@pytest.mark.parametrize("name", ["encoder", "mobilenet", "vit"])
def test_rows_stand_for_every_layer_and_sum_up_to_the_total(name, files):
    report = size_report(files[name])
    assert len(report.layers) > 100 or name == "vit"
    lines = beside_names(size_text(report))
    head = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    total = next(i for i, line in enumerate(lines) if line.startswith("total"))
    at = re.split(r"  +", lines[head]).index("bytes")
    rows = [re.split(r"  +", line) for line in lines[head + 2 : total]]
    names = [name for row in rows for name in unfolded(row[0])]
    assert sorted(names) == sorted(layer.name for layer in report.layers)
    assert sum(int(row[1]) for row in rows) == len(report.layers)
    assert sum(int(row[at].replace(",", "")) for row in rows) == report.disk_bytes
    assert f"{report.disk_bytes:,}" in lines[total]
    for row in rows:
        own = [layer for layer in report.layers if layer.name in unfolded(row[0])]
        assert {"x".join(map(str, layer.shape)) for layer in own} <= set(row)


@pytest.mark.parametrize(
    "change",
    [
        {"type": "Embedding"}, {"shape": (4, 16)}, {"grid": uniform(5, PerTensor())},
        {"grid": uniform(3, PerChannel(0))}, {"rank": 2}, {"n_scales": 8}, {"adapter_bytes": 3},
        {"panel_bytes": 64},
    ],
    ids=str,
)  # fmt: skip
def test_a_layer_that_differs_has_a_row_of_its_own(change):
    layers = [replace(SIZE, name=f"layers.{i}.q") for i in range(9)]
    layers[4] = replace(layers[4], **change)
    lines = size_text(page(*layers)).splitlines()
    assert any(line.startswith("layers.{0-3,5-8}.q ") for line in lines)
    assert any(line.startswith("layers.4.q ") for line in lines)


def test_a_row_states_the_range_of_what_differs_in_it():
    layers = [replace(SIZE, name=f"l.{i}", entropy=1.2 + i / 10) for i in range(3)]
    row = next(line for line in size_text(page(*layers)).splitlines() if line.startswith("l.{0-2}"))
    assert "1.200..1.400" in row
    assert row.split().count("2.500") == 2  # bits in memory and in the file: alike in all


def test_wide_shows_each_layer_with_every_column(files, monkeypatch, capsys):
    out = printed(monkeypatch, capsys, files["encoder"], "--wide")
    firsts = [line.split()[0] for line in out.splitlines() if line.split()]
    for layer in size_report(files["encoder"]).layers:
        assert layer.name in firsts
    assert "share of each level, %" in out
    assert "in_proj_bias" in out


def test_long_names_stand_above_their_figures_and_stay_whole():
    name = (
        "model.text_model.encoder.layers.blocks.mixer.attention.projections.query_projection.dense"
    )
    lines = size_text(page(replace(SIZE, name=name))).splitlines()
    assert name in lines
    assert max(map(len, lines)) <= 100
    longest = size_text(page(replace(SIZE, name="x" * 90 + ".y" * 90)), 100).splitlines()
    assert max(map(len, longest)) <= 100


def test_names_from_a_file_reach_the_terminal_as_text():
    bad = "a\x1b[31m\nb"
    out = size_text(page(replace(SIZE, name=bad), kept=[FloatTensor(bad, 1, 4, 2, False)]))
    assert "\x1b" not in out
    assert "a\ufffd[31m\ufffdb" in out


def test_what_stayed_float_is_folded_and_capped():
    kept = [FloatTensor(f"n.{i}.weight", 8, 32, 16, False) for i in range(50)]
    kept += [FloatTensor(f"odd{i}.w{i}", i + 1, 4 * i + 4, 2 * i + 2, False) for i in range(20)]
    lines = size_text(page(SIZE, kept=kept)).splitlines()
    assert any(re.match(r"n\.\{0-49\} +50 +weight +400 +1,600$", line) for line in lines)
    assert any(re.match(r"9 more rows, see --wide +9 +45 +180$", line) for line in lines)
    wide = size_text(page(SIZE, kept=kept), wide=True)
    assert all(f"n.{i} " in wide for i in range(50))
    assert all(f"odd{i} " in wide for i in range(20))


# ---------------------------------------------------------------- numbers of the whole


@pytest.mark.parametrize("name", ["mobilenet", "vit"])
def test_parameters_and_buffers_are_those_of_the_network(name, files):
    report = size_report(files[name])
    net = sb.load(files[name])
    owners = {layer.name: layer.weight for layer in packed_layers(net)}
    in_float = {n for n, p in net.named_parameters() if not n.endswith("dtype_of")}
    assert {t.name for t in report.float_parameters} == in_float
    assert {t.name for t in report.buffers} == {
        n for n in net.state_dict() if n not in in_float and ".packed." not in n
        and not any(n.startswith(f"{own}.") for own in owners)
    }  # fmt: skip
    assert report.n_parameters == sum(w.n_weights for w in owners.values()) + sum(
        p.numel() for n, p in net.named_parameters() if n in in_float
    )
    assert report.to_dict()["whole"]["file_bits_per_weight"] == pytest.approx(
        8 * files[name].stat().st_size / report.n_parameters
    )


def test_a_projection_that_stays_float_is_a_parameter(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

        def forward(self, x):
            return self.head(self.attn(x, x, x, need_weights=False)[0])

    recipe = sb.Recipe(rules=(sb.Rule("attn.in_proj"), sb.Rule(method=sb.LowRes(levels=3))))
    x = torch.randn(2, 3, 8)
    report = size_report(saved(Net(), tmp_path / "n.safetensors", recipe, example=x))
    assert "attn.in_proj.weight" in {tensor.name for tensor in report.float_parameters}
    assert report.buffers == ()
    assert report.n_parameters == sum(p.numel() for p in Net().parameters())


def test_absorbed_norms_keep_their_two_parameters(tmp_path):
    net = build("digitsnet")
    n_parameters = sum(p.numel() for p in net.parameters())
    sb.prepare(net, sb.LowRes(levels=3))
    sb.save(sb.pack(sb.freeze(net), batchnorm="absorb"), tmp_path / "a.safetensors")
    assert size_report(tmp_path / "a.safetensors").n_parameters == n_parameters


def test_a_file_that_does_not_say_what_are_buffers_says_so(files, tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    report = size_report(saved(net, tmp_path / "n.safetensors"))
    assert not report.knows_buffers
    assert [tensor.name for tensor in report.buffers] == ["1.num_batches_tracked"]
    assert "does not say" in size_text(report)
    assert "does not say" not in size_text(size_report(files["mobilenet"]))


@pytest.mark.parametrize(("more", "warned"), [(-1, False), (0, True), (1, True)])
def test_a_file_is_compared_with_the_network_in_float16(more, warned):
    kept = [FloatTensor("head.weight", 100, 400, 200, False), FloatTensor("n", 1, 8, 8, True)]
    float16 = 2 * SIZE.n_weights + 200 + 8
    report = replace(page(SIZE, kept=kept), file_bytes=float16 + more)
    assert report.float16_bytes == float16
    out = size_text(report)
    assert ("not smaller than the same network in" in out) is warned
    assert (report.to_dict()["whole"]["float16_warning"] is not None) is warned
    if warned:
        assert "head 400 bytes" in report.float16_warning


def test_a_network_that_stays_float_for_the_most_part_is_warned_of(tmp_path):
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    recipe = sb.Recipe(rules=(sb.Rule("0"), sb.Rule(method=sb.LowRes(levels=3))))
    report = size_report(saved(net, tmp_path / "n.safetensors", recipe))
    assert "(0 16,640 bytes, 1 8 bytes)" in report.float16_warning


def test_json_has_every_layer(files, monkeypatch, capsys):
    value = json.loads(printed(monkeypatch, capsys, files["encoder"], "--json"))
    assert len(value["layers"]) == 121
    assert value["whole"]["parameters"] == sum(p.numel() for p in Encoder().parameters())


# ---------------------------------------------------------------- panels


@pytest.mark.skipif(tier() is None, reason="the C++ core was not built")
@pytest.mark.parametrize("name", ["mobilenet", "vit"])
def test_panels_are_those_of_a_run_and_no_layer_runs(name, files, monkeypatch):
    with monkeypatch.context() as patch:
        for kind in (PackedLinear, PackedConv2d):
            patch.setattr(kind, "forward", lambda *_: pytest.fail("a layer was run"))
        found = {layer.name: layer.panel_bytes for layer in size_report(files[name]).layers}
    net = sb.load(files[name])
    net(torch.randn(2, 3, 32, 32) if name == "mobilenet" else torch.randn(2, 3, 8, 8))
    run = {layer.name: kernels.panel_bytes(layer.weight.words) for layer in packed_layers(net)}
    assert found == run
    assert any(found.values())


@pytest.mark.skipif(tier() is None, reason="the C++ core was not built")
def test_layers_that_no_kernel_serves_have_panels_of_0_bytes(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, kdim=8, vdim=8)
            self.circular = nn.Conv2d(4, 16, 3, padding=1, padding_mode="circular")
            self.plain = nn.Conv2d(4, 16, 3, padding=1)

        def forward(self, x, key):
            image = (self.circular(x) + self.plain(x)).mean((2, 3))[None]
            return self.attn(image, key[None], key[None], need_weights=False)[0]

    x, key = torch.randn(2, 4, 6, 6), torch.randn(2, 8)
    path = saved(Net(), tmp_path / "n.safetensors", example=(x, key))
    found = {layer.name: layer.panel_bytes for layer in size_report(path).layers}
    assert found.pop("plain") > 0
    assert set(found.values()) == {0}
    assert "attn.out_proj" in found
