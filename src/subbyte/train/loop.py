"""The training loop: one for float, hard, soft and proximal methods, without an `if`.

A run that is stopped and resumed ends, on one machine's CPU, in the same weights to the bit as one
that is not: whatever is drawn at random in an epoch is drawn from (seed, epoch).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from subbyte.core.atomic import write_atomically
from subbyte.core.jsontext import to_json
from subbyte.data import ImageSet, batches
from subbyte.errors import SubbyteError
from subbyte.models import Network
from subbyte.train.checkpoint import (
    Checkpoint,
    EpochRecord,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from subbyte.train.evaluate import Evaluation, evaluate
from subbyte.train.folder import own_folder, refuse_run
from subbyte.train.optim import learning_rate, set_learning_rate
from subbyte.train.progress import Progress, Silent
from subbyte.train.settings import LoopConfig, RunConfig
from subbyte.train.setup import Setup, set_up
from subbyte.train.update import State, emulates_bf16, lay_out, start, update
from subbyte.train.watch import Histograms, codes_of, histograms, watch

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
_OTHER_THREADS = (
    "note: the run began with {} threads and goes on with {}: its weights will differ in the last "
    "bits from those of a run that was not stopped"
)


@dataclass(frozen=True)
class TrainResult:
    """model: still prepared for training, not frozen; the average if the run has one."""

    model: Network
    history: tuple[EpochRecord, ...]
    histograms: tuple[Histograms, ...]
    evaluation: Evaluation
    checkpoint: Path


@dataclass
class _Tally:
    """Sums over the images of an epoch so far."""

    started: float
    loss: float = 0.0
    correct: int = 0
    images: int = 0

    def add(self, loss: float, correct: int, images: int) -> None:
        self.loss += loss * images
        self.correct += correct
        self.images += images

    def figures(self) -> tuple[float, float, float]:
        """Mean loss, top-1 in percent, images a second."""
        seconds = time.perf_counter() - self.started
        return self.loss / self.images, 100.0 * self.correct / self.images, self.images / seconds


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Builds, prepares and trains; leaves `checkpoint.pt` and `metrics.jsonl` in `config.out`.

    resume: continue from the checkpoint there. fresh: begin anew although there is one. Raises
    SubbyteError for a configuration, network and data that do not fit, for a folder that holds a
    run already or that another process is training in, and when the loss is no longer finite.
    """
    progress = progress or Silent()
    with own_folder(config.out):
        if not resume and not fresh:
            refuse_run(config.out / CHECKPOINT)
        checkpoint = load_checkpoint(config.out / CHECKPOINT, config) if resume else None
        return _train(config, checkpoint, progress)


def _train(config: RunConfig, checkpoint: Checkpoint | None, progress: Progress) -> TrainResult:
    with _scope(config.train):
        torch.manual_seed(config.train.seed)
        setup = set_up(config)
        if setup.plan is not None:
            progress.note(str(setup.plan))
        if emulates_bf16(setup.model, config.train):
            progress.note("this CPU has no bf16 instructions: float32 will be much faster here")
        state = start(setup.model, config.train, setup.teacher)
        if checkpoint is not None:
            _restore(state, checkpoint)
            _write_metrics(state, config)  # a kill may have come between checkpoint and metrics
            if checkpoint.threads != torch.get_num_threads():
                progress.note(_OTHER_THREADS.format(checkpoint.threads, torch.get_num_threads()))
        else:
            state.histograms = (histograms(state.best),)
        state.codes = codes_of(state.best)
        try:
            for _ in range(state.epoch, config.train.epochs):
                _epoch(state, setup, config, progress)
        finally:
            progress.close()
    return _result(state, setup.test, config)


