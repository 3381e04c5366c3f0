"""Round to nearest, with the scale of least squares.

The scale is searched among a geometric series of shares of max |w|, then refitted to its codes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from subbyte.core.functional import decode, encode, in_groups, round_scale
from subbyte.core.grids import Grid, PerChannel, PerGroup
from subbyte.core.tensors import QuantizedTensor

LEAST, MOST, RATIO = 0.1, 1.15, 1.04  # scales tried, times max |w|
COARSE = 1.12  # a ratio for estimates: a third of the scales, and the refits make up for most
_REFITS = 3


def rtn(matrix: Tensor, gram: Tensor | None, grid: Grid, ratio: float = RATIO) -> QuantizedTensor:
    """Nearest levels, with the scale of least squares; matrix float [out, width].

    gram: its diagonal weights the squares; None weights all alike. The grid is of the matrix
    (channels on axis 0), per channel, per tensor, or per group of inputs. ratio: of one scale that
    is tried to the next.
    """
    if isinstance(grid.granularity, PerGroup):
        scale = _group_scale(matrix, gram, grid, grid.granularity.size, ratio)
    else:
        scale = _plain_scale(matrix, _column_weights(matrix, gram), grid, ratio)
    return QuantizedTensor(encode(matrix, scale, grid), scale, grid)


def _group_scale(
    matrix: Tensor, gram: Tensor | None, grid: Grid, size: int, ratio: float
) -> Tensor:
    """Every group is a row of a matrix of its own; what fills up the last ones weighs nothing."""
    weights = _column_weights(matrix, gram).expand(matrix.shape)
    by_row = replace(grid, granularity=PerChannel(0))
    return _plain_scale(in_groups(matrix, size), in_groups(weights, size), by_row, ratio)


def _plain_scale(matrix: Tensor, weights: Tensor, grid: Grid, ratio: float) -> Tensor:
    """The scale with the least weighted squared rounding error of a geometric series of them.

    Each of the last ones is the best for the codes of the one before.
    """
    peak = matrix.abs().amax(1) if isinstance(grid.granularity, PerChannel) else matrix.abs().max()
    peak = peak.reshape(-1) / max(abs(grid.levels[0]), abs(grid.levels[-1]))
    best = torch.full_like(peak, torch.inf, dtype=torch.float64)
    chosen = round_scale(peak, grid.scale_domain)
    count = int(math.log(MOST / LEAST) / math.log(ratio))
    factors: list[float | None] = [MOST * ratio**-i for i in range(count)]
    for factor in factors + [None] * _REFITS:
        if factor is None:
            q = decode(encode(matrix, chosen, grid), torch.ones_like(chosen), grid)
            fitted = _rows((matrix * q * weights), best) / _rows(q.square() * weights, best)
            scale = torch.where(fitted.isfinite() & (fitted > 0), fitted.float(), chosen)
        else:
            scale = peak * factor
        scale = round_scale(scale, grid.scale_domain)
        error = (matrix - decode(encode(matrix, scale, grid), scale, grid)).square() * weights
        total = _rows(error, best)
        better = total < best
        best, chosen = torch.where(better, total, best), torch.where(better, scale, chosen)
    return chosen


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """The sum of each row, or, for one scale a tensor, of all; float64."""
    sums = x.double().sum(1)
    return sums if sums.shape == like.shape else sums.sum().reshape(1)


def _column_weights(matrix: Tensor, gram: Tensor | None) -> Tensor:
    """Weight of each squared error; broadcasts to the matrix."""
    if gram is None:
        return torch.ones(1, 1)
    diagonal = gram.diagonal(dim1=1, dim2=2).float()
    return diagonal.repeat_interleave(len(matrix) // len(gram), 0)
