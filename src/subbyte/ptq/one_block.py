"""A block of a chain as a network of its own: from hidden states to hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subbyte.core.plan import Plan, PlannedLayer
from subbyte.core.recipe import Recipe, Rule
from subbyte.errors import SubbyteError
from subbyte.ptq.steps.chain import BlockCall, Chain, hidden_of
from subbyte.tasks import Embedding
from subbyte.tasks.batches import leaves, mapped

BLOCK = "block"  # the name of a block in its Block


@dataclass(frozen=True)
class HiddenStates(Embedding):
    """Hidden states, token by token, compared by their angle: the norm that comes next takes their
    length out."""

    name: ClassVar[str] = "hidden states"
    item: ClassVar[str] = "token"
    far: ClassVar[float] = float("inf")  # the network as a whole is judged
    pool: str = "tokens"


class Block(nn.Module):
    """forward: hidden float [n, tokens, width]; attention_mask [n, tokens] says for the statistics
    which of the tokens count, and is not looked at here."""

    def __init__(self, block: nn.Module, own: BlockCall) -> None:
        super().__init__()
        self.block, self.own = block, own

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = hidden_of(self.own(self.block, hidden))
        return found


def batches_of(hidden: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Hidden states as calibration of a Block."""
    return [
        {"hidden": x, "attention_mask": torch.ones(x.shape[:2], dtype=torch.int64)} for x in hidden
    ]


def recipe_of(chosen: Sequence[PlannedLayer], path: str) -> Recipe:
    """Of the layers of the block at `path` that are quantized, by their names in a Block."""
    rules = (Rule(_inside(x.name, path), method=x.method) for x in chosen)
    return Recipe((*rules, Rule(method=None)))


def plan_of(chosen: Sequence[PlannedLayer], path: str) -> Plan | None:
    """Their levels and ranks; None where the methods say."""
    if any(x.levels is None for x in chosen):
        return None
    return Plan(tuple(replace(x, name=_inside(x.name, path)) for x in chosen))


def _inside(name: str, path: str) -> str:
    return BLOCK + name.removeprefix(path)


def outside(name: str, path: str) -> str:
    """The name in the network of what has a name in the Block of its block at `path`."""
    return path + name.removeprefix(BLOCK)


def common_call(chain: Chain) -> BlockCall:
    """How a block is called for all batches alike, whatever their number of examples.

    Raises SubbyteError where examples differ in length or padding.
    """
    pairs = zip(chain.calls, chain.hidden, strict=True)
    calls = [_of_one_example(own, len(hidden)) for own, hidden in pairs]
    shapes = {tuple(hidden.shape[1:]) for hidden in chain.hidden}
    if len(shapes) > 1 or not all(_are_equal(calls[0], own) for own in calls[1:]):
        raise SubbyteError(_UNLIKE)
    return calls[0]


_UNLIKE = (
    "by block, all calibration examples have one length and no padding, and these have not; cut "
    "them into windows of one length"
)


def _of_one_example(own: BlockCall, n: int) -> BlockCall:
    """Tensors with a row for each of n examples have one for all."""

    def row(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != n:
            return value
        if not torch.equal(value, value[:1].expand_as(value)):
            raise SubbyteError(_UNLIKE)
        return value[:1]

    args, kwargs = mapped(row, (own.args, dict(own.kwargs)))
    return BlockCall(args, kwargs, own.at)


def _are_equal(a: BlockCall, b: BlockCall) -> bool:
    pairs = list(zip(leaves((a.args, a.kwargs)), leaves((b.args, b.kwargs)), strict=True))
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in pairs
    )
