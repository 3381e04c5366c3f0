"""Calibration examples, as the network takes them.

    x                     model(x)
    (a, b)                model(a, b)
    {"ids": a, "mask": b} model(ids=a, mask=b), if these are parameters of forward; else model(x)

The last part of a tuple or list is labels, which the network is not given, where forward has no
place for it; and where forward could take it but need not, if it is one whole number an example.
Tensors whose first dimension is the batch's are of the examples; everything else (flags, None,
tensors of another length) has to be the same in every batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.spool import Spool
from subbyte.errors import SubbyteError
from subbyte.tasks.batches import (
    Batch,
    Examples,
    Inputs,
    Ragged,
    is_of_examples,
    leaves,
    mapped,
    values_of,
)

KEPT_BYTES = 2**28  # examples above this lie in a temporary file
SPOOL_BYTES = 2**35  # the most that it may hold
_CHUNK_BYTES = 2**25


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """labels: of the examples, if every batch has them. notes: how batches were understood."""

    examples: Examples
    labels: Tensor | None
    notes: tuple[str, ...]


def gathered(calibration: Iterable[Any], model: nn.Module) -> Calibration:
    """All calibration batches, on the CPU and in float32 where they are float.

    Raises SubbyteError for what is no iterable of batches, and for none.
    """
    one = isinstance(calibration, Tensor | Mapping | str)
    if one or not isinstance(calibration, Iterable):
        raise SubbyteError(
            f"calibration is one {type(calibration).__name__}; give an iterable of batches, such "
            "as a list of it, or a DataLoader"
        )
    forward, store = _Forward(model), _Store()
    labels: list[Tensor | None] = []
    for batch in calibration:
        inputs, own = _parted(batch, forward)
        if len(inputs):
            store.add(inputs)
            labels.append(own)
    if not labels:
        raise SubbyteError("no calibration images; give at least one batch")
    known = [own for own in labels if own is not None]
    joined = torch.cat(known) if len(known) == len(labels) else None
    notes = ((forward.guess,) if forward.guessed else ()) + store.notes()
    return Calibration(store.examples(), joined, notes)


class _Store:
    """Examples as they come, joined where they have one form; many of them in a temporary file.

    The file has no name and goes with the last tensor in it.
    """

    def __init__(self) -> None:
        self.parts: list[Batch] = []
        self.open: list[Batch] = []  # batches of one form that are not joined yet
        self.n_bytes = 0
        self.file: Spool | None = None

    def add(self, batch: Batch) -> None:
        own = sum(x.nbytes for x in _tensors(batch))
        if self.open and (_form(batch) != _form(self.open[0]) or self._is_full()):
            self._close()
        self.open.append(batch)
        self.n_bytes += own
        if self.n_bytes > SPOOL_BYTES:
            raise SubbyteError(
                f"the calibration takes more than {SPOOL_BYTES >> 30} GiB; give fewer examples"
            )
        if self.file is None and self.n_bytes > KEPT_BYTES:
            self.file = Spool()
            self.parts = [self._spooled(part) for part in self.parts]

    def examples(self) -> Examples:
        """One set of examples; parts of their own for batches of other shapes."""
        if self.open:
            self._close()
        return self.parts[0] if len(self.parts) == 1 else Ragged(tuple(self.parts))

    def notes(self) -> tuple[str, ...]:
        if self.file is None:
            return ()
        return (f"the calibration ({self.n_bytes >> 20} MiB) is kept in a temporary file",)

    def _is_full(self) -> bool:
        held = sum(x.nbytes for batch in self.open for x in _tensors(batch))
        return self.file is not None and held > _CHUNK_BYTES

    def _close(self) -> None:
        part = _concatenated(self.open)
        self.parts.append(part if self.file is None else self._spooled(part))
        self.open = []

    def _spooled(self, batch: Batch) -> Batch:
        assert self.file is not None
        if isinstance(batch, Tensor):
            return self.file.on_disk(batch)
        args, kwargs = mapped(self.file.kept, (batch.args, batch.kwargs))
        return Inputs(args, kwargs, batch.n)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    return (x for x in values_of(batch) if isinstance(x, Tensor))


class _Forward:
    """What the network's forward takes; remembers whether labels had to be guessed."""

    def __init__(self, model: nn.Module) -> None:
        parameters = list(inspect.signature(model.forward).parameters.values())
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        kinds = {p.kind for p in parameters}
        self.least = sum(p.default is p.empty for p in named)
        self.open = inspect.Parameter.VAR_POSITIONAL in kinds
        self.most = len(named)
        self.any_name = inspect.Parameter.VAR_KEYWORD in kinds
        self.names = {p.name for p in parameters}
        self.guessed = False
        self.guess = ""

    def takes(self, names: Iterable[Any]) -> bool:
        """Whether these can be keywords."""
        names = list(names)
        return all(isinstance(n, str) for n in names) and (
            self.any_name or set(names) <= self.names
        )

    def has_labels(self, batch: Sequence[Any]) -> bool:
        """Whether the last of a batch's parts is labels."""
        count = len(batch)
        if count < 2 or count <= self.least:
            return False
        if not self.open and count == self.most + 1:
            return True
        if (self.open or count <= self.most) and _are_classes(batch[-1]):
            self.guessed = True
            self.guess = (
                f"the last of the {count} parts of each batch, one whole number an example, is "
                "taken for labels; give the batches as dicts to hand it to forward"
            )
            return True
        return False


