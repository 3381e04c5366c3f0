"""A product as a packed layer asks for it: checked, and by the shortest way there is."""

from __future__ import annotations

from torch import Tensor

from subbyte.errors import SubbyteError
from subbyte.kernels import products, traced
from subbyte.kernels.values import PLAIN, Epilogue, Window
from subbyte.packing import PackedMatrix


def linear(x: Tensor, matrix: PackedMatrix, precision: str, epilogue: Epilogue = PLAIN) -> Tensor:
    """activation(x W' + bias + plus): x [..., in] -> [..., out], W a matrix [out, in].

    Ask `why_not` first.
    """
    width, size = matrix.shape[1], x.shape
    if not size or size[-1] != width:
        raise _mismatch(size, -1, width)
    way = traced if traced.is_seen(x, matrix, epilogue) else products
    return way.linear(x, matrix, precision, epilogue)


def conv2d(
    x: Tensor, matrix: PackedMatrix, window: Window, precision: str, epilogue: Epilogue = PLAIN
) -> Tensor:
    """activation(conv(x) + bias + plus): x [n, c, h, w] or [c, h, w], W [out, in / groups, kh, kw].

    The result has x's memory format. Ask `why_not_conv` first.
    """
    size, shape = x.shape, matrix.shape
    if len(size) == 3:
        y = conv2d(x[None], matrix, window, precision, Epilogue(epilogue.bias))[0]
        return products.finish(y, epilogue.plus, epilogue.activation)
    if len(size) != 4:
        raise SubbyteError(f"activations are {tuple(size)}; expected [n, c, h, w] or [c, h, w]")
    if size[1] != shape[1] * window.groups:
        raise _mismatch(size, 1, shape[1] * window.groups)
    if min(window.out_size((size[2], size[3]), (shape[2], shape[3]))) < 1:
        raise SubbyteError(
            f"images of {size[2]} x {size[3]} are smaller than the kernel {tuple(shape[2:])}"
        )
    way = traced if traced.is_seen(x, matrix, epilogue) else products
    return way.conv2d(x, matrix, window, precision, epilogue)


def _mismatch(size: tuple[int, ...], axis: int, width: int) -> SubbyteError:
    return SubbyteError(
        f"activations are {tuple(size)}; dimension {axis} must be {width} for this layer"
    )
