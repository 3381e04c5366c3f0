"""Linear layers as MatMulNBits, the operator of onnxruntime for weights of 2, 4 and 8 bits.

    y = sum over blocks of scale_block * (q - zero) x,   q of 2, 4 or 8 bits

It rounds activations to int8, a block of 16 to 256 inputs at a time. Our levels are equally spaced,
i - (N - 1) / 2 steps from zero. For odd N the zero point is whole. For even N it is a half:

    sum of step (q - zero - 1/2) x  =  sum of step (q - zero) x  -  step / 2 * sum of x

The last term is added in float32, of the exact activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subbyte.core.grids import Grid, PerChannel, PerGroup
from subbyte.export.onnx.pieces import Piece, Weight
from subbyte.export.onnx.products import finished
from subbyte.export.onnx.writer import MICROSOFT, Writer

_BLOCKS = (128, 64, 32, 16)  # the first that fits
_INT8 = 4  # accuracy level: activations of 8 bits


@dataclass(frozen=True, slots=True)
class Steps:
    """A grid of equal steps: level i is (i - zero - half) * step. half: 0 or 1/2."""

    step: float
    zero: int
    half: float
    bits: int


def steps_of(grid: Grid) -> Steps | None:
    """None for a grid whose levels are not equal steps around zero, exactly."""
    if grid.affine is None:
        return None
    offset, inverse = grid.affine
    zero = int(-offset // 1)
    half = -offset - zero
    bits = next(b for b in (2, 4, 8) if grid.n_levels <= 2**b)
    if not 0 <= zero < 2**bits:
        return None
    return Steps(1 / inverse, zero, half, bits)


def why_not_nbits(piece: Piece) -> str | None:
    """Why a piece is no MatMulNBits; None if it is."""
    weight = piece.weight
    if piece.kind != "Linear" or isinstance(weight, Tensor):
        return "it is no packed Linear"
    if weight.adapter is not None:
        return "it has an adapter"
    if steps_of(weight.grid) is None:
        return f"its {weight.grid.n_levels} levels are not equal steps"
    if weight.grid.granularity == PerChannel(1):
        return "its scales are of inputs"
    return None if block_of(weight) else f"{weight.shape[1]} inputs fill no block of 16"


def block_of(weight: Weight) -> int | None:
    """Inputs of a block: at most as many as share a scale."""
    width, grid = weight.shape[1], weight.grid
    if isinstance(grid.granularity, PerGroup) and grid.granularity.size < width:
        size = grid.granularity.size
        return next((b for b in _BLOCKS if size % b == 0), None)
    return next((b for b in _BLOCKS if width >= b), None)


def nbits(writer: Writer, piece: Piece, x: Any, plus: Any) -> tuple[Any, str]:
    """The product; ask `why_not_nbits` first."""
    weight = piece.weight
    assert isinstance(weight, Weight)
    steps, block = steps_of(weight.grid), block_of(weight)
    assert steps is not None
    assert block is not None
    rows, width = weight.shape
    inputs = [x, _codes(writer, piece.name, weight, block, steps.bits),
              _scales(writer, weight, steps, block)]  # fmt: skip
    if steps.zero != 2 ** (steps.bits - 1):
        inputs.append(_zeros(writer, steps, rows, -(-width // block)))
    y = writer.op(
        "MatMulNBits", *inputs, domain=MICROSOFT, K=width, N=rows, bits=steps.bits,
        block_size=block, accuracy_level=_INT8,
    )  # fmt: skip
    if steps.half:
        y = writer.op("Sub", y, _halves(writer, weight, steps, x))
    if piece.bias is not None:
        y = writer.op("Add", y, writer.constant(piece.bias.float()))
    return finished(writer, piece, y, plus), f"MatMulNBits, {steps.bits} bits"


def _codes(writer: Writer, name: str, weight: Weight, block: int, bits: int) -> Any:
    """uint8 [rows, blocks, block * bits / 8], the first code in the lowest bits."""
    key = ("nbits", name)
    if key not in writer.known:
        codes = weight.tensor.codes.numpy()
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % block)))
        writer.known[key] = writer.constant(_fields(codes.reshape(len(codes), -1, block), bits))
    return writer.known[key]


def _fields(codes: NDArray[Any], bits: int) -> NDArray[Any]:
    """Codes of the last dimension, 8 / bits of them in a byte."""
    per = 8 // bits
    split = codes.reshape(*codes.shape[:-1], -1, per).astype(np.uint8)
    found = np.zeros(split.shape[:-1], np.uint8)
    for i in range(per):
        found |= split[..., i] << (bits * i)
    return found


def _per_group(weight: Weight) -> Tensor:
    """Scales as [rows or 1, groups]."""
    rows, scale = weight.shape[0], weight.tensor.scale
    return scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(rows, -1)


def _scales(writer: Writer, weight: Weight, steps: Steps, block: int) -> Any:
    """float32 [rows, blocks], from as many numbers as there are."""
    rows, width = weight.shape
    scale = _per_group(weight) * steps.step
    blocks = -(-width // block)
    if scale.shape[1] == 1:
        return writer.op("Expand", writer.constant(scale), writer.constant([rows, blocks]))
    assert isinstance(weight.grid.granularity, PerGroup)
    each = weight.grid.granularity.size // block
    return writer.constant(scale.repeat_interleave(each, 1)[:, :blocks])


def _zeros(writer: Writer, steps: Steps, rows: int, blocks: int) -> Any:
    """uint8 [rows, bytes], packed like the codes of a row of blocks."""
    per = 8 // steps.bits
    row = _fields(np.full((1, -(-blocks // per) * per), steps.zero), steps.bits)
    shape = writer.constant([rows, row.shape[1]])
    return writer.op("Expand", writer.constant(row), shape)


def _halves(writer: Writer, weight: Weight, steps: Steps, x: Any) -> Any:
    """step / 2 * the sum of the inputs that share a scale, over all of these."""
    half = _per_group(weight) * (steps.step * steps.half)
    if half.shape[1] == 1:
        total = writer.op("ReduceSum", x, writer.constant([-1]), keepdims=1)
        return writer.op("Mul", total, writer.constant(half[:, 0]))
    assert isinstance(weight.grid.granularity, PerGroup)
    size, width = weight.grid.granularity.size, weight.shape[1]
    of_group = torch.arange(width) // size == torch.arange(half.shape[1])[:, None]
    sums = writer.op("MatMul", x, writer.constant(of_group.float().T.contiguous()))
    return writer.op("MatMul", sums, writer.constant(half.T.contiguous()))
