"""Runs what an experiment lacks: one line beside its file for every run that ends."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from subbyte.core.toml import nearest
from subbyte.errors import SubbyteError
from subbyte.experiments.lines import (
    Line,
    append,
    configuration,
    counting,
    lines_file,
    read_lines,
)
from subbyte.experiments.machine import machine, revision
from subbyte.experiments.settings import Experiment, with_seed
from subbyte.experiments.work import Found, Job, Ready, Work

RUNS = Path("runs/experiments")


def lines_of(experiment: Experiment, root: Path) -> dict[tuple[str, int], Line]:
    """The lines that count, by (variation, seed)."""
    return counting(experiment, read_lines(lines_file(experiment.runs_of, root)))


def jobs_of(
    experiment: Experiment, only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Job]:
    """All runs of the experiment, seed by seed. only: these variations; seeds: other seeds."""
    for word in only:
        if word not in experiment.variations:
            names = list(experiment.variations)
            raise SubbyteError(f"{experiment.runs_of} has no variation '{word}'; "
                               f"{nearest(word, names)}")  # fmt: skip
    chosen = only or list(experiment.variations)
    return [_job(experiment, v, seed) for seed in seeds or experiment.seeds for v in chosen]


def _job(experiment: Experiment, variation: str, seed: int) -> Job:
    return Job(
        f"{experiment.file}: {variation}, seed {seed}",
        with_seed(experiment.variations[variation], seed),
        variation,
        seed,
        RUNS / experiment.runs_of / f"{variation}-seed{seed}",
    )


def ready(job: Job, works: Mapping[str, Work]) -> Ready:
    """What does the job, by the one table of `works` that its settings have."""
    kinds = [kind for kind in works if kind in job.settings]
    if len(kinds) != 1:
        raise SubbyteError(f"{job.place}: needs one of {', '.join(works)}; has {kinds or 'none'}")
    return works[kinds[0]](job)


def lacking(experiment: Experiment, jobs: Sequence[Job], root: Path) -> list[Job]:
    """The jobs without a line that counts."""
    done = lines_of(experiment, root)
    return [job for job in jobs if (job.variation, job.seed) not in done]


def refuse_begun(jobs: Sequence[Job]) -> None:
    """Raises SubbyteError if a folder holds a run that has begun."""
    for job in jobs:
        if (job.out / "checkpoint.pt").is_file():
            raise SubbyteError(f"{job.out} holds a run that has begun; --resume goes on with it, "
                               "or remove the folder")  # fmt: skip


def run_jobs(
    experiment: Experiment,
    jobs: Sequence[Job],
    works: Mapping[str, Work],
    root: Path,
    tell: Callable[[str], None],
) -> list[Line]:
    """Does what is lacking, in order; the lines that were added. Settings are read first.

    A run that fails does not stop the others. Raises SubbyteError after them, with the first error.
    """
    ready_jobs = [(job, ready(job, works)) for job in jobs]
    added, failed = [], []
    for job, work in ready_jobs:
        if not lacking(experiment, [job], root):  # another process may have done it meanwhile
            continue
        tell(f"{experiment.runs_of} {job.variation}, seed {job.seed}")
        try:
            before = begun(experiment, job, root)
            line = {**before, **gave(work(False))}
        except SubbyteError as error:
            tell(f"error: {error}")
            failed.append(f"{job.variation}, seed {job.seed}: {error}")
            continue
        if append(lines_file(experiment.runs_of, root), line):
            added.append(line)
    if failed:
        raise SubbyteError(f"{len(failed)} of {len(jobs)} runs failed; {failed[0]}")
    return added


def begun(experiment: Experiment, job: Job, root: Path) -> Line:
    """What a line says of a run before it starts: the code may change while it runs."""
    return {
        "experiment": experiment.runs_of,
        "variation": job.variation,
        "seed": job.seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["subbyte", *sys.argv[1:]]),
        "revision": revision(root),
        "machine": machine(),
        "configuration": configuration(experiment.variations[job.variation], job.seed),
    }


def gave(found: Found) -> Line:
    """What a line says of what came out."""
    return {
        "hours": found.seconds / 3600,
        "figures": dict(found.figures),
        "curves": dict(found.curves),
        "details": dict(found.details),
    }


def estimate(experiment: Experiment, job: Job, lines: Sequence[Line]) -> float | None:
    """Hours that the job will take, by earlier lines: of its variation, else of the experiment."""
    own = [line["hours"] for line in lines if line["variation"] == job.variation]
    hours = [h for h in own or [line["hours"] for line in lines] if h is not None]
    return statistics.median(hours) if hours else None
