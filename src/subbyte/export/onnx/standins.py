"""Modules that stand in a program for packed layers.

Each calls one symbolic operation, "subbyte::Piece", with the name of its product; an exported graph
holds it as one node, which a form then replaces by operators of ONNX. Attention is written out, so
that only its projections are such operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subbyte.export.onnx.pieces import Piece, joint_projection, piece_of, projections
from subbyte.graph.layers import LAYERS, type_of
from subbyte.modules import PACKED, PackedMultiheadAttention

DOMAIN, OPERATION = "subbyte", "Piece"
_PACKED = tuple(PACKED.values())


def stand_ins(layers: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, Piece]]:
    """For each layer of a program what stands in for it, and the pieces that these name."""
    pieces: dict[str, Piece] = {}
    found: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        if isinstance(layer, PackedMultiheadAttention):
            found[name] = Attention(name, layer, pieces)
        elif isinstance(layer, _PACKED):
            pieces[name] = piece_of(name, layer)
            found[name] = Product(pieces[name], LAYERS[type_of(layer)].shape)
        else:  # a norm
            found[name] = layer
    return found, pieces


class Product(nn.Module):
    """One symbolic operation in the place of a layer; `shape` makes a result of the right shape."""

    def __init__(self, piece: Piece, shape: Callable[..., Tensor]) -> None:
        super().__init__()
        self.piece, self.shape = piece, shape

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            like = self.shape(self.piece.layer, x)
        found: Any = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATION}", (x,) if plus is None else (x, plus),
            {"name": self.piece.name}, dtype=like.dtype, shape=like.shape, version=1,
        )  # fmt: skip
        return found  # type: ignore[no-any-return]


def _projected_shape(rows: int) -> Callable[..., Tensor]:
    return lambda _, x: x.new_empty((*x.shape[:-1], rows))


class Attention(nn.Module):
    """`nn.MultiheadAttention` in eval mode, step by step, over symbolic projections."""

    def __init__(self, name: str, layer: Any, pieces: dict[str, Piece]) -> None:
        super().__init__()
        self.like: Any = (layer,)  # in a tuple: its parameters are no part of this module
        made = [_out(name, layer), *projections(name, layer)]
        if layer.joint:
            made.append(joint_projection(name, layer))
        pieces |= {piece.name: piece for piece in made}
        out, *rest = (Product(piece, _projected_shape(piece.shape[0])) for piece in made)
        self.out, self.apart, self.whole = out, nn.ModuleList(rest[:3]), rest[-1]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Eight parameters: the arguments of `nn.MultiheadAttention`."""
        (layer,) = self.like
        batched = query.dim() == 3
        q, k, v = (
            _batch_first(x, batched, layer.batch_first) for x in self._project(query, key, value)
        )
        k, v, extra = _extended(layer, k, v)
        mask = _mask(layer, attn_mask, key_padding_mask, q, extra)
        q, k, v = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = (q * layer.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        if not batched:
            mixed, weights = mixed[0], weights[0]
        elif not layer.batch_first:
            mixed = mixed.transpose(0, 1)
        averaged = weights.mean(-3) if average_attn_weights else weights
        return self.out(mixed), averaged if need_weights else None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.like[0].joint and query is key is value:
            return list(self.whole(query).chunk(3, -1))
        return [product(x) for product, x in zip(self.apart, (query, key, value), strict=True)]


def _out(name: str, layer: Any) -> Piece:
    """The projection behind attention: a packed layer, or one that stays float."""
    out, name = layer.out_proj, f"{name}.out_proj"
    if isinstance(out, _PACKED):
        return piece_of(name, out)
    bias = None if out.bias is None else out.bias.detach()
    return Piece(name, "Linear", out.weight.detach(), bias)


def _batch_first(x: Tensor, batched: bool, first: bool) -> Tensor:
    """[batch, tokens, width] of any of the shapes that attention takes."""
    if not batched:
        return x[None]
    return x if first else x.transpose(0, 1)


def _extended(layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys and values with the rows that the layer adds, and how many these are."""
    extra = 0
    if layer.bias_k is not None:
        k = torch.cat([k, layer.bias_k.detach().expand(k.shape[0], 1, -1)], 1)
        v = torch.cat([v, layer.bias_v.detach().expand(v.shape[0], 1, -1)], 1)
        extra += 1
    if layer.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        extra += 1
    return k, v, extra


def _mask(
    layer: Any, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, extra: int
) -> Tensor | None:
    """What is added to scores [batch, heads, queries, keys]; None for nothing."""
    found = None
    if attn_mask is not None:
        found = _additive(attn_mask, q)
        if found.dim() == 3:
            found = found.unflatten(0, (-1, layer.num_heads))
    if padding is not None:
        rows = _additive(padding if padding.dim() == 2 else padding[None], q)[:, None, None]
        found = rows if found is None else found + rows
    return found if found is None or not extra else F.pad(found, (0, extra))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
