"""The training loop: its parts against hand-computed values, its promises end to end."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import sys
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from subbyte import storage
from subbyte.cli import main
from subbyte.core.jsontext import to_json
from subbyte.core.recipe import Recipe, Rule
from subbyte.data import ImageSet
from subbyte.errors import SubbyteError
from subbyte.methods import LowRes, float_state_dict, prepare, quantizers
from subbyte.models import Network, NetworkSpec, build
from subbyte.train import (
    DataConfig,
    EpochRecord,
    LoopConfig,
    ModelConfig,
    RunConfig,
    console_progress,
    evaluate,
    loop,
    run,
    train,
    update,
)
from subbyte.train.checkpoint import load_checkpoint, sealed
from subbyte.train.folder import own_folder
from subbyte.train.optim import build_optimizer, learning_rate
from subbyte.train.progress import Live, Silent

TERNARY = Recipe((Rule(method=LowRes(levels=3)),))
CHECKPOINT = "checkpoint.pt"


def loop_config(**changes) -> LoopConfig:
    defaults = {"epochs": 2, "lr": 0.05, "batch_size": 64, "limit_batches": 3, "threads": 1}
    return LoopConfig(**{**defaults, **changes})


def run_config(out, recipe=None, data=None, **changes) -> RunConfig:
    data = data or DataConfig("digits", crop=1, flip=True)
    return RunConfig(ModelConfig("digitsnet"), data, loop_config(**changes), recipe, out)


def image_set(labels, n_classes=3) -> ImageSet:
    images = torch.arange(len(labels) * 4, dtype=torch.uint8).reshape(-1, 1, 2, 2)
    classes = tuple(map(str, range(n_classes)))
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64), classes, "made-up", "test")


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).float() / 255


class Tiny(Network):
    """A linear network on 2x2 images that remembers the type of its last logits."""

    def __init__(self) -> None:
        super().__init__(NetworkSpec("tiny"), flat, classes=3)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("counter", torch.tensor([7]))
        self.logits_dtype: torch.dtype | None = None

    def forward(self, x):
        logits = self.linear(x)
        self.logits_dtype = logits.dtype
        return logits


X = torch.arange(24, dtype=torch.uint8).reshape(6, 1, 2, 2) * 10
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def tiny_state(**changes):
    torch.manual_seed(0)
    config = loop_config(momentum=0.0, **changes)
    return update.start(Tiny(), config), config


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- learning rate and optimizer -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "step", "expected"),
    [
        ({"schedule": "constant"}, 39, 0.8),
        ({"schedule": "cosine"}, 0, 0.8),
        ({"schedule": "cosine"}, 20, 0.4),
        ({"schedule": "cosine"}, 39, 0.4 * (1 + math.cos(math.pi * 39 / 40))),
        ({"schedule": "cosine", "warmup_epochs": 2}, 0, 0.04),
        ({"schedule": "cosine", "warmup_epochs": 2}, 19, 0.8),
        ({"schedule": "cosine", "warmup_epochs": 2}, 20, 0.8),
        ({"schedule": "cosine", "warmup_epochs": 2}, 30, 0.4),
        ({"schedule": "step", "milestones": (1, 3), "gamma": 0.5}, 9, 0.8),
        ({"schedule": "step", "milestones": (1, 3), "gamma": 0.5}, 10, 0.4),
        ({"schedule": "step", "milestones": (1, 3), "gamma": 0.5}, 29, 0.4),
        ({"schedule": "step", "milestones": (1, 3), "gamma": 0.5}, 30, 0.2),
    ],
)
def test_learning_rate(changes, step, expected):
    config = LoopConfig(epochs=4, lr=0.8, **changes)
    assert learning_rate(config, step, steps_per_epoch=10) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_spares_vectors(name):
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    config = LoopConfig(epochs=1, lr=0.1, weight_decay=0.5, optimizer=name, momentum=0.0)
    optimizer = build_optimizer(layer.parameters(), config)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), weight * 0.95)
    assert torch.equal(layer.bias.detach(), bias)


def test_momentum_is_adamws_first_beta():
    config = LoopConfig(epochs=1, lr=0.1, optimizer="adamw", momentum=0.8)
    assert build_optimizer(Tiny().parameters(), config).defaults["betas"] == (0.8, 0.999)


# --- evaluate ------------------------------------------------------------------------------------


def test_evaluate_matches_float64_and_restores_each_mode():
    model = Tiny()
    model.linear.eval()
    data = image_set([0, 1, 2, 1, 1])
    result = evaluate(model, data, batch_size=2)
    with torch.no_grad():
        logits = model.linear(flat(data.images)).double()
    expected = F.cross_entropy(logits, data.labels).item()
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.top1 == 100 * (logits.argmax(1) == data.labels).double().mean().item()
    assert result.n == 5
    assert (model.training, model.linear.training) == (True, False)


def test_evaluate_runs_in_eval_mode():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    first, second = (evaluate(model, image_set([0, 1] * 9), preprocess=flat) for _ in range(2))
    assert first == second


def test_logits_that_are_not_finite_are_wrong_and_show_in_the_loss():
    model = Tiny()
    with torch.no_grad():
        model.linear.weight[1] = math.nan  # argmax of a row with NaN is the NaN's index
    result = evaluate(model, image_set([1, 1, 1]))
    assert result.top1 == 0.0
    assert math.isnan(result.loss)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_without_a_class_is_named(label):
    with pytest.raises(SubbyteError, match=rf"label {label} of image 4 .*'made-up'.*3 classes"):
        evaluate(Tiny(), image_set([0, 1, 2, 0, label]), batch_size=2)


def test_an_empty_set_and_an_unknown_input_are_refused():
    with pytest.raises(SubbyteError, match="'test' of 'made-up' is empty"):
        evaluate(Tiny(), image_set([]))
    with pytest.raises(SubbyteError, match=r"Linear has no .preprocess.; give"):
        evaluate(nn.Linear(4, 3), image_set([0]))


# --- one update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_label_smoothed_cross_entropy(smoothing):
    state, config = tiny_state(label_smoothing=smoothing)
    with torch.no_grad():
        log_p = state.model.linear(flat(X)).double().log_softmax(1)
    target = F.one_hot(Y, 3) * (1 - smoothing) + smoothing / 3
    loss, correct = update.update(state, X, Y, config, 0.0)
    assert loss == pytest.approx(-(target * log_p).sum(1).mean().item(), rel=1e-5)
    assert correct == (log_p.argmax(1) == Y).sum()


def test_a_teacher_has_nine_tenths_of_the_loss_at_temperature_two():
    torch.manual_seed(1)
    teacher, (state, config) = Tiny(), tiny_state()
    before = copy.deepcopy(teacher)
    state = replace(state, teacher=teacher)
    with torch.no_grad():
        ours, theirs = (m.linear(flat(X)).double() for m in (state.model, teacher))
    p, q = (theirs / 2).softmax(1), (ours / 2).softmax(1)
    soft = 4 * (p * (p / q).log()).sum(1).mean()
    hard = F.cross_entropy(ours, Y)
    loss, _ = update.update(state, X, Y, config, 0.0)
    assert loss == pytest.approx((0.1 * hard + 0.9 * soft).item(), rel=1e-5)
    assert same(teacher, before)


@pytest.mark.parametrize(("clip", "expected"), [(1e-3, 1e-3), (1e3, None), (0.0, None)])
def test_gradients_are_clipped_to_the_norm(clip, expected):
    state, config = tiny_state(lr=1.0, clip_grad_norm=clip)
    before = nn.utils.parameters_to_vector(state.model.parameters()).detach()
    update.update(state, X, Y, config, 0.0)
    after = nn.utils.parameters_to_vector(state.model.parameters()).detach()
    moved = (after - before).norm().item()
    if expected is None:
        assert moved > 0.1
    else:
        assert moved == pytest.approx(expected, rel=1e-2)


def test_ema_is_the_hand_computed_average_and_copies_integers():
    state, config = tiny_state(ema=0.75, lr=0.5)
    average = None
    for step in range(5):
        update.update(state, X, Y, config, 0.0)
        weight = state.model.linear.weight.detach().double()
        average = weight if average is None else 0.75 * average + 0.25 * weight
        state.model.counter += step
    torch.testing.assert_close(state.best.linear.weight.double(), average, rtol=1e-6, atol=1e-7)
    assert (average - weight).abs().max() > 1e-3
    assert state.best.counter == 7 + 0 + 1 + 2 + 3  # of the last update, not a rounded average


def test_an_integer_that_stays_does_not_drift_in_the_average():
    model = Tiny()
    averaged = update.averaged(model, 0.9)
    for _ in range(50):
        averaged.update_parameters(model)
    assert averaged.module.counter == 7


def test_bf16_is_for_training_only():
    state, config = tiny_state(precision="bf16")
    loss, _ = update.update(state, X, Y, config, 0.0)
    assert state.model.logits_dtype == torch.bfloat16
    assert state.model.linear.weight.dtype == torch.float32
    assert loss > 0
    evaluate(state.model, image_set([0, 1]))
    assert state.model.logits_dtype == torch.float32


def test_each_weight_is_quantized_once_an_update():
    model = build("digitsnet")
    prepare(model, TERNARY)
    calls = []
    for site, quantizer, _ in quantizers(model):
        quantizer.register_forward_hook(lambda *_, name=site.name: calls.append(name))
    config = loop_config()
    state = update.start(model, config)
    calls.clear()
    model.register_forward_pre_hook(lambda net, _: net.features[0].weight.dim() and None)
    update.update(state, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), Y[:4], config, 0.0)
    assert sorted(calls) == sorted(set(calls))
    assert len(calls) == 5
    assert not parametrize._cache_enabled


def test_convolutions_run_channels_last_and_come_back_contiguous(tmp_path):
    seen = []

    class Listener(Silent):
        def step(self, *_):
            seen.append(1)

    state = update.start(build("digitsnet"), loop_config())
    assert state.model.features[3].weight.is_contiguous(memory_format=torch.channels_last)
    result = train(run_config(tmp_path, epochs=1), progress=Listener())
    assert result.model.features[3].weight.is_contiguous()
    assert len(seen) == 3


def test_the_method_hooks_get_the_fraction_done(tmp_path, monkeypatch):
    seen: dict[str, list[float]] = {"penalty": [], "after": []}

    def penalty(model, progress):
        seen["penalty"].append(progress)
        return 0.5 * sum(p.square().sum() for p in model.parameters())

    monkeypatch.setattr(update, "penalty", penalty)
    monkeypatch.setattr(update, "after_step", lambda _, progress: seen["after"].append(progress))
    punished = train(run_config(tmp_path, limit_batches=2)).model
    assert seen == {"penalty": [0, 0.25, 0.5, 0.75], "after": [0, 0.25, 0.5, 0.75]}
    monkeypatch.setattr(update, "penalty", lambda *_: 0.0)
    assert not same(punished, train(run_config(tmp_path, limit_batches=2), fresh=True).model)


# --- repeat and resume ---------------------------------------------------------------------------

FULL = {"ema": 0.6, "clip_grad_norm": 1.0, "epochs": 3, "weight_decay": 1e-3}


def test_a_run_repeats_to_the_bit_and_leaves_the_callers_state(tmp_path):
    config = run_config(tmp_path, TERNARY, **FULL)
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    config = replace(config, train=replace(config.train, threads=threads + 1))
    first = train(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    torch.manual_seed(6)
    assert same(train(config, fresh=True).model, first.model)
    other = replace(config, train=replace(config.train, seed=1))
    assert not same(train(other, fresh=True).model, first.model)


class Killed(Silent):
    """Stops the run in the middle of its second epoch."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, *_):
        self.steps += 1
        if self.steps == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_is_bit_identical(tmp_path, monkeypatch, optimizer):
    def noisy(name):
        net = build(name)
        net.classifier.append(nn.Dropout(0.2))
        return net

    monkeypatch.setattr("subbyte.train.setup.build", noisy)
    changes = {**FULL, "optimizer": optimizer, "lr": 0.01}
    whole = train(run_config(tmp_path / "whole", TERNARY, **changes))
    config = run_config(tmp_path / "parts", TERNARY, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=Killed())
    assert load_checkpoint(config.out / CHECKPOINT, config).epoch == 1
    resumed = train(config, resume=True)
    assert same(resumed.model, whole.model)
    assert [r.train_loss for r in resumed.history] == [r.train_loss for r in whole.history]
    assert resumed.evaluation == whole.evaluation
    assert len(resumed.histograms) == len(whole.histograms) == 1 + len(whole.history)
    for got, wanted in zip(resumed.histograms, whole.histograms, strict=True):
        assert got.keys() == wanted.keys()
        for name, counts in wanted.items():
            assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(counts))
    states = [torch.load(r.checkpoint, weights_only=True) for r in (resumed, whole)]
    for key in ("model", "ema"):
        assert all(torch.equal(states[0][key][k], v) for k, v in states[1][key].items())


