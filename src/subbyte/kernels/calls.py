"""A product as a packed layer asks for it: checked, and by the shortest way there is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from subbyte.core.grids import Grid
from subbyte.errors import SubbyteError
from subbyte.kernels import products
from subbyte.kernels.ops import conv2d_op, linear_op, plain
from subbyte.kernels.products import Activation, finish


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
    """activation(x W' + bias + plus): x [..., in] -> [..., out], W `shape` [out, in] in words.

    scale: as the grid's domain stores it, one or one a row. Ask `why_not` first.
    """
    _check_width(x, -1, shape[1])
    if _by_op(x, plus):
        if precision == "float32":
            y = F.linear(x, products.decoded(words, scale, grid, shape), bias)
        else:
            y = linear_op(x, words, scale, bias, *plain(grid), list(shape), precision)
        return finish(y, plus, activation)
    return products.linear(x, words, scale, bias, grid, shape, precision, plus, activation)


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
    """activation(conv(x) + bias + plus): x [n, c, h, w] or [c, h, w], a weight in radix words.

    geometry: stride (2), dilation (2), padding (top, bottom, left, right), groups. The result has
    x's memory format. Ask `why_not_conv` first.
    """
    if x.ndim == 3:
        y = conv2d(x[None], words, scale, bias, grid, shape, geometry, precision)[0]
        return finish(y, plus, activation)
    if x.ndim != 4:
        raise SubbyteError(f"activations are {tuple(x.shape)}; expected [n, c, h, w] or [c, h, w]")
    _check_width(x, 1, shape[1] * geometry[-1])
    if min(products.out_size(x, shape, geometry)) < 1:
        raise SubbyteError(
            f"images of {x.shape[2]} x {x.shape[3]} are smaller than the kernel {tuple(shape[2:])}"
        )
    if _by_op(x, plus):
        if precision == "float32":
            y = products.reference_conv2d(
                x, products.decoded(words, scale, grid, shape), bias, geometry
            )
        else:
            y = conv2d_op(
                x, words, scale, bias, *plain(grid), list(shape), list(geometry), precision
            )
        return finish(y, plus, activation)
    return products.conv2d(
        x, words, scale, bias, grid, shape, geometry, precision, plus, activation
    )


def _by_op(x: Tensor, plus: Tensor | None = None) -> bool:
    """Whether the call must be seen by autograd or by a tracer."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return True
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or (isinstance(plus, Tensor) and plus.requires_grad)


def _check_width(x: Tensor, axis: int, width: int) -> None:
    size = x.shape
    if not size or size[axis] != width:
        raise SubbyteError(
            f"activations are {tuple(x.shape)}; dimension {axis} must be {width} for this layer"
        )
