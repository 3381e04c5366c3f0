"""Post-training quantization as a whole: search, tuning, norms, the published form, the command."""

import importlib
import itertools
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import subbyte as sb
from subbyte import CoRa, SubbyteError
from subbyte.cli import app
from subbyte.commands.demo import BASE
from subbyte.core.follow import norms_behind
from subbyte.core.plan import Plan, PlannedLayer
from subbyte.core.sites import bias_of, sites
from subbyte.core.tensors import as_matrix
from subbyte.data import load_images
from subbyte.methods.equalize import equalize
from subbyte.models import build, load_weights
from subbyte.ptq import PublishedCoRa, quantize
from subbyte.ptq.cora import solve_layer
from subbyte.ptq.evidence.statistics import Statistics
from subbyte.ptq.plan.search import Layer, _options, _priced, search
from subbyte.ptq.published import butterworth, equivalent_bits, search_ranks
from subbyte.ptq.steps.norms import correct_norms
from subbyte.ptq.steps.tune import tune
from subbyte.report import size_report
from subbyte.tasks import Classification
from subbyte.tasks.classes import divergence as by_item
from subbyte.train import evaluate, run


def divergence(logits, target):
    """The mean over the items."""
    return by_item(logits, target).mean()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Float weights of the digits network after three epochs: about 99 %."""
    out = tmp_path_factory.mktemp("float")
    config = replace(BASE, train=replace(BASE.train, threads=1, epochs=3), out=out)
    return run(config, quiet=True).file


@pytest.fixture(scope="module")
def net(weights):
    network = build("digitsnet")
    load_weights(network, weights)
    return network.eval()


@pytest.fixture(scope="module")
def images(net):
    data = load_images("digits", "train").head(400)
    return net.preprocess(data.images), data.labels


@pytest.fixture(scope="module")
def test_set():
    return load_images("digits", "test")


def top1(network, net, test_set):
    return evaluate(network, test_set, preprocess=net.preprocess).top1


# ---------------------------------------------------------------- the whole road


@pytest.mark.parametrize(
    ("method", "least", "bits"),
    [
        (CoRa(bits=4, tune=0), 97.5, 4.2),
        (CoRa(levels=3, tune=50), 95.0, 1.8),
        (CoRa(target_bits=2.45, tune=20), 97.5, 2.45),
        (CoRa(levels=3, target_bits=2.2, tune=20, adapter_bits=16), 96.0, 2.2),
        (CoRa(bits=8, codes="rtn", tune=0, correct_norms=False), 98.0, 8.2),
    ],
    ids=str,
)
def test_digits_survive(method, least, bits, net, images, test_set, tmp_path):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = sb.quantize(net, method, calibration=[images[0][:200], images[0][200:]])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert top1(sb.pack(result), net, test_set) >= least
    assert result.layer_bits_per_weight <= bits
    assert result.evidence.iterations == method.tune
    assert result.evidence.agreement > 90
    sb.save(sb.pack(result), tmp_path / "net.safetensors")
    report = size_report(tmp_path / "net.safetensors")
    assert 8 * report.disk_bytes / report.n_weights == pytest.approx(result.layer_bits_per_weight)
    for layer, planned in zip(report.layers, result.evidence.plan.layers, strict=True):
        assert (layer.levels, layer.rank, layer.disk_bytes) == (
            planned.levels, planned.rank, planned.n_bytes,
        )  # fmt: skip


def test_a_half_precision_network_is_quantized_in_float32(net, images):
    half = build("digitsnet")
    half.load_state_dict(net.state_dict())
    result = quantize(half.half(), CoRa(bits=4, tune=0), calibration=[images[0][:100]])
    assert sb.pack(result)(images[0]).dtype == torch.float32
    assert result.evidence.agreement > 90
    assert half.features[0].weight.dtype == torch.float16


def test_the_same_seed_gives_the_same_network(net, images):
    x = images[0][:100]
    method = CoRa(levels=3, target_bits=2.4, tune=5)  # labels drawn with the seed shape adapters
    results = [quantize(net, method, calibration=[x], seed=s) for s in (1, 1, 2)]
    states = [sb.pack(result).state_dict() for result in results]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_better_codes_and_adapters_do_buy_something(net, images):
    """In the divergence from the float network on images that no step has seen."""
    fresh = net.preprocess(load_images("digits", "train").images[600:1000])
    target = net(fresh).detach()

    def distance(method):
        model = sb.pack(quantize(net, method, calibration=[images[0]]))
        return float(divergence(model(fresh), target))

    plain = {"tune": 0, "correct_norms": False}
    nearest = distance(CoRa(levels=3, codes="rtn", **plain))
    compensated = distance(CoRa(levels=3, **plain))
    adapted = distance(CoRa(levels=3, target_bits=2.4, **plain))
    assert compensated < 0.5 * nearest
    assert adapted < compensated


def test_what_cannot_be_quantized_stays_float_and_is_named(images):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRUCell(8, 8)
            self.head = nn.Linear(8, 3)
            self.twin = nn.Linear(8, 3)
            self.twin.weight = self.head.weight
            self.last = nn.Linear(8, 5)
            self.never = nn.Linear(2, 2)

        def forward(self, x):
            y = self.rnn(x[:, -1])
            return self.last(y) + self.head(y).sum(1, keepdim=True)

    torch.manual_seed(0)
    result = quantize(Odd(), CoRa(levels=3, tune=0), calibration=[torch.randn(20, 4, 8)])
    notes = "\n".join(result.notes)
    assert "'rnn.weight_ih', 'rnn.weight_hh' stay float (384 values): GRUCell: there is" in notes
    assert "layer 'never' (Linear) has no input statistics" in notes
    assert [x.name for x in result.evidence.plan.layers] == ["head", "last", "never"]
    assert set(result.layers) == {"head", "last", "never"}
    packed = sb.pack(result)
    assert packed.twin.packed is packed.head.packed
    assert torch.equal(packed.twin.bias, result.model.twin.bias)


def test_a_transformer_is_quantized_at_every_projection():
    torch.manual_seed(0)
    vit = build("vit1", in_channels=1, image_size=8)
    x = torch.randn(40, 1, 8, 8)
    result = quantize(vit, CoRa(bits=8, tune=3), calibration=[x])
    assert [note for note in result.notes if " float " in note or "no input" in note][:1] == [
        "'positions' stays float (384 values): ViT is no layer that can be quantized"
    ]
    target = vit.eval()(x)
    assert float(divergence(sb.pack(result)(x), target).detach()) < 1e-2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give bits or levels, or target_bits"),
        ({"bits": 3, "levels": 5}, "bits=3 and levels=5; give one"),
        ({"bits": 9}, "bits=9; use 1 to 8"),
        ({"levels": 1}, "levels=1; use 2 to 256"),
        ({"target_bits": 0.0}, "target_bits=0.0"),
        ({"bits": 3, "codes": "best"}, "codes='best'; use one of gptq, rtn, k-sigma"),
        ({"bits": 3, "adapter_bits": 4}, "adapter_bits=4"),
        ({"bits": 3, "tune": 100_001}, "tune=100001; use 0 to 100000"),
        ({"bits": 3, "rounds": 0}, "rounds=0"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(SubbyteError, match=says):
        CoRa(**options)


def test_bad_calibration_is_named(net, images):
    for calibration in ([], [images[0][:0]]):
        with pytest.raises(SubbyteError, match="no calibration images"):
            quantize(net, CoRa(bits=3), calibration=calibration)
    sick = build("digitsnet")
    with torch.no_grad():
        sick.features[3].weight[0, 0, 0, 0] = math.inf
    with pytest.raises(SubbyteError, match=r"weight of 'features\.3' has 1 NaN or infinite"):
        quantize(sick, CoRa(bits=3), calibration=[images[0][:20]])
    broken = images[0][:10].clone()
    broken[3, 0, 0, 0] = math.nan
    with pytest.raises(SubbyteError, match=r"input of layer 'features\.0' has NaN"):
        quantize(net, CoRa(bits=3), calibration=[broken])
    with pytest.raises(SubbyteError, match=r"cannot be met; the smallest plan .* has 1\.\d+ bits"):
        quantize(net, CoRa(target_bits=0.5), calibration=[images[0][:20]])
    one = quantize(net, CoRa(bits=3), calibration=[images[0][:1]])
    assert any("too few to judge" in note for note in one.notes)
    assert one.evidence.iterations == 0


# ---------------------------------------------------------------- search


def made_up_layers(n=3):
    layers = []
    for i in range(n):
        net = nn.Sequential(nn.Linear(12, 8 + 4 * i))
        site = sites(net)[0]
        site = replace(site, name=f"layer{i}")
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
        effect = torch.rand(8 + 4 * i, generator=generator, dtype=torch.float64) * 10.0**i
        weight = as_matrix(net[0].weight.detach())
        layers.append(Layer(site, weight, 1, Statistics((x.T @ x / 50)[None], 50), effect))
    return layers


@pytest.mark.parametrize("bits", [2.6, 3.5, 5.0])
def test_the_search_is_close_to_trying_everything(bits):
    layers = made_up_layers()
    choices = (2, 3, 5, 9)
    plan = search(layers, bits, levels=choices, most_rank=2)
    weights = sum(layer.site.n_weights for layer in layers)
    budget = bits * weights / 8
    assert sum(layer.n_bytes for layer in plan.layers) <= budget
    assert plan.layer_bits_per_weight <= bits
    options = [_options(layer, choices, 8, 2) for layer in layers]
    best = min(
        sum(option.loss for option in chosen)
        for chosen in itertools.product(*options)
        if sum(option.n_bytes for option in chosen) <= budget
    )
    found = sum(layer.predicted for layer in plan.layers)
    worst = max(max(option.loss for option in own) for own in options)
    assert best * (1 - 1e-9) <= found <= best + 0.02 * worst


@pytest.mark.parametrize("bits", [2.8, 3.1, 3.7, 4.2, 4.8, 5.4])
def test_nothing_better_can_be_paid_with_what_the_search_leaves(bits):
    layers, choices = made_up_layers(), (2, 3, 5, 9)
    plan = search(layers, bits, levels=choices, most_rank=2)
    options = [_options(layer, choices, 8, 2) for layer in layers]
    weights = sum(layer.site.n_weights for layer in layers)
    left = bits * weights / 8 - sum(layer.n_bytes for layer in plan.layers)
    for now, own in zip(plan.layers, options, strict=True):
        better = [option for option in own if option.loss < now.predicted]
        assert all(option.n_bytes - now.n_bytes > left for option in better)


@pytest.mark.parametrize("bits", [2.6, 3.5, 5.0, 7.5])
def test_the_price_is_the_lowest_that_meets_the_budget(bits):
    """No price of a fine series of them does better within the budget."""
    options = [_options(layer, (2, 3, 5, 9, 17), 8, 2) for layer in made_up_layers()]
    weights = sum(layer.site.n_weights for layer in made_up_layers())
    budget = int(bits * weights / 8)
    chosen = _priced(options, budget)
    assert sum(option.n_bytes for option in chosen) <= budget

    def at(price):
        return [min(own, key=lambda o: (o.loss + price * o.n_bytes, o.n_bytes)) for own in options]

    fitting = [
        sum(o.loss for o in found)
        for found in map(at, torch.logspace(-12, 6, 4000, dtype=torch.float64).tolist())
        if sum(o.n_bytes for o in found) <= budget
    ]
    assert sum(option.loss for option in chosen) <= min(fitting) * (1 + 1e-9)


def test_a_layer_that_matters_more_gets_more_bits():
    plan = search(made_up_layers(), 3.0, most_rank=0)
    bits = [8 * layer.n_bytes / layer.n_weights for layer in plan.layers]
    assert bits[0] < bits[2]


def test_a_plan_is_saved_edited_and_used(net, images, tmp_path):
    first = quantize(net, CoRa(target_bits=2.45, tune=0), calibration=[images[0]])
    first.evidence.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == first.evidence.plan
    content = json.loads((tmp_path / "plan.json").read_text())
    content["layers"][1] |= {"levels": 17, "rank": 2}
    content["layers"][4]["levels"] = 0
    (tmp_path / "plan.json").write_text(json.dumps(content))
    edited = Plan.load(tmp_path / "plan.json")
    again = quantize(net, CoRa(bits=3, tune=0), calibration=[images[0]], plan=edited)
    assert (again.evidence.plan.layers[1].levels, again.evidence.plan.layers[1].rank) == (17, 2)
    assert sb.pack(again).features[3].packed.grid.n_levels == 17
    assert isinstance(sb.pack(again).classifier[4], nn.Linear)
    assert again.layer_bits_per_weight == pytest.approx(again.evidence.plan.layer_bits_per_weight)
    assert "float" in str(again.evidence.plan)


def test_bad_plans_are_named(net, images, tmp_path):
    for text, says in (
        ("{", "not a plan"),
        ('{"layers": [{"name": "a"}]}', "not a plan: KeyError"),
        ('{"layers": [{"name": "a", "type": "Linear", "shape": [1], "levels": 1, "rank": 0}]}',
         "levels of 'a' are 1"),
    ):  # fmt: skip
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(SubbyteError, match=says):
            Plan.load(tmp_path / "plan.json")
    with pytest.raises(SubbyteError, match=r"none\.json: cannot be read"):
        Plan.load(tmp_path / "none.json")
    other = Plan((PlannedLayer("absent", "Linear", (1, 1), 3, 0, 0),))
    with pytest.raises(SubbyteError, match="names layer 'absent'"):
        quantize(net, CoRa(bits=3), calibration=[images[0][:20]], plan=other)
    deep = Plan((PlannedLayer("features.0", "Conv2d", (16, 1, 3, 3), 3, 99, 0),))
    with pytest.raises(SubbyteError, match=r"layer 'features\.0': rank=99"):
        quantize(net, CoRa(bits=3), calibration=[images[0][:20]], plan=deep)


# ---------------------------------------------------------------- norms and tuning


def test_norms_move_by_what_quantization_moved(net, images):
    start = coarse(net)
    done = correct_norms(start, net, images[0])
    assert done.layers is start.layers
    model, quantized = done.model, sb.pack(done, precision="float32")
    seen = {}

    def remember(where):
        def hook(norm, args):
            rows = args[0].double().transpose(0, 1).flatten(1)
            seen[where] = (rows.mean(1), rows.var(1, correction=0))

        return hook

    net.features[1].register_forward_pre_hook(remember("float"))
    quantized.features[1].register_forward_pre_hook(remember("quantized"))
    with torch.no_grad():
        net(images[0])
        quantized(images[0])
    net.features[1]._forward_pre_hooks.clear()
    shift = seen["quantized"][0] - seen["float"][0]
    moved = (model.features[1].running_mean - net.features[1].running_mean).double()
    assert torch.allclose(moved, shift, atol=1e-5)
    ratio = (seen["quantized"][1] / seen["float"][1]).clamp(0.25, 4)
    grown = (model.features[1].running_var / net.features[1].running_var).double()
    assert torch.allclose(grown, ratio, rtol=1e-4)
    target = net(images[0]).detach()
    plain = float(divergence(sb.pack(start, precision="float32")(images[0]), target))
    assert float(divergence(quantized(images[0]), target)) < plain


def coarse(net, levels=3, rank=0):
    """Few levels by rounding to nearest: what needs correcting most."""
    layers = {}
    for site in sites(net):
        matrix = as_matrix(net.get_parameter(f"{site.owner}.{site.parameter}").detach())
        planned = PlannedLayer(site.name, site.type, site.shape, levels, rank)
        solved = solve_layer(Layer(site, matrix, 1, None, None), planned, CoRa(levels=3))
        layers[site.name] = replace(solved, bias=bias_of(net, site))
    return sb.Quantized(net, layers)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_tuning_lowers_the_divergence_at_every_rank(net, images, rank):
    """The first try at this diverged at rank 4."""
    start = coarse(net, rank=rank)
    losses = []
    done = tune(
        start, net, images[0], 60, Classification(), torch.Generator().manual_seed(0),
        step=lambda i, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 60
    assert all(math.isfinite(loss) for loss in losses)
    for name, layer in done.layers.items():
        assert torch.equal(layer.weight.codes, start.layers[name].weight.codes)
        assert (layer.adapter is None) == (rank == 0)
    target = net(images[0]).detach()

    def distance(quantized):
        return float(divergence(sb.pack(quantized, precision="float32")(images[0]), target))

    assert distance(done) < 0.9 * distance(start)


def test_what_does_not_help_is_dropped(net, images, monkeypatch):
    module = importlib.import_module("subbyte.ptq.quantize")  # the name is the function's too

    def worse(start, *rest, **more):
        return replace(start, model=build("digitsnet").eval())

    monkeypatch.setattr(module, "tune", worse)
    result = quantize(net, CoRa(bits=4, tune=5), calibration=[images[0]])
    assert any("5 iterations of tuning: dropped" in note for note in result.notes)
    assert result.evidence.agreement > 90


def test_images_that_judge_teach_nothing(net, images):
    """Every fifth image decides what is kept; the codes know nothing of it."""
    x = images[0].clone()
    method = CoRa(target_bits=3.0, tune=0, in_order=False, correct_norms=False)
    before = quantize(net, method, calibration=[x])
    x[::5] = x[::5].flip(3) * 2
    after = quantize(net, method, calibration=[x])
    assert before.evidence.plan == after.evidence.plan
    assert all(
        torch.equal(old, sb.pack(after).state_dict()[name])
        for name, old in sb.pack(before).state_dict().items()
    )


# ---------------------------------------------------------------- as published


def test_the_kernel_is_the_normalised_butterworth():
    got = butterworth(torch.tensor(0.5, dtype=torch.float64), 4, order=4)
    raw = [1 / math.sqrt(1 + (i / 4 / 0.5) ** 8) for i in (1, 2, 3, 4)]
    assert got.tolist() == pytest.approx([value / raw[0] for value in raw])


def test_the_published_search_meets_its_budget_and_leaves_the_network(net, images):
    method = PublishedCoRa(bits=3, iterations=200, budget=0.05, lr=0.05)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = quantize(net, method, calibration=[images])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert result.evidence.iterations == 200
    ranks = {layer.name: layer.rank for layer in result.evidence.plan.layers}
    assert all(ranks[name] >= 1 for name in ("features.0", "features.3", "features.7"))
    assert ranks["classifier.1"] == 0  # convolutions only
    start = PublishedCoRa(bits=3, iterations=1)
    found = {site.name: site for site in sites(net)}
    first = search_ranks(net, found, *images, start, torch.Generator())
    assert sum(ranks[name] for name in first) < 0.6 * sum(first.values())
    assert equivalent_bits(result.evidence.plan, method) > 3
    assert result.layer_bits_per_weight > equivalent_bits(result.evidence.plan, method) - 0.1
    assert sb.pack is not None


def test_the_published_search_needs_labels_or_a_teacher(net, images):
    with pytest.raises(SubbyteError, match="learns from labels and the calibration has none"):
        quantize(net, PublishedCoRa(bits=3, iterations=2), calibration=[images[0]])
    taught = PublishedCoRa(bits=4, iterations=2, labels=False)
    assert quantize(net, taught, calibration=[images[0]]).evidence.plan.layers[0].rank > 0
    for options, says in (
        ({"bits": 0}, "bits=0"), ({"budget": 2.0}, "budget=2.0"),
        ({"iterations": 0}, "iterations=0"), ({"start": 0.0}, "start=0.0"),
    ):  # fmt: skip
        with pytest.raises(SubbyteError, match=says):
            PublishedCoRa(**options)


# ---------------------------------------------------------------- equalization


def test_equalized_channels_compute_what_they_did(net, images):
    model = build("digitsnet")
    model.load_state_dict(net.state_dict())
    model.eval()
    pairs = norms_behind(model, lambda: model(images[0][:2]))
    assert pairs == {"features.0": "features.1", "features.3": "features.4",
                     "features.7": "features.8", "classifier.1": "classifier.2"}  # fmt: skip
    found = equalize(model, images[0][:2], levels=3)
    assert all(math.log2(d).is_integer() for d in found.values())
    assert not torch.equal(model.features[3].weight, net.features[3].weight)
    with torch.no_grad():
        assert torch.allclose(model(images[0]), net(images[0]), atol=1e-3)
    with pytest.raises(SubbyteError, match="no layer is followed by a BatchNorm"):
        equalize(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), 3)


def test_one_power_of_two_then_suits_as_well_as_a_scale_a_channel(net, images):
    model = build("digitsnet")
    model.load_state_dict(net.state_dict())
    equalize(model.eval(), images[0][:2], levels=3)
    method = sb.SGM(bits=2)

    def relative_error(network):
        w = network.features[3].weight.detach()
        sb.prepare(network, method)
        return float(
            (w - sb.freeze(network).layers["features.3"].weight.dequantize()).norm() / w.norm()
        )

    plain = build("digitsnet")
    plain.load_state_dict(net.state_dict())
    assert relative_error(model) < relative_error(plain)


# ---------------------------------------------------------------- the command


def command(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def test_the_command_leaves_a_file_and_its_figures(weights, tmp_path):
    out, plan = tmp_path / "net.safetensors", tmp_path / "plan.json"
    result = command("digitsnet", "--weights", weights, "--calibrate", "digits", "--samples", 200,
                     "--target-bits", 2.45, "--tune", 5, "--out", out, "--save-plan", plan,
                     "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["layer_bits_per_weight"] <= 2.45 < figures["bits_per_weight"]
    assert figures["bytes"] == out.stat().st_size
    assert figures["iterations"] == 5
    assert figures["top1"] > 95
    assert {"name", "levels", "rank", "n_bytes", "predicted"} <= set(figures["layers"][0])
    net = sb.load(out, precision="float32")  # the arithmetic of the figures
    shown = evaluate(net, load_images("digits", "test"), preprocess=build("digitsnet").preprocess)
    assert shown.top1 == figures["top1"]
    again = command("digitsnet", "--weights", weights, "--calibrate", "digits", "--samples", 200,
                    "--bits", 3, "--plan", plan, "--tune", 0, "--out", out)  # fmt: skip
    assert again.exit_code == 0
    assert "bits per weight" in again.output


@pytest.mark.parametrize("method", ["gptq", "rtn", "cora-paper"])
def test_every_method_has_a_name(method, weights, tmp_path):
    out = tmp_path / "net.safetensors"
    result = command("digitsnet", "--weights", weights, "--calibrate", "digits", "--samples", 64,
                     "--bits", 4, "--method", method, "--out", out, "--score", "",
                     "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["top1"] is None
    assert out.is_file()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The current folder, with a module of networks."""
    (tmp_path / "mynet.py").write_text(
        "from subbyte.models import build\n"
        "import torch.nn as nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        inner = build('digitsnet')\n"
        "        self.features, self.classifier = inner.features, inner.classifier\n"
        "        self.preprocess = inner.preprocess\n"
        "    def forward(self, x):\n"
        "        return self.classifier(self.features(x))\n"
        "class Untraced(Mine):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x if x.max() > -9 else -x)\n"
        "class Scaled(Mine):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        inner = self.preprocess\n"
        "        self.preprocess = lambda images: inner(images)\n"
        "three = 3\n"
        "def number(): return 3\n"
        "def broken(): raise RuntimeError('a fault of mine\\nin two lines')\n"
    )
    (tmp_path / "broken.py").write_text("def x(:\n")
    monkeypatch.chdir(tmp_path)  # the current folder is where modules are looked for
    yield tmp_path
    sys.modules.pop("mynet", None)