OTHER = {
    "epochs": None, "lr": 0.011, "batch_size": 33, "optimizer": "adamw", "seed": 5,
    "momentum": 0.5, "weight_decay": 1e-3, "warmup_epochs": 1, "ema": 0.9, "precision": "bf16",
    "schedule": "constant", "label_smoothing": 0.2, "clip_grad_norm": 3.0, "nesterov": False,
}  # fmt: skip


@pytest.mark.parametrize("key", [key for key in OTHER if key != "epochs"])
def test_every_setting_that_decides_the_weights_is_in_the_fingerprint(key):
    """Resuming with another value would be another run."""
    from subbyte.train.checkpoint import fingerprint

    base = run_config("x", TERNARY, **FULL)
    value = OTHER[key]
    if getattr(base.train, key) == value:
        value = {"nesterov": True, "schedule": "cosine", "weight_decay": 5e-4}[key]
    other = run_config("x", TERNARY, **{**FULL, key: value})
    assert fingerprint(other) != fingerprint(base)


def test_epochs_and_seeds_draw_differently(tmp_path):
    data = image_set([i % 3 for i in range(30)])
    config = run_config(tmp_path, data=DataConfig("digits"))
    other = replace(config, train=replace(config.train, seed=1))
    orders = [
        tuple(next(loop._draw(data, c, epoch, 1))[0].flatten().tolist())
        for c, epoch in [(config, 0), (config, 1), (other, 0), (other, 1), (config, 0)]
    ]
    assert len(set(orders)) == 4
    assert orders[0] == orders[4]
    assert sorted(orders[0]) == sorted(orders[1])


