"""The waist of the hourglass: what every method produces and every consumer reads.

All three values are frozen; tensors inside them are never written to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.errors import SubbyteError
from subbyte.functional import decode, n_groups
from subbyte.grids import Grid


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A weight as codes on a grid.

    codes: uint8, the weight's shape, each below grid.n_levels.
    scale: float32 [groups], in the grid's scale domain; groups is 1 per tensor, or the length of
        the channel axis. The value of a weight is `levels[code] * scale`, computed in float32.
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
        if not self.scale.isfinite().all():
            raise SubbyteError("scale has NaN or infinite values")
        if (self.scale < 0).any():
            raise SubbyteError("scale has negative values")
        top = int(self.codes.max()) if self.codes.numel() else 0
        if top >= self.grid.n_levels:
            raise SubbyteError(f"code {top} is above the grid's last code {self.grid.n_levels - 1}")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """The weight as float32, of the codes' shape."""
        return decode(self.codes, self.scale, self.grid)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLayer:
    """One layer: its quantized weight and its bias (float, as trained)."""

    weight: QuantizedTensor
    bias: Tensor | None = None
