"""What the C++ core multiplies, and why it would not."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from subbyte.core.grids import Grid, PerChannel, PerGroup
from subbyte.errors import SubbyteError

try:
    from subbyte import _native
except ImportError:  # a source tree without a compiler: the reference does everything
    _native = None  # type: ignore[assignment]

Precision = Literal["auto", "int8", "int16", "float32"]

_FLOAT32 = torch.float32
_LARGEST = 127  # integer weights are signed bytes
_SUMS = 2**31
_FEW_COLUMNS = 8  # that a weight is not decoded for where bytes multiply slowly
MANY = 1 << 30  # columns: more than any machine decodes nothing for
_FEW_CHANNELS = 8  # of a group; panels have 32 rows, so less would mostly multiply by nothing


def check_precision(precision: str) -> None:
    """Raises SubbyteError for what is no precision."""
    if precision not in get_args(Precision):
        known = ", ".join(map(repr, get_args(Precision)))
        raise SubbyteError(f"precision={precision!r}; use one of {known}")


def tier() -> str | None:
    """The instruction set in use ("avx2", ...), None without the C++ core.

    Raises SubbyteError if SUBBYTE_ISA names one that this machine lacks.
    """
    if _native is None:
        return None
    try:
        return _native.tier()
    except ValueError as error:
        raise SubbyteError(str(error)) from None


def decodes(precision: str, columns: int) -> bool:
    """Whether "auto" decodes a weight for so many columns (rows of x, or pixels of a result).

    Where bytes multiply without vectors ("portable"), PyTorch's float32 product takes a twentieth
    of the time, and decoding costs what a few columns do.
    """
    if precision != "auto" or columns <= _FEW_COLUMNS:
        return False
    return _native is not None and _native.tier() == "portable"


def why_not(x: Tensor, grid: Grid, row_length: int) -> str | None:
    """Why the C++ core does not multiply x with such a weight, in words; None if it does.

    row_length: weights that a value of the result is the sum of.
    """
    if x.dtype is _FLOAT32 and x.is_cpu:
        return _why_not_grid(grid, row_length)
    return _why_not_activations(x)


def why_not_conv(
    x: Tensor, grid: Grid, shape: Sequence[int], groups: int, padding_mode: str
) -> str | None:
    """The same for a convolution with a weight [out, in / groups, kh, kw]."""
    if x.dtype is _FLOAT32 and x.is_cpu:
        return _why_not_window(grid, shape, groups, padding_mode)
    return _why_not_activations(x)


def is_depthwise(shape: Sequence[int], groups: int) -> bool:
    """Whether a convolution is computed in float32 whatever its precision."""
    return shape[0] == groups and shape[1] == 1


def _why_not_activations(x: Tensor) -> str:
    if x.dtype is not _FLOAT32:
        return f"activations are {str(x.dtype).removeprefix('torch.')}, not float32"
    return f"activations are on {x.device}"


# Grids are frozen, and these are asked at every call.


@functools.lru_cache(maxsize=4096)
def _why_not_window(grid: Grid, shape: Sequence[int], groups: int, padding_mode: str) -> str | None:
    if padding_mode != "zeros":
        return f"padding mode is {padding_mode!r}"
    if isinstance(grid.granularity, PerGroup):
        return "scales are per group of inputs, which the products of linear layers alone know"
    if shape[0] // groups < _FEW_CHANNELS and not is_depthwise(shape, groups):
        return f"groups have {shape[0] // groups} output channels"
    return _why_not_grid(grid, torch.Size(shape[1:]).numel())


@functools.lru_cache(maxsize=4096)
def _why_not_grid(grid: Grid, row_length: int) -> str | None:
    if _native is None:
        return "the C++ core (subbyte._native) was not built"
    found = integers(grid)
    if found is None:
        return "levels are no multiples of one step"
    factor, center = found
    largest = max(abs(center), abs(factor * (grid.n_levels - 1) - center))
    if largest > _LARGEST:
        return f"{grid.n_levels} levels are integers up to {largest}; {_LARGEST} fit"
    if isinstance(grid.granularity, PerChannel) and grid.granularity.axis != 0:
        return f"scales are per index of dimension {grid.granularity.axis}, not per output channel"
    if isinstance(grid.granularity, PerGroup):
        row_length = min(row_length, grid.granularity.size)  # a sum ends where its scale does
    if factor * max(largest, grid.n_levels - 1) * 255 * (row_length + 64) >= _SUMS:
        return f"sums of {row_length} products do not fit in 32 bits"
    return None


def integers(grid: Grid) -> tuple[int, int] | None:
    """(factor, center): every level is proportional to the integer factor * code - center."""
    if grid.affine is None:
        return None
    factor = 1 if grid.affine[0] == int(grid.affine[0]) else 2
    return factor, int(-factor * grid.affine[0])
