"""Low-rank adapters for what quantization left over, and what a rank would reclaim.

The residual E = W - W_hat of a layer [out, width] is approximated by up @ down of a given rank so
that the least is left of

    sum over rows of  F_o (e_o - up_o down) H (e_o - up_o down)'

With H = L L' and f = sqrt(F) that is a plain truncated SVD of f E L, undone on both sides. H the
gram of the inputs makes it data-aware (QERA, arXiv:2410.06040, and EoRA, arXiv:2410.21271, for
linear layers; for convolutions, and the weighting of the rows, ours); H and F the identity give
CoRa's plain SVD (arXiv:2408.00923). A convolution's product is a k x k convolution into `rank`
channels followed by a 1 x 1 convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subbyte.core.tensors import LowRank
from subbyte.errors import SubbyteError
from subbyte.ptq.solvers.codes import damped

_INT8_TOP = 127
_SMALLEST_ROW = 1e-6  # of the mean effect: rows without effect must not be divided by 0


class Metric:
    """H and F of a layer as factors; None for either is the identity."""

    def __init__(self, gram: Tensor | None, effect: Tensor | None, groups: int, width: int) -> None:
        eye = torch.eye(width, dtype=torch.float64).expand(groups, width, width)
        self.gram = eye if gram is None else damped(gram.double())
        self.factor = eye if gram is None else torch.linalg.cholesky(self.gram)
        self.rows = _row_weights(effect)

    def whiten(self, error: Tensor) -> Tensor:
        """f E L, [groups, out / groups, width] of E [out, width]."""
        weighted = error.double() if self.rows is None else error.double() * self.rows[:, None]
        return weighted.reshape(len(self.factor), -1, error.shape[1]) @ self.factor


def _row_weights(effect: Tensor | None) -> Tensor | None:
    """sqrt(F), kept away from 0."""
    if effect is None or not float(effect.sum()) > 0:
        return None
    return effect.double().clamp(min=_SMALLEST_ROW * float(effect.mean())).sqrt()


def reclaimed(error: Tensor, metric: Metric, most: int) -> Tensor:
    """What is left of the weighted error at rank 0 .. most; float64 [most + 1], never rising."""
    values = torch.linalg.svdvals(metric.whiten(error)).square()
    total = values.sum()
    by_rank = values.sum(0)[:most]
    left = torch.cat([total[None], total - by_rank.cumsum(0)]).clamp(min=0.0)
    return torch.cat([left, left[-1:].expand(max(0, most + 1 - len(left)))])


def fit_adapter(error: Tensor, metric: Metric, rank: int, bits: int) -> LowRank:
    """The adapter of a rank for E = error [out, width], stored in 16 or 8 bits.

    `down` is rounded first; then `up` is fitted again to the rounded one, in closed form. Raises
    SubbyteError for another number of bits, or a rank the matrix does not have.
    """
    most = largest_rank(error.shape[0], error.shape[1], len(metric.factor))
    if not 1 <= rank <= most:
        raise SubbyteError(f"rank={rank!r}; a residual of this shape takes 1 to {most}")
    _, s, vh = torch.linalg.svd(metric.whiten(error), full_matrices=False)
    down = s[:, :rank, None].sqrt() * vh[:, :rank]
    down = torch.linalg.solve_triangular(metric.factor, down, upper=False, left=False)
    down_stored, down_scale = store_rows(down.flatten(0, 1), bits)
    rounded = (down_stored.double() * down_scale[:, None]).reshape(down.shape)
    up = _fit_up(error.double().reshape(len(down), -1, error.shape[1]), rounded, metric.gram)
    return _joined(up, down_stored, down_scale, bits)


def stored(up: Tensor, down: Tensor, bits: int) -> LowRank:
    """The adapter of float factors: up [groups, out / groups, rank], down [groups, rank, width]."""
    down_stored, down_scale = store_rows(down.flatten(0, 1), bits)
    return _joined(up, down_stored, down_scale, bits)


def largest_rank(out: int, width: int, groups: int) -> int:
    """The full rank of a group's residual."""
    return min(out // groups, width)


def adapter_bytes(out: int, width: int, groups: int, rank: int, bits: int) -> int:
    """What an adapter of this rank takes: factors and a float32 scale for each row of `down`."""
    return rank * (out + groups * width) * bits // 8 + 4 * groups * rank


def _fit_up(error: Tensor, down: Tensor, gram: Tensor) -> Tensor:
    """Least squares: up = E H down' (down H down')^-1; [groups, out / groups, rank]."""
    right = gram @ down.transpose(1, 2)
    inner = down @ right
    return torch.linalg.lstsq(inner.transpose(1, 2), (error @ right).transpose(1, 2)).solution.mT


def _joined(up: Tensor, down: Tensor, down_scale: Tensor, bits: int) -> LowRank:
    """One scale for each rank and group: that of `up`'s column times that of `down`'s row."""
    columns, up_scale = store_rows(up.transpose(1, 2).flatten(0, 1), bits)
    groups, rank = up.shape[0], up.shape[2]
    up_stored = columns.reshape(groups, rank, -1).transpose(1, 2).reshape(-1, rank).contiguous()
    return LowRank(up_stored, down, (up_scale * down_scale).float())


def store_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rows of x as int8 (bits 8) or float16 (16), and the float64 scale of each.

    Raises SubbyteError for another number of bits.
    """
    if bits not in (8, 16):
        raise SubbyteError(f"adapter bits={bits!r}; adapters are stored in 8 or 16")
    peak = x.abs().amax(1)
    scale = torch.where(peak > 0, peak, torch.ones_like(peak)).double()
    scale = scale / _INT8_TOP if bits == 8 else scale
    scale = scale.float().double()  # as it is stored
    unit = x / scale[:, None]
    if bits == 16:
        return unit.half(), scale
    return unit.round().clamp(-_INT8_TOP, _INT8_TOP).to(torch.int8), scale
