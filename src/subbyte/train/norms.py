"""BatchNorm over the images of all processes: the statistics of the whole batch, as one alone has.

`nn.SyncBatchNorm` does this on GPUs and nowhere else, and is a layer of another class. Here the
network stays as it is: its norms compute otherwise for the while.

    mean = sum x / n,  var = sum (x - c)^2 / n - (mean - c)^2      sums over all processes, n too

c is the mean of a process's own part, so that little cancels; the sums are added in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from subbyte.core.follow import BATCHNORMS
from subbyte.core.group import Group


@contextmanager
def synced_norms(model: nn.Module, group: Group) -> Iterator[None]:
    """While it is open, norms in training mode normalise by the whole batch's statistics."""
    norms = [] if group.alone else [m for m in model.modules() if isinstance(m, BATCHNORMS)]
    for norm in norms:
        vars(norm)["forward"] = partial(_forward, norm)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


class _Sum(torch.autograd.Function):
    """The sum over the processes, of which the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _forward(norm: Any, x: Tensor) -> Tensor:
    """x: [n, c, ...], n of this process, which may be 0."""
    if not norm.training:
        return type(norm).forward(norm, x)  # type: ignore[no-any-return]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    n, mean, variance = _moments(x.float(), shape)
    if norm.running_mean is not None:
        _remember(norm, n, mean.detach(), variance.detach())
    y = (x.float() - mean.float().reshape(shape)) * (variance + norm.eps).rsqrt().float().reshape(
        shape
    )
    if norm.affine:
        y = y * norm.weight.reshape(shape) + norm.bias.reshape(shape)
    return y.to(x.dtype)


def _moments(x: Tensor, shape: list[int]) -> tuple[float, Tensor, Tensor]:
    """How many values a channel has, their mean and their variance, float64 [c]."""
    dims = [0, *range(2, x.ndim)]
    own = x.numel() // x.shape[1]
    centre = (x.detach().sum(dims) / max(1, own)).double()
    away = x - centre.float().reshape(shape)
    first, second = away.sum(dims).double(), away.square().sum(dims).double()
    sums = torch.stack(
        [
            first + own * centre,
            second + 2 * centre * first + own * centre.square(),
            torch.full_like(centre, own),
        ]
    )
    total, squares, counts = _Sum.apply(sums)
    mean = total / counts
    return float(counts[0]), mean, squares / counts - mean.square()


@torch.no_grad()
def _remember(norm: Any, n: float, mean: Tensor, variance: Tensor) -> None:
    """The running statistics, as torch.nn keeps them: of the unbiased variance."""
    norm.num_batches_tracked += 1
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.float(), share)
    norm.running_var.lerp_((variance * (n / max(1.0, n - 1))).float(), share)
