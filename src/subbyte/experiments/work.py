"""What a run does, by the table that its settings have: train, or a script of the repository.

A work reads the settings first, so that a mistake stops before anything runs, and gives back what
does the work.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from subbyte.core.toml import Table, merged
from subbyte.errors import SubbyteError
from subbyte.models import build
from subbyte.report import size_report
from subbyte.train import ModelConfig, RunResult, run
from subbyte.train.checkpoint import EpochRecord
from subbyte.train.config import config_of
from subbyte.train.loop import CHECKPOINT
from subbyte.train.update import precision_on

SPIKE = 1.1  # times the training loss of the epoch before: above it an epoch counts as a loss spike
_STDERR = 2  # results alone go to stdout
RESULT = "result.json"  # what a script leaves in the folder of its run
_CURVES = ("lr", "train_loss", "train_top1", "test_loss", "test_top1", "seconds", "distance",
           "changed", "rounded_top1", "pull")  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What a run gave. seconds: of the work itself; curves: a value per epoch."""

    figures: Mapping[str, float | None]
    seconds: float
    curves: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run: where it stands in words, its settings with the seed in place, and its folder."""

    place: str
    settings: Table
    variation: str
    seed: int
    out: Path


Ready = Callable[[bool], Found]  # quiet
Work = Callable[[Job], Ready]


def trained(job: Job) -> Ready:
    """As `subbyte train` does; goes on from the checkpoint in the folder, if there is one."""
    table = merged(job.settings, {"out": str(job.out), "train": {"seed": job.seed}})
    config = config_of(table, job.place, job.variation)

    def work(quiet: bool) -> Found:
        found = found_in(run(config, resume=(config.out / CHECKPOINT).is_file(), quiet=quiet))
        used = precision_on(torch.device("cpu"), config.train)
        figures = {**found.figures, "parameters": n_parameters(config.model)}
        return replace(found, figures=figures, details={"precision": used})

    return work


def n_parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        net = build(model.name, **model.arguments)
    return sum(parameter.numel() for parameter in net.parameters())


def found_in(result: RunResult) -> Found:
    """Figures of the file that was saved, read back; bits and bytes of the whole file."""
    history = result.history
    figures: dict[str, float | None] = {
        "top1": result.saved.top1,
        "loss": result.saved.loss,
        "bytes": result.n_bytes,
        "bits": 32.0,
        "epochs": len(history),
        "spikes": spikes([record.train_loss for record in history]),
    }
    if history[-1].distance is not None:  # there are levels
        figures |= _of_levels(result)
    return Found(figures, sum(record.seconds for record in history), curves_of(history))


def _of_levels(result: RunResult) -> dict[str, float | None]:
    """What only quantized weights have."""
    last, changed = result.history[-1], [r.changed for r in result.history if r.changed is not None]
    sizes = size_report(result.file).to_dict()
    return {
        "bits": sizes["whole"]["file_bits_per_weight"],
        "layer_bits": sizes["bits_per_weight"]["disk"],
        "distance": last.distance,
        "changed": sum(changed) / len(changed) if changed else None,
        "changed_first": changed[0] if changed else None,
        "changed_last": changed[-1] if changed else None,
        "top1_before_rounding": last.test_top1,
        "lost_by_rounding": last.test_top1 - result.saved.top1,
    }


def spikes(losses: Sequence[float]) -> int:
    """How many epochs have a training loss above SPIKE times that of the epoch before."""
    return sum(b > SPIKE * a for a, b in pairwise(losses))


def curves_of(history: Sequence[EpochRecord]) -> dict[str, list[float | None]]:
    """The records by column; columns that hold nothing are left out."""
    rows = [asdict(record) for record in history]
    columns = {key: [row[key] for row in rows] for key in _CURVES}
    return {key: column for key, column in columns.items() if any(x is not None for x in column)}


def scripted(job: Job) -> Ready:
    """Runs `script` with --variation, --seed and --out; it leaves a `result.json` in the folder.

    Its object has the fields of `Found`.
    """
    script = job.settings["script"]
    if not isinstance(script, str) or not script.split() or not Path(script.split()[0]).is_file():
        raise SubbyteError(f"{job.place}: script = {script!r}: no such file; run in a checkout")

    def work(quiet: bool) -> Found:
        job.out.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, *script.split(), "--variation", job.variation,
            "--seed", str(job.seed), "--out", str(job.out),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else _STDERR)
        if done.returncode != 0:
            raise SubbyteError(f"{script} ended with exit code {done.returncode}; see above")
        return Found(**json.loads((job.out / RESULT).read_text()))

    return work


WORK: Mapping[str, Work] = {"train": trained, "script": scripted}
