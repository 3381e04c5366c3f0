"""The waist of the hourglass: what every method produces and every consumer reads.

All three values are frozen; tensors inside them are never written to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from subbyte.core.functional import decode, n_groups
from subbyte.core.grids import Grid, n_words
from subbyte.errors import SubbyteError


class QuantizedWeight(Protocol):
    """What is read of a quantized weight: a `QuantizedTensor`, or what a file holds of one."""

    @property
    def codes(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def grid(self) -> Grid: ...
    @property
    def shape(self) -> torch.Size: ...
    @property
    def n_bytes(self) -> int: ...
    def dequantize(self) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A weight as codes on a grid.

    codes: uint8, the weight's shape, each below grid.n_levels.
    scale: float32 [groups], in the grid's scale domain; groups is 1 per tensor, the length of the
        channel axis, or the number of groups of inputs, row by row. The value of a weight is
        `levels[code] * scale`, computed in float32.
    Raises SubbyteError when these do not fit together.
    """

    codes: Tensor
    scale: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8:
            raise SubbyteError(f"codes are {self.codes.dtype}, not torch.uint8")
        if self.scale.dtype != torch.float32:
            raise SubbyteError(f"scale is {self.scale.dtype}, not torch.float32")
        groups = n_groups(self.codes.shape, self.grid)
        if tuple(self.scale.shape) != (groups,):
            raise SubbyteError(
                f"scale has shape {tuple(self.scale.shape)}, codes of shape "
                f"{tuple(self.codes.shape)} on this grid need ({groups},)"
            )
        check_scale(self.scale)
        top = int(self.codes.max()) if self.codes.numel() else 0
        if top >= self.grid.n_levels:
            raise SubbyteError(f"code {top} is above the grid's last code {self.grid.n_levels - 1}")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def n_bytes(self) -> int:
        """Codes in 64-bit words, and scales as their domain stores them."""
        words = n_words(self.codes.numel(), self.grid.n_levels)
        return 8 * words + self.scale.numel() * self.grid.scale_domain.bits // 8

    def dequantize(self) -> Tensor:
        """The weight as float32, of the codes' shape."""
        return decode(self.codes, self.scale, self.grid)


def check_scale(scale: Tensor) -> None:
    """Raises SubbyteError for scales that are not finite, or negative."""
    if not scale.isfinite().all():
        raise SubbyteError("scale has NaN or infinite values")
    if (scale < 0).any():
        raise SubbyteError("scale has negative values")


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A low-rank adapter, as it is stored: what is added to a quantized weight.

    The weight is seen as a matrix [out, width], its channel axis first and the rest flattened. With
    groups, each group of rows has factors of its own.

    up: [out, rank], float16, int8 or (of a fused layer) float32. down: [groups * rank, width], of
    the same dtype.
    scale: float32 [groups * rank]. The product of group g is (up_g * scale_g) @ down_g, in float32.
    Raises SubbyteError when these do not fit together.
    """

    up: Tensor
    down: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if (
            self.up.dtype not in (torch.float16, torch.float32, torch.int8)
            or self.down.dtype != self.up.dtype
        ):
            raise SubbyteError(
                f"adapter factors are {self.up.dtype} and {self.down.dtype}; both must be "
                "torch.float16, torch.float32 or torch.int8"
            )
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] < 1:
            raise SubbyteError(
                f"adapter factors have shapes {tuple(self.up.shape)} and {tuple(self.down.shape)}, "
                "not [out, rank] and [groups * rank, width] with a rank of 1 or more"
            )
        groups, rest = divmod(self.down.shape[0], self.rank)
        if rest or groups < 1 or self.up.shape[0] % groups:
            raise SubbyteError(
                f"adapter factors of shapes {tuple(self.up.shape)} and {tuple(self.down.shape)} "
                "belong to no number of groups"
            )
        if self.scale.dtype != torch.float32 or self.scale.shape != self.down.shape[:1]:
            raise SubbyteError(
                f"adapter scale is {self.scale.dtype} {list(self.scale.shape)}, not torch.float32 "
                f"[{self.down.shape[0]}]"
            )
        for part in (self.up, self.down, self.scale):
            if part.is_floating_point() and not part.isfinite().all():
                raise SubbyteError("the adapter has NaN or infinite values")

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def groups(self) -> int:
        return self.down.shape[0] // self.rank

    @property
    def n_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.up, self.down, self.scale))

    def product(self) -> Tensor:
        """The matrix that is added to the weight, float32 [out, width]."""
        return low_rank_product(self.up, self.down, self.scale)


def low_rank_product(up: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """The product of a LowRank's parts, float32 [out, width]; shapes as there."""
    out, rank = up.shape
    groups = down.shape[0] // rank
    left = up.float().reshape(groups, out // groups, rank) * scale.reshape(groups, 1, rank)
    return (left @ down.float().reshape(groups, rank, -1)).reshape(out, -1)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLayer:
    """One layer: its quantized weight, its bias (float), and a low-rank adapter if it has one."""

    weight: QuantizedWeight
    bias: Tensor | None = None
    adapter: LowRank | None = None

    def __post_init__(self) -> None:
        if self.adapter is None:
            return
        size = self.adapter.up.shape[0] * self.adapter.down.shape[1]
        if size != self.weight.shape.numel():
            raise SubbyteError(
                f"the adapter's product is {self.adapter.up.shape[0]} x "
                f"{self.adapter.down.shape[1]}, the weight has shape {tuple(self.weight.shape)}"
            )

    @property
    def n_bytes(self) -> int:
        """Codes, scales and adapter; the bias, which is float, not."""
        return self.weight.n_bytes + (0 if self.adapter is None else self.adapter.n_bytes)

    def dequantize(self, channel_axis: int = 0) -> Tensor:
        """The weight that the layer computes with, adapter included; float32."""
        weight = self.weight.dequantize()
        if self.adapter is None:
            return weight
        return weight + as_weight(self.adapter.product(), weight.shape, channel_axis)


def as_matrix(weight: Tensor, channel_axis: int = 0) -> Tensor:
    """[out, width]: the channel axis first, the rest flattened in order."""
    return weight.movedim(channel_axis, 0).flatten(1)


def as_weight(matrix: Tensor, shape: torch.Size | tuple[int, ...], channel_axis: int = 0) -> Tensor:
    """The inverse of `as_matrix`."""
    moved = [shape[channel_axis], *(n for d, n in enumerate(shape) if d != channel_axis)]
    return matrix.reshape(moved).movedim(0, channel_axis)
