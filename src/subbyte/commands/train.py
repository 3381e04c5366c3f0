"""`subbyte train`: a config in; a packed file, metrics and curves out."""

from __future__ import annotations

from dataclasses import asdict

from subbyte.commands import options as o
from subbyte.commands.output import print_json
from subbyte.errors import SubbyteError
from subbyte.train import run
from subbyte.train.config import read_config


def train(
    config: o.Config,
    resume: o.Resume = False,
    set_: o.Set = None,
    json_: o.Json = False,
) -> None:
    """Train from a config; leaves the packed network, metrics, curves and a checkpoint in `out`."""
    result = run(read_config(config, _overrides(set_ or [])), resume=resume, quiet=json_)
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


def _overrides(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise SubbyteError(f"--set {pair}: expected KEY=VALUE, for instance train.epochs=2")
    return dict(pair.split("=", 1) for pair in pairs)  # type: ignore[misc]
