"""Networks whose outputs are values: regressors, embeddings, boxes, several outputs at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from subbyte.errors import SubbyteError
from subbyte.tasks.base import Task, attention_mask, main_tensor, rademacher, unpadded
from subbyte.tasks.batches import Batch, leaves

_FLOOR = 1e-4  # of the mean square: the least variance that an output is taken to have


@dataclass(frozen=True)
class Regression(Task):
    """Values of any shape, in one tensor or several; score: R^2, the mean over the outputs.

    Every output counts alike, whatever its unit: the squared error over its variance.
    """

    name: ClassVar[str] = "regression"
    measure: ClassVar[str] = "R^2"
    far: ClassVar[float] = 0.05

    def outputs(self, y: Any, batch: Batch) -> Tensor:
        """All tensors of floats whose first dimension is the batch's, side by side: [n, values]."""
        n = len(batch)
        tree = y.to_tuple() if hasattr(y, "to_tuple") else y
        own = [t for t in leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]
        parts = [t.reshape(n, -1) for t in own if t.ndim and len(t) == n]
        if not parts:
            raise SubbyteError(
                f"the network returns {_described(own)} for a batch of {n}; give a task of your "
                "own whose `outputs` finds what counts"
            )
        return torch.cat(parts, 1)

    def distance(self, y: Tensor, wanted: Tensor) -> Tensor:
        square = wanted.square().mean(0)
        variance = wanted.var(0, correction=0) + _FLOOR * square
        unit = torch.where(variance > 0, variance, torch.ones_like(variance))
        return ((y - wanted).square() / unit).mean(1)

    def direction(self, y: Tensor, generator: torch.Generator) -> Tensor:
        variance = y.var(0, correction=0) + _FLOOR * y.square().mean(0)
        unit = torch.where(variance > 0, variance, torch.ones_like(variance))
        return (2 / (unit * y.shape[1])).sqrt() * rademacher(y, generator)

    def measured(self, y: Any, batch: Batch, targets: Any) -> Tensor:
        """Output and target, [n, 2, values]."""
        found = self.outputs(y, batch)
        return torch.stack([found, torch.as_tensor(targets).to(found).reshape(found.shape)], 1)

    def score(self, parts: Tensor) -> float:
        found, target = parts.double().unbind(1)
        unexplained = (found - target).square().sum(0)
        total = (target - target.mean(0)).square().sum(0)
        return float((1 - unexplained / total)[total > 0].mean())


def _described(parts: list[Tensor]) -> str:
    return ", ".join(str(list(part.shape)) for part in parts) or "no tensors of floats"


@dataclass(frozen=True)
class Embedding(Task):
    """Vectors that are compared by their angle; score: Spearman's rank correlation.

    Of [n, tokens, width], such as `.last_hidden_state`, the mean over the tokens that are no
    padding (pool="mean"), the first token ("first"), or every token by itself ("tokens").
    Targets of a batch are one number for each pair of rows 2 i and 2 i + 1: the correlation is of
    the cosines of the pairs with them.
    """

    name: ClassVar[str] = "embedding"
    measure: ClassVar[str] = "Spearman"
    far: ClassVar[float] = 0.02
    pool: str = "mean"

    def __post_init__(self) -> None:
        if self.pool not in ("mean", "first", "tokens"):
            raise SubbyteError(f"pool={self.pool!r}; use 'mean', 'first' or 'tokens'")

    def outputs(self, y: Any, batch: Batch) -> Tensor:
        """[items, width], of length 1."""
        vectors, mask = main_tensor(y), attention_mask(batch)
        if vectors.ndim > 2:
            vectors = _pooled(vectors, mask, self.pool)
        return F.normalize(vectors, dim=-1)

    def distance(self, y: Tensor, wanted: Tensor) -> Tensor:
        """1 - cosine."""
        return 0.5 * (F.normalize(y, dim=-1) - F.normalize(wanted, dim=-1)).square().sum(-1)

    def direction(self, y: Tensor, generator: torch.Generator) -> Tensor:
        unit = F.normalize(y, dim=-1)
        noise = rademacher(y, generator)
        return noise - unit * (unit * noise).sum(-1, keepdim=True)

    def measured(self, y: Any, batch: Batch, targets: Any) -> Tensor:
        """The cosine of each pair of rows and its target, [pairs, 2]."""
        vectors = self.outputs(y, batch)
        cosines = (vectors[::2] * vectors[1::2]).sum(-1)
        return torch.stack([cosines, torch.as_tensor(targets).to(cosines)], 1)

    def score(self, parts: Tensor) -> float:
        return rank_correlation(*parts.double().unbind(1))


def _pooled(vectors: Tensor, mask: Tensor | None, pool: str) -> Tensor:
    if pool == "tokens":
        return unpadded(vectors, mask)
    if pool == "first":
        return vectors[:, 0]
    if mask is None or mask.shape != vectors.shape[:2]:
        return vectors.mean(1)
    weights = mask[:, :, None].to(vectors)
    return (vectors * weights).sum(1) / weights.sum(1).clamp(min=1)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values at their mean rank."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
