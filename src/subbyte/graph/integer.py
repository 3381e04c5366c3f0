"""A reference run in integers: what a fixed-point network computes with integer codes and shifts.

Weights are codes times 2^e, activations integers times 2^-fraction. A Linear or Conv2d is then an
integer sum of products,

    y = (sum of code * x) * 2^(e - fraction)

with no multiplication by a scale: e moves the point. The bias is rounded to the sum's own step.
NumPy only, int64, made to be read and to check against, not to be fast. What stands between the
layers (ReLU, pooling, addition, norms) runs in float64, which holds these fixed-point numbers
exactly; ReLU, max-pooling and addition keep them so.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor, nn

from subbyte.core.functional import scale_exponent, spread
from subbyte.core.grids import ScaleDomain
from subbyte.errors import SubbyteError
from subbyte.modules import PackedConv2d, PackedLinear, PackedWeight

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class FixedPoint:
    """Numbers `values * 2^-fraction`. values: int64, any shape."""

    values: Integers
    fraction: int

    def to_float(self) -> NDArray[np.float64]:
        """Exact while |values| stays below 2^53."""
        return np.ldexp(self.values.astype(np.float64), -self.fraction)


def to_fixed_point(x: NDArray[Any], fraction: int, bits: int) -> FixedPoint:
    """x rounded (half up) to multiples of 2^-fraction, saturated to signed integers of `bits`."""
    if not 2 <= bits <= 32:
        raise SubbyteError(f"bits={bits!r}; activations take 2 to 32 bits")
    if not -64 <= fraction <= 64:
        raise SubbyteError(f"fraction={fraction!r}; use -64 to 64 bits behind the point")
    if not np.isfinite(x).all():
        raise SubbyteError("activations are NaN or infinite; no fixed-point number holds them")
    top = 2 ** (bits - 1)
    rounded = np.floor(np.ldexp(x.astype(np.float64), fraction) + 0.5)
    return FixedPoint(np.clip(rounded, -top, top - 1).astype(np.int64), fraction)


@dataclass(frozen=True, slots=True, eq=False)
class IntegerWeight:
    """A weight as integers: `values * 2^exponent`, int64, of the weight's shape."""

    values: Integers
    exponent: int


def integer_weight(packed: PackedWeight) -> IntegerWeight:
    """The integers in a packed weight of a fixed-point grid.

    Channels of different exponents are shifted to the lowest of them. Raises SubbyteError for
    levels that are not whole numbers, and scales that are not powers of two.
    """
    grid, tensor = packed.grid, packed.quantized()
    whole = all(level.is_integer() for level in grid.levels)
    if not whole or grid.scale_domain is not ScaleDomain.POWER_OF_TWO:
        raise SubbyteError(
            "its weights are not fixed point (whole levels times powers of two); freeze it with "
            "SGM, or keep it out of the network"
        )
    levels = np.array([int(level) for level in grid.levels], dtype=np.int64)
    exponents = scale_exponent(tensor.scale).numpy().astype(np.int64)
    lowest = int(exponents.min())
    shifts = spread(torch.from_numpy(exponents - lowest), packed.shape, grid).numpy()
    return IntegerWeight(levels[tensor.codes.numpy()] << shifts, lowest)


def linear(x: FixedPoint, weight: IntegerWeight, bias: NDArray[Any] | None) -> FixedPoint:
    """x [..., in] -> [..., out]; exact but for the bias, which is rounded to the result's step."""
    fraction = x.fraction - weight.exponent
    return FixedPoint(x.values @ weight.values.T + _bias(bias, fraction), fraction)


def conv2d(
    x: FixedPoint,
    weight: IntegerWeight,
    bias: NDArray[Any] | None,
    *,
    stride: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> FixedPoint:
    """x [batch, in, h, w] -> [batch, out, h', w']; pads: zeros left, right, top and bottom.

    Seven parameters: they are the operator's attributes in a program.
    """
    left, right, top, bottom = pads
    padded = np.pad(x.values, ((0, 0), (0, 0), (top, bottom), (left, right)))
    _, per_group, kh, kw = weight.values.shape
    extent = (dilation[0] * (kh - 1) + 1, dilation[1] * (kw - 1) + 1)
    windows = sliding_window_view(padded, extent, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    batch, _, rows, columns = windows.shape[:4]
    patches = windows.reshape(batch, groups, per_group, rows, columns, kh, kw)
    patches = patches.transpose(1, 0, 3, 4, 2, 5, 6).reshape(groups, -1, per_group * kh * kw)
    kernels = weight.values.reshape(groups, -1, per_group * kh * kw)
    sums = patches @ kernels.transpose(0, 2, 1)
    sums = sums.reshape(groups, batch, rows, columns, -1).transpose(1, 0, 4, 2, 3)
    fraction = x.fraction - weight.exponent
    values = sums.reshape(batch, -1, rows, columns)
    shift = _bias(bias, fraction)
    return FixedPoint(values + (shift if bias is None else shift[:, None, None]), fraction)


def _bias(bias: NDArray[Any] | None, fraction: int) -> Any:
    return 0 if bias is None else np.floor(np.ldexp(bias, fraction) + 0.5).astype(np.int64)


class _IntegerLayer(nn.Module):
    """A packed Linear or Conv2d, computed in integers; float64 in and out."""

    def __init__(self, packed: PackedLinear | PackedConv2d, fraction: int, bits: int) -> None:
        super().__init__()
        self.packed, self.fraction, self.bits = packed, fraction, bits
        self.integers = integer_weight(packed.packed)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        activations = to_fixed_point(x.numpy(), self.fraction, self.bits)
        bias = None if packed.bias is None else packed.bias.double().numpy()
        if isinstance(packed, PackedLinear):
            y = linear(activations, self.integers, bias)
        else:
            y = conv2d(
                activations, self.integers, bias, stride=packed.stride, pads=packed.pads,
                dilation=packed.dilation, groups=packed.groups,
            )  # fmt: skip
        return torch.from_numpy(y.to_float())


def integer_network(net: nn.Module, *, fraction: int = 8, bits: int = 16) -> nn.Module:
    """A copy of a packed network whose layers round their input to fixed point and run in integers.

    fraction: bits behind the point of every layer's input; bits: in all, sign included; what does
    not fit saturates. It takes and gives float64. Raises SubbyteError for a packed layer that is
    not fixed point, or is neither Linear nor Conv2d with zero padding.
    """
    net = copy.deepcopy(net).double().eval()
    for path, parent in list(net.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and isinstance(getattr(child, "packed", None), PackedWeight):
                full = f"{path}.{name}".lstrip(".")
                setattr(parent, name, _integer_layer(full, child, fraction, bits))
    if isinstance(getattr(net, "packed", None), PackedWeight):
        return _integer_layer("", net, fraction, bits)
    return net


def _integer_layer(name: str, layer: nn.Module, fraction: int, bits: int) -> nn.Module:
    known = isinstance(layer, PackedLinear | PackedConv2d)
    if not known or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise SubbyteError(
            f"layer '{name}' ({type(layer).__name__}) has no integer run; Linear and Conv2d with "
            "zero padding have"
        )
    assert isinstance(layer, PackedLinear | PackedConv2d)
    try:
        return _IntegerLayer(layer, fraction, bits)
    except SubbyteError as error:
        raise SubbyteError(f"layer '{name}': {error}") from None
