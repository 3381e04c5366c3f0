"""Ternary weight networks: the baseline with a threshold and a mean.

    W_q = s {-1, 0, +1}:  sign(W) where |W| > 0.75 mean|W|, else 0;  s = mean of |W| above it
Backward: the gradient of W_q is handed to W.

Li, Zhang and Liu, "Ternary Weight Networks", arXiv:1605.04711, equations 5 and 6 (their approximate
solution). Ours: one scale per layer, every layer, first and last too, unless a recipe differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.core.functional import straight_through
from subbyte.core.grids import uniform
from subbyte.core.sites import Site
from subbyte.core.tensors import QuantizedTensor
from subbyte.methods.base import WeightQuantizer

THRESHOLD = 0.75
GRID = uniform(3)


@dataclass(frozen=True, slots=True)
class TWN:
    """Three levels; no options."""

    def quantizer(self, w: Tensor, site: Site) -> TWNQuantizer:
        return TWNQuantizer()


class TWNQuantizer(WeightQuantizer):
    """Threshold and mean of the weights as they are now."""

    def forward(self, w: Tensor) -> Tensor:
        with torch.no_grad():
            signs, scale = ternary(w)
        return straight_through(w, signs * scale)

    def quantize(self, w: Tensor) -> QuantizedTensor:
        signs, scale = ternary(w)
        return QuantizedTensor((signs + 1).to(torch.uint8), scale.reshape(1), GRID)


def ternary(w: Tensor) -> tuple[Tensor, Tensor]:
    """-1, 0 or 1 for each weight, in w's dtype, and the scale, 0-dim; equations 5 and 6."""
    magnitude = w.abs()
    large = magnitude > THRESHOLD * magnitude.mean()
    return w.sign() * large, (magnitude * large).sum() / large.sum().clamp(min=1)
