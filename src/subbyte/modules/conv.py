"""Convolutions with packed weights; float activations.

Two-dimensional ones multiply in integers (`subbyte.kernels`) where `precision` allows and the
kernels serve them. All others run on the reference: decode the weight, run the float operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from subbyte import kernels
from subbyte.core.tensors import QuantizedLayer
from subbyte.errors import SubbyteError
from subbyte.kernels import Activation, Precision, Window
from subbyte.modules.linear import then
from subbyte.modules.weight import (
    PackedWeight,
    by_reference,
    decoded_weight,
    frozen_bias,
    keep_types,
    take_attributes,
)


class _PackedConv(nn.Module):
    """A convolution with a packed weight; the subclass names its function."""

    function: Callable[..., Tensor]
    bias: nn.Parameter | None
    _apply = keep_types
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def __init__(self, like: Any, layer: QuantizedLayer) -> None:
        super().__init__()
        take_attributes(self, like)
        self.pads = tuple(like._reversed_padding_repeated_twice)
        self.packed = PackedWeight(layer)
        self.register_parameter("bias", frozen_bias(layer.bias))

    weight = property(decoded_weight)

    def forward(self, input: Tensor) -> Tensor:
        x = input  # torch's name of the argument
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.pads, mode=self.padding_mode), 0
        return by_reference(
            lambda x, weight, bias: type(self).function(
                x, weight, bias, self.stride, padding, self.dilation, self.groups
            ),
            x,
            self,
        )

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}, groups={self.groups}"


class PackedConv1d(_PackedConv):
    """`nn.Conv1d` with a packed weight [out, in / groups, k]."""

    function = staticmethod(F.conv1d)


class PackedConv2d(_PackedConv):
    """`nn.Conv2d` with a packed weight [out, in / groups, kh, kw].

    activation, and `plus` added before it: what `fuse` moves into the layer.
    """

    function = staticmethod(F.conv2d)
    stride: tuple[int, int]
    dilation: tuple[int, int]
    precision: Precision = "float32"
    activation: Activation = "none"
    fused = False  # `fuse` has moved something into it

    def __init__(self, like: nn.Conv2d, layer: QuantizedLayer) -> None:
        super().__init__(like, layer)
        left, right, top, bottom = self.pads
        (sh, sw), (dh, dw) = self.stride, self.dilation
        self.window = Window((sh, sw), (dh, dw), (top, bottom, left, right), self.groups)

    def forward(self, input: Tensor, plus: Tensor | None = None) -> Tensor:
        x = input
        # From the dictionaries: nn.Module's look-up by attribute takes a microsecond a name.
        packed: Any = self._modules["packed"]
        if plus is None and self.padding_mode == "zeros":
            y: Tensor | None = packed.answer(self, x)
            if y is not None:
                return y
        if self.why_not(x):
            return kernels.finish(super().forward(x), plus, self.activation)
        own = packed.epilogue(self._parameters["bias"], self.activation)
        epilogue = own.adding(plus)
        if packed._buffers["up"] is not None:
            epilogue = epilogue.adding(self._adapted(x, *packed.factors()))
        y = kernels.conv2d(x, packed.matrix(), self.window, self.precision, epilogue)
        packed.make_ready(self, own)
        return y

    def _adapted(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """What the adapter adds to the products."""
        down = down.reshape(-1, *self.packed.shape[1:])
        inner = F.conv2d(x, down, None, self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(inner, up[:, :, None, None], groups=self.groups)

    def why_not(self, x: Tensor, plus: Tensor | None = None) -> str | None:
        """Why the kernels do not convolve x, in words; None if they do."""
        packed: Any = self._modules["packed"]
        return kernels.why_not_conv(x, packed.grid, packed.shape, self.groups, self.padding_mode)

    def extra_repr(self) -> str:
        return super().extra_repr() + then(self)


class PackedConv3d(_PackedConv):
    """`nn.Conv3d` with a packed weight [out, in / groups, kd, kh, kw]."""

    function = staticmethod(F.conv3d)


class _PackedConvTranspose(nn.Module):
    """A transposed convolution with a packed weight; the subclass names its function."""

    function: Callable[..., Tensor]
    bias: nn.Parameter | None
    _apply = keep_types
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __init__(self, like: Any, layer: QuantizedLayer) -> None:
        super().__init__()
        take_attributes(self, like)
        self.packed = PackedWeight(layer, channel_axis=1)
        self.register_parameter("bias", frozen_bias(layer.bias))

    weight = property(decoded_weight)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        x = input  # torch's name of the argument
        extra = self.output_padding if output_size is None else self._extra(x, output_size)
        return by_reference(
            lambda x, weight, bias: type(self).function(
                x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation
            ),
            x,
            self,
        )

    def _extra(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """Output padding that gives the spatial output_size."""
        n_dims = len(self.kernel_size)
        wanted = tuple(output_size)[-n_dims:]
        smallest = [
            (x.shape[d - n_dims] - 1) * self.stride[d]
            - 2 * self.padding[d]
            + self.dilation[d] * (self.kernel_size[d] - 1)
            + 1
            for d in range(n_dims)
        ]
        extra = tuple(want - small for want, small in zip(wanted, smallest, strict=True))
        if any(not 0 <= e < s for e, s in zip(extra, self.stride, strict=True)):
            raise SubbyteError(
                f"output_size {wanted} cannot be had; it must be at least {tuple(smallest)} and "
                f"less than one stride {self.stride} above it"
            )
        return extra

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}, groups={self.groups}"


class PackedConvTranspose1d(_PackedConvTranspose):
    """`nn.ConvTranspose1d` with a packed weight [in, out / groups, k]."""

    function = staticmethod(F.conv_transpose1d)


class PackedConvTranspose2d(_PackedConvTranspose):
    """`nn.ConvTranspose2d` with a packed weight [in, out / groups, kh, kw]."""

    function = staticmethod(F.conv_transpose2d)


class PackedConvTranspose3d(_PackedConvTranspose):
    """`nn.ConvTranspose3d` with a packed weight [in, out / groups, kd, kh, kw]."""

    function = staticmethod(F.conv_transpose3d)