def test_training_images_are_augmented_as_configured(tmp_path):
    data = image_set([0, 1, 2])
    (plain, *_), (cut, *_) = (
        next(loop._draw(data, run_config(tmp_path, data=DataConfig("digits", cutout=size)), 0, 1))
        for size in (0, 4)
    )
    assert sorted(plain.flatten().tolist()) == list(range(12))
    assert cut.sum() == 0


def test_epochs_may_grow_and_nothing_else_may_change(tmp_path):
    config = run_config(tmp_path, TERNARY)
    train(config)
    longer = replace(config, train=replace(config.train, epochs=3))
    assert [r.epoch for r in train(longer, resume=True).history] == [1, 2, 3]
    with pytest.raises(SubbyteError, match=r"has 3 epochs.*train\.epochs = 2.*not shrink"):
        train(config, resume=True)
    for change, message in [
        (
            {"train": replace(longer.train, lr=0.5)},
            r"train\.lr = 0\.05, the configuration says 0\.5",
        ),
        ({"data": DataConfig("digits", crop=2, flip=True)}, r"data\.crop = 1.* says 2"),
        ({"model": ModelConfig("cvnn1")}, r"model\.name = 'digitsnet'.*'cvnn1'"),
        (
            {"recipe": Recipe((Rule(method=LowRes(levels=5)),))},
            r"recipe\.rules\.0\.method\.levels = 3, the configuration says 5",
        ),
        ({"recipe": None}, r"recipe.* says nothing"),
    ]:
        with pytest.raises(SubbyteError, match=message + ".*(start again)"):
            load_checkpoint(tmp_path / CHECKPOINT, replace(longer, **change))


