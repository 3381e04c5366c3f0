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

A table that a head shares is both: its gram is the sum of the two, each times the mean of its
effects, and the effects are of this sum.

Rows that the examples never read are read by others. The share of such reads is estimated as Good
and Turing do, by that of the rows read once, and shared out among the unread rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.group import ALONE, Group
from subbyte.core.sites import Site, sharing_sites
from subbyte.core.tensors import as_matrix
from subbyte.ptq.evidence.statistics import Statistics
from subbyte.tasks.base import Task
from subbyte.tasks.batches import Batch, call


@dataclass(slots=True)
class _Reads:
    """What became of a table in the passes so far.

    gram: sum of g g' over the look-ups. squares, counts: sum of |g|^2 and number of look-ups of
    each row.
    """

    gram: Tensor
    squares: Tensor
    counts: Tensor

    def take(self, indices: Tensor, gradient: Tensor) -> None:
        rows, read = gradient.reshape(-1, gradient.shape[-1]), indices.flatten()
        self.gram += (rows.t() @ rows).double()
        self.squares.index_add_(0, read, rows.square().sum(1).double())
        self.counts += torch.bincount(read, minlength=len(self.counts))

    def sums(self) -> tuple[Tensor, ...]:
        return self.gram, self.squares, self.counts

    def statistics(self) -> Statistics:
        reads = int(self.counts.sum())
        return Statistics((self.gram / max(1, reads))[None], max(1, reads))


@dataclass(slots=True)
class _Scores:
    """What became of a head's outputs. squares: sum of the squared gradient of each."""

    squares: Tensor

    def sums(self) -> tuple[Tensor, ...]:
        return (self.squares,)

    def take(self, gradient: Tensor) -> None:
        self.squares += gradient.flatten(0, -2).square().sum(0).double()


def sensitivity(
    model: nn.Module,
    layers: Sequence[Site],
    statistics: Mapping[str, Statistics],
    batches: Sequence[Batch],
    task: Task,
    generator: torch.Generator,
    group: Group = ALONE,
) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
    """The effect F of each row, float64 [out], of the layers with statistics and of the tables;
    and the statistics of the tables that are read.

    statistics: a head that shares its weight with a table is in them under its own name. The
    gradient of a batch's outputs in random directions (`Task.direction`), squared, estimates the
    sum of the items' squared gradients, because the directions are independent with mean zero.
    Those of a batch come from a seed of its own, whichever process of the group it falls to. Seven
    parameters: they are independent of each other.
    """
    tables = [site for site in layers if site.type == "Embedding"]
    heads = {n: own for n, own in sharing_sites(model).items() if n in {t.name for t in tables}}
    known = [s for s in layers if s.name in statistics or (s in tables and s.name not in heads)]
    sums = [torch.zeros(site.shape[site.channel_axis], dtype=torch.float64) for site in known]
    items = 0
    seeds = torch.randint(2**62, (len(batches),), generator=generator).tolist()
    dealt = zip(group.dealt(batches), group.dealt(seeds), strict=True)
    with (
        _reads_of(model, tables) as reads,
        _scores_of(model, heads) as scores,
        _squares_of(model, known, sums),
    ):
        for x, seed in dealt:
            with torch.enable_grad():
                y = task.outputs(call(model, x), x)
                direction = task.direction(y.detach(), torch.Generator().manual_seed(seed))
                (y * direction).sum().backward()
            items += len(y)
    items = int(group.sum(items)[0])
    seen_by = [own.sums() for own in reads.values()] + [own.sums() for own in scores.values()]
    for total in itertools.chain(sums, *seen_by):
        group.sum_(total)
    found = {name: own.statistics() for name, own in reads.items() if own.counts.any()}
    effects = {}
    for site, total in zip(known, sums, strict=True):
        seen = statistics.get(site.name) or found.get(site.name)
        if seen is None:
            continue
        if site.name in reads:
            total = _with_unread_rows(total, reads[site.name].counts)
        effects[site.name] = _per_trace(total / items, seen.gram)
    for name, own in heads.items():
        parts = [_as_table(reads[name], items)] if name in found else []
        parts += [
            (statistics[head.name], scores[head.name].squares / items)
            for head in own if head.name in statistics
        ]  # fmt: skip
        if parts:
            found[name], effects[name] = _both(parts)
    return effects, found


def _as_table(reads: _Reads, items: int) -> tuple[Statistics, Tensor]:
    """Statistics and effects of a table by its look-ups alone."""
    seen = reads.statistics()
    total = _with_unread_rows(reads.squares / items, reads.counts)
    return seen, _per_trace(total, seen.gram)


def _both(parts: Sequence[tuple[Statistics, Tensor]]) -> tuple[Statistics, Tensor]:
    """One gram and effects of a weight with several uses, each with a gram and effects."""
    gram = sum(float(effect.mean()) * seen.gram for seen, effect in parts)
    assert isinstance(gram, Tensor)
    total = sum(effect * float(seen.gram[0].trace()) for seen, effect in parts)
    assert isinstance(total, Tensor)
    patches = max(seen.patches for seen, _ in parts)
    return Statistics(gram, patches), _per_trace(total, gram)


@contextmanager
def _squares_of(model: nn.Module, known: Sequence[Site], sums: Sequence[Tensor]) -> Iterator[None]:
    """While it is open, every pass back adds the squared gradients of each row to the sums.

    A gradient is gone as soon as it was read: those of all weights are as large as the network.
    """
    wanted: dict[int, list[tuple[Site, Tensor]]] = {}
    for site, total in zip(known, sums, strict=True):
        weight = getattr(model.get_submodule(site.owner), site.parameter)
        wanted.setdefault(id(weight), []).append((site, total))

    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        for site, total in wanted.get(id(weight), ()):
            rows = as_matrix(weight.grad.to_dense(), site.channel_axis)
            total += torch.linalg.vector_norm(rows, dim=1).double().square()
        weight.grad = None

    learning = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(take) for p in learning]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    """While it is open, every pass forth and back is counted for the tables."""
    reads, handles = {}, []
    for site in tables:
        rows, width = site.shape
        own = reads[site.name] = _Reads(
            torch.zeros(width, width, dtype=torch.float64),
            torch.zeros(rows, dtype=torch.float64),
            torch.zeros(rows, dtype=torch.int64),
        )

        def hook(_: Any, args: Any, kwargs: Any, y: Tensor, own: _Reads = own) -> None:
            indices = args[0] if args else kwargs["input"]
            if y.requires_grad:
                y.register_hook(partial(own.take, indices.detach().long()))

        module = model.get_submodule(site.owner)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield reads
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _scores_of(
    model: nn.Module, heads: Mapping[str, Sequence[Site]]
) -> Iterator[dict[str, _Scores]]:
    """While it is open, every pass forth and back is counted for the heads."""
    scores, handles = {}, []
    for site in (head for own in heads.values() for head in own if head.type == "Linear"):
        own = scores[site.name] = _Scores(torch.zeros(site.shape[0], dtype=torch.float64))

        def hook(_: Any, args: Any, y: Tensor, own: _Scores = own) -> None:
            if y.requires_grad:
                y.register_hook(own.take)

        handles.append(model.get_submodule(site.owner).register_forward_hook(hook))
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()
