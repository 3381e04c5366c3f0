"""Weights as constant arrays: packed codes, or float tensors that a network kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subbyte.core.functional import read_scale, scale_exponent
from subbyte.core.grids import Grid, PerChannel, PerGroup, PerTensor, digits_per
from subbyte.errors import SubbyteError
from subbyte.export.c.listing import Listing
from subbyte.export.c.words import n_bytes, to_words
from subbyte.modules import PackedWeight


@dataclass(frozen=True, slots=True)
class Weight:
    """kind: packed, plain, half or byte (kernels.c). pointer: to its struct."""

    kind: str
    pointer: str


def weight_of(listing: Listing, name: str, weight: PackedWeight | Tensor) -> Weight:
    """A weight with its output channels first, [out, ...]; transposed convolutions too."""
    if isinstance(weight, Tensor):
        return plain_weight(listing, name, weight)
    return Weight(
        "packed", listing.once(("packed", id(weight)), lambda: _packed(listing, name, weight))
    )


def plain_weight(listing: Listing, name: str, weight: Tensor) -> Weight:
    """A float32 weight [out, ...]."""
    data = weight.detach().float().contiguous().numpy()
    values = listing.array("number", data.reshape(-1), f"{name}.weight")
    listing.stored.setdefault(name, "float32")
    return Weight("plain", listing.struct("plain", (values, data[0].size), name))


def factor_of(listing: Listing, name: str, values: Tensor, scale: Tensor | None) -> Weight:
    """A factor of an adapter [rows, width] as it is stored, with a scale per row."""
    if values.dtype == torch.float32:  # of a fused layer
        whole = values if scale is None else values * scale.float()[:, None]
        return plain_weight(listing, name, whole)
    kind, ctype = ("half", "uint16_t") if values.dtype == torch.float16 else ("byte", "int8_t")
    data = values.detach().contiguous().numpy().view(np.uint16 if kind == "half" else np.int8)
    scales = "0"
    if scale is not None:
        scales = listing.array("float", scale.float().numpy().reshape(-1), f"{name}.scale")
    words = listing.array(ctype, data.reshape(-1), name)
    return Weight(kind, listing.struct(kind, (words, scales, values.shape[1]), name))


def _packed(listing: Listing, name: str, packed: PackedWeight) -> str:
    levels, scales = (_integers if listing.number != "float" else _floats)(packed)
    return _stored(listing, name, _rows_first(name, packed), packed.grid, (levels, scales))


def _stored(listing: Listing, name: str, codes: Any, grid: Grid, values: tuple[Any, Any]) -> str:
    """A struct of codes [rows, ...]; values: levels and scales."""
    n, bits, width = grid.n_levels, listing.word_bits, codes[0].size
    words = listing.array("word", to_words(codes.reshape(-1), n, bits), f"{name}.words")
    levels = listing.array("number", values[0], f"levels{n}")
    scales = listing.kept(values[1], f"{name}.scales")
    size = 8 * n_bytes(codes.size, n, bits) / codes.size
    listing.stored[name] = f"{n} levels, {size:.3g} bits per weight"
    fields = (words, levels, scales, width, _shared(grid, width), n, digits_per(n, bits))
    return listing.struct("packed", fields, name)


def _rows_first(name: str, packed: PackedWeight) -> Any:
    """Codes [out, ...]. Raises SubbyteError for scales along another dimension."""
    sharing = packed.grid.granularity
    if isinstance(sharing, PerChannel) and sharing.axis:
        raise SubbyteError(
            f"layer '{name}' has a scale per index of dimension {sharing.axis}; C source holds "
            "scales per tensor, per output channel (PerChannel(0)) and per group"
        )
    return packed.codes().numpy()


def transposed_weight(listing: Listing, name: str, packed: PackedWeight, groups: int) -> Weight:
    """Of a transposed convolution: [in, out / groups, ...] as [out, in / groups, ...].

    Raises SubbyteError for scales per group or per input channel, which no row of it has.
    """
    sharing = packed.grid.granularity
    if packed.up is not None or not (sharing == PerTensor() or sharing == PerChannel(1)):
        what = "an adapter" if packed.up is not None else f"scales {sharing}"
        raise SubbyteError(
            f"layer '{name}' is a transposed convolution with {what}; C source holds one with a "
            "scale per tensor, or per output channel (PerChannel(1)), and without an adapter"
        )
    return Weight(
        "packed",
        listing.once(
            ("transposed", id(packed)), lambda: _transposed(listing, name, packed, groups)
        ),
    )


def _transposed(listing: Listing, name: str, packed: PackedWeight, groups: int) -> str:
    levels, scales = _floats(packed)
    if packed.grid.granularity != PerTensor():
        scales = np.tile(scales, groups)
    codes = swapped(packed.codes(), groups).numpy()
    return _stored(listing, name, codes, packed.grid, (levels, scales))


def swapped(weight: Tensor, groups: int) -> Tensor:
    """[in, out / groups, ...] as [out, in / groups, ...], contiguous."""
    parts = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return parts.reshape(-1, *parts.shape[2:]).contiguous()


def _shared(grid: Grid, width: int) -> int:
    """Weights of a row that share a scale; 0: the whole weight has one."""
    if isinstance(grid.granularity, PerGroup):
        return min(grid.granularity.size, width)
    return 0 if grid.granularity == PerTensor() else width


def _floats(packed: PackedWeight) -> tuple[Any, Any]:
    levels = np.array(packed.grid.levels, dtype=np.float32)
    return levels, read_scale(packed.scale, packed.grid.scale_domain).float().numpy()


def _integers(packed: PackedWeight) -> tuple[Any, Any]:
    """Whole levels, and scales as powers of two of the lowest."""
    exponents = scale_exponent(read_scale(packed.scale, packed.grid.scale_domain)).numpy()
    shifts = exponents.astype(np.int64) - int(exponents.min())
    levels = np.array(packed.grid.levels).astype(np.int64)
    return levels, np.int64(1) << shifts
