"""What a network is for: the one place that knows what its outputs mean.

A task says where the outputs are in what the network returns, how far two outputs are apart, what
a good score is, and how inputs may be varied. Calibration, the search, tuning and the judge ask
it; nothing else knows what an image or a token is. A user's own task is a class with `outputs`,
`distance` and, where it is to be scored, `measured` and `score` (docs/tasks.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subbyte.errors import SubbyteError
from subbyte.tasks.batches import Batch, Examples, Inputs, call


@dataclass(frozen=True, slots=True)
class Score:
    """How good a network is. value: in the task's own measure, whose name is `measure`; n: of how
    many examples (images, tokens, pairs)."""

    measure: str
    value: float
    n: int


@dataclass(frozen=True)
class Task:
    """Base of all tasks. Items are what is compared: images, tokens, pixels, sentences.

    name: as in TASKS. item: one item in words. measure: what `score` returns. far: the mean
    distance from which on a quantized network is called far from the float one.
    """

    name: ClassVar[str] = "own"
    item: ClassVar[str] = "example"
    measure: ClassVar[str] = "score"
    far: ClassVar[float] = float("inf")

    def outputs(self, y: Any, batch: Batch) -> Tensor:
        """The outputs that count, float [items, ...], of what the network returned."""
        return main_tensor(y)

    def distance(self, y: Tensor, wanted: Tensor) -> Tensor:
        """How far outputs are from those of the float network, [items]: 0 where they are equal,
        never negative, differentiable in y."""
        raise NotImplementedError

    def is_far(self, distance: float, agreement: float | None) -> bool:
        """Whether a quantized network that is this far from the float one deserves a warning."""
        return not distance < self.far

    def direction(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """A random tensor of y's shape whose second moments are the Hessian of the summed distance
        at y: the gradient that the network's sensitivity is measured with.

        By default that of a distance whose Hessian is diagonal, as squared errors have it.
        """
        signs = rademacher(y, generator)
        at = y.detach().clone().requires_grad_()
        with torch.enable_grad():
            total = self.distance(at, y.detach()).sum()
            (slope,) = torch.autograd.grad(total, at, create_graph=True)
            (curve,) = torch.autograd.grad((slope * signs).sum(), at)
        return (curve * signs).clamp(min=0).sqrt() * rademacher(y, generator)

    def agrees(self, y: Tensor, wanted: Tensor) -> Tensor | None:
        """Whether each item leads to the same decision, bool; None where nothing is decided."""
        return None

    def mask(self, batch: Batch) -> Tensor | None:
        """Which positions [n, tokens] of a batch are no padding; None if all are."""
        return attention_mask(batch)

    def varied(self, batch: Batch, generator: torch.Generator, step: int) -> Batch:
        """The batch as it might also have been, for training step number `step`."""
        return batch

    def more(self, examples: Examples, rounds: int, seed: int) -> Sequence[Batch]:
        """More inputs, `rounds` for each example, made of those at hand; none by default."""
        return ()

    def measured(self, y: Any, batch: Batch, targets: Any) -> Tensor:
        """What a batch adds to the score: a tensor whose first dimension is counted."""
        raise SubbyteError(f"task '{self.name}' has no score; give it `measured` and `score`")

    def score(self, parts: Tensor) -> float:
        """The score of all that was measured, joined along the first dimension."""
        raise SubbyteError(f"task '{self.name}' has no score; give it `measured` and `score`")


def main_tensor(y: Any) -> Tensor:
    """The tensor of outputs in what a network returned: `.logits`, "out", `.last_hidden_state`, or
    the first tensor of floats. Raises SubbyteError if there is none."""
    if isinstance(y, Tensor):
        return y
    for name in ("logits", "out", "last_hidden_state"):
        found = y.get(name) if isinstance(y, dict) else getattr(y, name, None)
        if isinstance(found, Tensor):
            return found
    parts = y.values() if isinstance(y, dict) else y if isinstance(y, tuple | list) else ()
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise SubbyteError(
        f"the network returns a {type(y).__name__} without a tensor of floats; give a task of your "
        "own whose `outputs` finds what counts"
    )


def attention_mask(batch: Batch) -> Tensor | None:
    """The attention mask of a batch as bool [n, tokens], if it has one."""
    found = batch.kwargs.get("attention_mask") if isinstance(batch, Inputs) else None
    return found.bool() if isinstance(found, Tensor) and found.ndim == 2 else None


def unpadded(y: Tensor, mask: Tensor | None) -> Tensor:
    """y [n, tokens, ...] at the positions of the mask, [items, ...]; all, if it is of another
    shape."""
    if y.ndim > 2 and mask is not None and y.shape[:2] == mask.shape:
        return y[mask]
    return y.flatten(0, 1) if y.ndim > 2 else y


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1, each with probability one half."""
    return torch.randint(2, like.shape, generator=generator).to(like) * 2 - 1


@torch.no_grad()
def evaluate(model: nn.Module, data: Iterable[tuple[Any, Any]], task: Task) -> Score:
    """The score of a network, in the mode it is in, on pairs of inputs and targets.

    Inputs are as the network takes them: a tensor, a tuple, a dict. Raises SubbyteError for none.
    """
    parts = []
    for given, targets in data:
        batch = as_batch(given)
        parts.append(task.measured(call(model, batch), batch, targets))
    if not parts:
        raise SubbyteError("there is nothing to evaluate; give at least one (inputs, targets)")
    joined = torch.cat(parts)
    return Score(task.measure, task.score(joined), len(joined))


def as_batch(given: Any) -> Batch:
    """Inputs as they come, as one value that `call` takes."""
    if isinstance(given, Tensor | Inputs):
        return given
    if isinstance(given, tuple | list):
        return Inputs(tuple(given), {}, len(given[0]))
    if isinstance(given, Mapping):
        named = dict(given)
        return Inputs((), named, len(next(iter(named.values()))))
    raise SubbyteError(
        f"inputs are a {type(given).__name__}; give a tensor, or a tuple or dict of tensors"
    )
