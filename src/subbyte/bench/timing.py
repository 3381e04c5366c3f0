"""Times that can be compared: everything in turn, round by round; medians with quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PAUSE = 0.003  # seconds before a burst: thread pools of whoever ran before stop spinning
BURST = 0.01  # seconds of calls that make one sample, about
CALLS = 4  # in a sample, at least: after other code's turn the first ones fill the caches again
ROUNDS = 5  # at least


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.3f} (quartiles {self.low:.3f} .. {self.high:.3f}, n = {self.n})"

    def __mul__(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(factor * self.median, factor * self.low, factor * self.high, self.n)


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; quartiles by linear interpolation between the values themselves."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def in_turn(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Spread]:
    """Seconds that one call of each takes, all measured in one run of about `seconds`.

    A round goes once through the calls, in the opposite order of the round before, so that a
    change of the machine's speed meets all of them. One sample is a pause, a call that is not
    counted, and the mean of a burst of calls. At least five rounds, however long they take.
    """
    burst = min(BURST, seconds / (ROUNDS * len(calls)))
    repeats = {name: _repeats(call, burst) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, end, rounds = list(calls), time.perf_counter() + seconds, 0
    while rounds < ROUNDS or time.perf_counter() < end:
        for name in names:
            samples[name].append(_burst(calls[name], repeats[name]))
        names.reverse()
        rounds += 1
    return {name: spread(values) for name, values in samples.items()}


def _repeats(call: Callable[[], object], burst: float) -> int:
    """Calls in a burst of so many seconds. The first call repacks and allocates."""
    call()
    start = time.perf_counter()
    call()
    return max(CALLS, round(burst / max(time.perf_counter() - start, 1e-9)))


def _burst(call: Callable[[], object], repeats: int) -> float:
    time.sleep(PAUSE)
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
