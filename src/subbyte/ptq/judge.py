"""The calibration examples that teach nothing: they say how far a network is from the float one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte.core.group import ALONE, Group
from subbyte.core.quantized import Quantized
from subbyte.modules import pack
from subbyte.tasks.base import Task
from subbyte.tasks.batches import SCORED_TOKENS, Batch, Examples, call, in_batches

HELD_OUT = 5  # one calibration example in so many judges, the others teach
_BATCH = 64
_KEPT_BYTES = 2**28  # of the float network's outputs; what is above is computed anew each time


@dataclass(frozen=True, slots=True)
class Verdict:
    """distance: the mean over the items (images, tokens, ...), infinite where an output is not
    finite. agreement: percent of the items that lead to the same decision; None where nothing is
    decided."""

    distance: float
    agreement: float | None


class Judge:
    """Some inputs of the network and what the float network `teacher` makes of them.

    group: processes that share the inputs; all of them come to the same verdict.
    """

    def __init__(
        self, teacher: nn.Module, examples: Examples, task: Task, group: Group = ALONE
    ) -> None:
        self.teacher, self.task, self.group = teacher, task, group
        self.batches = group.dealt(in_batches(examples, _BATCH, SCORED_TOKENS))
        self._kept: list[Tensor] = []

    def distance(self, quantized: Quantized) -> float:
        """Of float activations: what the weights alone do."""
        return self.verdict(pack(quantized, precision="float32")).distance

    @torch.no_grad()
    def verdict(self, net: nn.Module) -> Verdict:
        total, same, decided, items = 0.0, 0, 0, 0
        for y, wanted in self._pairs(net):
            if not y.isfinite().all():
                total = math.inf
                break
            total += float(self.task.distance(y, wanted).sum())
            items += len(y)
            agrees = self.task.agrees(y, wanted)
            if agrees is not None:
                same, decided = same + int(agrees.sum()), decided + agrees.numel()
        whole, n, agreeing, judged = self.group.sum(total, items, same, decided)
        if not math.isfinite(whole):
            return Verdict(math.inf, None)
        return Verdict(whole / max(1, n), 100.0 * agreeing / judged if judged else None)

    def _pairs(self, net: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs of the network and of the float one."""
        for i, x in enumerate(self.batches):
            yield self.task.outputs(call(net, x), x), self._wanted(i, x)

    def _wanted(self, i: int, x: Batch) -> Tensor:
        """Outputs of the float network; the first ones are kept."""
        if i < len(self._kept):
            return self._kept[i]
        y = self.task.outputs(call(self.teacher, x), x)
        if i == len(self._kept) and sum(k.nbytes for k in self._kept) + y.nbytes <= _KEPT_BYTES:
            self._kept.append(y)
        return y


def teaching(examples: Examples) -> Examples:
    """All but those that judge; of very few, all."""
    judge = torch.arange(len(examples)) % HELD_OUT == 0
    return examples[~judge] if len(examples) >= HELD_OUT else examples


def judging(examples: Examples) -> Examples:
    return examples[::HELD_OUT]
