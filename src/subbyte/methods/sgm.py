"""Fixed-point weights by gradient descent: a symmetric mixture of Gaussian modes (SGM, SYMOG).

    Q(w) = D clip(round(w / D), -T, T)    D = 2^-f, a power of two a layer; T = 2^(b-1) - 1
    loss = task + sum over layers of kappa sum_i h(w_i - Q(w_i))
    h(d) = d^2 / 2 where |d| <= r D, and r D (|d| - r D / 2) beyond; r = 1/2 is d^2 / 2 everywhere
    kappa = start (end / start)^(progress^late)      exponential growth (late = 1), or later
    after every step: clip |w| to D T
    at the end: w := Q(w)

The forward pass sees the float weights: no straight-through estimator, the task's gradient is
exact. Each weight is drawn to the nearest mode, first softly, so that it may still change its mode,
then so hard that rounding at the end changes nothing.

Enderich, Timm, Rosenbaum and Burgard, "Learning Multimodal Fixed-Point Weights using Gradient
Descent", arXiv:1907.07220; Enderich, Timm and Burgard, "SYMOG", arXiv:2002.08204. The papers give
the idea in words (modes on fixed-point values, power-of-two D, clipping, growing strength); the
formulas are ours. Ours too:
- D is the power of two with the least squared rounding error of the pre-trained weights, then
  fixed;
- the pull on a weight is kappa (w - Q(w)), whatever the layer's size: lambda_l = kappa M_l / 2
  where the regulariser is written as lambda_l / M_l times the squared distance;
- `reach`, r above: a pull that is no stronger halfway between two modes than at r D from one. A
  weight that changes its mode must climb against it all the way; so at equal chances to change,
  the weights that stay lie closer to their modes, and the task is seen as it will be;
- start and end of kappa;
- `late`: weights settle once kappa / lr passes about 0.1; with a rate that falls over the run,
  growth that comes later lets them choose their modes under less noise;
- a tie between two modes goes up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from subbyte.core.functional import encode, fake_quantize, power_of_two, scale_exponent
from subbyte.core.grids import Grid, fixed_point, fixed_point_bits
from subbyte.core.sites import Site
from subbyte.core.tensors import QuantizedTensor
from subbyte.errors import SubbyteError
from subbyte.methods.base import WeightQuantizer, describe

_EXPONENTS_TRIED = 8  # on either side of the largest weight's


@dataclass(frozen=True, slots=True)
class SGM:
    """Fixed point of `bits` bits, 2 to 8: 2^bits - 1 levels, scales that are powers of two.

    start, end: the pull kappa at the first and the last step, in units of the gradient per unit of
    weight (as weight decay is). The end must be strong enough to gather the weights on their modes;
    `lr * end` must stay below 2 (1 + momentum), or the pull itself oscillates. late: 1 for plain
    exponential growth; above 1 kappa stays near start for longer. reach: how far from a mode the
    pull still grows, in steps D; 0.5, halfway to the next and no limit, is the papers'.
    """

    bits: int = 2
    start: float = 1e-3
    end: float = 100.0
    late: float = 1.0
    reach: float = 0.5

    def __post_init__(self) -> None:
        fixed_point(self.bits)
        for name in ("start", "end", "late"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise SubbyteError(f"{name}={value!r}; use a finite number above 0")
        if not 0 < self.reach <= 0.5:
            raise SubbyteError(f"reach={self.reach!r}; use a number above 0, at most 0.5 (steps)")
        if self.end < self.start:
            raise SubbyteError(
                f"end={self.end!r} is below start={self.start!r}; the pull must not fall"
            )

    def __str__(self) -> str:
        return describe(self, "bits")

    def pull(self, progress: float) -> float:
        """kappa after this fraction of training."""
        return self.start * (self.end / self.start) ** (progress**self.late)

    def with_levels(self, levels: int) -> SGM:
        return replace(self, bits=fixed_point_bits(levels))

    def quantizer(self, w: Tensor, site: Site) -> SGMQuantizer:
        return SGMQuantizer(self, w)


class SGMQuantizer(WeightQuantizer):
    """Float weights in the forward pass, drawn to the modes of a fixed grid."""

    soft = True
    scale: Tensor  # float32 [1], a power of two: D

    def __init__(self, method: SGM, w: Tensor) -> None:
        super().__init__()
        self.method, self.grid = method, fixed_point(method.bits)
        for name, value in self.initial_state(w).items():
            self.register_buffer(name, value)

    def initial_state(self, w: Tensor) -> dict[str, Tensor]:
        return {"scale": least_squares_power_of_two(w, self.grid)}

    def forward(self, w: Tensor) -> Tensor:
        return w

    def penalty(self, w: Tensor, progress: float) -> Tensor:
        modes = fake_quantize(w, self.scale, self.grid)
        reach = self.method.reach * float(self.scale) if self.method.reach < 0.5 else math.inf
        return self.method.pull(progress) * F.huber_loss(w, modes, reduction="sum", delta=reach)

    def pull(self, progress: float) -> float:
        return self.method.pull(progress)

    def after_step(self, w: Tensor, progress: float) -> None:
        limit = float(self.scale) * self.grid.levels[-1]
        w.clamp_(-limit, limit)

    def quantize(self, w: Tensor) -> QuantizedTensor:
        return QuantizedTensor(encode(w, self.scale, self.grid), self.scale.clone(), self.grid)


@torch.no_grad()
def least_squares_power_of_two(w: Tensor, grid: Grid) -> Tensor:
    """The power of two whose grid has the least squared error on w; float32 [1].

    Of equal errors the larger scale wins. Raises SubbyteError if all weights are 0.
    """
    peak = w.abs().max().reshape(1)
    if not float(peak) > 0:
        raise SubbyteError(
            "all its weights are 0, so no power of two fits them; start from trained or random "
            "weights, or keep the layer float"
        )
    top = int(scale_exponent(peak)) + 1
    exponents = torch.arange(top, top - 2 * _EXPONENTS_TRIED, -1, device=w.device)
    scales = power_of_two(exponents.clamp(-126, 127))
    errors = [
        (w - fake_quantize(w, scale, grid)).double().square().sum() for scale in scales[:, None]
    ]
    return scales[torch.stack(errors).argmin()].reshape(1)
