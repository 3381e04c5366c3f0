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
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from subbyte.errors import SubbyteError
from subbyte.functional import decode, read_scale
from subbyte.grids import Grid, PerChannel, PerTensor, ScaleDomain
from subbyte.packing import radix

try:
    from subbyte import _native
except ImportError:  # a source tree without a compiler: the reference does everything
    _native = None  # type: ignore[assignment]

Precision = Literal["int8", "int16", "float32"]
Activation = Literal["none", "relu", "relu6"]

_LARGEST = 127  # integer weights are signed bytes
_SUMS = 2**31
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


# ---------------------------------------------------------------- what is served


def why_not(x: Tensor, grid: Grid, row_length: int) -> str | None:
    """Why the C++ core does not multiply x with such a weight, in words; None if it does.

    row_length: weights that a value of the result is the sum of.
    """
    if x.dtype is not torch.float32:
        return f"activations are {str(x.dtype).removeprefix('torch.')}, not float32"
    if not x.is_cpu:
        return f"activations are on {x.device}"
    return _why_not_grid(grid, row_length)


def why_not_conv(
    x: Tensor,
    grid: Grid,
    shape: Sequence[int],
    groups: int,
    padding_mode: str,
) -> str | None:
    """The same for a convolution with a weight [out, in / groups, kh, kw]."""
    if padding_mode != "zeros":
        return f"padding mode is {padding_mode!r}"
    if shape[0] // groups < _FEW_CHANNELS and not is_depthwise(shape, groups):
        return f"groups have {shape[0] // groups} output channels"
    return why_not(x, grid, torch.Size(shape[1:]).numel())


def is_depthwise(shape: Sequence[int], groups: int) -> bool:
    """Whether a convolution is computed in float32 whatever its precision."""
    return shape[0] == groups and shape[1] == 1


def _why_not_grid(grid: Grid, row_length: int) -> str | None:
    """Cached: a grid is frozen, and this is asked at every call."""
    key = (grid, row_length)
    if key not in _REASONS:
        _REASONS[key] = _find_reason(grid, row_length)
    return _REASONS[key]


_REASONS: dict[tuple[Grid, int], str | None] = {}


def _find_reason(grid: Grid, row_length: int) -> str | None:
    if _native is None:
        return "the C++ core (subbyte._native) was not built"
    integers = _integers(grid)
    if integers is None:
        return "levels are no multiples of one step"
    factor, center = integers
    largest = max(abs(center), abs(factor * (grid.n_levels - 1) - center))
    if largest > _LARGEST:
        return f"{grid.n_levels} levels are integers up to {largest}; {_LARGEST} fit"
    if factor * max(largest, grid.n_levels - 1) * 255 * (row_length + 64) >= _SUMS:
        return f"sums of {row_length} products do not fit in 32 bits"
    return None


def _integers(grid: Grid) -> tuple[int, int] | None:
    """(factor, center): every level is proportional to the integer factor * code - center."""
    if grid.affine is None:
        return None
    factor = 1 if grid.affine[0] == int(grid.affine[0]) else 2
    return factor, int(-factor * grid.affine[0])


# ---------------------------------------------------------------- panels


@dataclass(frozen=True, slots=True)
class _Entry:
    """A repacked weight, and what it was made of."""

    words: weakref.ref[Tensor]
    scale: weakref.ref[Tensor]
    versions: tuple[int, int]
    key: tuple[Any, ...]
    panel: Any


_PANELS: dict[int, _Entry] = {}  # by the identity of the words


def _found(words: Tensor, scale: Tensor, key: tuple[Any, ...]) -> Any:
    """The panel of these words; None if there is none, or if they or the scales have changed.

    Asked at every call, so it looks at as little as will do.
    """
    entry = _PANELS.get(id(words))
    if (
        entry is not None
        and entry.words() is words
        and entry.scale() is scale
        and entry.versions == (_version(words), _version(scale))
        and entry.key == key
    ):
        return entry.panel
    return None


