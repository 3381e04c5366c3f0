"""Examples as a network takes them: one tensor, several, or named ones; and the call itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 2048  # of one batch at most
SCORED_TOKENS = 512  # where all scores of a large vocabulary are held, several times over


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """n examples of a network that takes more than one tensor, or named ones."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: slice | Tensor) -> Inputs:
        def part(value: Any) -> Any:
            return value[index] if is_of_examples(value, self.n) else value

        args, kwargs = mapped(part, self.args), mapped(part, self.kwargs)
        return Inputs(args, kwargs, len(torch.arange(self.n)[index]))

    def split(self, size: int) -> list[Inputs]:
        return [self[i : i + size] for i in range(0, self.n, size)]


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Examples whose shapes differ from batch to batch, such as padded sentences."""

    parts: tuple[Tensor | Inputs, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: slice | Tensor) -> Ragged:
        """In the order of the parts."""
        wanted = torch.zeros(len(self), dtype=torch.bool)
        wanted[index] = True
        own = wanted.split([len(part) for part in self.parts])
        return Ragged(tuple(p[o] for p, o in zip(self.parts, own, strict=True) if o.any()))

    def split(self, size: int) -> list[Tensor | Inputs]:
        return [batch for part in self.parts for batch in part.split(size)]


Batch = Tensor | Inputs
Examples = Tensor | Inputs | Ragged


def call(model: nn.Module, batch: Batch) -> Any:
    """What the network makes of a batch."""
    if isinstance(batch, Inputs):
        return model(*batch.args, **batch.kwargs)
    return model(batch)


def values_of(batch: Batch) -> Iterator[Any]:
    """Everything that the network is given for a batch, without its structure."""
    return leaves((batch.args, batch.kwargs) if isinstance(batch, Inputs) else batch)


def one_batch(examples: Examples) -> Batch:
    """The examples as one batch; of several shapes, the shape that most of them have."""
    if isinstance(examples, Ragged):
        return max(examples.parts, key=len)
    return examples


def in_batches(examples: Examples, most: int, tokens: int | None = None) -> list[Batch]:
    """At most so many examples each, and no more than so many tokens (TOKENS) in all."""
    parts = examples.parts if isinstance(examples, Ragged) else (examples,)
    return [batch for part in parts for batch in part.split(batch_size(part, most, tokens))]


def some_batches(batches: list[Batch], tokens: int) -> list[Batch]:
    """Every so many-th batch, so that about `tokens` token ids are left; of other inputs, all."""
    total = sum(n_tokens(batch) for batch in batches)
    return batches[:: max(1, total // tokens)]


def n_tokens(batch: Batch) -> int:
    """Token ids of a batch; 0 if its inputs are no token ids."""
    return max((x.numel() for x in values_of(batch) if are_ids(x)), default=0)


def batch_size(part: Batch, most: int, tokens: int | None = None) -> int:
    """How many examples make a batch: at most so many, and no more token ids than `tokens`."""
    each = max([x.shape[1] for x in values_of(part) if are_ids(x)], default=1)
    return max(1, min(most, (TOKENS if tokens is None else tokens) // max(1, each)))


def are_ids(x: Any) -> bool:
    """Whether a value is token ids: whole numbers [n, tokens]."""
    return isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point()


def values_an_example(examples: Examples) -> int:
    """Input values of the first example."""
    first = one_batch(examples[:1])
    return sum(x.numel() for x in values_of(first) if is_of_examples(x, len(first)))


def shapes(batch: Batch) -> str:
    """The shapes of a batch's tensors, for messages."""
    if isinstance(batch, Tensor):
        return _shape(batch)
    named = [f"{name}: {_shape(x)}" for name, x in batch.kwargs.items()]
    return ", ".join([*map(_shape, batch.args), *named])


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def is_of_examples(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same structure of tuples, lists and mappings with its leaves changed, in order."""
    if isinstance(value, Mapping):
        return {key: mapped(change, own) for key, own in value.items()}
    if isinstance(value, tuple | list):
        own = [mapped(change, part) for part in value]
        return own if isinstance(value, list) else tuple(own)
    return change(value)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for own in value.values():
            yield from leaves(own)
    elif isinstance(value, tuple | list):
        for own in value:
            yield from leaves(own)
    else:
        yield value
