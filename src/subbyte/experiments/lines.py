"""The lines beside an experiment's file: one JSON object per finished run, newest last.

experiment, variation, seed     which run it was
date, command, revision         when, how and by which code
machine, hours                  where, and how long it took
configuration                   the settings of the run
figures, curves                 what came out; curves by epoch
details                         what else is known
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from subbyte.core.jsontext import to_json
from subbyte.errors import SubbyteError
from subbyte.experiments.settings import Experiment, with_seed

Line = dict[str, Any]
_KEYS = {
    "experiment", "variation", "seed", "date", "command", "revision", "machine", "hours",
    "configuration", "figures", "curves", "details",
}  # fmt: skip
_FREE = ("out",)  # settings that do not decide what comes out
_FREE_OF_TRAIN = ("threads",)


def lines_file(name: str, root: Path) -> Path:
    return root / f"{name}.jsonl"


def read_lines(path: Path) -> list[Line]:
    """All lines, oldest first; none if there is no file. Raises SubbyteError for a damaged one."""
    if not path.is_file():
        return []
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = _parsed(text)
        if not isinstance(line, dict) or not line.keys() >= _KEYS:
            raise SubbyteError(f"{path}, line {number}: no line of a run; remove it")
        found.append(line)
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def configuration(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What decides a run's outcome, with the seed in its place."""
    plain = {key: value for key, value in with_seed(settings, seed).items() if key not in _FREE}
    if "train" in plain:
        train = {k: v for k, v in plain["train"].items() if k not in _FREE_OF_TRAIN}
        plain["train"] = {**train, "seed": seed}
    return plain


def counting(experiment: Experiment, lines: Iterable[Line]) -> dict[tuple[str, int], Line]:
    """The newest line of each (variation, seed) whose configuration is what the file says now."""
    found = {}
    for line in lines:
        settings = experiment.variations.get(line["variation"])
        if settings is not None and line["configuration"] == configuration(settings, line["seed"]):
            found[line["variation"], line["seed"]] = line
    return found


def append(path: Path, line: Line) -> bool:
    """Add the line, unless the same run's is there already (another process was faster)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if any(_same_run(line, other) for other in read_lines(path)):
            return False
        file.write(to_json(line) + "\n")
    return True


def _same_run(a: Line, b: Line) -> bool:
    return all(a[key] == b[key] for key in ("variation", "seed", "configuration"))
