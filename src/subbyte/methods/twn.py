"""Ternary weight networks: the baseline with a threshold and a mean.

    W_q = s {-1, 0, +1}:  sign(W) where |W| > 0.75 mean|W|, else 0;  s = mean of |W| above it
Backward: the gradient of W_q is handed to W.

Li, Zhang and Liu, "Ternary Weight Networks", arXiv:1605.04711, equations 5 and 6 (their approximate
solution). Ours: one scale a layer, every layer, first and last too, unless a recipe says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.functional import decode, straight_through
from subbyte.grids import uniform
from subbyte.layers import Site
from subbyte.methods.base import WeightQuantizer
from subbyte.tensors import QuantizedTensor

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
            quantized = self.quantize(w.detach())
            w_hat = decode(quantized.codes, quantized.scale, GRID)
        return straight_through(w, w_hat)

    def quantize(self, w: Tensor) -> QuantizedTensor:
        large = w.abs() > THRESHOLD * w.abs().mean()
        codes = (1 + w.sign() * large).to(torch.uint8)
        scale = (w.abs() * large).sum() / large.sum().clamp(min=1)
        return QuantizedTensor(codes, scale.reshape(1), GRID)
