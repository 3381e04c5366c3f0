"""The training loop: one for float, hard, soft and proximal methods, without an `if`.

A run that is stopped and resumed ends, on one machine's CPU, in the same weights to the bit as one
that is not: whatever is drawn at random in an epoch is drawn from (seed, epoch). Several processes
(`core.group`) draw the same batches and take a part of each; the leading one writes and speaks.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from subbyte.core.atomic import write_atomically
from subbyte.core.group import ALONE, Group, local
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
from subbyte.train.parallel import gathered, load_optimizer, load_whole
from subbyte.train.progress import Progress, Silent
from subbyte.train.settings import LoopConfig, RunConfig
from subbyte.train.setup import Setup, set_up
from subbyte.train.update import (
    State,
    emulates_bf16,
    first_not_finite,
    lay_out,
    start,
    update,
)
from subbyte.train.watch import Histograms, codes_of, histograms, watch

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
_OTHER_SUMS = (
    "note: the run began with {} and goes on with {}: its weights will differ in the last bits "
    "from those of a run that was not stopped"
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
    group: Group = ALONE,
) -> TrainResult:
    """Builds, prepares and trains; leaves `checkpoint.pt` and `metrics.jsonl` in `config.out`.

    resume: continue from the checkpoint there. fresh: begin anew although there is one. group: the
    processes that train together, each of which calls this; after a restart by torchrun they go on
    from the checkpoint, if there is one. Raises SubbyteError for a configuration, network and data
    that do not fit, for a folder that holds a run already or that another process is training in,
    and when the loss is no longer finite.
    """
    progress = progress or Silent()
    with own_folder(config.out) if group.leads else nullcontext():
        checkpoint = group.told(lambda: _checkpoint(config, resume, fresh, group.restarts))
        return _train(config, checkpoint, progress, group)


def _checkpoint(config: RunConfig, resume: bool, fresh: bool, restarts: int) -> Checkpoint | None:
    """Where to go on from, None to begin. Raises SubbyteError for a run that nobody asked for."""
    path = config.out / CHECKPOINT
    if resume or (restarts and path.is_file()):
        return load_checkpoint(path, config)
    if not fresh:
        refuse_run(path)
    return None


def _train(
    config: RunConfig, checkpoint: Checkpoint | None, progress: Progress, group: Group
) -> TrainResult:
    with _scope(config.train):
        torch.manual_seed(config.train.seed)
        setup = set_up(config, group)
        for note in setup.notes():
            progress.note(note)
        if emulates_bf16(setup.model, config.train):
            progress.note("this CPU has no bf16 instructions: float32 will be much faster here")
        state = start(setup.model, config.train, setup.teacher, group)
        if checkpoint is not None:
            _restore(state, checkpoint, config.out / CHECKPOINT)
            _write_metrics(state, config)  # a kill may have come between checkpoint and metrics
            _note_other_sums(checkpoint, group, progress)
        elif group.leads:  # a restart must not take an older run's checkpoint for this one's
            (config.out / CHECKPOINT).unlink(missing_ok=True)
        best = state.best
        state.histograms = state.histograms or (histograms(best),)
        state.codes = codes_of(best)
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


def _note_other_sums(checkpoint: Checkpoint, group: Group, progress: Progress) -> None:
    pairs = {
        "threads": (checkpoint.threads, torch.get_num_threads()),
        "processes": (checkpoint.processes, group.size),
    }
    for name, (then, now) in pairs.items():
        if then != now:
            progress.note(_OTHER_SUMS.format(f"{then} {name}", now))


def _restore(state: State, checkpoint: Checkpoint, path: Path) -> None:
    try:
        load_whole(state.model, checkpoint.model)
        load_optimizer(state.optimizer, checkpoint.optimizer)
        if state.ema is not None and checkpoint.ema is not None:
            load_whole(state.ema, checkpoint.ema)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise SubbyteError(
            f"{path}: what it holds does not fit this network ({' '.join(str(error).split())[:300]}"
            "); delete it and start again"
        ) from None
    state.epoch, state.history = checkpoint.epoch, checkpoint.history
    state.histograms = checkpoint.histograms


def _epoch(state: State, setup: Setup, config: RunConfig, progress: Progress) -> None:
    steps = n_steps(len(setup.train), config.train)
    lr = learning_rate(config.train, state.epoch * steps, steps)
    progress.start(state.epoch + 1, config.train.epochs, steps)
    loss, top1, speed, seconds = _train_epoch(state, setup.train, config, steps, progress)
    _check_weights(state)
    best, group = state.best, state.group
    test = evaluate(best, setup.test, preprocess=state.model.preprocess, group=group)
    state.epoch += 1
    done = state.epoch / config.train.epochs
    watched, state.codes = watch(best, state.codes, setup.test, done, group)
    state.histograms += (histograms(best),)
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
    drawn = _draw(data, config, state.epoch, steps, state.group)
    for step, (x, y, n) in enumerate(drawn, state.epoch * steps):
        set_learning_rate(state.optimizer, learning_rate(config.train, step, steps))
        loss, correct = update(state, x, y, config.train, step / (config.train.epochs * steps), n)
        if not math.isfinite(loss):
            where = first_not_finite(state, x)
            layer = f", first in the output of layer '{where}'," if where else ""
            raise _diverged(f"the loss is {loss}{layer}", state.epoch, step - state.epoch * steps)
        tally.add(loss, correct, n)
        progress.step(*tally.figures())
    return *tally.figures(), time.perf_counter() - tally.started


def n_steps(n_images: int, config: LoopConfig) -> int:
    """Steps of an epoch. A last batch of one image is dropped: BatchNorm has no variance for it."""
    full, rest = divmod(n_images, config.batch_size)
    steps = full + (rest > 1)
    return steps if config.limit_batches is None else min(steps, config.limit_batches)


def _draw(
    data: ImageSet, config: RunConfig, epoch: int, steps: int, group: Group = ALONE
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """This process's part of the epoch's batches, shuffled and augmented, and each batch's size.

    Dropout draws from torch's global generator, in each process on its own.
    """
    purpose = "layers" if group.leads else f"layers of process {group.rank}"
    torch.manual_seed(_mix(config.train.seed, epoch, purpose))
    generator = torch.Generator().manual_seed(_mix(config.train.seed, epoch, "data"))
    augment, size = config.data.augment(), config.train.batch_size
    drawn = batches(data, size, generator=generator, group=group)
    for i, (x, y) in enumerate(islice(drawn, steps)):
        n = min(size, len(data) - i * size)
        yield augment(x, generator, (n, group.own(n))), y, n


def _mix(seed: int, epoch: int, purpose: str) -> int:
    """A seed of its own for each (seed, epoch, purpose): sums of them would collide."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _check_weights(state: State) -> None:
    """The last update of an epoch must not put weights that are not finite into the checkpoint."""
    own = state.model.named_parameters()
    bad = state.group.first(next((n for n, p in own if not local(p).isfinite().all()), None))
    if bad is not None:
        raise _diverged(f"'{bad}' is not finite after the last step", state.epoch, None)


