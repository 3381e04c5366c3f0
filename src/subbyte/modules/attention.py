"""Attention with packed projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subbyte import kernels
from subbyte.core.tensors import QuantizedLayer
from subbyte.kernels import Precision
from subbyte.modules.linear import packed_linear
from subbyte.modules.weight import PackedWeight, cast_to, frozen_bias, keep_types, take_attributes


class PackedMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` with packed projections, same call and results.

    projections: one `in_proj`, or `q_proj`, `k_proj`, `v_proj` when their widths differ. A
    projection that a recipe keeps in float stays a float tensor. Plain self-attention multiplies
    by the kernels; `why_not` says in words when a call does not.
    """

    precision: Precision = "float32"

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj: nn.Module
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    _apply = keep_types

    # TransformerEncoderLayer reads it: where it is False it calls this module, instead of taking
    # decoded weights into a product of its own
    _qkv_same_embed_dim = False
    merge_masks = nn.MultiheadAttention.merge_masks  # TransformerEncoderLayer calls it

    def __init__(self, like: nn.MultiheadAttention, packed: Mapping[str, QuantizedLayer]) -> None:
        super().__init__()
        self.joint = like._qkv_same_embed_dim  # one projection for query, key and value
        for name in ("in_proj",) if self.joint else ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, _projection(getattr(like, f"{name}_weight"), packed.get(name)))
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            self.register_parameter(name, frozen_bias(getattr(like, name)))
        self.out_proj = like.out_proj
        take_attributes(self, like)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """[3 * embed_dim, embed_dim], decoded at each call; None for separate projections."""
        return self.in_proj() if self.joint else None

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
        """As `nn.MultiheadAttention`. Eight parameters: its arguments."""
        if not self.why_not(
            query, key, value, key_padding_mask, need_weights, attn_mask, is_causal=is_causal
        ):
            return self._attend(query), None
        swap = self.batch_first and query.dim() == 3
        if swap:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        weight = self.in_proj_weight
        out, weights = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads,
            _like(query, weight), _like(query, self.in_proj_bias), _like(query, self.bias_k),
            _like(query, self.bias_v), self.add_zero_attn, self.dropout,
            cast_to(query, self.out_proj.weight), _like(query, self.out_proj.bias),
            training=self.training, key_padding_mask=key_padding_mask, need_weights=need_weights,
            attn_mask=attn_mask, average_attn_weights=average_attn_weights, is_causal=is_causal,
            use_separate_proj_weight=weight is None,
            **self._separate_weights(query),
        )  # fmt: skip
        return (out.transpose(0, 1) if swap else out), weights

    def why_not(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> str | None:
        """Why this call decodes its weights instead of using the kernels; None if it does not.

        Eight parameters: those of `forward`.
        """
        projection = self._modules.get("in_proj")
        if not isinstance(projection, PackedWeight):
            return "query, key and value have projections of their own, or float ones"
        if not (query is key is value):
            return "query, key and value are not one tensor"
        if query.dim() != 3:
            return f"queries are {tuple(query.shape)}, not [batch, tokens, width]"
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            return "attention is masked"
        if need_weights:
            return "attention weights are asked for (need_weights)"
        if self.bias_k is not None or self.bias_v is not None or self.add_zero_attn:
            return "keys and values are extended (bias_k, bias_v or add_zero_attn)"
        if self.training and self.dropout:
            return "dropout is on"
        return kernels.why_not(query, projection.grid, self.embed_dim)

    def _attend(self, x: Tensor) -> Tensor:
        """Self-attention of x [batch, tokens, width], or [tokens, batch, width]."""
        packed = cast(PackedWeight, self.in_proj)
        epilogue = packed.epilogue(self.in_proj_bias, "none")
        projected = packed_linear(x, packed, self.precision, epilogue)
        if not self.batch_first:
            projected = projected.transpose(0, 1)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in projected.chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        if not self.batch_first:
            mixed = mixed.transpose(0, 1)
        out: Tensor = self.out_proj(mixed)
        return out

    def float_layer(self) -> nn.MultiheadAttention:
        """The layer of torch.nn with the decoded weights."""
        with torch.device("meta"):
            twin: Any = nn.MultiheadAttention(
                self.embed_dim, self.num_heads, self.dropout, self.in_proj_bias is not None,
                self.bias_k is not None, self.add_zero_attn, batch_first=self.batch_first,
            )  # fmt: skip
        if self.joint:
            twin.in_proj_weight = frozen_bias(self.in_proj_weight)
        else:
            twin._qkv_same_embed_dim, twin.in_proj_weight = False, None
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(twin, f"{name}_weight", frozen_bias(getattr(self, name)()))
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            setattr(twin, name, frozen_bias(getattr(self, name)))
        twin.out_proj.weight = frozen_bias(self.out_proj.weight)
        twin.out_proj.bias = frozen_bias(self.out_proj.bias)
        found: nn.MultiheadAttention = twin
        return found

    def _separate_weights(self, query: Tensor) -> dict[str, Tensor]:
        names = () if self.joint else ("q_proj", "k_proj", "v_proj")
        return {f"{name}_weight": cast_to(query, getattr(self, name)()) for name in names}


def _like(x: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else cast_to(x, weight)


class _FloatWeight(nn.Module):
    """A projection that stays float, called like a PackedWeight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self) -> Tensor:
        return self.weight


def _projection(weight: Tensor, layer: QuantizedLayer | None) -> nn.Module:
    return _FloatWeight(weight) if layer is None else PackedWeight(layer)