@contextmanager
def _scope(config: LoopConfig) -> Iterator[None]:
    """The caller's random state and thread count are as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)


def _restore(state: State, checkpoint: Checkpoint) -> None:
    state.model.load_state_dict(checkpoint.model)
    state.optimizer.load_state_dict(checkpoint.optimizer)
    if state.ema is not None and checkpoint.ema is not None:
        state.ema.load_state_dict(checkpoint.ema)
    state.epoch, state.history = checkpoint.epoch, checkpoint.history
    state.histograms = checkpoint.histograms


def _epoch(state: State, setup: Setup, config: RunConfig, progress: Progress) -> None:
    steps = n_steps(len(setup.train), config.train)
    lr = learning_rate(config.train, state.epoch * steps, steps)
    progress.start(state.epoch + 1, config.train.epochs, steps)
    loss, top1, speed, seconds = _train_epoch(state, setup.train, config, steps, progress)
    _check_weights(state)
    test = evaluate(state.best, setup.test, preprocess=state.model.preprocess)
    state.epoch += 1
    done = state.epoch / config.train.epochs
    watched, state.codes = watch(state.best, state.codes, setup.test, done)
    state.histograms += (histograms(state.best),)
    record = EpochRecord(
        state.epoch, lr, loss, top1, test.top1, test.loss, speed, seconds, **asdict(watched)
    )
    state.history += (record,)
    _save(state, config)
    progress.finish(record, config.train.epochs)


def _train_epoch(
    state: State, data: ImageSet, config: RunConfig, steps: int, progress: Progress
) -> tuple[float, float, float, float]:
    """Mean loss, top-1, images a second and seconds."""
    state.model.train()
    tally = _Tally(started=time.perf_counter())
    for step, (x, y) in enumerate(_draw(data, config, state.epoch, steps), state.epoch * steps):
        set_learning_rate(state.optimizer, learning_rate(config.train, step, steps))
        loss, correct = update(state, x, y, config.train, step / (config.train.epochs * steps))
        if not math.isfinite(loss):
            raise _diverged(f"the loss is {loss}", state.epoch, step - state.epoch * steps)
        tally.add(loss, correct, len(y))
        progress.step(*tally.figures())
    return *tally.figures(), time.perf_counter() - tally.started


def n_steps(n_images: int, config: LoopConfig) -> int:
    """Steps of an epoch. A last batch of one image is dropped: BatchNorm has no variance for it."""
    full, rest = divmod(n_images, config.batch_size)
    steps = full + (rest > 1)
    return steps if config.limit_batches is None else min(steps, config.limit_batches)


def _draw(
    data: ImageSet, config: RunConfig, epoch: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's batches, shuffled and augmented; dropout draws from torch's global generator."""
    torch.manual_seed(_mix(config.train.seed, epoch, "layers"))
    generator = torch.Generator().manual_seed(_mix(config.train.seed, epoch, "data"))
    augment = config.data.augment()
    drawn = batches(data, config.train.batch_size, generator=generator)
    for x, y in islice(drawn, steps):
        yield augment(x, generator), y


def _mix(seed: int, epoch: int, purpose: str) -> int:
    """A seed of its own for each (seed, epoch, purpose): sums of them would collide."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _check_weights(state: State) -> None:
    """The last update of an epoch must not put weights that are not finite into the checkpoint."""
    for name, parameter in state.model.named_parameters():
        if not parameter.isfinite().all():
            raise _diverged(f"'{name}' is not finite after the last step", state.epoch, None)


def _diverged(what: str, epoch: int, step: int | None) -> SubbyteError:
    where = f"epoch {epoch + 1}" + ("" if step is None else f", step {step + 1}")
    kept = f"; the checkpoint of epoch {epoch} is kept" if epoch else ""
    return SubbyteError(
        f"{what} in {where}; lower train.lr, or set train.clip_grad_norm or "
        f"train.warmup_epochs{kept}"
    )


def _save(state: State, config: RunConfig) -> None:
    checkpoint = Checkpoint(
        model=state.model.state_dict(),
        ema=None if state.ema is None else state.ema.state_dict(),
        optimizer=state.optimizer.state_dict(),
        epoch=state.epoch,
        history=state.history,
        histograms=state.histograms,
        fingerprint=fingerprint(config),
        threads=torch.get_num_threads(),
    )
    save_checkpoint(checkpoint, config.out / CHECKPOINT)
    _write_metrics(state, config)


def _write_metrics(state: State, config: RunConfig) -> None:
    text = "".join(to_json(asdict(record)) + "\n" for record in state.history)
    write_atomically(config.out / METRICS, text.encode())


def _result(state: State, test: ImageSet, config: RunConfig) -> TrainResult:
    """The last epoch's figures; memory as other code expects it."""
    model = state.best
    assert isinstance(model, Network)
    lay_out(model, torch.contiguous_format)
    last = state.history[-1]
    evaluation = Evaluation(last.test_top1, last.test_loss, len(test))
    return TrainResult(model, state.history, state.histograms, evaluation, config.out / CHECKPOINT)
