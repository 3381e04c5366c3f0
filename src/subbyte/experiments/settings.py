"""An experiment's file: the claim, the runs that test it, and the rules that judge it.

    title = "Accuracy by number of levels"
    claim = "5 levels reach the accuracy of float32."
    source = "arXiv:2502.08795, abstract"
    base = "../bases/cvnn1.toml"            # settings that all runs share; see `core.toml.parse`
    seeds = [0, 1, 2]
    epochs = 10                             # optional: train.epochs

    [variations.float]                      # what differs from the shared settings
    [variations.5-levels]
    method = { name = "lowres", levels = 5 }

    [[judge]]                               # all comparisons must hold; see `Comparison`
    figure = "top1"
    of = "5-levels"
    minus = "float"
    at_least = -0.5

Any other key is a setting of the runs. "{seed}" in a text stands for the seed of the run.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from subbyte.core.toml import Place, Table, merged, nearest, parse, read_fields
from subbyte.errors import SubbyteError
from subbyte.experiments.figures import FIGURES

ROOT = Path("experiments")
BASES = "bases"
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of one variation against a bound, over the seeds.

    A seed's value is the figure of `of`, less that of `minus` or divided by that of `over` with the
    same seed. at_least, at_most: the bound, exactly one of them. seeds: the fewest that decide. by:
    "median" compares the median of the values with the bound; "interval" decides only if the whole
    95 % interval of their mean (Student's t) lies on one side of it.
    """

    figure: str
    of: str
    minus: str | None = None
    over: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    seeds: int = 3
    by: Literal["median", "interval"] = "median"

    def __post_init__(self) -> None:
        if self.figure not in FIGURES:
            raise SubbyteError(f"figure = {self.figure!r}; {nearest(self.figure, list(FIGURES))}")
        if (self.at_least is None) == (self.at_most is None):
            raise SubbyteError("needs a bound: at_least or at_most, one of them")
        if not math.isfinite(self.bound):
            raise SubbyteError(f"bound = {self.bound}; give a finite number")
        if self.minus is not None and self.over is not None:
            raise SubbyteError("has both 'minus' and 'over'; keep one of them")
        if self.seeds < (2 if self.by == "interval" else 1):
            raise SubbyteError(f"seeds = {self.seeds}; an interval needs 2 or more, a median 1")

    @property
    def bound(self) -> float:
        return self.at_least if self.at_least is not None else float(self.at_most or 0.0)

    @property
    def variations(self) -> tuple[str, ...]:
        return tuple(v for v in (self.of, self.minus, self.over) if v is not None)


@dataclass(frozen=True)
class _Document:
    """The keys of an experiment that are not settings of its runs."""

    title: str
    claim: str
    source: str
    judge: tuple[dict, ...] = ()
    variations: dict | None = None
    runs_of: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int | None = None
    shown: tuple[str, ...] = ("top1", "bits", "bytes")
    curve: str | None = None
    not_run: str | None = None
    place: int = 0


KEYS = frozenset(f.name for f in fields(_Document))


@dataclass(frozen=True, eq=False)
class Experiment:
    """One claim. name: "<paper>/<claim>"; variations: names to the settings of their runs.

    runs_of: the name of the experiment whose runs and lines it judges, its own unless the file says
    otherwise. shown: the figures of its table. curve: what its picture shows by epoch, None for no
    picture. not_run: why runs are missing, if somebody knows. place: on the page, the lowest first.
    """

    name: str
    file: str
    title: str
    claim: str
    source: str
    variations: Table
    judge: tuple[Comparison, ...]
    seeds: tuple[int, ...]
    runs_of: str
    shown: tuple[str, ...]
    curve: str | None
    not_run: str | None
    place: int

    @property
    def paper(self) -> str:
        return self.name.partition("/")[0]


def names_of(root: Path) -> list[str]:
    """All experiments below the folder, by paper."""
    if not root.is_dir():
        raise SubbyteError(f"{root}: no such folder; run in a checkout, or give --root")
    paths = sorted(root.glob("*/*.toml"))
    return [f"{path.parent.name}/{path.stem}" for path in paths if path.parent.name != BASES]