def test_a_run_is_not_overwritten_unasked(tmp_path):
    config = run_config(tmp_path)
    one = replace(config, train=replace(config.train, epochs=1))
    train(one)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(SubbyteError, match=r"holds a run of 1 epochs; resume .* fresh .* 'out'"):
        train(config)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert len(train(config, resume=True).history) == config.train.epochs
    assert len(train(one, fresh=True).history) == 1


def test_two_runs_do_not_share_a_folder(tmp_path):
    config = run_config(tmp_path / "on")
    with own_folder(config.out), pytest.raises(SubbyteError, match="another run is training in"):
        train(config)
    train(replace(config, train=replace(config.train, epochs=1)))


def test_metrics_are_whole_after_a_kill_between_them_and_the_checkpoint(tmp_path):
    config = run_config(tmp_path)
    train(config)
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole.splitlines()[0] + "\n")
    train(config, resume=True)
    assert metrics.read_text() == whole


def test_another_number_of_threads_at_resume_is_said(tmp_path):
    config = run_config(tmp_path)
    short = replace(config.train, epochs=1, threads=1)
    train(replace(config, train=short))
    for threads, said in ((1, 0), (2, 1)):
        notes = Notes()
        longer = replace(config.train, epochs=1 + threads, threads=threads)
        train(replace(config, train=longer), resume=True, progress=notes)
        assert sum("began with 1 threads and goes on with 2" in text for text in notes.kept) == said


