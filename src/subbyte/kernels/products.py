"""Products of float activations with packed weights, by the C++ core.

Activations are rounded to integers with a scale of their own for each row (Linear) or image (Conv),
multiplied in integers without error, and scaled back:

    int8    127 steps to the largest value: each activation is off by at most 1/254 of it
    int16   two 8-bit planes, 128 times finer
    float32 no rounding: weights become float32 instead, a block of rows at a time

Weights are repacked into panels once, at the first product (docs/adr/0007-kernels.md). A row or
image that holds NaN or infinity, or nothing but values below 1e-35, has no scale: it is computed by
the reference, so that it behaves as in float and nothing else in the batch notices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from subbyte.core.functional import decode, read_scale
from subbyte.core.grids import Grid
from subbyte.kernels.panels import conv_panels, linear_panel
from subbyte.packing import radix

Activation = Literal["none", "relu", "relu6"]

_PLANES = {"int8": 1, "int16": 2, "float32": 0}  # of bytes
_RANGES = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Grid,
    shape: Sequence[int],
    precision: str,
    plus: Tensor | None = None,
    activation: Activation = "none",
) -> Tensor:
    """activation(x W' + bias + plus) of plain tensors that nothing traces; x [..., in]."""
    panel = linear_panel(words, scale, grid, shape)
    x = x.contiguous()
    size = x.shape  # as numbers and not as a tuple: half a microsecond
    y = x.new_empty(size[0], shape[0]) if len(size) == 2 else x.new_empty(*size[:-1], shape[0])
    if plus is not None and not _lies_like(plus, y):
        return finish(linear(x, words, scale, bias, grid, shape, precision), plus, activation)
    values = y.numel()
    if not values:
        return y
    bias = _single(bias)
    low, high = _RANGES[activation]
    odd = panel.linear(
        x.data_ptr(), values // shape[0], y.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if plus is None else plus.data_ptr(), low, high, _PLANES[precision],
        torch.get_num_threads(),
    )  # fmt: skip
    if odd:
        weight = decoded(words, scale, grid, shape)
        rows = F.linear(x.reshape(-1, shape[1])[odd], weight, bias)
        more = None if plus is None else plus.reshape(-1, shape[0])[odd]
        y.view(-1, shape[0])[odd] = finish(rows, more, activation)
    return y


def conv2d(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Grid,
    shape: Sequence[int],
    geometry: tuple[int, ...],
    precision: str,
    plus: Tensor | None = None,
    activation: Activation = "none",
) -> Tensor:
    """activation(conv(x) + bias + plus) of plain tensors that nothing traces; x [n, c, h, w]."""
    panels = conv_panels(words, scale, grid, shape, geometry)
    x, last = laid_out(x)
    y = new_images(x, shape, geometry, last)
    if plus is not None and not _lies_like(plus, y):
        y = conv2d(x, words, scale, bias, grid, shape, geometry, precision)
        return finish(y, plus, activation)
    if not y.numel():
        return y
    n, _, height, width = x.shape
    bias = _single(bias)
    low, high = _RANGES[activation]
    odd = panels.conv2d(
        x.data_ptr(), n, height, width, y.data_ptr(), last,
        0 if bias is None else bias.data_ptr(), 0 if plus is None else plus.data_ptr(), low, high,
        _PLANES[precision], torch.get_num_threads(),
    )  # fmt: skip
    if odd:
        weight = decoded(words, scale, grid, shape)
        images = reference_conv2d(x[odd], weight, bias, geometry)
        y[odd] = finish(images, None if plus is None else plus[odd], activation)
    return y


def finish(y: Tensor, plus: Tensor | None, activation: Activation) -> Tensor:
    """activation(y + plus): what follows a product where the core does not do it."""
    if plus is not None:
        y = y + plus
    if activation == "none":
        return y
    own = not torch.is_grad_enabled()  # y is nobody else's
    return F.relu(y, inplace=own) if activation == "relu" else F.relu6(y, inplace=own)


def laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """x without gaps, and whether its channels lie together (as PyTorch's own kernels decide)."""
    if x.is_contiguous():
        return x, False
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def new_images(x: Tensor, shape: Sequence[int], geometry: tuple[int, ...], last: bool) -> Tensor:
    height, width = out_size(x, shape, geometry)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(
        x.shape[0], shape[0], height, width,
        dtype=x.dtype, device=x.device, memory_format=layout,
    )  # fmt: skip


def out_size(x: Tensor, shape: Sequence[int], geometry: Sequence[int]) -> tuple[int, int]:
    sh, sw, dh, dw, top, bottom, left, right, _ = geometry
    height = (x.shape[2] + top + bottom - dh * (shape[2] - 1) - 1) // sh + 1
    width = (x.shape[3] + left + right - dw * (shape[3] - 1) - 1) // sw + 1
    return height, width


def reference_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    sh, sw, dh, dw, top, bottom, left, right, groups = geometry
    padding = top, left
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x, weight, bias, (sh, sw), padding, (dh, dw), groups)


def decoded(words: Tensor, scale: Tensor, grid: Grid, shape: Sequence[int]) -> Tensor:
    codes = radix.unpack(words, grid.n_levels, torch.Size(shape).numel())
    return decode(codes.reshape(tuple(shape)), read_scale(scale, grid.scale_domain), grid)


def _single(bias: Tensor | None) -> Tensor | None:
    """As the core reads it, also when the network's other values have been made narrower."""
    return bias if bias is None or bias.dtype is torch.float32 else bias.float()


def _lies_like(plus: Tensor, y: Tensor) -> bool:
    """Whether two tensors have their values in the same places."""
    return (
        isinstance(plus, Tensor)  # a number can be added, too
        and plus.shape == y.shape
        and plus.stride() == y.stride()
        and plus.dtype is y.dtype
        and plus.is_cpu
    )
