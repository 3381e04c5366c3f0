"""What a product is told beside its activations and its weight. Built once for a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["none", "relu", "relu6"]

_LIMITS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


@dataclass(frozen=True, slots=True)
class Window:
    """How a two-dimensional convolution moves over its images.

    pads: rows and columns of zeros, (top, bottom, left, right).
    """

    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    groups: int

    def out_size(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the result for images of this size."""
        top, bottom, left, right = self.pads
        height = size[0] + top + bottom - self.dilation[0] * (kernel[0] - 1) - 1
        width = size[1] + left + right - self.dilation[1] * (kernel[1] - 1) - 1
        return height // self.stride[0] + 1, width // self.stride[1] + 1

    def plain(self) -> list[int]:
        """Its nine numbers: stride, dilation, pads, groups."""
        return [*self.stride, *self.dilation, *self.pads, self.groups]

    @staticmethod
    def from_plain(numbers: Sequence[int]) -> Window:
        sh, sw, dh, dw, top, bottom, left, right, groups = numbers
        return Window((sh, sw), (dh, dw), (top, bottom, left, right), groups)


@dataclass(frozen=True, slots=True, eq=False)
class Epilogue:
    """What becomes of a product: activation(product + bias + plus).

    bias: [out] or None. plus: a tensor of the result's shape, a number, or None.
    """

    bias: Tensor | None = None
    plus: Tensor | None = None
    activation: Activation = "none"

    @property
    def limits(self) -> tuple[float, float]:
        """The activation as the least and the largest value."""
        return _LIMITS[self.activation]

    def adding(self, plus: Tensor | None) -> Epilogue:
        """The same with one more sum."""
        if plus is None:
            return self
        return Epilogue(self.bias, plus if self.plus is None else self.plus + plus, self.activation)


PLAIN = Epilogue()


def plain_bias(bias: Tensor | None) -> Tensor | None:
    """As the core reads it: float32, without gaps, also where a network's values are narrower."""
    if bias is None or (bias.dtype is torch.float32 and bias.is_contiguous()):
        return bias
    return bias.float().contiguous()