class Notes(Silent):
    def __init__(self):
        self.kept = []

    def note(self, text):
        self.kept.append(text)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    class Pressed(Silent):
        def step(self, *_):
            if self.epoch == 2:
                raise KeyboardInterrupt

        def start(self, epoch, *_):
            self.epoch = epoch

    module = sys.modules["subbyte.train.run"]
    monkeypatch.setattr(module, "console_progress", lambda **_: Pressed())
    path = tmp_path / "small.toml"
    path.write_text(
        f"out = {str(tmp_path / 'on')!r}\n[model]\nname = 'digitsnet'\n[data]\nsource = 'digits'\n"
        "[train]\nepochs = 3\nlr = 0.1\nlimit_batches = 2\n[method]\nname = 'lowres'\n"
    )
    monkeypatch.setattr("sys.argv", ["subbyte", "train", str(path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    said = capsys.readouterr().err
    assert "1 epochs are kept" in said
    assert "--resume goes on" in said
    assert len(said.strip().splitlines()) == 1


def test_no_checkpoint_and_a_damaged_one(tmp_path):
    config = run_config(tmp_path)
    with pytest.raises(SubbyteError, match=r"no checkpoint to resume; start the run without"):
        train(config, resume=True)
    train(replace(config, train=replace(config.train, epochs=1)))
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(SubbyteError, match=r"checkpoint\.pt: the checksum does not fit"):
            load_checkpoint(path, config)
        path.write_bytes(sealed(damaged))
        with pytest.raises(SubbyteError, match=r"checkpoint\.pt: not a readable checkpoint"):
            load_checkpoint(path, config)
    draw = random.Random(0)
    for place in (draw.randrange(len(content)) for _ in range(100)):
        bit = 1 << draw.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        with pytest.raises(SubbyteError, match=r"checkpoint\.pt: the checksum does not fit"):
            load_checkpoint(path, config)
    torch.save({"version": 99}, path)
    path.write_bytes(sealed(path.read_bytes()))
    with pytest.raises(SubbyteError, match="version 99"):
        load_checkpoint(path, config)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    path = tmp_path / CHECKPOINT
    torch.save({"version": 1, "model": Payload()}, path)
    path.write_bytes(sealed(path.read_bytes()))
    with pytest.raises(SubbyteError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / CHECKPOINT, run_config(tmp_path))
    assert not (tmp_path / "ran").exists()


# --- when it goes wrong --------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    rate = lambda config, step, steps: 0.05 if step < steps else 1e38  # noqa: E731
    monkeypatch.setattr(loop, "learning_rate", rate)
    config = run_config(tmp_path)
    with pytest.raises(SubbyteError, match=r"epoch 2, step \d; lower train\.lr.*epoch 1 is kept"):
        train(config)
    checkpoint = load_checkpoint(tmp_path / CHECKPOINT, config)
    assert checkpoint.epoch == 1
    assert all(v.isfinite().all() for v in checkpoint.model.values())


def test_a_penalty_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "penalty", lambda *_: math.nan)
    with pytest.raises(SubbyteError, match=r"the loss is nan in epoch 1, step 1; lower train\.lr"):
        train(run_config(tmp_path))


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", lambda *_: math.inf)
    with pytest.raises(
        SubbyteError, match=r"'features.*' is not finite .*epoch 1; lower train\.lr"
    ):
        train(run_config(tmp_path, limit_batches=1))
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 12}, "network has 12 classes.*has 10; set model.arguments.classes = 10"),
        ({"classes": 4}, "label . of image .* outside the network's 4 classes"),
        ({"in_channels": 3}, r"images of shape \(1, 8, 8\).*channels"),
        ({"image_size": 16}, r"images of shape \(1, 8, 8\).*size"),
    ],
)
def test_a_network_that_does_not_fit_the_data(tmp_path, arguments, message):
    config = replace(run_config(tmp_path), model=ModelConfig("digitsnet", arguments))
    with pytest.raises(SubbyteError, match=message):
        train(config)


