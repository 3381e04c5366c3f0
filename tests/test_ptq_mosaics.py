"""More to see for a classifier that sees one vector an image."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from subbyte.core.rtn import rtn
from subbyte.core.sites import sites
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor, as_matrix, as_weight
from subbyte.ptq import measuring
from subbyte.ptq.evidence.statistics import input_statistics, rounds_needed
from subbyte.ptq.plan.search import Layer
from subbyte.ptq.solvers.codes import channel_grid
from subbyte.ptq.steps.in_order import solve_in_order
from subbyte.tasks.images import Mosaics, mosaic


class Ear:
    def __init__(self):
        self.notes = []

    def progress(self, step, done, total):
        pass

    def note(self, text):
        self.notes.append(text)


def pictures(n, seed, size=16):
    """Smooth random pictures [n, 3, size, size], each of few colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 20)
    ).eval()


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 4), (1, 1)])
def test_each_quarter_is_a_piece_of_an_image(size):
    images = torch.arange(5.0)[:, None, None, None].expand(5, 2, *size).contiguous()
    made = mosaic(images, 40, torch.Generator().manual_seed(0))
    assert made.shape == (40, 2, *size)
    assert torch.equal(made, made.round())
    assert {int(v) for v in made.unique()} == set(range(5))
    h, w = size[0] // 2, size[1] // 2
    for quarter in (made[:, :, :h, :w], made[:, :, h:, :w], made[:, :, :h, w:], made[:, :, h:, w:]):
        flat = quarter.flatten(1)
        assert torch.equal(flat, flat[:, :1].expand_as(flat))
    if min(size) > 1:
        assert (made[:, 0, 0, 0] != made[:, 0, -1, -1]).any()


def test_batches_are_made_again_as_they_were():
    images = pictures(10, 0)
    made = Mosaics(images, 3, seed=1, batch=4)
    assert [len(x) for x in made] == [4, 4, 2] * 3
    assert len(made) == 9
    assert torch.equal(made[5], made[5])
    assert torch.equal(made[5], made[4:6][1])
    assert not torch.equal(made[0], made[3])
    assert not torch.equal(made[0], Mosaics(images, 3, seed=2, batch=4)[0])
    with pytest.raises(IndexError):
        made[9]


def test_rounds_bring_four_vectors_an_input_at_most_eight_times():
    assert [rounds_needed(n, 100) for n in (1000, 100, 99, 80, 50, 40, 1)] == [0, 0, 4, 4, 7, 8, 8]


def test_only_starved_layers_see_them(monkeypatch):
    seen = []
    original = measuring.input_statistics

    def watched(model, layers, batches, **options):
        seen.append(([site.name for site in layers], sum(len(x) for x in batches)))
        return original(model, layers, batches, **options)

    monkeypatch.setattr(measuring, "input_statistics", watched)
    ear = Ear()
    images = pictures(40, 1)
    sb.quantize(classifier(), sb.CoRa(levels=4, tune=0), calibration=[images], listener=ear)
    assert seen == [(["0", "4"], 32), (["4"], 5 * 32)]
    assert "few inputs for 4: 5 mosaics per image as well" in ear.notes
    seen.clear()
    sb.quantize(classifier(), sb.CoRa(levels=4, tune=0), calibration=[pictures(80, 1)])
    assert seen == [(["0", "4"], 64)]


def test_solving_in_order_sees_them_too():
    net, x = classifier(), pictures(24, 3)
    found = input_statistics(net, sites(net), [x])
    known = [
        Layer(site, as_matrix(net.get_submodule(site.owner).weight.detach()), 1, found[site.name],
              None)
        for site in sites(net)
    ]  # fmt: skip
    seen = {}

    def solve(layer):
        seen[layer.site.name] = layer.statistics
        codes = rtn(layer.matrix, None, channel_grid(16, 0))
        weight = as_weight(codes.codes, layer.site.shape)
        return QuantizedLayer(QuantizedTensor(weight, codes.scale, codes.grid))

    more = Mosaics(x, 2, seed=0)
    solve_in_order(sb.Quantized(net, {}), known, solve, x.split(10), more=more, starved=["4"])
    assert {name: statistics.patches for name, statistics in seen.items()} == {
        "0": 24 * 14 * 14,
        "4": 24 + 48,
    }


def test_a_flat_input_goes_without():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 4))
    result = sb.quantize(net, sb.CoRa(levels=4, tune=0), calibration=[torch.randn(20, 30)])
    assert sb.pack(result)(torch.randn(2, 30)).isfinite().all()


def test_codes_hold_better_for_images_not_seen(monkeypatch):
    net, new = classifier(), pictures(600, 9)

    def distance():
        total = 0.0
        for seed in range(4):
            result = sb.quantize(
                net, sb.CoRa(levels=4, tune=0), calibration=[pictures(30, seed)], seed=seed
            )
            with torch.no_grad():
                total += float((sb.pack(result)(new) - net(new)).square().mean())
        return total

    with_mosaics = distance()
    monkeypatch.setattr(measuring, "rounds_needed", lambda vectors, width: 0)
    without = distance()
    assert with_mosaics < 0.8 * without
