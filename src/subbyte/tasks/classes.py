"""Networks that choose among classes: for an input, a token or a pixel.

Two outputs are as far apart as their softmaxes: T^2 KL(float || quantized) at temperature T. T = 4
for classifiers, which are so sure of the examples at hand that nothing is to be learnt from an
answer of 1; T = 1 for language, where the next token is never sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from subbyte.errors import SubbyteError
from subbyte.tasks.base import Task, attention_mask, main_tensor, unpadded
from subbyte.tasks.batches import Batch, Examples, Inputs, are_ids
from subbyte.tasks.images import Mosaics, are_images, varied

_LEAST_AGREEMENT = 85.0  # percent of the decisions
IGNORED = -100  # a label that counts for nothing, as torch's cross-entropy has it


def divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of softmax(logits / T) from softmax(target / T), times T^2, over the last dimension; nats.

    The factor keeps the gradient's size, whatever the temperature T.
    """
    ours, theirs = ((x / temperature).log_softmax(-1) for x in (logits, target))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def drawn_direction(y: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Gradient of T times the cross-entropy at temperature T, of labels drawn from the softmax: its
    second moments are the Hessian of `divergence` (the Fisher information)."""
    share = (y.detach() / temperature).softmax(-1)
    labels = torch.multinomial(share, 1, generator=generator)
    return share.scatter_add(1, labels, -torch.ones_like(labels, dtype=share.dtype))


class Classes:
    """What all tasks have in common whose outputs are scores of classes [items, classes]."""

    temperature: float = 1.0

    def distance(self, y: Tensor, wanted: Tensor) -> Tensor:
        return divergence(y, wanted, self.temperature)

    def direction(self, y: Tensor, generator: torch.Generator) -> Tensor:
        return drawn_direction(y, self.temperature, generator)

    def agrees(self, y: Tensor, wanted: Tensor) -> Tensor:
        return y.argmax(-1) == wanted.argmax(-1)


@dataclass(frozen=True)
class Classification(Classes, Task):
    """Class scores [n, classes], or [n, tokens, classes]; score: top-1 in percent."""

    name: ClassVar[str] = "classification"
    measure: ClassVar[str] = "top-1 (%)"
    temperature: float = 4.0

    def is_far(self, distance: float, agreement: float | None) -> bool:
        return agreement is None or agreement < _LEAST_AGREEMENT

    def outputs(self, y: Any, batch: Batch) -> Tensor:
        return unpadded(main_tensor(y), attention_mask(batch))

    def varied(self, batch: Batch, generator: torch.Generator, step: int) -> Batch:
        return varied(batch, generator, step)

    def more(self, examples: Examples, rounds: int, seed: int) -> Sequence[Batch]:
        return Mosaics(examples, rounds, seed) if are_images(examples) else ()

    def measured(self, y: Any, batch: Batch, targets: Any) -> Tensor:
        logits = main_tensor(y).flatten(0, -2)
        labels = torch.as_tensor(targets).flatten()
        kept = labels != IGNORED
        return (logits.argmax(-1) == labels)[kept]

    def score(self, parts: Tensor) -> float:
        return 100.0 * float(parts.double().mean())


@dataclass(frozen=True)
class Language(Classes, Task):
    """Scores of the next token [n, tokens, vocabulary]; score: perplexity.

    Padding, as the attention mask has it, counts for nothing. Targets are the token ids themselves
    (None: those of the inputs); the last position predicts nothing that is known.
    """

    name: ClassVar[str] = "language"
    item: ClassVar[str] = "token"
    measure: ClassVar[str] = "perplexity"
    far: ClassVar[float] = 0.25

    def outputs(self, y: Any, batch: Batch) -> Tensor:
        return unpadded(main_tensor(y), attention_mask(batch))

    def measured(self, y: Any, batch: Batch, targets: Any) -> Tensor:
        ids = _ids(batch) if targets is None else torch.as_tensor(targets)
        mask = attention_mask(batch)
        if mask is not None:
            ids = ids.masked_fill(~mask, IGNORED)
        logits, following = main_tensor(y)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        kept = following != IGNORED
        return F.cross_entropy(logits[kept].float(), following[kept], reduction="none")

    def score(self, parts: Tensor) -> float:
        return float(parts.double().mean().exp())


def _ids(batch: Batch) -> Tensor:
    """The token ids of a batch: its first tensor of whole numbers with two dimensions."""
    given = (batch.kwargs.get("input_ids"), *batch.args) if isinstance(batch, Inputs) else (batch,)
    for value in given:
        if are_ids(value):
            return value
    raise SubbyteError("the batch has no token ids to score; give them as the targets")


@dataclass(frozen=True)
class Dense(Classes, Task):
    """Class scores for every pixel, [n, classes, ...]; score: mean intersection over union."""

    name: ClassVar[str] = "dense"
    item: ClassVar[str] = "pixel"
    measure: ClassVar[str] = "mean IoU (%)"
    far: ClassVar[float] = 0.25

    def outputs(self, y: Any, batch: Batch) -> Tensor:
        return main_tensor(y).movedim(1, -1).flatten(0, -2)

    def varied(self, batch: Batch, generator: torch.Generator, step: int) -> Batch:
        return varied(batch, generator, step)

    def measured(self, y: Any, batch: Batch, targets: Any) -> Tensor:
        """The confusion of each image, [n, classes, classes]: label by prediction."""
        scores, labels = main_tensor(y), torch.as_tensor(targets)
        classes, found = scores.shape[1], scores.argmax(1)
        kept = labels != IGNORED
        pairs = torch.where(kept, labels * classes + found, classes**2).flatten(1)
        counts = torch.zeros(len(scores), classes**2 + 1, dtype=torch.float64)
        counts.scatter_add_(1, pairs, torch.ones_like(pairs, dtype=torch.float64))
        return counts[:, :-1].reshape(-1, classes, classes)

    def score(self, parts: Tensor) -> float:
        """Of the classes that occur, in labels or predictions."""
        confusion = parts.sum(0)
        both = confusion.diagonal()
        either = confusion.sum(0) + confusion.sum(1) - both
        return 100.0 * float((both / either)[either > 0].mean())