def test_a_network_of_ones_own(weights, own, tmp_path, monkeypatch):
    out = tmp_path / "net.safetensors"
    common = ("--calibrate", "digits", "--samples", 64, "--bits", 4, "--tune", 0, "--out", out)
    result = command("mynet:Mine", "--weights", weights, *common, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["top1"] > 95
    assert "--model" not in str(json.loads(result.stdout)["notes"])
    assert size_report(out).knows_buffers
    runner = CliRunner()
    wanted = sb.load(out, importlib.import_module("mynet").Mine())
    image = torch.randn(3, 1, 8, 8)
    assert torch.equal(sb.load(out)(image), wanted(image))
    reads = (("evaluate", str(out), "--data", "digits", "--limit", "50"),
             ("bench", str(out), "--seconds", "0.01"),
             ("bench", str(out), "--input", "1,8,8", "--seconds", "0.01"),
             ("inspect", str(out)))  # fmt: skip
    with monkeypatch.context() as elsewhere:  # where no module `mynet` is
        elsewhere.chdir("/")
        elsewhere.delitem(sys.modules, "mynet")
        for read in reads:
            alone = runner.invoke(app, [*read, "--json"])
            assert alone.exit_code == 0, (read, alone.output, alone.exception)
    wrong = runner.invoke(
        app, ["evaluate", "digitsnet", "--data", "digits", "--model", "mynet:Mine"]
    )
    assert "--model goes with a packed file" in str(wrong.exception)
    for name, says in (
        ("mynet:Absent", "cannot be imported"), ("nomodule:x", "cannot be imported"),
        ("mynet:three", "is a int; give a function or a class"),
        ("mynet:Mine.__name__", "cannot be imported"),
        ("mynet:number", "returns a int; it must return an nn.Module"),
        ("mynet:broken", "failed: RuntimeError: a fault of mine (mynet.py, line 21)"),
        ("broken:x", "cannot be imported: SyntaxError"), ("nonet", "neither a zoo network"),
        ("digitsnet", "needs its float weights"),
    ):  # fmt: skip
        failed = command(name, *common)
        assert isinstance(failed.exception, SubbyteError)
        assert says in str(failed.exception)


@pytest.mark.parametrize(
    ("name", "says", "reads"),
    [
        ("Untraced", "saved without a program: Untraced cannot be traced", ["evaluate", "bench"]),
        ("Scaled", "does not hold the network's preprocess", ["evaluate"]),
    ],
)
def test_a_file_that_needs_its_network_says_why(name, says, reads, weights, own, tmp_path):
    out = tmp_path / "net.safetensors"
    result = command(f"mynet:{name}", "--weights", weights, "--calibrate", "digits", "--samples",
                     64, "--bits", 4, "--tune", 0, "--out", out, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    (note,) = [n for n in json.loads(result.stdout)["notes"] if "--model" in n]
    assert says in note
    options = {"evaluate": ("--data", "digits", "--limit", "50"),
               "bench": ("--input", "1,8,8", "--seconds", "0.01")}  # fmt: skip
    for read in reads:
        line = [read, str(out), *options[read], "--json"]
        assert isinstance(CliRunner().invoke(app, line).exception, SubbyteError)
        found = CliRunner().invoke(app, [*line, "--model", f"mynet:{name}"])
        assert found.exit_code == 0, found.output


def test_options_that_do_not_fit_are_named(weights, tmp_path):
    common = ("digitsnet", "--weights", weights, "--calibrate", "digits", "--out",
              tmp_path / "net.safetensors")  # fmt: skip
    for options, says in (
        (("--bits", 3, "--samples", 0), "samples=0"),
        (("--bits", 3, "--method", "magic"), "--method magic: expected one of"),
        (("--bits", 3, "--method", "gptq", "--target-bits", 3), "--target-bits goes with"),
        (("--levels", 5, "--method", "cora-paper"), "takes --bits"),
        ((), "give bits or levels"),
    ):
        failed = command(*common, *options)
        assert isinstance(failed.exception, SubbyteError), failed.output
        assert says in str(failed.exception)
    assert not (tmp_path / "net.safetensors").exists()
