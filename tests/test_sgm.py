"""SGM, TWN and LSQ against their formulas in float64, and what SGM promises about its end."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import subbyte as sb
from subbyte import LSQ, SGM, TWN, Recipe, Rule, SubbyteError
from subbyte.cli import app
from subbyte.commands.demo import BASE
from subbyte.experiments.settings import read_experiment
from subbyte.methods import quantizers
from subbyte.methods.sgm import least_squares_power_of_two
from subbyte.models import build
from subbyte.report import size_report
from subbyte.train import run
from subbyte.train.config import config_of
from subbyte.train.watch import BINS, histograms

ROOT = Path(__file__).resolve().parents[1]


def layer_of(w):
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(w)
    return layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1e-4, 0.03, 1.0, 77.0])
def test_the_scale_is_the_best_power_of_two(bits, size):
    w = torch.randn(40, 30, generator=torch.Generator().manual_seed(bits)) * size
    scale = float(least_squares_power_of_two(w, sb.fixed_point(bits)))
    top = 2 ** (bits - 1) - 1

    def error(d):
        w64 = w.double()
        return float((w64 - d * (w64 / d + 0.5).floor().clamp(-top, top)).square().sum())

    errors = {e: error(2.0**e) for e in range(-30, 12)}
    assert scale == 2.0 ** min(errors, key=lambda e: errors[e])


def test_the_forward_pass_sees_float_weights_and_the_exact_gradient():
    w = torch.randn(6, 5)
    layer = layer_of(w)
    sb.prepare(layer, SGM(bits=2))
    assert torch.equal(layer.weight, w)
    x, g = torch.randn(3, 5), torch.randn(3, 6)
    layer(x).backward(g)
    assert torch.allclose(layer.parametrizations.weight.original.grad, g.T @ x)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_penalty_and_its_gradient_follow_the_formula(progress):
    method = SGM(bits=3, start=1e-2, end=50.0)
    w = torch.randn(20, 10) * 0.2
    layer = layer_of(w)
    sb.prepare(layer, method)
    loss = sb.penalty(layer, progress)
    loss.backward()
    d = sb.freeze(layer).layers[""].weight.scale.double()
    w64 = w.double()
    away = w64 - d * (w64 / d + 0.5).floor().clamp(-3, 3)
    kappa = 1e-2 * (50.0 / 1e-2) ** progress
    assert loss.item() == pytest.approx(float(kappa / 2 * away.square().sum()), rel=1e-5)
    grad = layer.parametrizations.weight.original.grad.double()
    assert (grad - kappa * away).abs().max() <= 1e-5 * kappa * float(d)


@pytest.mark.parametrize("reach", [0.05, 0.2])
def test_beyond_its_reach_the_pull_grows_no_more(reach):
    method = SGM(bits=3, start=2.0, end=2.0, reach=reach)
    w = torch.randn(20, 10) * 0.2
    layer = layer_of(w)
    sb.prepare(layer, method)
    loss = sb.penalty(layer, 0.5)
    loss.backward()
    d = float(sb.freeze(layer).layers[""].weight.scale)
    w64 = w.double()
    away = w64 - d * (w64 / d + 0.5).floor().clamp(-3, 3)
    pull = away.clamp(-reach * d, reach * d)
    assert 0.1 < (away.abs() > reach * d).double().mean() < 0.95
    grad = layer.parametrizations.weight.original.grad.double()
    assert (grad - 2 * pull).abs().max() <= 1e-5 * d
    energy = (pull.abs() * (away.abs() - pull.abs() / 2)).sum()  # the work against that pull
    assert loss.item() == pytest.approx(float(2 * energy), rel=1e-5)


def test_weights_are_clipped_to_the_outer_modes():
    layer = layer_of(torch.randn(20, 10))
    sb.prepare(layer, SGM(bits=3))
    limit = 3 * float(sb.freeze(layer).layers[""].weight.scale)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(10)
    sb.after_step(layer, 0.5)
    assert layer.weight.abs().max().item() == limit


def test_an_all_zero_layer_is_named_by_sgm_and_works_with_the_baselines():
    net = nn.Sequential(layer_of(torch.randn(3, 3)), layer_of(torch.zeros(4, 3)))
    with pytest.raises(SubbyteError, match=r"layer '1': all its weights are 0.*keep the layer"):
        sb.prepare(net, SGM(bits=2))
    for method in (TWN(), LSQ(bits=2)):
        layer = layer_of(torch.zeros(4, 3))
        sb.prepare(layer, method)
        (layer(torch.randn(2, 3)).sum() + sb.penalty(layer, 0.5)).backward()
        assert layer.parametrizations.weight.original.grad.isfinite().all()
        assert (sb.freeze(layer).layers[""].weight.dequantize() == 0).all()


def test_twn_follows_its_paper():
    w = torch.randn(30, 20)
    layer = layer_of(w)
    sb.prepare(layer, TWN())
    w64 = w.double()
    large = w64.abs() > 0.75 * w64.abs().mean()
    expected = w64.sign() * large * w64.abs()[large].mean()
    assert (layer.weight.double() - expected).abs().max() <= 1e-6
    g = torch.randn(30, 20)
    layer.weight.backward(g)
    assert torch.equal(layer.parametrizations.weight.original.grad, g)


@pytest.mark.parametrize("bits", [2, 3])
def test_lsq_follows_its_paper(bits):
    w = torch.randn(30, 20)
    layer = layer_of(w)
    sb.prepare(layer, LSQ(bits=bits))
    top = 2 ** (bits - 1) - 1
    w64 = w.double()
    s = 2 * w64.abs().mean() / top**0.5
    x = w64 / s
    q = (x.clamp(-top, top) + 0.5).floor()
    safe = (x - 0.5 - (x - 0.5).round()).abs() > 1e-5
    assert ((layer.weight.double() - s * q).abs()[safe] <= 1e-6 * s).all()
    g = torch.randn(30, 20)
    layer.weight.backward(g)
    inside = x.abs() < top
    quantizer = next(quantizers(layer))[1]
    per_weight = torch.where(inside, q - x, x.sign() * top)
    expected = (g.double() * per_weight).sum() / (w.numel() * top) ** 0.5
    assert quantizer.step.grad.item() == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    got = layer.parametrizations.weight.original.grad.double()
    assert torch.equal(got != 0, inside & (g != 0))
    assert torch.allclose(got[inside], g.double()[inside], rtol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """SGM at 2 bits on the digits, from float weights: a few seconds."""
    folder = tmp_path_factory.mktemp("sgm")
    base = replace(BASE, train=replace(BASE.train, threads=1, epochs=4), out=folder / "float")
    start = run(base, quiet=True)
    config = replace(
        base,
        model=replace(base.model, weights=str(start.file)),
        recipe=Recipe((Rule(method=SGM(bits=2, end=1000.0)),)),
        train=replace(base.train, lr=0.02, epochs=8),
        out=folder / "sgm",
    )
    return run(config, quiet=True)


def test_at_the_end_rounding_changes_nothing(trained):
    last = trained.history[-1]
    assert last.distance < 0.01
    assert abs(last.rounded_top1 - last.test_top1) <= 0.1
    assert trained.saved.top1 == pytest.approx(last.rounded_top1)
    assert trained.saved.top1 > 97


def test_weights_change_their_mode_early_and_settle(trained):
    changed = [record.changed for record in trained.history]
    assert max(changed) > 0.003
    assert changed[-1] < 0.0005
    distance = [record.distance for record in trained.history]
    assert distance[0] > 0.05


def test_the_pull_is_recorded_and_grows_exponentially(trained):
    pulls = [record.pull for record in trained.history]
    ratios = [b / a for a, b in itertools.pairwise(pulls)]
    assert ratios == pytest.approx([1e6 ** (1 / 8)] * 7)
    assert pulls[-1] == pytest.approx(1000.0)


def test_a_run_shows_the_modes_forming(trained):
    folder = trained.file.parent
    assert (folder / "modes.png").read_bytes().startswith(b"\x89PNG")
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(content["histograms"]) == len(trained.history) + 1
    first, last = content["histograms"][0], content["histograms"][-1]
    assert sum(last["classifier.1"]) == 65536
    assert sum(count > 0 for count in first["classifier.1"]) > 50  # a broad bell at first
    assert sum(count > 0 for count in last["classifier.1"]) <= 6  # a bin or two a mode at last


def test_a_histogram_counts_every_weight_once():
    w = torch.tensor([[-9.0, -1.0, -0.26, 0.0, 0.2, 1.0, 1.9, 50.0]])
    net = layer_of(w)
    sb.prepare(net, SGM(bits=2))
    quantizer = next(quantizers(net))[1]
    quantizer.scale.fill_(1.0)
    counts = histograms(net)[""]
    edges = torch.linspace(-1.75, 1.75, BINS + 1)
    expected = torch.histogram(w.flatten().clamp(-1.75, 1.75), edges).hist
    assert counts == expected.long().tolist()
    assert histograms(nn.Linear(2, 2)) == {}


def test_weights_that_end_far_from_their_levels_are_warned_of(trained, tmp_path, capsys):
    assert size_report(trained.file).warning is None
    config = replace(
        BASE,
        recipe=Recipe((Rule(method=SGM(bits=2, start=1e-6, end=1e-5)),)),
        train=replace(BASE.train, threads=1, epochs=1, limit_batches=3),
        out=tmp_path,
    )
    result = run(config)
    report = size_report(result.file)
    assert report.distance == pytest.approx(result.history[-1].distance)
    figure = f"{report.distance:.1%} of a step"
    assert report.distance > 0.01
    assert figure in " ".join(capsys.readouterr().err.split())
    assert figure in report.warning
    assert "raise method.end or train longer" in report.warning
    shown = CliRunner().invoke(app, ["inspect", str(result.file)]).output
    assert figure in " ".join(shown.split())


def test_the_file_is_fixed_point(trained):
    report = size_report(trained.file)
    for layer in report.layers:
        assert layer.levels == 3
        assert float(torch.tensor(layer.scale_min).log2()).is_integer()
    assert report.disk_bytes * 8 / report.n_weights <= 1.61


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bits": 1}, "bits=1.*2 to 8"), ({"bits": 9}, "bits=9"), ({"start": 0.0}, "start=0.0"),
     ({"late": -1.0}, "late=-1.0"), ({"reach": 0.6}, "reach=0.6.*at most 0.5"),
     ({"reach": 0.0}, "reach=0.0"),
     ({"end": float("nan")}, "end=nan"), ({"start": 2.0, "end": 1.0}, "end=1.0 is below")],
)  # fmt: skip
def test_bad_options_are_named(options, says):
    with pytest.raises(SubbyteError, match=says):
        SGM(**options)


def test_the_vgg7_experiment_trains(tmp_path):
    """Three steps from float weights, on images that are at hand: the run itself needs a GPU."""
    settings = read_experiment("sgm/vgg7", ROOT / "experiments").variations["2-bits"]
    config = config_of(settings, "sgm/vgg7", "2-bits")
    config = replace(
        config,
        model=replace(config.model, weights=None, arguments={"in_channels": 1, "image_size": 8}),
        data=replace(config.data, source="digits", crop=1),
        train=replace(config.train, threads=1, epochs=1, limit_batches=3, batch_size=16),
        out=tmp_path,
    )
    result = run(config, quiet=True)
    assert result.history[0].distance < 0.3
    assert size_report(result.file).n_weights > 3_000_000


@pytest.mark.parametrize(("bits", "disk"), [(2, 1.60), (3, 2.91), (4, 4.0)])
def test_a_frozen_file_takes_the_bits_it_should(tmp_path, bits, disk):
    """3, 7 and 15 levels: 40, 22 and 16 digits in a word of 64 bits; a scale is one byte."""
    net = build("fcnn1", in_channels=1, image_size=28)
    sb.prepare(net, SGM(bits=bits))
    sb.save(sb.pack(sb.freeze(net)), tmp_path / "net.safetensors")
    report = size_report(tmp_path / "net.safetensors")
    assert 8 * report.disk_bytes / report.n_weights == pytest.approx(disk, rel=0.005)
    tensors = load_file(tmp_path / "net.safetensors")
    scales = [value for name, value in tensors.items() if name.endswith("scale")]
    assert len(scales) == len(report.layers)
    assert all(scale.dtype == torch.int8 and scale.numel() == 1 for scale in scales)


def test_late_growth_stays_near_the_start_and_ends_where_it_should():
    early, late = SGM(start=1e-3, end=10.0), SGM(start=1e-3, end=10.0, late=4.0)
    assert early.pull(0.5) == pytest.approx(0.1)
    assert late.pull(0.5) == pytest.approx(1e-3 * 1e4 ** (0.5**4))
    assert late.pull(0.0) == early.pull(0.0) == 1e-3
    assert late.pull(1.0) == pytest.approx(10.0)
