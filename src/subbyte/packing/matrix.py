"""A packed weight as one value: what products of it need to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from subbyte.core.functional import decode, read_scale
from subbyte.core.grids import Grid
from subbyte.packing import radix


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A weight of any number of dimensions in radix words.

    words: uint8 [8 * n_words] (`radix.pack`). scale: [groups] as the grid's domain stores it:
    float32, float16 or int8 exponents. shape: the weight's. made: room for what others make of it
    once, by name; it is no part of the value.
    """

    words: Tensor
    scale: Tensor
    grid: Grid
    shape: tuple[int, ...]
    made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def n_weights(self) -> int:
        return torch.Size(self.shape).numel()

    def codes(self) -> Tensor:
        """uint8, the weight's shape."""
        return radix.unpack(self.words, self.grid.n_levels, self.n_weights).reshape(self.shape)

    def unit(self) -> Tensor:
        """The scales as float32 [groups]."""
        return read_scale(self.scale, self.grid.scale_domain)

    def decoded(self) -> Tensor:
        """The weight as float32."""
        return decode(self.codes(), self.unit(), self.grid)
