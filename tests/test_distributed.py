"""Two processes against one: training, resuming, post-training, and what happens when one fails.

One pair of processes (`distributed_cases.py`) goes through all cases once; the tests compare what
it left with what one process gets here.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import distributed_cases as cases
import subbyte as sb
from processes import together, torchrun
from subbyte.core.group import ALONE, Group, _dealt_by_cost
from subbyte.train.folder import own_folder

STEPS = 4  # of an epoch: 3 whole batches and a short one
# Sums in another order: an entry of a gradient, of norm 1 at most after clipping, is off by some
# eps; the network as it is then feeds that back with a factor of order 1 in so few steps.
ROUNDINGS = 64 * torch.finfo(torch.float32).eps
BOUND = STEPS * cases.EPOCHS * cases.LR / (1 - 0.5) * cases.CLIP * ROUNDINGS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As each of the two has: the number of threads decides the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(what each of the two processes found, their folder)."""
    folder = tmp_path_factory.mktemp("pair")
    for strategy in ("ddp", "fsdp"):
        cases.train(cases.config(folder / f"alone-{strategy}", "lowres", strategy, epochs=1))
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
            made[method] = cases.outcome(cases.train(cases.config(out, method)))
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
        assert_close(own["resumed"][strategy]["weights"], alone("lowres")["weights"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_begin_and_one_goes_on(pair, alone, strategy):
    out = pair[1] / f"begun-{strategy}"
    notes = Notes()
    got = cases.train(cases.config(out, "lowres", "ddp"), resume=True, progress=notes)
    assert_close(got.model.state_dict(), alone("lowres")["weights"])
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
        "the loss is nan, first in the output of layer 'features.0', in epoch 2, step 1" in said[0]
    )
    assert "the checkpoint of epoch 1 is kept" in said[0]
    assert torch.load(folder / "diverged" / "checkpoint.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("name", list(cases.QUANTIZED))
def test_two_processes_quantize_to_the_plan_and_codes_of_one(pair, name):
    """Choices and codes to the bit; what is predicted of them, and tuned, but for the last bits."""
    wanted = sb.quantize(cases.network(), cases.QUANTIZED[name], calibration=cases.calibration())
    for own in pair[0]:
        plan, layers, notes, distance = own["quantized"][name]
        assert notes == wanted.notes
        assert math.isclose(distance, wanted.evidence.distance, rel_tol=1e-6)
        for got, layer in zip(plan.layers, wanted.evidence.plan.layers, strict=True):
            assert replace(got, predicted=None) == replace(layer, predicted=None)
            assert math.isclose(got.predicted or 0, layer.predicted or 0, rel_tol=1e-12)
        for layer, other in wanted.layers.items():
            assert torch.equal(layers[layer].weight.codes, other.weight.codes), layer
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


# ---------------------------------------------------------------- the command, under torchrun

CONFIG = """
out = '{out}'
[model]
name = 'fcnn1'
[model.arguments]
in_channels = 1
image_size = 8
classes = {classes}
[data]
source = 'digits'
train_split = 'test'
[train]
epochs = 3
lr = 0.02
batch_size = 92
strategy = 'fsdp'
[method]
name = 'lowres'
"""
KILLED = """
import os, signal
from subbyte import cli
from subbyte.train import loop

before = loop.update
def killed(state, *rest):
    if state.epoch == 1 and os.environ["RANK"] == "1" and os.environ["{count}"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return before(state, *rest)

loop.update = killed
cli.main()
"""


def written(folder, classes=10):
    path = folder / "small.toml"
    path.write_text(CONFIG.format(out=folder / "on", classes=classes))
    return path


@pytest.mark.slow  # torchrun starts the processes twice
def test_a_killed_worker_restarts_from_the_last_checkpoint_by_itself(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(count="TORCHELASTIC_RESTART_COUNT"))
    done = torchrun(script, "train", written(tmp_path), "--fresh", restarts=1)
    assert done.returncode == 0, done.stderr
    epochs = [line for line in done.stderr.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/3", "2/3", "3/3"]  # none of them twice
    assert done.stdout.count("net.safetensors") == 1
    assert done.stderr.count("error: ") == 1
    assert "lost another process of the run" in done.stderr


def errors(ends):
    """The lines that say what is wrong; nothing else of a fault is shown."""
    assert [code for code, _ in ends] == [2, 2]
    assert not any("Traceback" in text for _, text in ends)
    return [x for _, text in ends for x in text.splitlines() if x.startswith("error: ")]


@pytest.mark.slow  # as the next one, and 20 s
def test_a_fault_of_all_processes_is_one_line_of_one(tmp_path):
    (said,) = errors(together("-m", "subbyte", "train", written(tmp_path, classes=12)))
    assert said.startswith("error: the network has 12 classes")


def test_a_fault_of_the_leading_process_is_one_line_and_ends_the_others(tmp_path):
    """Here: the folder, which the leading process alone locks."""
    path = written(tmp_path)
    with own_folder(tmp_path / "on"):
        (said,) = errors(together("-m", "subbyte", "train", path))
    assert "another run is training in this folder" in said