@pytest.mark.parametrize(
    ("n", "batch_size", "limit", "expected"),
    [(10, 5, None, 2), (11, 5, None, 2), (12, 5, None, 3), (3, 64, None, 1), (10, 2, 3, 3)],
)
def test_a_last_batch_of_one_image_is_dropped(n, batch_size, limit, expected):
    config = LoopConfig(epochs=1, lr=0.1, batch_size=batch_size, limit_batches=limit)
    assert loop.n_steps(n, config) == expected


# --- progress and metrics ------------------------------------------------------------------------

RECORD = EpochRecord(1, 0.1, 0.5, 80.0, 70.0, math.nan, 1234.0, 2.0)


def test_metrics_have_a_line_an_epoch(tmp_path):
    result = train(run_config(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert json.loads(lines[1])["test_top1"] == result.history[1].test_top1
    assert json.loads(to_json(asdict(RECORD)))["test_loss"] is None


def listen(progress) -> None:
    progress.note("[plan]")
    progress.start(1, 3, 2)
    progress.step(0.75, 80.0, 1234.0)
    if isinstance(progress, Live):
        progress._bar.refresh()  # otherwise ten times a second
    progress.finish(RECORD, 3)
    progress.close()


def test_progress_is_a_line_an_epoch_when_there_is_no_terminal():
    out = io.StringIO()
    listen(console_progress(console=Console(file=out, width=40)))
    plan, line = out.getvalue().splitlines()
    assert plan == "[plan]"
    assert line.startswith("epoch 1/3")
    assert "top-1 70.00 %" in line
    assert "1234 images/s" in line


def test_progress_is_live_on_a_terminal_and_nothing_when_quiet():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=150, _environ={"TERM": "xterm"})
    listen(console_progress(console=console))
    assert "loss 0.7500  top-1 80.00 %  1234 images/s" in out.getvalue()
    assert "1/2" in out.getvalue()
    quiet = io.StringIO()
    listen(console_progress(quiet=True, console=Console(file=quiet)))
    assert quiet.getvalue() == ""


# --- whole runs ----------------------------------------------------------------------------------

WHOLE = {"epochs": 3, "limit_batches": None, "lr": 0.05, "weight_decay": 1e-4}


def test_digits_in_float_and_on_from_the_saved_weights(tmp_path):
    plain = DataConfig("digits")
    result = run(run_config(tmp_path, None, plain, **WHOLE), quiet=True)
    assert result.trained.top1 > 95
    assert result.saved.top1 == result.trained.top1
    assert result.saved.loss == pytest.approx(result.trained.loss, rel=1e-5)
    assert (result.file.name, result.n_bytes) == ("weights.safetensors", result.file.stat().st_size)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = run_config(tmp_path / "on", TERNARY, plain, epochs=1, limit_batches=1, lr=1e-30)
    config = replace(config, model=ModelConfig("digitsnet", weights=str(result.file)))
    continued = float_state_dict(train(config).model)
    saved = load_file(result.file)
    assert all(torch.equal(continued[k], v) for k, v in saved.items() if k.endswith("weight"))
    with pytest.raises(SubbyteError, match=r"no weights file .*absent"):
        train(replace(config, model=ModelConfig("digitsnet", weights="absent")), fresh=True)
    with pytest.raises(SubbyteError, match="absent"):
        train(replace(config, train=replace(config.train, teacher="absent")), fresh=True)
    taught = replace(config, train=replace(config.train, teacher=str(result.file)))
    taught = train(taught, fresh=True)
    assert taught.history[-1].train_loss != result.history[-1].train_loss


def test_digits_in_three_levels_and_the_file_scores_the_same(tmp_path, capfd):
    config = run_config(tmp_path, TERNARY, DataConfig("digits"), **{**WHOLE, "ema": 0.8})
    result = run(config)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "classifier.4" in printed.err
    assert "epoch 3/3" in printed.err
    assert result.trained.top1 > 93
    assert result.saved.top1 == result.trained.top1
    assert result.saved.loss == pytest.approx(result.trained.loss, rel=1e-4)
    assert result.file.name == "net.safetensors"
    assert result.n_bytes < 94_506 * 4 / 10
    net = storage.load(result.file)
    assert not any(parametrize.is_parametrized(module) for module in net.modules())


def test_the_saved_score_is_of_the_file_that_was_read(tmp_path, monkeypatch):
    def wiped(path, precision):
        assert precision == "float32"
        assert path == tmp_path / "net.safetensors"
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10).apply(zeroed))

    def zeroed(layer):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)

    monkeypatch.setattr(storage, "load", wiped)
    result = run(run_config(tmp_path, TERNARY, epochs=1), quiet=True)
    assert result.saved.loss == pytest.approx(math.log(10), rel=1e-6)
    assert result.trained.loss != pytest.approx(math.log(10), rel=1e-3)


@pytest.mark.parametrize(("has", "auto"), [(True, "bf16"), (False, "float32")])
def test_auto_is_bf16_where_the_cpu_has_it(monkeypatch, has, auto):
    from subbyte.train.update import emulates_bf16, precision_on

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has, "avx2": True})
    config = LoopConfig(epochs=1, lr=0.1, precision="auto")
    assert precision_on(torch.device("cpu"), config) == auto
    assert precision_on(torch.device("cuda"), config) == "bf16"
    assert not emulates_bf16(torch.nn.Linear(2, 2), config)
    assert precision_on(torch.device("cpu"), LoopConfig(epochs=1, lr=0.1)) == "float32"


@pytest.mark.parametrize(("has", "warns"), [(True, False), (False, True)])
def test_bf16_on_a_cpu_that_emulates_it_is_told(monkeypatch, has, warns):
    from subbyte.train.update import emulates_bf16

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has, "avx2": True})
    model = torch.nn.Linear(2, 2)
    assert emulates_bf16(model, LoopConfig(epochs=1, lr=0.1, precision="bf16")) == warns
    assert not emulates_bf16(model, LoopConfig(epochs=1, lr=0.1))