def _are_classes(value: Any) -> bool:
    if value is None:
        return True
    tensor = value if isinstance(value, Tensor) else None
    return (
        tensor is not None
        and tensor.ndim == 1
        and not tensor.is_floating_point()
        and not tensor.is_complex()
    )


def _parted(batch: Any, forward: _Forward) -> tuple[Batch, Tensor | None]:
    """Inputs and labels."""
    labels = None
    if isinstance(batch, tuple | list) and forward.has_labels(batch):
        *rest, labels = batch
        batch = rest[0] if len(rest) == 1 else rest
    inputs = _inputs(mapped(_on_cpu, batch), forward)
    if labels is None:
        return inputs, None
    labels = torch.as_tensor(labels).cpu()
    if len(labels) != len(inputs):
        raise SubbyteError(f"a calibration batch has {len(inputs)} inputs and {len(labels)} labels")
    return inputs, labels


def _inputs(batch: Any, forward: _Forward) -> Batch:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return _inputs(batch[0], forward)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(batch, Mapping) and forward.takes(batch):
        kwargs = dict(batch)
    elif isinstance(batch, tuple | list):
        args = tuple(batch)
    else:
        args = (batch,)
    tensors = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
    if not tensors:
        raise SubbyteError(
            f"a calibration batch is a {type(batch).__name__} without tensors; give inputs as the "
            "network takes them, with the examples along their first dimension"
        )
    return Inputs(args, kwargs, len(tensors[0]))


def _on_cpu(value: Any) -> Any:
    """Arrays as tensors; floats in float32, as the network computes here."""
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    value = value.clone() if value.is_inference() else value  # those take no part in gradients
    return value.float() if value.is_floating_point() else value


def _form(batch: Batch) -> Any:
    """What batches must have in common to be one: names, shapes of an example, constants."""
    if isinstance(batch, Tensor):
        return batch.dtype, batch.shape[1:]
    return (
        type(batch),
        *(
            (x.dtype, x.shape[1:]) if is_of_examples(x, batch.n) else _constant(x)
            for x in leaves((batch.args, batch.kwargs))
        ),
        tuple(batch.kwargs),
    )


def _constant(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _concatenated(batches: Sequence[Batch]) -> Batch:
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([b for b in batches if isinstance(b, Tensor)])
    if len(batches) == 1:
        return first
    others = [b for b in batches if isinstance(b, Inputs)]
    columns = zip(*(list(leaves((b.args, b.kwargs))) for b in others), strict=True)
    joined = iter(
        [torch.cat(own) if is_of_examples(own[0], first.n) else own[0] for own in columns]
    )
    args, kwargs = mapped(lambda _: next(joined), (first.args, first.kwargs))
    return Inputs(args, kwargs, sum(len(b) for b in others))
