"""Tasks: where outputs are, how far two are apart, what a score is, what sensitivity is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import subbyte as sb
from subbyte.errors import SubbyteError
from subbyte.ptq.judge import Judge
from subbyte.ptq.quantize import far_warning
from subbyte.tasks import (
    TASKS,
    Classification,
    Dense,
    Embedding,
    Language,
    Regression,
    Task,
    evaluate,
    task_named,
    task_of,
)
from subbyte.tasks.batches import Inputs
from subbyte.tasks.values import rank_correlation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SHAPES = {
    "classification": (6, 5), "language": (3, 4, 7), "embedding": (6, 9), "regression": (6, 3),
    "dense": (2, 4, 3, 5),
}  # fmt: skip


def raw(task, seed=0):
    return torch.randn(SHAPES[task], generator=generator(seed))


def batch_of(name):
    return torch.zeros(SHAPES[name][0], 1)


@pytest.mark.parametrize("name", TASKS)
@given(seed=st.integers(0, 99), size=st.floats(0.01, 0.3))
def test_the_distance_is_0_for_equals_and_falls_with_the_error(name, seed, size):
    """Along a straight line from the float network's outputs."""
    task = TASKS[name]()
    y, error = raw(name, seed), raw(name, seed + 1000)
    wanted = task.outputs(y, batch_of(name))
    far, near = (task.outputs(y + s * error, batch_of(name)) for s in (size, size / 2))
    none, less, more = (task.distance(o, wanted).double().mean() for o in (wanted, near, far))
    assert abs(none) < 1e-6
    assert 0 < less < more


@pytest.mark.parametrize("name", TASKS)
def test_directions_have_the_curvature_of_the_distance(name):
    """E (v d)^2 = d' H d for the Hessian H, here from autograd in float64."""
    task = TASKS[name]()
    y = task.outputs(raw(name).double(), batch_of(name))[:4]
    d = torch.randn(y.shape, generator=generator(5), dtype=torch.float64)
    at = y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(task.distance(at, y).sum(), at, create_graph=True)
    (curve,) = torch.autograd.grad((slope * d).sum(), at)
    exact = (curve * d).flatten(1).sum(1)
    draws = 4000
    g = generator(1)
    found = torch.zeros(len(y), dtype=torch.float64)
    for _ in range(draws):
        found += (task.direction(y, g) * d).flatten(1).sum(1).square() / draws
    # The mean of `draws` squares of a bounded value: 6 standard errors of a kurtosis below 12.
    assert ((found - exact).abs() <= 6 * math.sqrt(12 / draws) * exact).all()


class Quartic(Task):
    """A distance of one's own whose Hessian is diagonal."""

    def distance(self, y, wanted):
        return (3 * (y - wanted).square() + (y - wanted) ** 4).sum(-1)


def test_a_distance_of_ones_own_has_a_direction():
    y = torch.randn(5, 4)
    assert torch.allclose(Quartic().direction(y, generator()).abs(), torch.full((5, 4), 6**0.5))


# ---------------------------------------------------------------- padding


def padded():
    ids = torch.tensor([[3, 1, 4, 1], [5, 9, 0, 0]])
    return Inputs((), {"input_ids": ids, "attention_mask": (ids > 0).long()}, 2)


@pytest.mark.parametrize("task", [Classification(), Language(), Embedding("tokens")])
def test_padding_counts_for_nothing(task):
    batch, y = padded(), torch.randn(2, 4, 7)
    other = y.clone()
    other[1, 2:] = 99
    assert len(task.outputs(y, batch)) == 6
    assert torch.equal(task.outputs(y, batch), task.outputs(other, batch))


def test_pooled_embeddings_leave_padding_out():
    y = torch.randn(2, 4, 7)
    pooled = Embedding().outputs(y, padded())
    assert torch.allclose(pooled[1], nn.functional.normalize(y[1, :2].mean(0), dim=0))
    assert torch.allclose(Embedding("first").outputs(y, padded())[1], pooled.new_tensor(
        nn.functional.normalize(y[1, 0], dim=0).tolist()))  # fmt: skip
    with pytest.raises(SubbyteError, match="pool='max'"):
        Embedding("max")


# ---------------------------------------------------------------- scores


