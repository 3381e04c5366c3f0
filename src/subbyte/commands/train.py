"""`subbyte train`: a config in; a packed file, metrics and curves out."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from subbyte.commands import options as o
from subbyte.commands.output import print_json
from subbyte.core.group import Group, joined
from subbyte.errors import SubbyteError
from subbyte.train import RunConfig, RunResult, run
from subbyte.train.checkpoint import read_checkpoint
from subbyte.train.config import read_config
from subbyte.train.loop import CHECKPOINT


def train(
    config: o.Config,
    resume: o.Resume = False,
    fresh: o.Fresh = False,
    set_: o.Set = None,
    json_: o.Json = False,
) -> None:
    """Train from a config; leaves the packed network, metrics, curves and a checkpoint in `out`.

    Several processes train together: torchrun --nproc-per-node 2 -m subbyte train CONFIG
    """
    with joined() as group:
        if resume and fresh:
            raise SubbyteError("--resume goes on with a run, --fresh begins anew; give one of them")
        wanted = read_config(config, _overrides(set_ or []))
        result = _trained(wanted, resume, fresh, json_, group)
    if group.leads:
        _show(result, json_)


def _trained(config: RunConfig, resume: bool, fresh: bool, quiet: bool, group: Group) -> RunResult:
    try:
        return run(config, resume=resume, fresh=fresh, quiet=quiet, group=group)
    except KeyboardInterrupt:
        if group.leads:
            print(_stopped(config.out / CHECKPOINT), file=sys.stderr)
        raise SystemExit(130) from None


def _show(result: RunResult, json_: bool) -> None:
    if json_:
        print_json(
            {
                "file": str(result.file),
                "bytes": result.n_bytes,
                **asdict(result.saved),
                "trained": asdict(result.trained),
                "history": [asdict(record) for record in result.history],
            }
        )
        return
    print(
        f"{result.file}: {result.n_bytes:,} bytes, top-1 {result.saved.top1:.2f} % of "
        f"{result.saved.n:,} images (read back from the file; in training "
        f"{result.trained.top1:.2f} %)"
    )


def _stopped(checkpoint: Path) -> str:
    if not checkpoint.is_file():
        return "stopped before the first epoch was done; nothing is kept"
    epoch = read_checkpoint(checkpoint)["epoch"]
    return (
        f"stopped; {epoch} epochs are kept in {checkpoint}. The same command with --resume goes on"
    )


def _overrides(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise SubbyteError(f"--set {pair}: expected KEY=VALUE, for instance train.epochs=2")
    return dict(pair.split("=", 1) for pair in pairs)  # type: ignore[misc]
