"""A quantized weight as a file holds it, decoded only when somebody asks for its codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.core.functional import decode, read_scale, store_scale
from subbyte.core.grids import Grid
from subbyte.core.tensors import QuantizedWeight, check_scale
from subbyte.errors import SubbyteError
from subbyte.packing import radix


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """Stands for a `QuantizedTensor` (its `codes`, `scale`, `grid`, `shape`, to the bit).

    words: uint8 [8 * n_words], perhaps a mapped part of the file. stored_scale: [groups], in the
    type of the grid's scale domain. checked: whether the words are known to hold codes of the grid;
    if not, what decodes them checks first.
    """

    words: Tensor
    stored_scale: Tensor
    grid: Grid
    shape: torch.Size
    checked: bool

    def __post_init__(self) -> None:
        fault = radix.check_size(self.words, self.grid.n_levels, self.shape.numel())
        if fault:
            raise SubbyteError(fault)
        check_scale(self.scale)
        if self.checked:
            check_codes(self.words, self.grid, self.shape.numel())

    @property
    def codes(self) -> Tensor:
        """uint8, the weight's shape. Raises SubbyteError for words that hold other codes."""
        if not self.checked:
            check_codes(self.words, self.grid, self.shape.numel())
        return radix.unpack(self.words, self.grid.n_levels, self.shape.numel()).reshape(self.shape)

    @property
    def scale(self) -> Tensor:
        """float32 [groups]."""
        return read_scale(self.stored_scale, self.grid.scale_domain)

    @property
    def n_bytes(self) -> int:
        """Codes in 64-bit words, and scales as their domain stores them."""
        return self.words.numel() + self.stored_scale.numel() * self.stored_scale.element_size()

    def dequantize(self) -> Tensor:
        """The weight as float32."""
        return decode(self.codes, self.scale, self.grid)


def stored(weight: QuantizedWeight, place: Callable[[Tensor], Tensor]) -> StoredTensor:
    """The weight in words that `place` has put somewhere, where they are not read yet."""
    words = place(radix.pack(weight.codes, weight.grid.n_levels))
    scale = store_scale(weight.scale, weight.grid.scale_domain)
    return StoredTensor(words, scale, weight.grid, weight.shape, checked=False)


def check_codes(words: Tensor, grid: Grid, count: int) -> None:
    """Raises SubbyteError if words hold anything but `count` codes of the grid."""
    fault = radix.check_words(words, grid.n_levels, count)
    if fault:
        raise SubbyteError(fault)