class Given(nn.Module):
    def __init__(self, y):
        super().__init__()
        self.y = y

    def forward(self, *args, **kwargs):
        return self.y


def test_top_1():
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3])]
    found = evaluate(Given(logits), [(torch.zeros(4, 1), torch.tensor([0, 1, 0, -100]))], TASKS[
        "classification"]())  # fmt: skip
    assert (found.value, found.n) == (pytest.approx(200 / 3), 3)


def test_perplexity_is_that_of_the_next_tokens_without_padding():
    y = torch.randn(2, 4, 10)
    found = evaluate(Given(y), [(dict(padded().kwargs), None)], Language())
    logs = y.double().log_softmax(-1)
    pairs = [(0, 0, 1), (0, 1, 4), (0, 2, 1), (1, 0, 9)]  # row, position, the token behind
    expected = math.exp(-sum(float(logs[i, t, token]) for i, t, token in pairs) / 4)
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.n == 4


def test_rank_correlation_agrees_with_the_definition_on_ties():
    a, b = torch.tensor([1.0, 2, 2, 5]), torch.tensor([3.0, 1, 4, 4])
    ranks_a, ranks_b = torch.tensor([1.0, 2.5, 2.5, 4]), torch.tensor([2.0, 1, 3.5, 3.5])
    expected = torch.corrcoef(torch.stack([ranks_a, ranks_b]))[0, 1]
    assert rank_correlation(a, b) == pytest.approx(float(expected))


def test_embeddings_are_scored_by_the_order_of_their_pairs():
    angles = torch.tensor([0.0, 0.1, 0.0, 0.5, 0.0, 1.0])  # pairs apart by .1, .5 and 1
    y = torch.stack([angles.cos(), angles.sin()], 1)
    given = [(torch.zeros(6, 1), torch.tensor([3.0, 2.0, 1.0]))]
    assert evaluate(Given(y), given, Embedding()).value == pytest.approx(1.0)


def test_mean_iou_and_r2():
    labels = torch.tensor([[[0, 0], [1, 1]]])
    found = torch.tensor([[[0, 1], [1, 1]]])
    scores = nn.functional.one_hot(found, 3).movedim(-1, 1).float()
    got = evaluate(Given(scores), [(torch.zeros(1, 1), labels)], Dense())
    assert got.value == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    y, target = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [2.0], [3.0]])
    got = evaluate(Given(y), [(torch.zeros(3, 1), target)], Regression())
    assert got.value == pytest.approx(1 - 1 / 2)


def test_what_has_no_score_says_so():
    with pytest.raises(SubbyteError, match="task 'own' has no score"):
        evaluate(Given(torch.zeros(2, 2)), [(torch.zeros(2, 1), None)], Quartic())
    with pytest.raises(SubbyteError, match="nothing to evaluate"):
        evaluate(Given(torch.zeros(2, 2)), [], Classification())


# ---------------------------------------------------------------- in quantize


def test_an_unknown_task_is_named():
    net = nn.Linear(4, 3)
    with pytest.raises(SubbyteError, match="task 'vision' is not known; use one of classif"):
        sb.quantize(net, sb.CoRa(levels=4), calibration=[torch.randn(9, 4)], task="vision")
    assert task_named("dense") == Dense()
    with pytest.raises(SubbyteError, match=r"tensor of int64; it has to return"):
        task_of(torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1))


