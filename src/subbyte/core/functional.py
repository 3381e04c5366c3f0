"""Pure functions on weights: scale rules, encode, decode, straight-through, entropy.

Shapes in words: a weight is [out, ...] (any rank), a scale is [groups] with one group for the whole
tensor, one for each index of the grid's channel axis, or one for every so many inputs of each row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subbyte.core.grids import Grid, PerChannel, PerGroup, ScaleDomain
from subbyte.errors import SubbyteError

MIN_EXPONENT, MAX_EXPONENT = -126, 127
FLOAT16_MAX = 65504.0


def n_groups(shape: Sequence[int], grid: Grid) -> int:
    """Number of scales a weight of this shape has on this grid."""
    if isinstance(grid.granularity, PerGroup):
        return _rows(shape) * grid.granularity.per_row(_width(shape))
    if not isinstance(grid.granularity, PerChannel):
        return 1
    axis = grid.granularity.axis
    if axis >= len(shape):
        raise SubbyteError(f"channel axis {axis} of a weight of shape {tuple(shape)}")
    return shape[axis]


def _rows(shape: Sequence[int]) -> int:
    if not len(shape):
        raise SubbyteError("a weight without dimensions has no groups of inputs; use PerTensor")
    return shape[0]


def _width(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def spread(scale: Tensor, shape: Sequence[int], grid: Grid) -> Tensor:
    """scale [groups] so that it broadcasts against a weight of this shape: a view, but of groups of
    inputs, whose scales are repeated."""
    if isinstance(grid.granularity, PerGroup):
        wide = scale.reshape(_rows(shape), -1).repeat_interleave(grid.granularity.size, 1)
        return wide[:, : _width(shape)].reshape(tuple(shape))
    axis = grid.granularity.axis if isinstance(grid.granularity, PerChannel) else 0
    ones = [1] * len(shape)
    if ones:
        ones[axis] = -1
    return scale.reshape(ones)


def in_groups(x: Tensor, size: int) -> Tensor:
    """A weight's values as [groups, size], one group of inputs a row; 0 where the last of a row of
    the weight is shorter."""
    matrix = x.reshape(_rows(x.shape), -1)
    return F.pad(matrix, (0, -matrix.shape[1] % size)).reshape(-1, size)


def reduce_groups(x: Tensor, grid: Grid) -> Tensor:
    """Mean of x over everything that shares a scale; [groups]."""
    if isinstance(grid.granularity, PerGroup):
        size = grid.granularity.size
        counts = in_groups(torch.ones_like(x), size).sum(1)
        return in_groups(x, size).sum(1) / counts
    if not isinstance(grid.granularity, PerChannel):
        return x.mean().reshape(1)
    dims = [d for d in range(x.ndim) if d != grid.granularity.axis]
    return x.mean(dim=dims) if dims else x


def mean_abs_scale(w: Tensor, grid: Grid) -> Tensor:
    """Mean of |w| for each group; [groups]."""
    return reduce_groups(w.abs(), grid)


def std_scale(w: Tensor, grid: Grid) -> Tensor:
    """Root of the mean squared deviation of w from its mean, for each group; [groups].

    Its gradient at a group of equal weights is 0 (a plain square root would give NaN).
    """
    centred = w - spread(reduce_groups(w, grid), w.shape, grid)
    variance = reduce_groups(centred.square(), grid)
    safe = torch.where(variance > 0, variance, torch.ones_like(variance))
    return torch.where(variance > 0, safe.sqrt(), torch.zeros_like(variance))


def round_scale(scale: Tensor, domain: ScaleDomain) -> Tensor:
    """Nearest scale that the domain can store, float32 [groups].

    float32: unchanged. float16: to nearest, at most 65504. power of two: 2^e, e the whole number
    nearest to log2(scale), limited to -126 .. 127, so that a scale of 0 becomes 2^-126. Round the
    scale first, then choose codes: they fit the scale that is stored.
    """
    if domain is ScaleDomain.FLOAT32:
        return scale.float()
    if domain is ScaleDomain.FLOAT16:
        return _round_to_float16(scale.float())
    return power_of_two(scale_exponent(scale))


def _round_to_float16(x: Tensor) -> Tensor:
    """`x.half().float()` for x >= 0, in float32 arithmetic: compilers fold away a pair of casts."""
    x = x.clamp(max=FLOAT16_MAX)
    wide = x * (2.0**13 + 1)  # Veltkamp: keep 11 of 24 significant bits
    normal = wide - (wide - x)
    subnormal = (x + 0.75) - 0.75  # float32 near 0.75 has steps of 2^-24, as float16 near 0
    return torch.where(x < 2.0**-14, subnormal, normal)


def scale_exponent(scale: Tensor) -> Tensor:
    """Exponents of the nearest powers of two (nearest in log2), int32 [groups]."""
    nearest = (scale.float().log2() + 0.5).floor()  # 0 has -inf
    return nearest.clamp(MIN_EXPONENT, MAX_EXPONENT).int()


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent exactly, float32; exponent: integers from -126 to 127."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def divide(w: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """w / scale as float32; a group whose scale is 0 is left as it is (its values decode to 0)."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return w / spread(safe, w.shape, grid)


