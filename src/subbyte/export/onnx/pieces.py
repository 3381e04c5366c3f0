"""The packed products of a network, as an exporter sees them.

A piece is one weight with what is done to its product. A layer is one piece; attention with
projections of its own has up to three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.functional import spread
from subbyte.core.grids import Grid, PerTensor
from subbyte.core.tensors import LowRank, QuantizedTensor, as_weight
from subbyte.graph.layers import type_of
from subbyte.modules import PackedWeight


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """Codes, scales and adapter of a weight. channel_axis: what the adapter's rows belong to."""

    tensor: QuantizedTensor
    adapter: LowRank | None = None
    channel_axis: int = 0

    @property
    def grid(self) -> Grid:
        return self.tensor.grid

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.codes.shape)

    def decoded(self) -> Tensor:
        """float32, the adapter included."""
        weight = self.tensor.dequantize()
        if self.adapter is None:
            return weight
        return weight + as_weight(self.adapter.product(), self.shape, self.channel_axis)

    def scales(self) -> Tensor:
        """float32 scales that broadcast against the weight."""
        return spread(self.tensor.scale, self.shape, self.grid)

    def rows(self, first: int, last: int) -> Weight:
        """Of a matrix [out, in] these rows."""
        codes, scale = self.tensor.codes[first:last], self.tensor.scale
        if self.grid.granularity != PerTensor():
            scale = scale.reshape(self.shape[0], -1)[first:last].flatten()
        adapter = self.adapter
        if adapter is not None:
            adapter = LowRank(adapter.up[first:last], adapter.down, adapter.scale)
        return Weight(QuantizedTensor(codes, scale, self.grid), adapter)


def weight_of(packed: PackedWeight) -> Weight:
    return Weight(packed.quantized(), packed.adapter(), packed.channel_axis)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A product of the graph.

    kind: as in LAYERS. weight: packed, or float32 where a projection stays float. layer: the module
    that has strides and pads; None for the projections of attention.
    """

    name: str
    kind: str
    weight: Weight | Tensor
    bias: Tensor | None = None
    activation: str = "none"
    layer: Any = None

    def decoded(self) -> Tensor:
        return self.weight if isinstance(self.weight, Tensor) else self.weight.decoded()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


def piece_of(name: str, layer: Any) -> Piece:
    """A packed layer of one weight."""
    bias = getattr(layer, "bias", None)
    activation = getattr(layer, "activation", "none")
    weight = weight_of(layer.packed)
    return Piece(name, type_of(layer), weight, _plain(bias), activation, layer)


def projections(name: str, attention: Any) -> list[Piece]:
    """The pieces in which attention projects query, key and value: one for all, or three."""
    if not attention.joint:
        parts = ("q_proj", "k_proj", "v_proj")
        pieces = [_projection(f"{name}.{part}", getattr(attention, part)) for part in parts]
    else:
        whole = _projection(f"{name}.in_proj", attention.in_proj)
        pieces = [_rows(whole, i, attention.embed_dim) for i in range(3)]
    bias = _plain(attention.in_proj_bias)
    if bias is None:
        return pieces
    return [replace(p, bias=b) for p, b in zip(pieces, bias.chunk(3), strict=True)]


def joint_projection(name: str, attention: Any) -> Piece:
    """The one piece of self-attention."""
    piece = _projection(f"{name}.in_proj", attention.in_proj)
    return replace(piece, bias=_plain(attention.in_proj_bias))


def _projection(name: str, module: nn.Module) -> Piece:
    if isinstance(module, PackedWeight):
        return Piece(name, "Linear", weight_of(module))
    return Piece(name, "Linear", module().detach())


def _rows(whole: Piece, part: int, width: int) -> Piece:
    first, last = part * width, (part + 1) * width
    weight = whole.weight
    rows = weight[first:last] if isinstance(weight, Tensor) else weight.rows(first, last)
    return replace(whole, name=f"{whole.name}.{'qkv'[part]}", weight=rows)


def _plain(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()


def n_codes(weight: Weight) -> int:
    return torch.Size(weight.shape).numel()


Pieces = Mapping[str, Piece]
