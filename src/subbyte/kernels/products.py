"""Products of float activations with packed weights, by the C++ core.

Activations are rounded to integers with a scale of their own for each row (Linear) or image (Conv),
multiplied in integers without error, and scaled back:

    int8    127 steps to the largest value: each activation is off by at most 1/254 of it
    int16   two 8-bit planes, 128 times finer
    auto    int8; where bytes multiply slowly, the weight decoded for many columns (`decodes`)
    float32 no rounding: weights become float32 instead, a block of rows at a time

Weights are repacked into panels once, at the first product (docs/adr/0007-kernels.md). A row or
image that holds NaN or infinity, or nothing but values below 1e-35, has no scale, and the sums of
one with values near the end of float32's range might overflow before they are scaled: these are
computed by the reference, so that they behave as in float and nothing else in the batch notices.

What is here sees plain tensors only: whatever traces, transforms or differentiates is in `traced`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subbyte.errors import SubbyteError
from subbyte.kernels.panels import panel_of
from subbyte.kernels.served import decodes, is_depthwise
from subbyte.kernels.values import Activation, Epilogue, Window
from subbyte.packing import PackedMatrix

PLANES = {"auto": 1, "int8": 1, "int16": 2, "float32": 0}  # of bytes


def linear(x: Tensor, matrix: PackedMatrix, precision: str, epilogue: Epilogue) -> Tensor:
    """`kernels.linear` of plain tensors that nothing traces; x [..., in]."""
    rows, plus = matrix.shape[0], epilogue.plus
    size = x.shape  # as numbers and not as a tuple: half a microsecond
    if decodes(precision, x.numel() // max(1, size[-1])):
        y = F.linear(x, matrix.decoded(), epilogue.bias)
        return finish(y, plus, epilogue.activation)
    y = x.new_empty(size[0], rows) if len(size) == 2 else x.new_empty(*size[:-1], rows)
    if plus is not None and not _lies_like(plus, y):
        y = linear(x, matrix, precision, Epilogue(epilogue.bias))
        return finish(y, plus, epilogue.activation)
    x = x.contiguous()
    low, high = epilogue.limits
    try:
        odd = panel_of(matrix).linear(
            x, y, epilogue.bias, plus, low, high, PLANES[precision], torch.get_num_threads()
        )
    except ValueError as error:
        raise _named(matrix, error) from None
    if odd:
        rest = F.linear(x.reshape(-1, size[-1])[odd], matrix.decoded(), epilogue.bias)
        more = None if plus is None else plus.reshape(-1, rows)[odd]
        y.view(-1, rows)[odd] = finish(rest, more, epilogue.activation)
    return y


def conv2d(
    x: Tensor, matrix: PackedMatrix, window: Window, precision: str, epilogue: Epilogue
) -> Tensor:
    """`kernels.conv2d` of plain tensors that nothing traces; x [n, c, h, w]."""
    depthwise = is_depthwise(matrix.shape, window.groups)
    if not depthwise and decodes(precision, pixels(x, matrix.shape, window)):
        y = reference_conv2d(x, matrix.decoded(), epilogue.bias, window)
        return finish(y, epilogue.plus, epilogue.activation)
    x, last = _laid_out(x)
    y, plus = new_images(x, matrix.shape, window, last), epilogue.plus
    if plus is not None and not _lies_like(plus, y):
        y = conv2d(x, matrix, window, precision, Epilogue(epilogue.bias))
        return finish(y, plus, epilogue.activation)
    low, high = epilogue.limits
    try:
        odd = panel_of(matrix, window).conv2d(
            x, y, last, epilogue.bias, plus, low, high, PLANES[precision], torch.get_num_threads()
        )
    except ValueError as error:
        raise _named(matrix, error) from None
    if odd:
        images = reference_conv2d(x[odd], matrix.decoded(), epilogue.bias, window)
        more = None if plus is None else plus[odd]
        y[odd] = finish(images, more, epilogue.activation)
    return y


def finish(y: Tensor, plus: Tensor | None, activation: Activation) -> Tensor:
    """activation(y + plus): what follows a product where the core does not do it."""
    if plus is not None:
        y = y + plus
    if activation == "none":
        return y
    own = not torch.is_grad_enabled()  # y is nobody else's
    return F.relu(y, inplace=own) if activation == "relu" else F.relu6(y, inplace=own)


def new_images(x: Tensor, shape: tuple[int, ...], window: Window, last: bool | None = None) -> Any:
    """Room for the result of a convolution, laid out as x is."""
    if last is None:
        last = _laid_out(x)[1]
    height, width = window.out_size((x.shape[2], x.shape[3]), (shape[2], shape[3]))
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(
        x.shape[0], shape[0], height, width,
        dtype=x.dtype, device=x.device, memory_format=layout,
    )  # fmt: skip


def pixels(x: Tensor, shape: tuple[int, ...], window: Window) -> int:
    """Of all images of a convolution's result."""
    height, width = window.out_size((x.shape[-2], x.shape[-1]), (shape[2], shape[3]))
    return (x.shape[0] if x.ndim == 4 else 1) * height * width


def reference_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """The convolution in float, of x [..., c, h, w]."""
    top, bottom, left, right = window.pads
    padding = top, left
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x, weight, bias, window.stride, padding, window.dilation, window.groups)


def _laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """x without gaps, and whether its channels lie together (as PyTorch's own kernels decide)."""
    if x.is_contiguous():
        return x, False
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def _lies_like(plus: Any, y: Tensor) -> bool:
    """Whether two tensors have their values in the same places."""
    return (
        isinstance(plus, Tensor)  # a number can be added, too
        and plus.shape == y.shape
        and plus.stride() == y.stride()
        and plus.dtype is y.dtype
        and plus.is_cpu
    )


def _named(matrix: PackedMatrix, error: ValueError) -> SubbyteError:
    """What the core refuses, with the layer that it was asked for."""
    if isinstance(error, SubbyteError):
        return error
    return SubbyteError(
        f"a packed layer with a weight {list(matrix.shape)}: {error}; put back tensors that fit it"
    )
