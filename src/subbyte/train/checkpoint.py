"""The state of a run between two epochs: written whole or not at all, no code is run on reading."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from subbyte.core.atomic import write_atomically
from subbyte.errors import SubbyteError
from subbyte.train.settings import RunConfig
from subbyte.train.watch import Histograms

_VERSION = 3
_MARK = b"subbyte-sha256:"  # behind what torch.save wrote, with the checksum of that
_KINDS = {"model": (dict,), "ema": (dict, type(None)), "optimizer": (dict,), "epoch": (int,),
          "history": (list,), "histograms": (list,), "fingerprint": (dict,), "threads": (int,),
          "processes": (int,)}  # fmt: skip
_FREE_KEYS = (  # they may differ at resume
    "out", "compress", "batchnorm", "train.epochs", "train.threads", "train.strategy",
    "data.unreadable",
)  # fmt: skip


@dataclass(frozen=True)
class EpochRecord:
    """One line of `metrics.jsonl`.

    epoch counts from 1; lr: of the epoch's first step; train_loss: cross-entropy without the
    method's penalty; *_top1 in percent; seconds and images_per_s: of training, not of evaluation.
    distance, changed, rounded_top1, pull: of the quantized weights, see `train.watch`; None without
    any.
    """

    epoch: int
    lr: float
    train_loss: float
    train_top1: float
    test_top1: float
    test_loss: float
    images_per_s: float
    seconds: float
    distance: float | None = None
    changed: float | None = None
    rounded_top1: float | None = None
    pull: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """epoch: how many are done. ema: None when the run averages nothing.

    histograms: of the quantized layers' float weights, before the first epoch and after each.
    threads, processes: on which the last bits of every sum depend. All values are whole, whoever
    held shards of them.
    """

    model: dict[str, Any]
    ema: dict[str, Any] | None
    optimizer: dict[str, Any]
    epoch: int
    history: tuple[EpochRecord, ...]
    histograms: tuple[Histograms, ...]
    fingerprint: dict[str, str]
    threads: int
    processes: int = 1


def fingerprint(config: RunConfig) -> dict[str, str]:
    """What decides the weights, as "section.key" to text; `epochs` may grow, so it is left out."""
    flat = _flatten("", config)
    return {key: value for key, value in flat.items() if key not in _FREE_KEYS}


def _flatten(name: str, value: object) -> dict[str, str]:
    if is_dataclass(value) and not isinstance(value, type):
        inner = {"type": type(value).__name__} if name.endswith(".method") else {}
        inner |= {f.name: getattr(value, f.name) for f in fields(value)}
    elif isinstance(value, Mapping):
        inner = {str(key): value[key] for key in sorted(value)}
    elif isinstance(value, tuple):
        inner = {str(i): item for i, item in enumerate(value)}
    else:
        return {name: repr(value)}
    flat: dict[str, str] = {}
    for key, item in inner.items():
        flat |= _flatten(f"{name}.{key}" if name else key, item)
    return flat


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    content["history"] = [asdict(record) for record in checkpoint.history]
    content["histograms"] = list(checkpoint.histograms)
    content["version"] = _VERSION
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, sealed(buffer.getvalue()))


def sealed(data: bytes) -> bytes:
    """The bytes with their checksum behind them; torch.load reads them as before."""
    return data + _seal(data)


def _seal(data: bytes) -> bytes:
    return _MARK + hashlib.sha256(data).digest()


def load_checkpoint(path: Path, config: RunConfig) -> Checkpoint:
    """Raises SubbyteError if there is none, if it is damaged, or if it belongs to another run."""
    content = read_checkpoint(path)
    try:
        content["history"] = tuple(EpochRecord(**record) for record in content["history"])
        content["histograms"] = tuple(content["histograms"])
        checkpoint = Checkpoint(**content)
    except (KeyError, TypeError) as error:
        raise SubbyteError(
            f"{path}: not a checkpoint of this loop ({error!s:.200}); delete it and start again"
        ) from None
    _check_same_run(checkpoint, config, path)
    return checkpoint


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Its fields, unchecked against any run. Raises SubbyteError for what is no checkpoint."""
    if not path.is_file():
        raise SubbyteError(f"{path}: no checkpoint to resume; start the run without resume")
    data = path.read_bytes()
    end = max(0, len(data) - len(_MARK) - 32)
    content_bytes = data[:end]
    if data[end:] != _seal(content_bytes):
        raise SubbyteError(
            f"{path}: the checksum does not fit, the checkpoint is damaged or of an older version; "
            "take a copy, or delete it and start again"
        )
    try:
        content = torch.load(io.BytesIO(content_bytes), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        raise SubbyteError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it and start again"
        ) from error
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version != _VERSION:
        raise SubbyteError(
            f"{path}: checkpoint version {version!r:.50}, expected {_VERSION}; delete it, start "
            "again"
        )
    _check_kinds(content, path)
    return content


def _check_kinds(content: Mapping[str, Any], path: Path) -> None:
    for name, kinds in _KINDS.items():
        found = content.get(name, 1 if name == "processes" else ...)  # older ones do not say it
        if type(found) not in kinds:
            raise SubbyteError(
                f"{path}: not a checkpoint of this loop ('{name}' is of type "
                f"{type(found).__name__}); delete it and start again"
            )
    numbers = [
        x for record in content["history"] if isinstance(record, dict) for x in record.values()
    ]
    counts = [x for own in content["histograms"] if isinstance(own, dict) for x in own.values()]
    if not all(isinstance(x, int | float | None) for x in numbers) or not all(
        isinstance(x, list) and all(type(n) is int for n in x) for x in counts
    ):
        raise SubbyteError(
            f"{path}: not a checkpoint of this loop (its history holds other things than numbers); "
            "delete it and start again"
        )


def _check_same_run(checkpoint: Checkpoint, config: RunConfig, path: Path) -> None:
    then, now = checkpoint.fingerprint, fingerprint(config)
    unset = repr(None)  # an option that is not set is as one that did not exist yet
    for key in [*now, *then]:
        if then.get(key, unset) != now.get(key, unset):
            raise SubbyteError(
                f"{path}: was made with {key!s:.100} = {then.get(key, 'nothing')!s:.200}, "
                f"the configuration says {now.get(key, 'nothing')}; "
                "restore the value, or choose another 'out' and start again"
            )
    if config.train.epochs < checkpoint.epoch:
        raise SubbyteError(
            f"{path}: has {checkpoint.epoch} epochs, the configuration says train.epochs = "
            f"{config.train.epochs}; epochs may grow, not shrink"
        )
