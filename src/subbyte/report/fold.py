"""Rows that differ in the numbers of their names only, as one row.

`layers.0.attn.q` to `layers.29.attn.q` become `layers.{0-29}.attn.q`; numbers that are missing stay
missing: `layers.{0-3,5-29}.attn.q`, `layers.{0-28 by 2}.attn.q`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Numbers = tuple[int, ...]

MAX_RUNS = 4  # of numbers in one pair of braces; more become rows of their own
_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")


@dataclass(frozen=True, slots=True)
class Fold(Generic[T]):
    """Items that are alike, in their order, under one name."""

    name: str
    items: tuple[T, ...]


def folds(
    items: Iterable[T], name_of: Callable[[T], str], alike: Callable[[T], Hashable]
) -> tuple[Fold[T], ...]:
    """Every item once, in the order of each row's first item. Names are all different.

    alike: what items of one row have in common beside the words of their names.
    """
    groups: dict[Hashable, dict[Numbers, tuple[int, T]]] = {}
    for place, item in enumerate(items):
        words, numbers = _parts(name_of(item))
        groups.setdefault((words, alike(item)), {})[numbers] = (place, item)
    found: list[tuple[int, Fold[T]]] = []
    for group in groups.values():
        words, _ = _parts(name_of(next(iter(group.values()))[1]))
        for block in _blocks(list(group)):
            members = sorted((group[numbers] for numbers in block), key=lambda member: member[0])
            fold = Fold(_name(words, block), tuple(item for _, item in members))
            found.append((members[0][0], fold))
    return tuple(fold for _, fold in sorted(found, key=lambda pair: pair[0]))


def _parts(name: str) -> tuple[tuple[str, ...], Numbers]:
    """The words of a name and the numbers between them."""
    parts = _NUMBER.split(name)
    return tuple(parts[::2]), tuple(map(int, parts[1::2]))


def _blocks(names: Sequence[Numbers]) -> Iterator[Sequence[Numbers]]:
    """The names in parts that braces can name: every number of one place with every of another, in
    no more than MAX_RUNS runs each."""
    places = _places(names)
    if math.prod(map(len, places)) != len(names):
        at, parts = _split(names, places)
    else:
        long = [at for at, values in enumerate(places) if len(_runs(values)) > MAX_RUNS]
        if not long:
            yield names
            return
        at, runs = long[0], _runs(places[long[0]])
        chunks = (runs[i : i + MAX_RUNS] for i in range(0, len(runs), MAX_RUNS))
        parts = [{value for run in chunk for value in run} for chunk in chunks]
    for part in parts:
        yield from _blocks([numbers for numbers in names if numbers[at] in part])


def _split(
    names: Sequence[Numbers], places: Sequence[Sequence[int]]
) -> tuple[int, Sequence[Collection[int]]]:
    """The place with the fewest parts, more than one, of equal numbers at the other places."""
    parts: list[tuple[int, list[list[int]]]] = []
    for at, values in enumerate(places):
        others: dict[int, set[Numbers]] = {value: set() for value in values}
        for numbers in names:
            others[numbers[at]].add(numbers[:at] + numbers[at + 1 :])
        equal: dict[frozenset[Numbers], list[int]] = {}
        for value in values:
            equal.setdefault(frozenset(others[value]), []).append(value)
        parts.append((at, list(equal.values())))
    return min((part for part in parts if len(part[1]) > 1), key=lambda part: len(part[1]))


def _places(names: Sequence[Numbers]) -> list[list[int]]:
    """The different numbers at each place of the names, in order."""
    return [sorted(set(values)) for values in zip(*names, strict=True)]


def _runs(values: Sequence[int]) -> list[range]:
    """Increasing numbers as ranges: neighbours, or three and more of one distance."""
    runs, start = [], 0
    while start < len(values):
        stop = start + 1
        step = values[stop] - values[start] if stop < len(values) else 1
        while stop < len(values) and values[stop] - values[stop - 1] == step:
            stop += 1
        if stop - start == 2 and step > 1:
            stop = start + 1
        runs.append(range(values[start], values[stop - 1] + 1, step))
        start = stop
    return runs


def _name(words: Sequence[str], block: Sequence[Numbers]) -> str:
    numbers = [_braced(values) for values in _places(block)]
    return "".join(a + b for a, b in zip(words, [*numbers, ""], strict=True))


def _braced(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    return "{" + ",".join(map(_run_text, _runs(values))) + "}"


def _run_text(run: range) -> str:
    if len(run) == 1:
        return str(run[0])
    return f"{run[0]}-{run[-1]}" + ("" if run.step == 1 else f" by {run.step}")
