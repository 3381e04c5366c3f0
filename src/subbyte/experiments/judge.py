"""Verdicts: a rule and the lines in; reproduced, not reproduced or not decided out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from subbyte.experiments.settings import Comparison, Experiment

Verdict = Literal["reproduced", "not reproduced", "not decided"]
Lines = Mapping[tuple[str, int], dict[str, Any]]

# the 97.5 % quantile of Student's t by degrees of freedom, 1 to 9; more are taken for 9
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Judged:
    """A comparison and what became of it. values: by seed; low, high: what the bound is held to."""

    comparison: Comparison
    values: Mapping[int, float]
    low: float | None
    high: float | None
    verdict: Verdict


def verdict(judged: Sequence[Judged]) -> Verdict:
    """Of all comparisons together: one that fails decides; all must hold."""
    found = [each.verdict for each in judged]
    if "not reproduced" in found:
        return "not reproduced"
    return "not decided" if "not decided" in found else "reproduced"


def judge(experiment: Experiment, lines: Lines) -> tuple[Judged, ...]:
    return tuple(judged(comparison, lines) for comparison in experiment.judge)


def judged(comparison: Comparison, lines: Lines) -> Judged:
    """Not decided with fewer seeds than the rule asks for; only finite values count."""
    values = values_of(comparison, lines)
    if len(values) < comparison.seeds:
        return Judged(comparison, values, None, None, "not decided")
    low, high = _range(list(values.values()), comparison.by)
    return Judged(comparison, values, low, high, _against(comparison, low, high))


def values_of(comparison: Comparison, lines: Lines) -> dict[int, float]:
    """The compared value of every seed that has one."""
    seeds = sorted({seed for variation, seed in lines if variation == comparison.of})
    found = {seed: _value(comparison, lines, seed) for seed in seeds}
    return {seed: value for seed, value in found.items() if value is not None}


def _value(comparison: Comparison, lines: Lines, seed: int) -> float | None:
    parts = [figure(lines.get((v, seed)), comparison.figure) for v in comparison.variations]
    if None in parts or (comparison.over is not None and parts[1] == 0):
        return None
    first, *other = [part for part in parts if part is not None]
    if comparison.minus is not None:
        return round(first - other[0], 9)  # 85.1 - 85.6 is -0.5, not a little less
    return first / other[0] if comparison.over is not None else first


def figure(line: Mapping[str, Any] | None, name: str) -> float | None:
    """A finite figure of a line, or None."""
    value = None if line is None else line["figures"].get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def _range(values: list[float], by: str) -> tuple[float, float]:
    """The median, twice; or the ends of the 95 % interval of the mean."""
    if by == "median":
        middle = statistics.median(values)
        return middle, middle
    mean, n = statistics.mean(values), len(values)
    wide = _T[min(n - 1, len(_T)) - 1] * statistics.stdev(values) / math.sqrt(n)
    return mean - wide, mean + wide


def _against(comparison: Comparison, low: float, high: float) -> Verdict:
    bound = comparison.bound
    holds = low >= bound if comparison.at_least is not None else high <= bound
    fails = high < bound if comparison.at_least is not None else low > bound
    if holds:
        return "reproduced"
    return "not reproduced" if fails else "not decided"
