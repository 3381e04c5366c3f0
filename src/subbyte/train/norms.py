"""BatchNorm over the images of all processes: the statistics of the whole batch, as one alone has.

    y = (x - mean) / sqrt(var + eps) * w + b          mean, var over the values of all processes
    dx = (dy - mean(dy) - (x - mean) mean(dy (x - mean)) / (var + eps)) w / sqrt(var + eps)

`nn.SyncBatchNorm` does this on GPUs and nowhere else, and is a layer of another class. Here the
network stays as it is: its norms compute otherwise for the while. Sums are added in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subbyte.core.follow import BATCHNORMS
from subbyte.core.group import Group


@contextmanager
def synced_norms(model: nn.Module, group: Group) -> Iterator[None]:
    """While it is open, norms in training mode normalise by the whole batch's statistics."""
    norms = [] if group.alone else [m for m in model.modules() if isinstance(m, BATCHNORMS)]
    for norm in norms:
        vars(norm)["forward"] = partial(_forward, norm, group)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


def _forward(norm: Any, group: Group, x: Tensor) -> Tensor:
    """x: [n, c, ...], n of this process, which may be 0."""
    if not norm.training:
        return type(norm).forward(norm, x)  # type: ignore[no-any-return]
    n, mean, variance = _moments(x.detach().float(), group)
    if norm.running_mean is not None:
        _remember(norm, n, mean, variance)
    moments = (mean.float(), variance.float(), n)
    y: Tensor = _Normalise.apply(x.float(), norm.weight, norm.bias, moments, norm.eps, group)
    return y.to(x.dtype)


class _Normalise(torch.autograd.Function):
    """The formulas above, with the moments and n, how many values a channel has."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Any, *rest: Any
    ) -> Tensor:
        mean, variance, ctx.n = moments
        eps, ctx.group = rest
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dy, (x, weight, mean, slope) = gradients[0], ctx.saved_tensors
        away = x - _wide(mean, x)
        own = torch.stack([dy.sum(_others(x)), (dy * away).sum(_others(x))])
        all_of = (ctx.group.sum_(own.double()) / ctx.n).float()
        dx = dy - _wide(all_of[0], x) - away * _wide(all_of[1] * slope.square(), x)
        dx = dx * _wide(slope if weight is None else slope * weight, x)
        affine = (None, None) if weight is None else (own[1] * slope, own[0])
        return dx, *affine, None, None, None


def _moments(x: Tensor, group: Group) -> tuple[float, Tensor, Tensor]:
    """How many values a channel has in all processes, their mean and variance, float64 [c]."""
    own, zero = x.numel() // x.shape[1], x.new_zeros(x.shape[1])
    variance, mean = torch.var_mean(x, _others(x), correction=0) if own else (zero, zero)
    mean, variance = mean.double(), variance.double()
    sums = [own * mean, own * (variance + mean.square()), torch.full_like(mean, own)]
    total, squares, counts = group.sum_(torch.stack(sums))
    mean = total / counts
    return float(counts[0]), mean, (squares / counts - mean.square()).clamp(min=0.0)


def _others(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, x.ndim)]


def _wide(x: Tensor, like: Tensor) -> Tensor:
    """A value per channel, as it multiplies [n, c, ...]."""
    return x.reshape([1, -1, *[1] * (like.ndim - 2)])


@torch.no_grad()
def _remember(norm: Any, n: float, mean: Tensor, variance: Tensor) -> None:
    """The running statistics, as torch.nn keeps them: of the unbiased variance."""
    norm.num_batches_tracked += 1
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.float(), share)
    norm.running_var.lerp_((variance * (n / max(1.0, n - 1))).float(), share)
