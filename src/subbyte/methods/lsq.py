"""Learned step size (LSQ): the baseline whose scale is trained by gradient descent.

    W_q = s round(clip(W / s, -T, T)),  T = 2^(b-1) - 1
    dW_q/dW = 1 inside the clip, 0 outside;  dW_q/ds = round(W/s) - W/s inside, -T or T outside
    the gradient of s is multiplied by 1 / sqrt(M T);  s starts at 2 mean|W| / sqrt(T)

Esser et al., "Learned Step Size Quantization", arXiv:1902.08153, equations 1 to 3 and section 2.2.
Ours: symmetric levels -T .. T, 2^b - 1 of them, so that files are as large as those of SGM (the
paper has one more negative level); s is kept positive; a tie goes up; weights only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from subbyte.core.functional import encode, snap, straight_through
from subbyte.core.grids import Grid, fixed_point, fixed_point_bits
from subbyte.core.sites import Site
from subbyte.core.tensors import QuantizedTensor
from subbyte.methods.base import WeightQuantizer, describe

SMALLEST_STEP = 1e-8


@dataclass(frozen=True, slots=True)
class LSQ:
    """`bits` bits, 2 to 8: 2^bits - 1 symmetric levels, one learned float32 step a layer."""

    bits: int = 2

    def __post_init__(self) -> None:
        fixed_point(self.bits)

    def __str__(self) -> str:
        return describe(self, "bits")

    def with_levels(self, levels: int) -> LSQ:
        return replace(self, bits=fixed_point_bits(levels))

    def quantizer(self, w: Tensor, site: Site) -> LSQQuantizer:
        return LSQQuantizer(self, w)


class LSQQuantizer(WeightQuantizer):
    """A step that is a parameter, float32 [1]: FSDP takes no 0-dim ones."""

    def __init__(self, method: LSQ, w: Tensor) -> None:
        super().__init__()
        self.grid = Grid(fixed_point(method.bits).levels)
        self.step = nn.Parameter(self.initial_state(w)["step"])

    def initial_state(self, w: Tensor) -> dict[str, Tensor]:
        top = self.grid.levels[-1]
        return {"step": (2 * w.abs().mean() / top**0.5).clamp(min=SMALLEST_STEP).reshape(1)}

    def forward(self, w: Tensor) -> Tensor:
        top = self.grid.levels[-1]
        step = _scale_gradient(self._positive_step(), (w.numel() * top) ** -0.5)
        x = (w / step).clamp(-top, top)
        return straight_through(x, snap(x, self.grid)) * step

    def quantize(self, w: Tensor) -> QuantizedTensor:
        step = self._positive_step().detach().clone()
        return QuantizedTensor(encode(w, step, self.grid), step, self.grid)

    def _positive_step(self) -> Tensor:
        return self.step.clamp(min=SMALLEST_STEP)


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by factor."""
    return straight_through(x * factor, torch.as_tensor(x))
