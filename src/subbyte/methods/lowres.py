"""N-level weights trained from scratch (LowRes).

Forward: W_n = W / gamma with gamma = beta * mean|W|; W_q = quant(W_n), N equally spaced levels from
-1 to +1; the layer computes gamma * (W_q x) + b.
Backward: the full gradient reaches W_n, also through the clamp.
Float32 master weights, quantized for good at the end (`freeze`).

Cabral and Driemeier, "Low-Resolution Neural Networks", arXiv:2502.08795 (Neural Networks 191, 2025,
107763), section 2; beta = 1.4 and the gradient are the paper's.
Ours, where the text is silent:
- the mean is of |W| (the plain mean of a Glorot weight is 0); `statistic="std"` is the alternative;
- gamma is computed anew at every step. `gamma="frozen"` keeps the one of the first weights, as in
  the reading "the optimizer updates W_n directly";
- gamma is a constant for the gradient; `gamma_grad=True` lets the gradient through it;
- one gamma a layer is the paper's; `granularity="channel"` and other scale domains are ours;
- an exact tie between two levels takes the upper one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from subbyte.core.functional import (
    divide,
    encode,
    fake_quantize,
    mean_abs_scale,
    round_scale,
    snap,
    spread,
    std_scale,
    straight_through,
)
from subbyte.core.grids import Grid, PerChannel, PerTensor, ScaleDomain, uniform
from subbyte.core.sites import Site
from subbyte.core.tensors import QuantizedTensor
from subbyte.errors import SubbyteError
from subbyte.methods.base import WeightQuantizer, describe

Gamma = Literal["recomputed", "frozen"]
Statistic = Literal["mean_abs", "std"]
Sharing = Literal["tensor", "channel"]
Domain = Literal["float32", "float16", "power_of_two"]

_STATISTICS = {"mean_abs": mean_abs_scale, "std": std_scale}


@dataclass(frozen=True, slots=True)
class LowRes:
    """N weight levels, trained from scratch or fine-tuned.

    levels: 2 to 256, the paper uses 2, 3, 4, 5, 9, 17. beta: scale = beta * statistic of the
    weights, above 0. gamma: "recomputed" every step or "frozen" at the start. gamma_grad: whether
    the scale carries gradient. statistic: "mean_abs" or "std". granularity: one scale a "tensor"
    or a "channel". scale_domain: "float32", "float16" or "power_of_two".
    """

    levels: int = 5
    beta: float = 1.4
    gamma: Gamma = "recomputed"
    gamma_grad: bool = False
    statistic: Statistic = "mean_abs"
    granularity: Sharing = "tensor"
    scale_domain: Domain = "float32"

    def __post_init__(self) -> None:
        uniform(self.levels)
        number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        if not (number and math.isfinite(self.beta) and self.beta > 0):
            raise SubbyteError(
                f"beta={self.beta!r}; use a finite number above 0 (the paper's: 1.4)"
            )
        _check_choice("gamma", self.gamma, get_args(Gamma))
        _check_choice("statistic", self.statistic, get_args(Statistic))
        _check_choice("granularity", self.granularity, get_args(Sharing))
        _check_choice("scale_domain", self.scale_domain, get_args(Domain))

    def __str__(self) -> str:
        return describe(self, "levels")

    def with_levels(self, levels: int) -> LowRes:
        return replace(self, levels=levels)

    def grid(self, channel_axis: int) -> Grid:
        """The grid of a layer whose output channels lie along this axis of its weight."""
        sharing = PerTensor() if self.granularity == "tensor" else PerChannel(channel_axis)
        return uniform(self.levels, sharing, ScaleDomain(self.scale_domain))

    def quantizer(self, w: Tensor, site: Site) -> LowResQuantizer:
        return LowResQuantizer(self, self.grid(site.channel_axis), w)


class LowResQuantizer(WeightQuantizer):
    """gamma * quant(W / gamma), with a straight-through gradient."""

    gamma: Tensor  # float32 [groups]; only if the method freezes it

    def __init__(self, method: LowRes, grid: Grid, w: Tensor) -> None:
        super().__init__()
        self.method, self.grid = method, grid
        for name, value in self.initial_state(w).items():
            self.register_buffer(name, value)

    def initial_state(self, w: Tensor) -> dict[str, Tensor]:
        return {"gamma": self._scale_of(w)} if self.method.gamma == "frozen" else {}

    def scale(self, w: Tensor) -> Tensor:
        """gamma for the weights as they are now; float32 [groups], in the grid's domain."""
        return self.gamma if self.method.gamma == "frozen" else self._scale_of(w)

    def _scale_of(self, w: Tensor) -> Tensor:
        gamma = self.method.beta * _STATISTICS[self.method.statistic](w, self.grid)
        return straight_through(gamma, round_scale(gamma, self.grid.scale_domain))

    def forward(self, w: Tensor) -> Tensor:
        if not self.method.gamma_grad:
            with torch.no_grad():
                scale = self.scale(w)
            return straight_through(w, fake_quantize(w, scale, self.grid).to(w.dtype))
        scale = self.scale(w)
        normed = divide(w, scale, self.grid)
        w_hat = straight_through(normed, snap(normed, self.grid)) * spread(
            scale, w.shape, self.grid
        )
        return w_hat.to(w.dtype)

    def quantize(self, w: Tensor) -> QuantizedTensor:
        scale = self.scale(w)
        return QuantizedTensor(encode(w, scale, self.grid), scale, self.grid)


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SubbyteError(f"{field}={value!r}; use one of {', '.join(map(repr, choices))}")