def read_experiment(name: str, root: Path = ROOT) -> Experiment:
    """The experiment of a name. Raises SubbyteError with the file, the place and a remedy."""
    document, settings, place = _read(name, root)
    if document.runs_of is not None:
        return _judging(document, name, root, place)
    return _experiment(document, name, _variations(document, settings, place), name, place)


def _read(name: str, root: Path) -> tuple[_Document, Table, Place]:
    """The file's own keys, and the settings that its runs share."""
    known = names_of(root)
    if name not in known:
        raise SubbyteError(f"experiment '{name}': there is none in {root}; {nearest(name, known)}")
    path = root / f"{name}.toml"
    table, place = parse(path), Place(str(path))
    document = read_fields(_Document, {k: v for k, v in table.items() if k in KEYS}, place)
    settings = {key: value for key, value in table.items() if key not in KEYS}
    if document.epochs is not None:
        settings = merged(settings, {"train": {"epochs": document.epochs}})
    return document, settings, place


def _judging(document: _Document, name: str, root: Path, place: Place) -> Experiment:
    """An experiment without runs of its own."""
    other = f"{name.partition('/')[0]}/{document.runs_of}"
    own, settings, there = _read(other, root)
    if own.runs_of is not None:
        raise SubbyteError(f"{place.key('runs_of')} = '{document.runs_of}', which has no runs of "
                           "its own; name the experiment that has them")  # fmt: skip
    if document.variations is not None:
        raise SubbyteError(f"{place} has both 'runs_of' and 'variations'; keep one of them")
    variations = _variations(own, settings, there)
    return _experiment(replace(document, seeds=own.seeds), name, variations, other, place)


def _experiment(
    document: _Document, name: str, variations: Table, runs_of: str, place: Place
) -> Experiment:
    judge = tuple(
        read_fields(Comparison, table, Place(place.file, f"judge.{i}"))
        for i, table in enumerate(document.judge)
    )
    _check(document, judge, list(variations), place)
    return Experiment(
        name, place.file, document.title, document.claim, document.source, variations, judge,
        document.seeds, runs_of, document.shown, document.curve, document.not_run,
        document.place,
    )  # fmt: skip


def _check(
    document: _Document, judge: tuple[Comparison, ...], variations: list[str], place: Place
) -> None:
    if not judge:
        raise SubbyteError(f"{place} needs a rule: [[judge]] with figure, of and a bound")
    if not document.seeds or len(set(document.seeds)) != len(document.seeds):
        raise SubbyteError(f"{place.key('seeds')} = {list(document.seeds)}; give each seed once")
    for i, comparison in enumerate(judge):
        for word in comparison.variations:
            if word not in variations:
                where = f"{place.file}: [judge.{i}]"
                raise SubbyteError(f"{where} names '{word}'; {nearest(word, variations)}")
    for word in document.shown:
        if word not in FIGURES:
            raise SubbyteError(f"{place.key('shown')}: '{word}'; {nearest(word, list(FIGURES))}")


def _variations(document: _Document, settings: Table, place: Place) -> dict[str, Any]:
    if not document.variations:
        raise SubbyteError(f"{place} needs variations: [variations.NAME], or runs_of")
    for name, own in document.variations.items():
        if not _NAME.fullmatch(name) or not isinstance(own, dict):
            raise SubbyteError(
                f"{place.key('variations')}.{name}: expected a table with a name of small letters, "
                "digits, dots and hyphens: it names a folder"
            )
    return {name: merged(settings, own) for name, own in document.variations.items()}


def with_seed(value: Any, seed: int) -> Any:
    """The settings of one run: "{seed}" in every text becomes the seed."""
    if isinstance(value, dict):
        return {key: with_seed(item, seed) for key, item in value.items()}
    if isinstance(value, list):
        return [with_seed(item, seed) for item in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value
