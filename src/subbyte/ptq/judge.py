"""The calibration images that teach nothing: they say how far a network is from the float one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from subbyte.core.quantized import Quantized
from subbyte.modules import pack
from subbyte.ptq.calibration import Examples, call
from subbyte.ptq.steps.tune import TEMPERATURE, divergence

HELD_OUT = 5  # one calibration image in so many judges, the others teach
_BATCH = 64


class Judge:
    """Some inputs of the network and what the float network `teacher` makes of them."""

    def __init__(self, teacher: nn.Module, images: Examples) -> None:
        self.teacher, self.batches = teacher, images.split(_BATCH)

    @cached_property
    def _wanted(self) -> Sequence[Tensor]:
        """The float network's logits."""
        with torch.no_grad():
            return [call(self.teacher, x) for x in self.batches]

    @torch.no_grad()
    def distance(self, quantized: Quantized) -> float:
        """Mean divergence from the float network, nats; infinite if any logit is not finite."""
        net = pack(quantized, precision="float32")
        total = 0.0
        for x, wanted in zip(self.batches, self._wanted, strict=True):
            logits = call(net, x)
            if not logits.isfinite().all():
                return float("inf")
            total += float(divergence(logits, wanted, TEMPERATURE)) * len(x)
        return total / max(1, sum(len(x) for x in self.batches))

    @torch.no_grad()
    def agreement(self, net: nn.Module) -> float:
        """Percent of the images (or tokens) of which it predicts the float network's class."""
        same = total = 0
        for x, wanted in zip(self.batches, self._wanted, strict=True):
            hits = call(net, x).argmax(-1) == wanted.argmax(-1)
            same, total = same + int(hits.sum()), total + hits.numel()
        return 100.0 * same / max(1, total)


def teaching(images: Examples) -> Examples:
    """All but those that judge; of very few images, all."""
    judge = torch.arange(len(images)) % HELD_OUT == 0
    return images[~judge] if len(images) >= HELD_OUT else images


def judging(images: Examples) -> Examples:
    return images[::HELD_OUT]
