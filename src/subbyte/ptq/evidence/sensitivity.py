"""What the loss makes of an error in a weight: effects of rows, and the statistics of tables.

    effect F = E |dL/dw_o|^2 / trace H                  (a number per row)

1/2 F_o e_o H e_o' predicts how far the network moves: the curvature of the row, factored as F_o H
(as K-FAC does: Martens and Grosse, arXiv:1503.05671). L is the sum of the outputs along random
directions whose second moments are the Hessian of the task's distance; for classes these are the
gradients of T times the cross-entropy at temperature T with labels drawn from the network's own
softmax, so real labels are never needed. At T = 1 a network is so sure of the classes that the
images show that the rows of all other classes seem to have no effect (MobileNetV1, 400 images of
1000 classes: the classifier was left 4 levels).

A table of embeddings has its factors the other way about. Its inputs choose rows, so an error e_r
of a row matters as often as the row is read, and in the metric of what the network makes of the
features:

    gram H   = mean over look-ups of g g',  g = dL/d(output of the table)
    effect F = E |dL/dw_r|^2 / trace H                  (how often a row is read, weighted)

Rows that the examples never read are read by others. The share of such reads is estimated as Good
and Turing do, by that of the rows read once, and shared out among the unread rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.sites import Site
from subbyte.core.tensors import as_matrix
from subbyte.ptq.evidence.statistics import Statistics
from subbyte.tasks.base import Task
from subbyte.tasks.batches import Batch, call


@dataclass(slots=True)
class _Reads:
    """What became of a table in the passes so far. gram: sum of g g'; counts: reads of each row."""

    gram: Tensor
    counts: Tensor
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # indices, output

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        for (indices, _), gradient in zip(self.pending, gradients, strict=True):
            if gradient is not None:
                rows = gradient.reshape(-1, gradient.shape[-1])
                self.gram += (rows.t() @ rows).double()
                self.counts += torch.bincount(indices.flatten(), minlength=len(self.counts))
        self.pending.clear()

    def statistics(self) -> Statistics:
        reads = int(self.counts.sum())
        return Statistics((self.gram / max(1, reads))[None], max(1, reads))


def sensitivity(
    model: nn.Module,
    layers: Sequence[Site],
    statistics: Mapping[str, Statistics],
    batches: Sequence[Batch],
    task: Task,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
    """The effect F of each row, float64 [out], of the layers with statistics and of the tables;
    and the statistics of the tables that are read.

    The gradient of a batch's outputs in random directions (`Task.direction`), squared, estimates
    the sum of the items' squared gradients, because the directions are independent with mean zero.
    """
    tables = [site for site in layers if site.type == "Embedding"]
    known = [site for site in layers if site.name in statistics or site in tables]
    weights = [getattr(model.get_submodule(site.owner), site.parameter) for site in known]
    sums = [torch.zeros(site.shape[site.channel_axis], dtype=torch.float64) for site in known]
    items = 0
    with _reads_of(model, tables) as reads:
        for x in batches:
            with torch.enable_grad():
                y = task.outputs(call(model, x), x)
                along = task.direction(y.detach(), generator)
                outputs = [out for own in reads.values() for _, out in own.pending]
                gradients = torch.autograd.grad(
                    (y * along).sum(), [*weights, *outputs], allow_unused=True
                )
            _add(sums, known, gradients)
            rest = iter(gradients[len(weights) :])
            for own in reads.values():
                own.take([next(rest) for _ in own.pending])
            items += len(y)
    found = {name: own.statistics() for name, own in reads.items() if own.counts.any()}
    effects = {}
    for site, total in zip(known, sums, strict=True):
        seen = statistics.get(site.name) or found.get(site.name)
        if seen is None:
            continue
        if site.name in reads:
            total = _with_unread_rows(total, reads[site.name].counts)
        effects[site.name] = _per_trace(total / items, seen.gram)
    return effects, found


def _add(sums: Sequence[Tensor], known: Sequence[Site], gradients: Sequence[Any]) -> None:
    """In place: squared gradients of each row."""
    for site, total, gradient in zip(known, sums, gradients, strict=False):
        if gradient is not None:
            rows = as_matrix(gradient.to_dense(), site.channel_axis)
            total += torch.linalg.vector_norm(rows, dim=1).double().square()


def _per_trace(total: Tensor, gram: Tensor) -> Tensor:
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    per_row = trace.repeat_interleave(len(total) // len(trace))
    return total / per_row.clamp(min=torch.finfo(torch.float64).tiny)


def _with_unread_rows(total: Tensor, counts: Tensor) -> Tensor:
    """The sum stays; the unread rows get the share of the rows read once, each alike."""
    unread = counts == 0
    if not unread.any():
        return total
    share = float((counts == 1).sum() / counts.sum().clamp(min=1))
    return torch.where(unread, share * total.sum() / unread.sum(), (1 - share) * total)


@contextmanager
def _reads_of(model: nn.Module, tables: Sequence[Site]) -> Iterator[dict[str, _Reads]]:
    """While it is open, every forward pass leaves the tables' look-ups in `pending`."""
    reads, handles = {}, []
    for site in tables:
        rows, width = site.shape
        own = reads[site.name] = _Reads(
            torch.zeros(width, width, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
        )

        def hook(_: Any, args: Any, kwargs: Any, y: Tensor, own: _Reads = own) -> None:
            indices = args[0] if args else kwargs["input"]
            if y.requires_grad:
                own.pending.append((indices.detach().long(), y))

        module = model.get_submodule(site.owner)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield reads
    finally:
        for handle in handles:
            handle.remove()
