"""Damaged files against the readers: python benchmarks/fuzz.py --minutes 5 [--seed 0]

Each case is a file of specimens.py with faults of damage.py, or a checkpoint with faults, given to
`load`, `size_report` (what `inspect` shows), `storage.read` (what `verify` does) or `train`. A
reader may refuse the file by a SubbyteError, or take it. A report is: another exception, more than
2 s of processor time, a message of more than 1,000 characters, more memory than `memory_limit`, or
a crash. The cases run in a child process, so that a crash ends the case and not the run.

Appends one line to results/reliability.jsonl. --first N begins at a case, --keep FOLDER writes the
files of reports. Exit code 1 if there is a report.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import damage
import specimens
from common import append, revision

from subbyte import SubbyteError, load, storage
from subbyte.report import size_report

SECONDS = 2.0  # of processor time, for each reader
LONGEST = 1000  # characters of a message, without the file's path
STUCK = 60.0  # seconds without a word from the child
_ADDRESSES = 8 << 30  # what a case may reserve before it fails


def memory_limit(n_bytes: int) -> int:
    """What reading a file of this size may add: 64 MiB, and 3,000 times the file."""
    return (64 << 20) + 3000 * n_bytes


READERS: dict[str, Callable[[Path], object]] = {
    "read": storage.read,
    "load": load,
    "size_report": size_report,
}


def warm(files: dict[str, bytes]) -> None:
    """Every reader takes every file while it is whole; modules that it needs are imported now."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        for data in files.values():
            path.write_bytes(data)
            for reader in READERS.values():
                reader(path)


class TooLong(BaseException):
    """The alarm; no `except Exception` takes it."""


def case(number: int, seed: int, files: dict[str, bytes]) -> tuple[str, bytes, list[str]]:
    """(kind of damage, file, readers), from the seed and the number alone."""
    draw = random.Random(f"{seed}/{number}")
    if draw.random() < 0.1:
        return "checkpoint", checkpoints.damaged(files["checkpoint"], draw), ["train"]
    name = draw.choice([name for name in files if name != "checkpoint"])
    kind, data = damage.damaged(files[name], draw)
    return kind, data, list(READERS)


def tried(reader: Callable[[Path], object], path: Path, n_bytes: int) -> tuple[str, str | None]:
    """(what the reader said, what is wrong with that): "" where it takes the file."""
    before, said, fault = resident("VmRSS"), "", None
    reset_peak()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reader(path)
    except SubbyteError as error:
        said = str(error).replace(str(path), "")
        fault = f"a message of {len(said)} characters" if len(said) > LONGEST else None
    except TooLong:
        fault = f"over {SECONDS} s"
    except BaseException as error:
        fault = f"{type(error).__name__}: {error!s:.200}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = resident("VmHWM") - before
    return said, fault or (f"{grown:,} bytes" if grown > memory_limit(n_bytes) else None)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident(key: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since `reset_peak` (Linux)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{key}:")[2].split()[0])


# ---------------------------------------------------------------- the child


def work(first: int, seed: int, files: dict[str, bytes], end: float, out: int) -> None:
    """Cases from `first` until the time is over; a line of JSON before and after each."""
    signal.signal(signal.SIGPROF, alarm)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    readers = {**READERS, "train": checkpoints.resumed}
    with tempfile.TemporaryDirectory() as folder, os.fdopen(out, "w") as pipe:
        path = Path(folder) / "net.safetensors"
        number = first
        while time.monotonic() < end:
            print(json.dumps({"number": number}), file=pipe, flush=True)
            kind, data, names = case(number, seed, files)
            path.write_bytes(data)
            found = {name: tried(readers[name], path, len(data)) for name in names}
            print(json.dumps({"kind": kind, "found": found}), file=pipe, flush=True)
            number += 1


def alarm(*_: Any) -> None:
    raise TooLong


# ---------------------------------------------------------------- the parent


def lines_of(child: int, source: int) -> Iterator[dict[str, Any]]:
    """What the child says, until it ends; one that says nothing for long is killed."""
    buffer = b""
    while True:
        if not select.select([source], [], [], STUCK)[0]:
            os.kill(child, signal.SIGKILL)
            return
        part = os.read(source, 65536)
        if not part:
            return
        *whole, buffer = (buffer + part).split(b"\n")
        yield from map(json.loads, whole)


def run(seed: int, first: int, end: float, files: dict[str, bytes]) -> dict[str, Any]:
    """Counts of cases by kind, of files taken, of refusals that differ; and the reports."""
    kinds: Counter[str] = Counter()
    taken, reports, refusals = 0, [], set()
    number = first
    while time.monotonic() < end:
        source, out = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(source)
            try:
                work(number, seed, files, end, out)
            finally:
                os._exit(0)
        os.close(out)
        for line in lines_of(child, source):
            if "number" in line:
                number = line["number"]
                continue
            kinds[line["kind"]] += 1
            for reader, (said, fault) in line["found"].items():
                taken += not said and not fault
                refusals.add("".join(c for c in said[:120] if c.isalpha() or c == " "))
                if fault:
                    reports.append({"number": number, "reader": reader, "fault": fault})
                    print(reports[-1], flush=True)
        os.close(source)
        if os.waitpid(child, 0)[1]:
            reports.append({"number": number, "reader": "", "fault": "the process ended"})
            print(reports[-1], flush=True)
        number += 1
    return {
        "cases": sum(kinds.values()), "kinds": dict(sorted(kinds.items())), "taken": taken,
        "refusals": len(refusals) - 1, "reports": reports,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    started = time.monotonic()
    files = specimens.files()
    warm(files)
    files["checkpoint"] = checkpoints.made()
    found = run(options.seed, options.first, started + 60 * options.minutes, files)
    for report in found["reports"] if options.keep else ():
        options.keep.mkdir(parents=True, exist_ok=True)
        data = case(report["number"], options.seed, files)[1]
        (options.keep / f"{options.seed}-{report['number']}.bin").write_bytes(data)
    seconds = round(time.monotonic() - started, 1)
    head = {"case": "fuzz", "commit": revision(), "seed": options.seed, "seconds": seconds}
    append("reliability", {**head, **found, "reports": len(found["reports"])})
    print(f"{found['cases']} cases, {len(found['reports'])} reports, {seconds:.0f} s")
    return 1 if found["reports"] else 0


if __name__ == "__main__":
    sys.exit(main())
