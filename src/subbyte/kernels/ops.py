"""The products as operations that autograd and tracers see.

`subbyte::linear` and `subbyte::conv2d` take plain values only, so that a graph can be stored. They
have gradients to the activations and the bias, and a rule for `torch.func.vmap`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_input

from subbyte.core.grids import Granularity, Grid, PerChannel, PerGroup, PerTensor, ScaleDomain
from subbyte.errors import SubbyteError
from subbyte.kernels import products
from subbyte.kernels.served import check_precision
from subbyte.kernels.values import Epilogue, Window, plain_bias
from subbyte.packing import PackedMatrix


def plain(grid: Grid) -> tuple[list[float], int, str]:
    """A grid as an op's arguments: levels, axis of its scales, their domain.

    An axis of -1 is one scale for all; of -1 - n, one for every n inputs of a row.
    """
    sharing, axis = grid.granularity, -1
    if isinstance(sharing, PerChannel):
        axis = sharing.axis
    elif isinstance(sharing, PerGroup):
        axis = -1 - sharing.size
    return list(grid.levels), axis, grid.scale_domain.value


@functools.lru_cache(maxsize=1024)
def _grid(levels: tuple[float, ...], axis: int, domain: str) -> Grid:
    granularity: Granularity = PerTensor() if axis == -1 else PerChannel(max(axis, 0))
    if axis < -1:
        granularity = PerGroup(-1 - axis)
    return Grid(levels, granularity, ScaleDomain(domain))


def _matrix(
    words: Tensor,
    scale: Tensor,
    levels: Sequence[float],
    axis: int,
    domain: str,
    shape: Sequence[int],
) -> PackedMatrix:
    return PackedMatrix(words, scale, _grid(tuple(levels), axis, domain), tuple(shape))


_TANGENTS = threading.local()  # .apart: forward derivatives are looked after by the caller


@contextmanager
def tangents_apart() -> Iterator[None]:
    """Here the operators may be called within a dual level: their caller adds the tangents."""
    before = getattr(_TANGENTS, "apart", False)
    _TANGENTS.apart = True
    try:
        yield
    finally:
        _TANGENTS.apart = before


def _check_tangents() -> None:
    """Raises SubbyteError where an operator would drop a tangent in silence."""
    if forward_ad._current_level >= 0 and not getattr(_TANGENTS, "apart", False):
        raise SubbyteError(
            "an operator of subbyte within forward differentiation, which would lose its tangent; "
            "call the packed layer itself, outside of torch.compile and torch.export"
        )


@torch.library.custom_op("subbyte::linear", mutates_args=())
def linear_op(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    levels: Sequence[float],
    axis: int,
    domain: str,
    shape: Sequence[int],
    precision: str,
) -> Tensor:
    """`linear` as one opaque operation. Nine parameters: a schema of torch takes plain values."""
    check_precision(precision)
    _check_tangents()
    matrix = _matrix(words, scale, levels, axis, domain, shape)
    return products.linear(x, matrix, precision, Epilogue(plain_bias(bias)))


@linear_op.register_fake
def _(x, words, scale, bias, levels, axis, domain, shape, precision):  # type: ignore[no-untyped-def]
    """Shape of the result. Nine parameters: the operator's."""
    _check_tangents()
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.custom_op("subbyte::conv2d", mutates_args=())
def conv2d_op(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    levels: Sequence[float],
    axis: int,
    domain: str,
    shape: Sequence[int],
    geometry: Sequence[int],
    precision: str,
) -> Tensor:
    """`conv2d` as one opaque operation. Ten parameters: a schema of torch takes plain values.

    geometry: `Window.plain`.
    """
    check_precision(precision)
    _check_tangents()
    matrix, window = _matrix(words, scale, levels, axis, domain, shape), _window(tuple(geometry))
    return products.conv2d(x, matrix, window, precision, Epilogue(plain_bias(bias)))


@conv2d_op.register_fake
def _(x, words, scale, bias, levels, axis, domain, shape, geometry, precision):  # type: ignore[no-untyped-def]
    """Shape of the result. Ten parameters: the operator's."""
    _check_tangents()
    return products.new_images(x, shape, Window.from_plain(geometry))


@functools.lru_cache(maxsize=1024)
def _window(geometry: tuple[int, ...]) -> Window:
    return Window.from_plain(geometry)


# ---------------------------------------------------------------- gradients


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, _ = inputs[:4]
    if ctx.needs_input_grad[2]:
        raise SubbyteError(
            "the scale of a packed weight requires a gradient, which packed products do not give; "
            "train the float network (subbyte.prepare)"
        )
    ctx.save_for_backward(words, scale)
    ctx.grid_and_shape, ctx.rest, ctx.size = inputs[4:8], inputs[8:], x.shape


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_x, _, _, to_bias = ctx.needs_input_grad[:4]
    matrix = _matrix(*ctx.saved_tensors, *ctx.grid_and_shape)
    return (
        grad @ matrix.decoded() if to_x else None, None, None,
        grad.reshape(-1, grad.shape[-1]).sum(0) if to_bias else None, *(None,) * 5,
    )  # fmt: skip


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_x, _, _, to_bias = ctx.needs_input_grad[:4]
    matrix, window = _matrix(*ctx.saved_tensors, *ctx.grid_and_shape), _window(tuple(ctx.rest[0]))
    return (
        images_gradient(grad, matrix, window, ctx.size) if to_x else None,
        None, None, grad.sum((0, 2, 3)) if to_bias else None, *(None,) * 6,
    )  # fmt: skip


def images_gradient(
    grad: Tensor, matrix: PackedMatrix, window: Window, size: Sequence[int]
) -> Tensor:
    """The gradient to images of this size [n, c, h, w], of one to their convolution."""
    top, bottom, left, right = window.pads
    n, channels, height, width = size
    padded = (n, channels, height + top + bottom, width + left + right)
    wide = conv2d_input(
        padded, matrix.decoded(), grad, window.stride, 0, window.dilation, window.groups
    )
    return wide[:, :, top : top + height, left : left + width]


linear_op.register_autograd(_linear_backward, setup_context=_remember)
conv2d_op.register_autograd(_conv2d_backward, setup_context=_remember)


# ---------------------------------------------------------------- vmap


def _only_activations(in_dims: tuple[Any, ...]) -> int:
    """The dimension of x that is mapped over. Raises SubbyteError if anything else is."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:4]):
        raise SubbyteError(
            "torch.func.vmap over the weight or the bias of a packed layer; only activations can "
            "be mapped over: call one network after another"
        )
    return int(in_dims[0])


@linear_op.register_vmap
def _(info, in_dims, x, *rest):  # type: ignore[no-untyped-def]
    return linear_op(x.movedim(_only_activations(in_dims), 0), *rest), 0


@conv2d_op.register_vmap
def _(info, in_dims, x, *rest):  # type: ignore[no-untyped-def]
    x = x.movedim(_only_activations(in_dims), 0)
    return conv2d_op(x.flatten(0, 1), *rest).unflatten(0, x.shape[:2]), 0
