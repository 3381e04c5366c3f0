"""Convolutions in integers: activations of 8 bits with scales of calibration, int8 weights.

Each value between layers goes through QuantizeLinear and DequantizeLinear. onnxruntime turns a
convolution between such pairs into QLinearConv, and drops what is then nothing: it multiplies
integers, and never makes a float of them. Weights are our levels as whole numbers times a step,
without error; where a layer has an adapter, scales of groups, or levels that are not equal steps,
its weight is rounded to 7 bits for each channel: without VNNI onnxruntime adds pairs of products in
16 bits, which two products of larger weights leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subbyte.core.grids import Grid, PerGroup, PerTensor
from subbyte.export.onnx.pieces import Piece, Weight
from subbyte.export.onnx.products import convolved, geometry, pads_zeros
from subbyte.export.onnx.ranges import Range, Ranges
from subbyte.export.onnx.weights import digits
from subbyte.export.onnx.writer import Writer

PACKED, ROUNDED = "codes, int8 products", "int8, rounded for each channel"
_TOP = 64  # two products with bytes up to 255 fit into 16 bits, where AVX2 adds them
_PASSING = (
    "MaxPool",
    "Slice",
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Identity",
)
_MOST_BIAS = 2.0**30


def whole_levels(grid: Grid) -> tuple[NDArray[np.int8], float] | None:
    """Levels as int8 times a step: levels == whole * step; None where there are none such."""
    if grid.affine is None:
        return None
    offset, inverse = grid.affine
    double = 1 if offset.is_integer() else 2
    whole = np.round((np.arange(grid.n_levels) + offset) * double)
    if np.abs(whole).max() > _TOP:
        return None
    return whole.astype(np.int8), 1 / (inverse * double)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A value of int8 in the graph, and float32 scales [out]. exact: no weight was rounded."""

    value: Any
    scale: Tensor
    exact: bool


def int8_weight(writer: Writer, piece: Piece, packed: bool) -> Int8Weight:
    """The weight of a convolution."""
    key = ("int8", piece.name)
    if key not in writer.known:
        writer.known[key] = _int8_weight(writer, piece, packed)
    found: Int8Weight = writer.known[key]
    return found


def _int8_weight(writer: Writer, piece: Piece, packed: bool) -> Int8Weight:
    weight = piece.weight
    assert isinstance(weight, Weight)
    grid, rows = weight.grid, piece.shape[0]
    levels = whole_levels(grid)
    per_row = grid.granularity == PerTensor() or len(weight.tensor.scale) == rows
    if levels is None or weight.adapter is not None or not per_row or _of_inputs(grid):
        whole, scale = _rounded(piece.decoded())
        return Int8Weight(writer.constant(whole), scale, False)
    codes = weight.tensor.codes.numpy()
    value = digits(writer, weight, levels[0]) if packed else writer.constant(levels[0][codes])
    return Int8Weight(value, (weight.tensor.scale.float() * levels[1]).expand(rows), True)


def _of_inputs(grid: Grid) -> bool:
    return not isinstance(grid.granularity, PerGroup | PerTensor) and grid.granularity.axis != 0


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the weight's shape, and float32 scales [out]."""
    top = weight.flatten(1).abs().amax(1)
    scale = torch.where(top > 0, top / _TOP, torch.ones_like(top))
    whole = (weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).round()
    return whole.clamp(-_TOP, _TOP).to(torch.int8), scale


@dataclass(frozen=True, slots=True, eq=False)
class Int8:
    """Lowers convolutions. packed: weights are base-N bytes, not plain int8.

    known: value of the graph -> the range that it is quantized with.
    """

    ranges: Mapping[str, Ranges]
    packed: bool = True
    known: dict[Any, Range] = field(default_factory=dict)

    def conv(self, writer: Writer, piece: Piece, x: Any, plus: Any) -> tuple[Any, str] | None:
        """The product; None where its bias fits no 32 bits."""
        ranges = self.ranges[piece.name]
        weight = int8_weight(writer, piece, self.packed)
        x, given = geometry(writer, piece, x)
        x_range = self._range(x, ranges.x)
        scale = weight.scale
        if piece.bias is not None:
            dead = scale == 0
            least = piece.bias.abs() / (x_range.scale * _MOST_BIAS)
            scale = torch.where(dead, least.clamp_min(1e-30), scale)
            if (least > scale).any():
                return None
        x = self._quantized(writer, x, x_range)
        w = writer.op("DequantizeLinear", weight.value, writer.constant(scale), axis=0)
        bias = None if piece.bias is None else _bias(writer, piece.bias, scale * x_range.scale)
        y = convolved(writer, piece, (x, w, bias), given)
        if plus is not None:
            y = self._quantized(writer, y, ranges.product)
            plus = self._quantized(writer, plus, self._range(plus, ranges.plus))
            y = writer.op("Add", y, plus)
        # A ReLU or ReLU6 is what rounding to 8 bits does: the range of its result starts at 0, and
        # ends at 6 or below.
        y = self._quantized(writer, y, ranges.result)
        stored = ROUNDED if not weight.exact else PACKED if self.packed else "int8, int8 products"
        return y, stored

    def _range(self, value: Any, seen: Range) -> Range:
        """What the value is quantized with already, if it only passed through; else as seen."""
        while value is not None and value not in self.known:
            node = value.producer()
            passes = node is not None and (node.op_type in _PASSING or pads_zeros(node))
            value = node.inputs[0] if passes else None
        return seen if value is None else self.known[value]

    def _quantized(self, writer: Writer, value: Any, range_: Range) -> Any:
        """The value, rounded to 8 bits of this range; once for each value."""
        if value in self.known:
            return value
        key = ("pair", value)
        if key not in writer.known:
            scale = writer.constant(float(np.float32(range_.scale)))
            zero = writer.constant(np.array(range_.zero, np.uint8))
            q = writer.op("QuantizeLinear", value, scale, zero)
            made = writer.op("DequantizeLinear", q, scale, zero)
            made.shape = value.shape
            self.known[made] = range_
            writer.known[key] = made
        return writer.known[key]


def _bias(writer: Writer, bias: Tensor, scale: Tensor) -> Any:
    """int32 steps of the product's own scale, [out]."""
    whole = (bias.double() / scale.double()).round().to(torch.int32)
    return writer.op("DequantizeLinear", writer.constant(whole), writer.constant(scale), axis=0)