def _keep(words: Tensor, scale: Tensor, key: tuple[Any, ...], panel: Any) -> Any:
    """The panel, remembered until its words are gone."""
    number, versions = id(words), (_version(words), _version(scale))
    reference = weakref.ref(words, lambda _: _PANELS.pop(number, None))
    _PANELS[number] = _Entry(reference, weakref.ref(scale), versions, key, panel)
    return panel


def _version(tensor: Tensor) -> int:
    """Counts changes in place; inference tensors do not keep it (to ask them is slow)."""
    return -1 if tensor.is_inference() else tensor._version


def panel_bytes(words: Tensor) -> int:
    """Bytes of memory that the panel of these words takes now, 0 if it has none."""
    entry = _PANELS.get(id(words))
    return 0 if entry is None or entry.words() is not words else entry.panel.bytes


def _scales(scale: Tensor, grid: Grid, rows: int, factor: int) -> Tensor:
    """float32 [rows]: what the integers of a row are multiplied with."""
    assert grid.affine is not None
    unit = read_scale(scale, grid.scale_domain) / (factor * grid.affine[1])
    return unit.expand(rows).contiguous()


def _linear_panel(words: Tensor, scale: Tensor, grid: Grid, shape: Sequence[int]) -> Any:
    key = grid, shape, _native.tier()
    panel = _found(words, scale, key)
    if panel is not None:
        return panel
    factor, center = _integers(grid)  # type: ignore[misc]
    rows, k = shape
    panel = _native.make_panel(
        words.contiguous(), grid.n_levels, radix.digits_per(grid.n_levels, 64), 0, rows, k,
        torch.arange(k, dtype=torch.int32), _scales(scale, grid, rows, factor), factor, center,
    )  # fmt: skip
    return _keep(words, scale, key, panel)


def _conv_panels(
    words: Tensor, scale: Tensor, grid: Grid, shape: Sequence[int], geometry: tuple[int, ...]
) -> Any:
    """geometry: stride, dilation, padding (top, bottom, left, right), groups."""
    key = grid, shape, geometry, _native.tier()
    panels = _found(words, scale, key)
    if panels is not None:
        return panels
    factor, center = _integers(grid)  # type: ignore[misc]
    sizes = [shape[1] * geometry[-1], shape[0], *shape[2:], *geometry]
    panels = _native.make_conv(
        words.contiguous(), grid.n_levels, radix.digits_per(grid.n_levels, 64), sizes,
        _scales(scale, grid, shape[0], factor), factor, center,
    )  # fmt: skip
    return _keep(words, scale, key, panels)


# ---------------------------------------------------------------- products


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
            y = F.linear(x, _decode(words, scale, grid, shape), bias)
        else:
            y = linear_op(x, words, scale, bias, *_plain(grid), list(shape), precision)
        return finish(y, plus, activation)
    return _linear(x, words, scale, bias, grid, shape, precision, plus, activation)


