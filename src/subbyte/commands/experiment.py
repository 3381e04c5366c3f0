"""`subbyte experiment`: claims as files, their runs, tables and pages."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from subbyte.commands import options as o
from subbyte.commands.converting import converted
from subbyte.commands.output import print_json
from subbyte.core.atomic import check_writable, write_atomically
from subbyte.core.toml import nearest
from subbyte.errors import SubbyteError
from subbyte.experiments.judge import judge, verdict
from subbyte.experiments.lines import lines_file, read_lines
from subbyte.experiments.page import page_of, pictures_of, section
from subbyte.experiments.run import (
    estimate,
    jobs_of,
    lacking,
    lines_of,
    ready,
    refuse_begun,
    run_jobs,
)
from subbyte.experiments.settings import ROOT, Experiment, names_of, read_experiment
from subbyte.experiments.work import WORK, Job, Work

WORKS: Mapping[str, Work] = {**WORK, "quantize": converted}

experiment = typer.Typer(
    no_args_is_help=True, help="Claims as files: run them, judge them, make their pages."
)


@experiment.command("list")
def list_(root: o.Root = ROOT, json_: o.Json = False) -> None:
    """All experiments, with how many of their runs are done and the verdict."""
    rows = [_row(read_experiment(name, root), root) for name in names_of(root)]
    if json_:
        print_json({"experiments": rows})
        return
    for row in rows:
        print(f"{row['name']:34} {row['done']:3} of {row['runs']:3} runs  {row['verdict']}")


def _row(found: Experiment, root: Path) -> dict[str, Any]:
    jobs = jobs_of(found)
    done = len(jobs) - len(lacking(found, jobs, root))
    decided = verdict(judge(found, lines_of(found, root)))
    return {"name": found.name, "runs": len(jobs), "done": done, "verdict": decided}


@experiment.command()
def run(
    name: o.Experiment,
    only: o.Only = None,
    seeds: o.Seeds = None,
    resume: o.Resume = False,
    dry_run: o.DryRun = False,
    root: o.Root = ROOT,
) -> None:
    """Run what an experiment lacks; each run that ends adds a line beside the experiment's file."""
    found = read_experiment(name, root)
    chosen = () if only is None else only.split(",")
    jobs = lacking(found, jobs_of(found, chosen, _integers(seeds)), root)
    for job in jobs:
        ready(job, WORKS)
    if dry_run:
        _print_plan(found, jobs, root)
        return
    check_writable(lines_file(found.runs_of, root))
    if not resume:
        refuse_begun(jobs)
    try:
        added = run_jobs(found, jobs, WORKS, root, lambda text: print(text, file=sys.stderr))
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"{found.name}: {len(added)} runs done; {verdict(judge(found, lines_of(found, root)))}")


def _integers(text: str | None) -> list[int]:
    try:
        return [] if text is None else [int(word) for word in text.split(",")]
    except ValueError:
        raise SubbyteError(f"--seeds {text}: expected integers, for instance 0,1,2") from None


def _print_plan(found: Experiment, jobs: list[Job], root: Path) -> None:
    lines = read_lines(lines_file(found.runs_of, root))
    for job in jobs:
        hours = estimate(found, job, lines)
        about = "no estimate" if hours is None else f"about {hours:.2f} hours"
        print(f"{job.variation}, seed {job.seed}: {about}, in {job.out}")
    print(f"{found.name}: {len(jobs)} runs to do")


@experiment.command()
def table(name: o.Experiment, root: o.Root = ROOT) -> None:
    """The claim, the table of its runs, how it is judged, and the verdict."""
    found = read_experiment(name, root)
    print(section(found, lines_of(found, root)))


@experiment.command()
def page(paper: o.Paper, root: o.Root = ROOT, out: o.Pages = Path("docs/results")) -> None:
    """A paper's page and its pictures, made from the lines alone."""
    found = [read_experiment(name, root) for name in names_of(root)]
    own = {e: lines_of(e, root) for e in found if e.paper == paper}
    if not own:
        papers = sorted({e.paper for e in found})
        raise SubbyteError(f"{root} has no experiments of '{paper}'; {nearest(paper, papers)}")
    place = out / f"{paper}.md"
    check_writable(place)
    for picture, draw in pictures_of(own).items():
        draw(out / picture)
    write_atomically(place, page_of(paper, own).encode())
    print(place)