def _nearest_(x: Tensor, grid: Grid) -> Tensor:
    """Index of the nearest level, as a float tensor; a tie goes up. May overwrite x."""
    if grid.affine is None:
        levels = torch.tensor(grid.levels, dtype=torch.float64, device=x.device)
        edges = ((levels[1:] + levels[:-1]) / 2).to(x.dtype)
        return torch.bucketize(x, edges, right=True).to(x.dtype)
    offset, inverse = grid.affine
    return x.mul_(inverse).add_(0.5 - offset).floor_().clamp_(0, grid.n_levels - 1)


def _level_(index: Tensor, grid: Grid) -> Tensor:
    """Float32 level of each (float) index, the bits of a table look-up. May overwrite index."""
    if grid.affine is None:
        return torch.tensor(grid.levels, dtype=torch.float32, device=index.device)[index.int()]
    offset, inverse = grid.affine
    return index.add_(offset).div_(inverse)


def nearest_level(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Code (as a float tensor) and level nearest to each x, at unit scale; for inner loops."""
    index = _nearest_(x.clone(), grid)
    return index, _level_(index.clone(), grid)


def snap(x: Tensor, grid: Grid) -> Tensor:
    """Nearest level to each x (unit scale); same bits as `levels[encode(x, 1, grid)]`, no graph."""
    with torch.no_grad():
        return _level_(_nearest_(x.detach().clone(), grid), grid)


def fake_quantize(w: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """`decode(encode(w, scale, grid), scale, grid)`, bit for bit, without the codes; no graph."""
    with torch.no_grad():
        index = _nearest_(divide(w, scale, grid), grid)
        return _level_(index, grid).mul_(spread(scale, w.shape, grid))


def encode(w: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Code of the nearest level for every weight; an exact tie takes the upper level.

    w: float [out, ...]. scale: float32 [groups], already in the grid's domain (`round_scale`),
    so that the codes fit the scale that is stored. Returns uint8 of w's shape. Positions are
    float32: a weight within about N 2^-23 steps of a tie may go either way.
    """
    return _nearest_(divide(w.detach(), scale, grid), grid).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """levels[code] * scale in float32, of the codes' shape. A scale is float32 [groups]."""
    return _level_(codes.float(), grid) * spread(scale, codes.shape, grid)


class _StraightThrough(torch.autograd.Function):
    """Returns q in the forward pass exactly, and hands q's gradient to w."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, q: Tensor) -> Tensor:
        return q.view_as(q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def straight_through(w: Tensor, q: Tensor) -> Tensor:
    """q, with the gradient of w: the identity, also where q was clamped.

    Exact, unlike `w + (q - w).detach()`, which is one ulp off for some weights.
    """
    return _StraightThrough.apply(w, q.detach())


def level_shares(codes: Tensor, n_levels: int) -> Tensor:
    """Share of the weights on each level, float64 [n_levels]; sums to 1 (0 if there are none)."""
    counts = torch.bincount(codes.flatten().int(), minlength=n_levels).double()
    return counts / max(1, codes.numel())


def entropy(codes: Tensor, n_levels: int) -> float:
    """Entropy of the codes, bits per weight: -sum p log2 p over the levels that occur."""
    shares = level_shares(codes, n_levels)
    used = shares[shares > 0]
    return float(-(used * used.log2()).sum()) if used.numel() else 0.0


def store_scale(scale: Tensor, domain: ScaleDomain) -> Tensor:
    """Scale float32 [groups] in the dtype that its domain is stored in."""
    if domain is ScaleDomain.POWER_OF_TWO:
        return scale_exponent(scale).to(torch.int8)
    return scale.clone() if domain is ScaleDomain.FLOAT32 else scale.half()


def read_scale(stored: Tensor, domain: ScaleDomain) -> Tensor:
    """float32 [groups] of a stored scale."""
    if domain is ScaleDomain.POWER_OF_TWO:
        return power_of_two(stored)
    return stored.float()