def _linear(
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
    panel = _linear_panel(words, scale, grid, shape)
    x = x.contiguous()
    size = x.shape  # as numbers and not as a tuple: half a microsecond
    y = x.new_empty(size[0], shape[0]) if len(size) == 2 else x.new_empty(*size[:-1], shape[0])
    if plus is not None and not _lies_like(plus, y):
        return finish(_linear(x, words, scale, bias, grid, shape, precision), plus, activation)
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
        weight = _decode(words, scale, grid, shape)
        rows = F.linear(x.reshape(-1, shape[1])[odd], weight, bias)
        more = None if plus is None else plus.reshape(-1, shape[0])[odd]
        y.view(-1, shape[0])[odd] = finish(rows, more, activation)
    return y


def finish(y: Tensor, plus: Tensor | None, activation: Activation) -> Tensor:
    """activation(y + plus): what follows a product where the core does not do it."""
    if plus is not None:
        y = y + plus
    if activation == "none":
        return y
    own = not torch.is_grad_enabled()  # y is nobody else's
    return F.relu(y, inplace=own) if activation == "relu" else F.relu6(y, inplace=own)


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
    if min(_out_size(x, shape, geometry)) < 1:
        raise SubbyteError(
            f"images of {x.shape[2]} x {x.shape[3]} are smaller than the kernel {tuple(shape[2:])}"
        )
    if _by_op(x, plus):
        if precision == "float32":
            y = _reference_conv2d(x, _decode(words, scale, grid, shape), bias, geometry)
        else:
            y = conv2d_op(
                x, words, scale, bias, *_plain(grid), list(shape), list(geometry), precision
            )
        return finish(y, plus, activation)
    return _conv2d(x, words, scale, bias, grid, shape, geometry, precision, plus, activation)


def _conv2d(
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
    panels = _conv_panels(words, scale, grid, shape, geometry)
    x, last = _laid_out(x)
    y = _new_images(x, shape, geometry, last)
    if plus is not None and not _lies_like(plus, y):
        y = _conv2d(x, words, scale, bias, grid, shape, geometry, precision)
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
        weight = _decode(words, scale, grid, shape)
        images = _reference_conv2d(x[odd], weight, bias, geometry)
        y[odd] = finish(images, None if plus is None else plus[odd], activation)
    return y


def _laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """x without gaps, and whether its channels lie together (as PyTorch's own kernels decide)."""
    if x.is_contiguous():
        return x, False
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def _new_images(x: Tensor, shape: Sequence[int], geometry: tuple[int, ...], last: bool) -> Tensor:
    height, width = _out_size(x, shape, geometry)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(
        x.shape[0], shape[0], height, width,
        dtype=x.dtype, device=x.device, memory_format=layout,
    )  # fmt: skip


def _out_size(x: Tensor, shape: Sequence[int], geometry: Sequence[int]) -> tuple[int, int]:
    sh, sw, dh, dw, top, bottom, left, right, _ = geometry
    height = (x.shape[2] + top + bottom - dh * (shape[2] - 1) - 1) // sh + 1
    width = (x.shape[3] + left + right - dw * (shape[3] - 1) - 1) // sw + 1
    return height, width


def _reference_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    sh, sw, dh, dw, top, bottom, left, right, groups = geometry
    padding = top, left
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x, weight, bias, (sh, sw), padding, (dh, dw), groups)


def _decode(words: Tensor, scale: Tensor, grid: Grid, shape: Sequence[int]) -> Tensor:
    codes = radix.unpack(words, grid.n_levels, torch.Size(shape).numel())
    return decode(codes.reshape(tuple(shape)), read_scale(scale, grid.scale_domain), grid)


_PLANES = {"int8": 1, "int16": 2, "float32": 0}  # of bytes
_RANGES = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


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


# ---------------------------------------------------------------- ops for tracers and autograd


def _plain(grid: Grid) -> tuple[list[float], int, str]:
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
    return _linear(x, words, scale, bias, _grid(levels, axis, domain), tuple(shape), precision)


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
    return _conv2d(
        x, words, scale, bias, _grid(levels, axis, domain), tuple(shape), tuple(geometry), precision
    )


@conv2d_op.register_fake
def _(x, words, scale, bias, levels, axis, domain, shape, geometry, precision):  # type: ignore[no-untyped-def]
    return _new_images(x, shape, tuple(geometry), _laid_out(x)[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, _, levels, axis, domain, shape = inputs[:8]
    ctx.save_for_backward(words, scale)
    ctx.of = (_grid(levels, axis, domain), tuple(shape), inputs[8:], x.shape)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, scale = ctx.saved_tensors
    grid, shape, _, _ = ctx.of
    return (grad @ _decode(words, scale, grid, shape), *(None,) * 8)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, scale = ctx.saved_tensors
    grid, shape, (geometry, _), size = ctx.of
    sh, sw, dh, dw, top, bottom, left, right, groups = geometry
    n, c, height, width = size
    padded = (n, c, height + top + bottom, width + left + right)
    wide = conv2d_input(
        padded, _decode(words, scale, grid, shape), grad, (sh, sw), 0, (dh, dw), groups
    )
    inside = wide[:, :, top : top + height, left : left + width]
    return (inside, *(None,) * 9)


linear_op.register_autograd(_linear_backward, setup_context=_remember)
conv2d_op.register_autograd(_conv2d_backward, setup_context=_remember)
