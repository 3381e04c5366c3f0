"""What every benchmark needs: the machine in words, medians with their spread, a line a result."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from subbyte.bench.timing import Spread, spread
from subbyte.experiments.machine import machine
from subbyte.experiments.machine import revision as commit
from subbyte.experiments.work import RESULT

__all__ = ["RESULTS", "ROOT", "Spread", "append", "leave", "revision", "run_options", "spread"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def revision() -> str:
    """The commit that the tree is at."""
    return commit(ROOT)


def append(name: str, result: dict[str, Any]) -> Path:
    """Add one line to results/<name>.jsonl: date, command, machine, then the result."""
    line = {"date": _now(), "command": _command(), "machine": machine(), **result}
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line, default=_plain, allow_nan=False) + "\n")
    return path


def run_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options that `subbyte experiment run` gives a script, beside its own."""
    parser.add_argument("--variation", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets result.json")
    return parser.parse_args()


def leave(
    options: argparse.Namespace, figures: dict[str, Any], seconds: float, details: dict[str, Any]
) -> None:
    """What a run of an experiment gave, for `subbyte experiment run`."""
    found = {"figures": figures, "seconds": seconds, "details": details}
    (options.out / RESULT).write_text(json.dumps(found, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} in a result")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _command() -> str:
    """As it is typed in the repository's root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", str(shown), *sys.argv[1:]])
