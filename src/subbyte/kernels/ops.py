"""The products as operations that autograd and tracers see, with a gradient to the activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from subbyte.core.grids import Grid, PerChannel, PerTensor, ScaleDomain
from subbyte.kernels import products


def plain(grid: Grid) -> tuple[list[float], int, str]:
    """A grid as an op's arguments: levels, axis of its scales (-1: one for all), their domain."""
    axis = getattr(grid.granularity, "axis", -1)
    return list(grid.levels), axis, grid.scale_domain.value


def _grid(levels: Sequence[float], axis: int, domain: str) -> Grid:
    granularity = PerTensor() if axis < 0 else PerChannel(axis)
    return Grid(tuple(levels), granularity, ScaleDomain(domain))


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
    """`linear` as one opaque operation, with a gradient to x."""
    return products.linear(
        x, words, scale, bias, _grid(levels, axis, domain), tuple(shape), precision
    )


@linear_op.register_fake
def _(x, words, scale, bias, levels, axis, domain, shape, precision):  # type: ignore[no-untyped-def]
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
    """`conv2d` as one opaque operation, with a gradient to x."""
    return products.conv2d(
        x, words, scale, bias, _grid(levels, axis, domain), tuple(shape), tuple(geometry), precision
    )


@conv2d_op.register_fake
def _(x, words, scale, bias, levels, axis, domain, shape, geometry, precision):  # type: ignore[no-untyped-def]
    return products.new_images(x, shape, tuple(geometry), products.laid_out(x)[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, _, levels, axis, domain, shape = inputs[:8]
    ctx.save_for_backward(words, scale)
    ctx.of = (_grid(levels, axis, domain), tuple(shape), inputs[8:], x.shape)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, scale = ctx.saved_tensors
    grid, shape, _, _ = ctx.of
    return (grad @ products.decoded(words, scale, grid, shape), *(None,) * 8)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, scale = ctx.saved_tensors
    grid, shape, (geometry, _), size = ctx.of
    sh, sw, dh, dw, top, bottom, left, right, groups = geometry
    n, c, height, width = size
    padded = (n, c, height + top + bottom, width + left + right)
    wide = conv2d_input(
        padded, products.decoded(words, scale, grid, shape), grad, (sh, sw), 0, (dh, dw), groups
    )
    inside = wide[:, :, top : top + height, left : left + width]
    return (inside, *(None,) * 9)


linear_op.register_autograd(_linear_backward, setup_context=_remember)
conv2d_op.register_autograd(_conv2d_backward, setup_context=_remember)
