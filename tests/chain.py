"""The arithmetic of activations in 8 bits, in exact integers and float32 (docs/runtime.md).

A value in bytes is q = byte - zero with x = scale * q. What an operation computes on it is a sum of
whole numbers, exact, then float32 in the order that is written here, then rounded, ties to even.
NumPy and float64 convolutions of whole numbers (exact below 2^53); nothing of the runtime.
"""

import numpy as np
import torch
from torch.nn import functional as F

from subbyte.graph.activations import FUNCTIONS, SAME, ByteScale

f32 = np.float32


class Bytes:
    """q: whole numbers [n, c, h, w] or [n, k]."""

    def __init__(self, q, scale):
        self.q, self.scale = np.asarray(q, np.int64), scale

    def values(self):
        return self.q.astype(f32) * f32(self.scale.scale)

    def like(self, q):
        return Bytes(q, self.scale)


def zero_of(scale):
    return 128 if scale.signed else 0


def from_memory(array, scale):
    """What the runtime shows: uint8, images N H W C."""
    q = array.astype(np.int64) - zero_of(scale)
    return Bytes(q.transpose(0, 3, 1, 2) if q.ndim == 4 else q, scale)


def to_memory(own):
    found = (own.q + zero_of(own.scale)).astype(np.uint8)
    return found.transpose(0, 2, 3, 1) if found.ndim == 4 else found


def rounded(value, scale, low=-np.inf, high=np.inf):
    """float32 in units of the scale."""
    assert value.dtype == f32
    value = np.minimum(
        np.maximum(value, max(f32(low), f32(scale.low))), min(f32(high), f32(scale.high))
    )
    return Bytes(np.rint(value), scale)


def inverse_of(scale):
    return f32(1) / f32(scale.scale)


def integers_of(packed):
    """Whole numbers of a packed weight, and the float32 factor of each row."""
    tensor = packed.quantized()
    levels = torch.tensor(tensor.grid.levels, dtype=torch.float64)
    step = (len(levels) - 1) / (levels[-1] - levels[0]).item()
    unit = step if len(levels) % 2 else 2 * step
    whole = (levels * unit).round()
    assert torch.allclose(whole, levels * unit)
    scale = tensor.scale.numpy().astype(f32) / f32(unit)
    return whole[tensor.codes.long()], np.broadcast_to(scale, packed.shape[0])


def sums_of(layer, q):
    """A convolution's or Linear's products, exact."""
    weight, _ = integers_of(layer.packed)
    x = torch.from_numpy(np.asarray(q, np.float64))
    if weight.ndim == 2:
        return F.linear(x, weight).numpy()
    found = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return found.numpy()


def by_rows(vector, like):
    return vector.reshape(1, -1, *[1] * (like.ndim - 2))


def rounded_images(x):
    """Each image by its largest magnitude, as layers round floats; q and the scales [n]."""
    largest = np.abs(x).reshape(len(x), -1).max(1).astype(f32)
    inverse, scale = f32(127) / largest, largest / f32(127)
    return np.rint(x * inverse.reshape(-1, 1, 1, 1)), scale


LIMITS = {"none": (-np.inf, np.inf), "relu": (0, np.inf), "relu6": (0, 6)}


def conv(layer, x, plus, to):
    """x: Bytes, or float32 images. to: the result's scale, or None for float32."""
    if isinstance(x, Bytes):
        q, scale = x.q, np.full(len(x.q), f32(x.scale.scale))
    else:
        q, scale = rounded_images(x)
    sums = sums_of(layer, q).astype(f32)
    _, row = integers_of(layer.packed)
    bias = np.zeros(len(row), f32) if layer.bias is None else layer.bias.detach().numpy()
    low, high = LIMITS[layer.activation]
    factor = scale[:, None] * row[None]
    if to is None:
        value = sums * factor.reshape(*factor.shape, *[1] * (sums.ndim - 2))
        start = by_rows(bias, sums) + (0 if plus is None else plus)
        return np.clip(value + start, f32(low), f32(high))
    inverse = inverse_of(to)
    factor = (factor * inverse).reshape(*factor.shape, *[1] * (sums.ndim - 2))
    value = sums * factor + by_rows(bias * inverse, sums)
    if plus is not None:
        value = value + plus.q.astype(f32) * (f32(plus.scale.scale) * inverse)
    return rounded(value, to, f32(low) * inverse, f32(high) * inverse)


def add(a, b, to):
    inverse = inverse_of(to)
    left = a.q.astype(f32) * (f32(a.scale.scale) * inverse)
    return rounded(left + b.q.astype(f32) * (f32(b.scale.scale) * inverse), to)


def same_scale(x, to):
    return x if x.scale == to else rounded(x.values() * inverse_of(to), to)


def average(x, args, to):
    q = torch.from_numpy(x.q.astype(np.float64))
    settings = {k: args[o] for k, o in (("stride", "strides"), ("padding", "pads")) if o in args}
    sums = F.avg_pool2d(q, args["kernel_shape"], divisor_override=1, **settings).numpy()
    count = F.avg_pool2d(torch.ones_like(q), args["kernel_shape"], divisor_override=1, **settings)
    if args.get("count_include_pad", True):
        count = torch.full_like(count, float(np.prod(args["kernel_shape"])))
    factor = f32(x.scale.scale) * inverse_of(to)
    return rounded(sums.astype(f32) * factor / count.numpy().astype(f32), to)


def mean(x):
    factor = f32(x.scale.scale) / f32(x.q.shape[2] * x.q.shape[3])
    return x.q.sum((2, 3)).astype(f32) * factor


__all__ = ["FUNCTIONS", "SAME", "ByteScale", "Bytes", "add", "average", "conv", "from_memory",
           "mean", "rounded", "same_scale", "to_memory"]  # fmt: skip
