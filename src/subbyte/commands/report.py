"""`subbyte report`: packed files and runs as one page to look at."""

from __future__ import annotations

import json
from pathlib import Path

from subbyte.commands import options as o
from subbyte.core.atomic import check_writable, write_atomically
from subbyte.errors import SubbyteError
from subbyte.report import size_report
from subbyte.report.page import Subject, page
from subbyte.storage.pretrained import PACKED, is_folder
from subbyte.train.checkpoint import EpochRecord
from subbyte.train.loop import METRICS
from subbyte.train.run import NETWORK


def report(
    targets: o.Targets,
    out: o.Page = Path("report.html"),
) -> None:
    """One HTML page of packed files and runs, side by side; it opens without a connection."""
    check_writable(out)
    names = _names(targets)
    subjects = [_subject(path, name) for path, name in zip(targets, names, strict=True)]
    data = page(subjects).encode()
    write_atomically(out, data)
    print(f"{out}: {len(data):,} bytes, of {', '.join(names)}")


def _names(targets: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for n in range(1, 1 + max(len(path.parts) for path in targets)):
        names = ["/".join(path.parts[-n:]) for path in targets]
        if len(set(names)) == len(names):
            return names
    raise SubbyteError(f"{targets[0]} is given twice")


def _subject(path: Path, name: str) -> Subject:
    metrics = path / METRICS
    if path.is_dir() and metrics.is_file():
        packed = path / NETWORK
        size = size_report(packed) if packed.is_file() else None
        return Subject(name, size, _history(metrics))
    return Subject(name, size_report(path / PACKED if is_folder(str(path)) else path))


def _history(metrics: Path) -> tuple[EpochRecord, ...]:
    try:
        found = [json.loads(line) for line in metrics.read_text().splitlines()]
        return tuple(EpochRecord(**record) for record in found)
    except (ValueError, TypeError) as error:
        raise SubbyteError(f"{metrics}: no metrics of a run ({str(error)[:200]})") from None