class Tokens(nn.Module):
    """A small language model: ids and a mask to scores of the next token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 30)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.body(self.embed(input_ids)))


NETWORKS = {
    "classification": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), (8,)),
    "regression": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), (8,)),
    "embedding": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12)), (8,)),
    "dense": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        (3, 6, 6),
    ),
    "language": (Tokens, None),
}


def examples(name, n=64):
    shape = NETWORKS[name][1]
    if shape is None:
        return torch.randint(30, (n, 10), generator=generator(3))
    return torch.randn(n, *shape, generator=generator(3))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_quantizes_and_more_levels_are_nearer(name):
    torch.manual_seed(0)
    net = NETWORKS[name][0]().eval()
    x = examples(name)
    done = [
        sb.quantize(net, sb.CoRa(levels=n, tune=20), calibration=[x], task=name)
        for n in (2, 4, 16)
    ]  # fmt: skip
    assert {d.evidence.task for d in done} == {name}
    distances = [d.evidence.distance for d in done]
    assert distances[0] > distances[1] > distances[2] > 0
    again = Judge(net, x[::5], TASKS[name]()).verdict(sb.pack(done[1]))
    assert again.distance == pytest.approx(done[1].evidence.distance, rel=1e-3)
    assert (again.agreement is None) == (name in ("regression", "embedding"))


def test_a_network_that_is_far_off_is_told_with_what_to_try():
    torch.manual_seed(0)
    net = NETWORKS["regression"][0]().eval()
    rough = sb.quantize(net, sb.CoRa(levels=2, tune=0), calibration=[examples("regression")])
    assert sum("WARNING: the packed network is far" in note for note in rough.notes) == 1
    fine = sb.quantize(net, sb.CoRa(levels=256, tune=0), calibration=[examples("regression")])
    assert not any("WARNING" in note for note in fine.notes)
    nan = Judge(net, examples("regression"), Regression()).verdict(
        Given(torch.full((64, 1), math.nan))
    )
    assert list(far_warning(Regression(), nan))


def test_a_mask_that_hides_all_is_refused():
    ids = torch.randint(30, (10, 6))
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(SubbyteError, match="all of it is padding"):
        sb.quantize(Tokens(), sb.CoRa(levels=4), calibration=[batch])


def test_a_batch_that_the_network_refuses_comes_with_its_shapes():
    with pytest.raises(SubbyteError, match=r"mat1 and mat2.*a batch was float32 \[2, 9\]"):
        sb.quantize(nn.Linear(4, 3), sb.CoRa(levels=4), calibration=[torch.randn(9, 9)])


def test_variations_are_of_images_alone():
    x = torch.rand(8, 3, 16, 16)
    assert not torch.equal(Classification().varied(x, generator(), 0), x)
    assert not torch.equal(Dense().varied(x, generator(), 0), x)
    for task in (Regression(), Embedding(), Language()):
        assert task.varied(x, generator(), 1) is x
    ids = torch.zeros(4, 5, dtype=torch.int64)
    assert Classification().varied(ids, generator(), 1) is ids


# ---------------------------------------------------------------- calibration as a stream


def test_many_examples_lie_in_a_temporary_file(monkeypatch):
    """Read once from a generator; the result is the same to the bit."""
    from subbyte.ptq import calibration

    torch.manual_seed(0)
    net, x = Tokens().eval(), examples("language", 96)

    def stream():
        yield from ({"input_ids": own, "attention_mask": own > 0} for own in x.split(8))

    method = sb.CoRa(levels=4, tune=4)
    plain = sb.quantize(net, method, calibration=stream())
    monkeypatch.setattr(calibration, "KEPT_BYTES", 2000)
    kept = sb.quantize(net, method, calibration=stream())
    assert any("is kept in a temporary file" in note for note in kept.notes)
    assert not any("temporary" in note for note in plain.notes)
    for name, layer in plain.layers.items():
        assert torch.equal(layer.weight.codes, kept.layers[name].weight.codes)
        assert torch.equal(layer.weight.scale, kept.layers[name].weight.scale)
    monkeypatch.setattr(calibration, "_CHUNK_BYTES", 1000)
    found = calibration.gathered(stream(), net).examples
    assert torch.equal(torch.cat([p.kwargs["input_ids"] for p in found.parts]), x)
    assert len(found) == 96
    monkeypatch.setattr(calibration, "SPOOL_BYTES", 3000)
    with pytest.raises(SubbyteError, match="takes more than 0 GiB; give fewer"):
        calibration.gathered(stream(), net)


def test_sentences_of_many_lengths_are_drawn_in_whole_batches():
    from subbyte.ptq.steps.tune import _draw
    from subbyte.tasks.batches import Ragged

    parts = tuple(torch.full((40, n), n) for n in (3, 5, 9))
    drawn = list(_draw(Ragged(parts), 6, Language(), generator()))
    assert all(len(batch) == 32 and len(batch.unique()) == 1 for batch in drawn)
    assert {batch.shape[1] for batch in drawn[:3]} == {3, 5, 9}
    long = torch.zeros(40, 1024, dtype=torch.int64)
    assert [len(b) for b in _draw(long, 3, Language(), generator())] == [2, 2, 2]
