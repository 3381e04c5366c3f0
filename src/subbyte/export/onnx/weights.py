"""Weights as few bytes that a runtime turns into float32 when it loads the file.

Codes are digits to the base N. Where a whole number of them fills a byte well, a table of all bytes
gives their levels; else they are digits of 64-bit integers, taken apart by division. Both are plain
operators over constants, which onnxruntime computes once, when the session starts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subbyte.core.grids import Grid, PerGroup, digits_per
from subbyte.core.tensors import LowRank
from subbyte.export.onnx.pieces import Piece, Weight
from subbyte.export.onnx.writer import Writer

_BYTES_WORTH = 1.01  # bytes may be so much larger than words: the table is the shorter graph


def float_weight(writer: Writer, piece: Piece) -> Any:
    """The weight as plain float32."""
    return writer.constant(piece.decoded().float())


def small_weight(writer: Writer, piece: Piece) -> Any:
    """The weight, float32 of its shape, from codes, levels, scales and adapter."""
    weight = piece.weight
    if isinstance(weight, Tensor):
        return float_weight(writer, piece)
    key = ("weight", piece.name)
    if key not in writer.known:
        levels = np.array(weight.grid.levels, np.float32)
        found = digits(writer, weight, levels)
        found = writer.op("Mul", found, scales(writer, weight))
        writer.known[key] = add_adapter(writer, weight, found)
    return writer.known[key]


def digits(writer: Writer, weight: Weight, levels: NDArray[Any]) -> Any:
    """`levels[code]` for every code of the weight, of its shape and the levels' type."""
    codes, n = weight.tensor.codes.flatten().numpy(), weight.grid.n_levels
    if _in_bytes(n):
        per = digits_per(n, 8)
        found = writer.op("Gather", writer.constant(_table(n, per, levels)),
                          _whole(writer, codes, n, per), axis=0)  # fmt: skip
    else:
        per = digits_per(n, 63)
        words = writer.constant(_words(codes, n, per, np.int64))
        powers = writer.constant(np.array([[n**i for i in range(per)]], np.int64))
        found = writer.op("Mod", writer.op("Div", words, powers), writer.constant([n]))
        found = writer.op("Gather", writer.constant(levels), found, axis=0)
    if len(codes) % per:
        found = writer.op("Reshape", found, writer.constant([-1]))
        ends = writer.constant([len(codes)])
        found = writer.op("Slice", found, writer.constant([0]), ends)
    return writer.op("Reshape", found, writer.constant(list(weight.shape)))


def _in_bytes(n: int) -> bool:
    return digits_per(n, 63) * 8 / (digits_per(n, 8) * 63) < _BYTES_WORTH * 64 / 63


def _whole(writer: Writer, codes: NDArray[Any], n: int, per: int) -> Any:
    """Bytes of `per` digits each, as indices."""
    bytes_ = _words(codes, n, per, np.uint8)[:, 0]
    return writer.op("Cast", writer.constant(bytes_), to=6)  # int32


def _words(codes: NDArray[Any], n: int, per: int, dtype: Any) -> NDArray[Any]:
    """[words, 1]: each sum of digit i times n^i."""
    padded = np.pad(codes, (0, -len(codes) % per)).reshape(-1, per).astype(np.int64)
    powers = np.array([n**i for i in range(per)], np.int64)
    found: NDArray[Any] = (padded * powers).sum(1, keepdims=True).astype(dtype)
    return found


def _table(n: int, per: int, levels: NDArray[Any]) -> NDArray[Any]:
    """[n^per, per]: the levels of each byte's digits."""
    every = np.arange(n**per)[:, None] // n ** np.arange(per) % n
    found: NDArray[Any] = levels[every]
    return found


def scales(writer: Writer, weight: Weight) -> Any:
    """float32 scales that broadcast against the weight, from as many numbers as there are."""
    grid, scale = weight.grid, weight.tensor.scale
    if not isinstance(grid.granularity, PerGroup):
        return stored(writer, weight.scales(), grid)
    rows, size = weight.shape[0], grid.granularity.size
    groups, width = len(scale) // rows, torch.Size(weight.shape[1:]).numel()
    found = stored(writer, scale.reshape(rows, groups, 1), grid)
    found = writer.op("Expand", found, writer.constant([rows, groups, size]))
    found = writer.op("Reshape", found, writer.constant([rows, groups * size]))
    if groups * size != width:
        found = writer.op("Slice", found, writer.constant([0]), writer.constant([width]),
                          writer.constant([1]))  # fmt: skip
    return writer.op("Reshape", found, writer.constant(list(weight.shape)))


def stored(writer: Writer, scale: Tensor, grid: Grid) -> Any:
    """Scales in the width that the grid's domain needs; float32 as a value."""
    if scale.numel() > 1 and grid.scale_domain.value == "float16":
        return writer.op("Cast", writer.constant(scale.half()), to=1)
    return writer.constant(scale.float())


def add_adapter(writer: Writer, weight: Weight, value: Any) -> Any:
    """The value and the adapter's product, if the weight has an adapter."""
    if weight.adapter is None:
        return value
    return writer.op("Add", value, _adapter(writer, weight, weight.adapter))


def _adapter(writer: Writer, weight: Weight, adapter: LowRank) -> Any:
    """The adapter's product, float32 of the weight's shape."""
    shape, axis = weight.shape, weight.channel_axis
    groups, rank = adapter.groups, adapter.rank
    up = _factor(writer, adapter.up.reshape(groups, -1, rank))
    up = writer.op("Mul", up, writer.constant(adapter.scale.reshape(groups, 1, rank)))
    down = _factor(writer, adapter.down.reshape(groups, rank, -1))
    found = writer.op("MatMul", up, down)
    moved = [shape[axis], *(n for d, n in enumerate(shape) if d != axis)]
    found = writer.op("Reshape", found, writer.constant(moved))
    if axis == 0:
        return found
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
    return writer.op("Transpose", found, perm=order)


def _factor(writer: Writer, value: Tensor) -> Any:
    made = writer.constant(value)
    return made if value.dtype == torch.float32 else writer.op("Cast", made, to=1)