def _diverged(what: str, epoch: int, step: int | None) -> SubbyteError:
    where = f"epoch {epoch + 1}" + ("" if step is None else f", step {step + 1}")
    kept = f"; the checkpoint of epoch {epoch} is kept" if epoch else ""
    return SubbyteError(
        f"{what} in {where}; lower train.lr, or set train.clip_grad_norm or "
        f"train.warmup_epochs{kept}"
    )


def _save(state: State, config: RunConfig) -> None:
    checkpoint = Checkpoint(
        model=gathered(state.model.state_dict()),
        ema=None if state.ema is None else gathered(state.ema.state_dict()),
        optimizer=gathered(state.optimizer.state_dict()),
        epoch=state.epoch,
        history=state.history,
        histograms=state.histograms,
        fingerprint=fingerprint(config),
        threads=torch.get_num_threads(),
        processes=state.group.size,
    )
    if state.group.leads:
        save_checkpoint(checkpoint, config.out / CHECKPOINT)
    _write_metrics(state, config)


def _write_metrics(state: State, config: RunConfig) -> None:
    text = "".join(to_json(asdict(record)) + "\n" for record in state.history)
    if state.group.leads:
        write_atomically(config.out / METRICS, text.encode())


def _result(state: State, test: ImageSet, config: RunConfig) -> TrainResult:
    """The last epoch's figures; memory as other code expects it."""
    model = state.best
    assert isinstance(model, Network)
    lay_out(model.cpu(), torch.contiguous_format)
    last = state.history[-1]
    evaluation = Evaluation(last.test_top1, last.test_loss, len(test))
    return TrainResult(model, state.history, state.histograms, evaluation, config.out / CHECKPOINT)
