"""What a run tells while it runs: a live line on a terminal, else one line an epoch, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from subbyte.train.checkpoint import EpochRecord

_EVERY_S = 10.0


class Progress(Protocol):
    """A listener of the loop, and of post-training (`subbyte.ptq.listen`).

    Epochs count from 1; top1 is in percent, over the epoch so far.
    """

    def note(self, text: str) -> None: ...
    def progress(self, step: str, done: int, total: int) -> None: ...
    def start(self, epoch: int, epochs: int, steps: int) -> None: ...
    def step(self, loss: float, top1: float, images_per_s: float) -> None: ...
    def finish(self, record: EpochRecord, epochs: int) -> None: ...
    def close(self) -> None: ...


class Silent:
    """Tells nothing."""

    def note(self, text: str) -> None: ...
    def progress(self, step: str, done: int, total: int) -> None: ...
    def start(self, epoch: int, epochs: int, steps: int) -> None: ...
    def step(self, loss: float, top1: float, images_per_s: float) -> None: ...
    def finish(self, record: EpochRecord, epochs: int) -> None: ...
    def close(self) -> None: ...


class Lines:
    """One line per epoch, and one for a long step every ten seconds: for logs and pipes."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._step, self._started, self._told = "", 0.0, 0.0

    def progress(self, step: str, done: int, total: int) -> None:
        now = self._clock()
        if step != self._step or done == 1:
            self._step, self._started, self._told = step, now, now
        if now - self._told >= _EVERY_S:
            self._told = now
            left = (now - self._started) / max(1, done - 1) * (total - done)
            self._print(f"{step}: {done} of {total}, about {left:.0f} s left")

    def note(self, text: str) -> None:
        self._print(text)

    def start(self, epoch: int, epochs: int, steps: int) -> None: ...
    def step(self, loss: float, top1: float, images_per_s: float) -> None: ...

    def finish(self, record: EpochRecord, epochs: int) -> None:
        self._print(epoch_line(record, epochs))

    def close(self) -> None: ...

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Live:
    """A bar with loss, accuracy, speed and the time left in the epoch; the epoch's line stays."""

    def __init__(self, console: Console) -> None:
        self._lines = Lines(console)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        self._lines.note(text)

    def progress(self, step: str, done: int, total: int) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(step, total=total, figures="")
        self._bar.update(self._task, description=step, completed=done, total=total)
        if done == total:
            self._bar.remove_task(self._task)
            self._task = None
            self._bar.stop()

    def start(self, epoch: int, epochs: int, steps: int) -> None:
        self._bar.start()
        self._task = self._bar.add_task(f"epoch {epoch}/{epochs}", total=steps, figures="")

    def step(self, loss: float, top1: float, images_per_s: float) -> None:
        assert self._task is not None
        figures = f"loss {loss:.4f}  top-1 {top1:.2f} %  {images_per_s:.0f} images/s"
        self._bar.update(self._task, advance=1, figures=figures)

    def finish(self, record: EpochRecord, epochs: int) -> None:
        assert self._task is not None
        self._bar.remove_task(self._task)
        self._task = None
        self._lines.finish(record, epochs)

    def close(self) -> None:
        self._bar.stop()


def epoch_line(record: EpochRecord, epochs: int) -> str:
    return (
        f"epoch {record.epoch}/{epochs}  lr {record.lr:.4g}  "
        f"train loss {record.train_loss:.4f}  top-1 {record.train_top1:.2f} %  "
        f"test loss {record.test_loss:.4f}  top-1 {record.test_top1:.2f} %  "
        f"{record.images_per_s:.0f} images/s{_watched(record)}"
    )


def _watched(record: EpochRecord) -> str:
    """What the quantized weights did, if there are any."""
    text = ""
    if record.rounded_top1 is not None and record.distance is not None:
        text += f"  rounded top-1 {record.rounded_top1:.2f} %  distance {record.distance:.2%}"
    if record.changed is not None:
        text += f"  changed {record.changed:.2%}"
    return text


def console_progress(*, quiet: bool = False, console: Console | None = None) -> Progress:
    """Silent if quiet; live on a terminal; else a line an epoch. On stderr, beside the results."""
    if quiet:
        return Silent()
    console = console or Console(stderr=True)
    return Live(console) if console.is_terminal else Lines(console)
