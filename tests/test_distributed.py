"""Two processes against one: training, resuming, post-training, and what happens when one fails.

One pair of processes (`distributed_cases.py`) goes through all cases once; the tests compare what
it left with what one process gets here.
"""

from __future__ import annotations

import math

import pytest
import torch

import distributed_cases as cases
import subbyte as sb
from processes import together
from subbyte.core.group import ALONE, Group, _dealt_by_cost
from subbyte.train import train

STEPS = 4  # of an epoch: 3 whole batches and a short one
# Sums in another order: an entry of a gradient, of norm 1 at most after clipping, is off by some
# eps; the network as it is then feeds that back with a factor of order 1 in so few steps.
ROUNDINGS = 64 * torch.finfo(torch.float32).eps
BOUND = STEPS * cases.EPOCHS * cases.LR / (1 - 0.5) * cases.CLIP * ROUNDINGS


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(what each of the two processes found, their folder)."""
    folder = tmp_path_factory.mktemp("pair")
    for strategy in ("ddp", "fsdp"):
        train(cases.config(folder / f"alone-{strategy}", "sgm", strategy, epochs=1))
    ends = together(cases.__file__, folder)
    for code, said in ends:
        assert code == 0, said
    found = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return found, folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gets, by method."""
    made = {}

    def of(method):
        if method not in made:
            out = tmp_path_factory.mktemp(method)
            made[method] = cases.outcome(train(cases.config(out, method)))
        return made[method]

    return of


def assert_close(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (got[name].double() - value.double()).abs()
        assert (error <= BOUND * value.double().abs().clamp(min=1.0)).all(), (
            f"{name}: {error.max()} of {BOUND}"
        )


def assert_same_history(got, wanted):
    for own, other in zip(got, wanted, strict=True):
        for a, b in zip(own, other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or math.isclose(a, b, rel_tol=1e-5)


@pytest.mark.parametrize(("strategy", "method"), cases.CASES)
def test_two_processes_train_to_the_weights_of_one(pair, alone, strategy, method):
    """With clipping, EMA, weight decay, augmentation, BatchNorm and a short last batch."""
    found, _ = pair
    for own in found:
        got = own["trained"][f"{strategy}-{method}"]
        assert_close(got["weights"], alone(method)["weights"])
        assert_same_history(got["history"], alone(method)["history"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_begins_and_two_go_on(pair, alone, strategy):
    found, _ = pair
    for own in found:
        assert_close(own["resumed"][strategy]["weights"], alone("sgm")["weights"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_begin_and_one_goes_on(pair, alone, strategy):
    out = pair[1] / f"begun-{strategy}"
    notes = Notes()
    got = train(cases.config(out, "sgm", "ddp"), resume=True, progress=notes)
    assert_close(got.model.state_dict(), alone("sgm")["weights"])
    assert sum("began with 2 processes and goes on with 1" in text for text in notes.kept) == 1


class Notes(sb.train.progress.Silent):
    def __init__(self):
        self.kept = []

    def note(self, text):
        self.kept.append(text)


def test_only_the_leading_process_writes(pair):
    assert not (pair[1] / "nobody").exists()
    assert (pair[1] / "ddp-lowres" / "metrics.jsonl").read_text().count("\n") == cases.EPOCHS


def test_a_loss_that_is_nan_in_one_process_stops_both_and_names_the_layer(pair):
    found, folder = pair
    said = [own["diverged"] for own in found]
    assert said[0] == said[1]
    assert (
        "the loss is nan, first in the output of layer 'features.3', in epoch 2, step 1" in said[0]
    )
    assert "the checkpoint of epoch 1 is kept" in said[0]
    assert torch.load(folder / "diverged" / "checkpoint.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("name", list(cases.QUANTIZED))
def test_two_processes_quantize_to_the_plan_and_codes_of_one(pair, name):
    """Codes and plan to the bit; scales and adapters too, before the tuning and after it."""
    wanted = sb.quantize(cases.network(), cases.QUANTIZED[name], calibration=cases.calibration())
    for own in pair[0]:
        plan, layers, notes, distance = own["quantized"][name]
        assert plan.to_dict() == wanted.evidence.plan.to_dict()
        assert notes == wanted.notes
        assert math.isclose(distance, wanted.evidence.distance, rel_tol=1e-6)
        for layer, other in wanted.layers.items():
            assert torch.equal(layers[layer].weight.codes, other.weight.codes)
            torch.testing.assert_close(layers[layer].weight.scale, other.weight.scale)


def test_every_thing_is_of_one_process(pair):
    found, _ = pair
    for n in range(6):
        parts = [list(range(n))[own["parts"][n]] for own in found]
        assert [x for part in parts for x in part] == list(range(n))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 2, 6, 7, 100])
def test_parts_of_any_number_of_processes(n, size):
    groups = [Group(rank, size) for rank in range(size)]
    things = list(range(n))
    assert [x for group in groups for x in things[group.own(n)]] == things
    assert sorted(x for group in groups for x in group.dealt(things)) == things
    lengths = [len(things[group.own(n)]) for group in groups]
    assert max(lengths) - min(lengths) <= 1


def test_dear_items_are_spread():
    assert _dealt_by_cost([1, 9, 8, 1, 1], 2) == [1, 0, 1, 0, 1]
    assert ALONE.each(lambda x: 2 * x, [3, 1], lambda x: x) == [6, 2]
