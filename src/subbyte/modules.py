"""Packed layers: uint8 words, a scale and a bias in plain buffers; float activations.

Linear layers and 2-d convolutions multiply in integers (`subbyte.kernels`) where `precision` allows
and the kernels serve them. Everything else runs on the reference: decode the weight, run the float
operation, drop the decoded weight again. Buffers are plain tensors, so state_dict, deepcopy,
`.to(device)` and safetensors work as for any module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subbyte import kernels
from subbyte.batchnorm import BatchNormMode, absorb_batchnorm, check_mode
from subbyte.errors import SubbyteError
from subbyte.functional import decode, read_scale, store_scale
from subbyte.grids import Grid, PerChannel
from subbyte.kernels import Activation, Precision
from subbyte.layers import Site, sites, supported_type
from subbyte.packing import radix
from subbyte.tensors import (
    LowRank,
    QuantizedLayer,
    QuantizedTensor,
    as_weight,
    low_rank_product,
)


class PackedWeight(nn.Module):
    """A layer's QuantizedTensor in radix words, and its low-rank adapter if it has one.

    words: uint8 [8 * n_words]. scale: [groups] as the grid's domain stores it: float32, float16 or
    int8 exponents. up, down, adapter_scale: see `LowRank`; None without an adapter. channel_axis:
    the dimension of the weight that the rows of `up` belong to.
    """

    words: Tensor
    scale: Tensor
    up: Tensor | None
    down: Tensor | None
    adapter_scale: Tensor | None

    def __init__(self, layer: QuantizedLayer, channel_axis: int = 0) -> None:
        super().__init__()
        weight, adapter = layer.weight, layer.adapter
        self.grid: Grid = weight.grid
        self.shape = tuple(weight.shape)
        self.channel_axis = channel_axis
        parts = (None,) * 3 if adapter is None else (adapter.up, adapter.down, adapter.scale)
        for name, part in zip(("up", "down", "adapter_scale"), parts, strict=True):
            self.register_buffer(name, _copy(part))
        self.register_buffer("words", radix.pack(weight.codes, weight.grid.n_levels))
        self.register_buffer("scale", store_scale(weight.scale, weight.grid.scale_domain))

    @property
    def n_weights(self) -> int:
        return torch.Size(self.shape).numel()

    def codes(self) -> Tensor:
        """uint8, the weight's shape."""
        return radix.unpack(self.words, self.grid.n_levels, self.n_weights).reshape(self.shape)

    def quantized(self) -> QuantizedTensor:
        """Back to the value it was made of, bit for bit."""
        scale = read_scale(self.scale, self.grid.scale_domain)
        return QuantizedTensor(self.codes(), scale, self.grid)

    def adapter(self) -> LowRank | None:
        """Back to the value it was made of."""
        if self.up is None or self.down is None or self.adapter_scale is None:
            return None
        return LowRank(self.up, self.down, self.adapter_scale)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The adapter's up [out, rank], scaled, and down [groups * rank, width], float32."""
        if self.up is None or self.down is None or self.adapter_scale is None:
            return None
        scale = self.adapter_scale.float().reshape(-1, 1, self.up.shape[1])
        up = self.up.float().reshape(scale.shape[0], -1, self.up.shape[1]) * scale
        return up.reshape(self.up.shape), self.down.float()

    def forward(self) -> Tensor:
        """The weight that the layer computes with, as float32: decoded, plus the adapter."""
        scale = read_scale(self.scale, self.grid.scale_domain)
        weight = decode(self.codes(), scale, self.grid)
        if self.up is None or self.down is None or self.adapter_scale is None:
            return weight
        extra = low_rank_product(self.up, self.down, self.adapter_scale.float())
        return weight + as_weight(extra, self.shape, self.channel_axis)

    def extra_repr(self) -> str:
        rank = "" if self.up is None else f", rank={self.up.shape[1]}"
        return f"shape={self.shape}, levels={self.grid.n_levels}, scales={self.scale.numel()}{rank}"


def _decoded(self: Any) -> Tensor:
    """The weight of a packed layer as float32, decoded at each call."""
    weight: Tensor = self.packed()
    return weight


def _linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    precision: Precision,
    plus: Tensor | None = None,
    activation: Activation = "none",
) -> Tensor:
    """x [..., in] -> activation(x W' + bias + plus) [..., out], the adapter included."""
    buffers: Any = packed._buffers
    if buffers["up"] is not None:
        up, down = packed.factors()  # type: ignore[misc]
        extra = F.linear(F.linear(x, down), up)
        plus = extra if plus is None else extra + plus
    return kernels.linear(
        x, buffers["words"], buffers["scale"], bias, packed.grid, packed.shape, precision, plus,
        activation,
    )  # fmt: skip


def _then(layer: PackedLinear | PackedConv2d) -> str:
    """For a layer's repr: what it does with its products."""
    return "" if layer.activation == "none" else f", then {layer.activation}"


def _copy(tensor: Tensor | None) -> Tensor | None:
    """Frozen values are never written to, so a module gets its own, laid out as a file gives it."""
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed weight [out, in]; x [..., in] -> [..., out] in x's dtype.

    activation, and `plus` [..., out] added before it: what `fuse` moves into the layer.
    """

    bias: Tensor | None
    precision: Precision = "float32"
    activation: Activation = "none"
    fused = False  # `fuse` has moved something into it

    def __init__(self, like: nn.Linear, layer: QuantizedLayer) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.packed = PackedWeight(layer)
        self.register_buffer("bias", _copy(layer.bias))

    weight = property(_decoded)

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if self.why_not(x):
            y = F.linear(x, self.weight.to(x.dtype), self.bias)
            return kernels.finish(y, plus, self.activation)
        # From the dictionaries: nn.Module's look-up by attribute takes a microsecond a name.
        packed: Any = self._modules["packed"]
        return _linear(x, packed, self._buffers["bias"], self.precision, plus, self.activation)

    def why_not(self, x: Tensor, plus: Tensor | None = None) -> str | None:
        """Why the kernels do not multiply x, in words; None if they do."""
        packed: Any = self._modules["packed"]
        return kernels.why_not(x, packed.grid, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}{_then(self)}"


class _PackedConv(nn.Module):
    """A convolution with a packed weight; the subclass names its function."""

    function: Callable[..., Tensor]
    bias: Tensor | None

    def __init__(self, like: Any, layer: QuantizedLayer) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = like.stride, like.padding, like.dilation
        self.groups, self.padding_mode = like.groups, like.padding_mode
        self.pads = tuple(like._reversed_padding_repeated_twice)
        self.packed = PackedWeight(layer)
        self.register_buffer("bias", _copy(layer.bias))

    weight = property(_decoded)

    def forward(self, x: Tensor) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.pads, mode=self.padding_mode), 0
        weight = self.weight.to(x.dtype)
        return type(self).function(
            x, weight, self.bias, self.stride, padding, self.dilation, self.groups
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
    precision: Precision = "float32"
    activation: Activation = "none"
    fused = False  # `fuse` has moved something into it

    def __init__(self, like: nn.Conv2d, layer: QuantizedLayer) -> None:
        super().__init__(like, layer)
        left, right, top, bottom = self.pads
        strides, dilations = tuple(self.stride), tuple(self.dilation)
        self.geometry = (*strides, *dilations, top, bottom, left, right, self.groups)

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if self.why_not(x):
            return kernels.finish(super().forward(x), plus, self.activation)
        packed, groups = self.packed, self.groups
        buffers: Any = packed._buffers
        factors = packed.factors()
        if factors is not None:
            up, down = factors
            down = down.reshape(-1, *packed.shape[1:])
            inner = F.conv2d(x, down, None, self.stride, self.padding, self.dilation, groups)
            extra = F.conv2d(inner, up[:, :, None, None], groups=groups)
            plus = extra if plus is None else extra + plus
        return kernels.conv2d(
            x, buffers["words"], buffers["scale"], self._buffers["bias"], packed.grid,
            packed.shape, self.geometry, self.precision, plus, self.activation,
        )  # fmt: skip

    def why_not(self, x: Tensor, plus: Tensor | None = None) -> str | None:
        """Why the kernels do not convolve x, in words; None if they do."""
        packed: Any = self._modules["packed"]
        return kernels.why_not_conv(x, packed.grid, packed.shape, self.groups, self.padding_mode)

    def extra_repr(self) -> str:
        return super().extra_repr() + _then(self)


class PackedConv3d(_PackedConv):
    """`nn.Conv3d` with a packed weight [out, in / groups, kd, kh, kw]."""

    function = staticmethod(F.conv3d)


class _PackedConvTranspose(nn.Module):
    """A transposed convolution with a packed weight; the subclass names its function."""

    function: Callable[..., Tensor]
    bias: Tensor | None

    def __init__(self, like: Any, layer: QuantizedLayer) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = like.kernel_size, like.stride, like.padding
        self.output_padding, self.dilation = like.output_padding, like.dilation
        self.groups = like.groups
        self.packed = PackedWeight(layer, channel_axis=1)
        self.register_buffer("bias", _copy(layer.bias))

    weight = property(_decoded)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        extra = self.output_padding if output_size is None else self._extra(x, output_size)
        weight = self.weight.to(x.dtype)
        return type(self).function(
            x, weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation
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


class PackedEmbedding(nn.Module):
    """`nn.Embedding` with a packed table [entries, features]; [...] -> [..., features].

    Only the rows that are looked up are decoded.
    """

    dtype_of: Tensor

    def __init__(self, like: nn.Embedding, layer: QuantizedLayer) -> None:
        super().__init__()
        self.packed = PackedWeight(layer)
        self.register_buffer("dtype_of", torch.empty(0), persistent=False)  # follows .to(dtype)

    weight = property(_decoded)

    def forward(self, indices: Tensor) -> Tensor:
        packed = self.packed
        entries, features = packed.shape
        nothing = self.dtype_of.new_zeros(1, 1).expand(entries, 1)
        F.embedding(indices, nothing)  # raises what nn.Embedding raises for a bad index
        rows = indices.flatten().long()
        codes = radix.unpack_rows(packed.words, packed.grid.n_levels, rows, features)
        scale = read_scale(packed.scale, packed.grid.scale_domain)
        by_row = packed.grid.granularity == PerChannel(0)
        found = decode(codes, scale[rows] if by_row else scale, packed.grid)
        factors = packed.factors()
        if factors is not None:
            found = found + factors[0][rows] @ factors[1]
        return found.to(self.dtype_of.dtype).reshape(*indices.shape, features)


class PackedMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` with packed projections, same call and results.

    projections: one `in_proj`, or `q_proj`, `k_proj`, `v_proj` when their widths differ. A
    projection that a recipe keeps in float stays a float tensor. Plain self-attention multiplies
    by the kernels; `why_not` says in words when a call does not.
    """

    precision: Precision = "float32"

    in_proj: nn.Module
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None

    merge_masks = nn.MultiheadAttention.merge_masks  # TransformerEncoderLayer calls it

    def __init__(self, like: nn.MultiheadAttention, packed: Mapping[str, QuantizedLayer]) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = like.embed_dim, like.num_heads
        self.dropout, self.batch_first = like.dropout, like.batch_first
        self.add_zero_attn = like.add_zero_attn
        self._qkv_same_embed_dim = like._qkv_same_embed_dim  # TransformerEncoderLayer reads it
        for name in ("in_proj",) if self._qkv_same_embed_dim else ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, _projection(getattr(like, f"{name}_weight"), packed.get(name)))
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            value = getattr(like, name)
            self.register_buffer(name, _copy(value))
        self.out_proj = like.out_proj

    @property
    def in_proj_weight(self) -> Tensor | None:
        """[3 * embed_dim, embed_dim], decoded at each call; None for separate projections."""
        return self.in_proj() if self._qkv_same_embed_dim else None

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
            None if weight is None else weight.to(query.dtype),
            self.in_proj_bias, self.bias_k, self.bias_v, self.add_zero_attn, self.dropout,
            self.out_proj.weight.to(query.dtype), self.out_proj.bias,
            training=self.training, key_padding_mask=key_padding_mask, need_weights=need_weights,
            attn_mask=attn_mask, average_attn_weights=average_attn_weights, is_causal=is_causal,
            use_separate_proj_weight=weight is None,
            **self._separate_weights(query.dtype),
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
        """Why this call decodes its weights instead of using the kernels; None if it does not."""
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
        projected = _linear(x, cast(PackedWeight, self.in_proj), self.in_proj_bias, self.precision)
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

    def _separate_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        names = () if self._qkv_same_embed_dim else ("q_proj", "k_proj", "v_proj")
        return {f"{name}_weight": getattr(self, name)().to(dtype) for name in names}


class _FloatWeight(nn.Module):
    """A projection that stays float, called like a PackedWeight."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())

    def forward(self) -> Tensor:
        return self.weight


def _projection(weight: Tensor, layer: QuantizedLayer | None) -> nn.Module:
    return _FloatWeight(weight) if layer is None else PackedWeight(layer)


def is_fused(net: nn.Module) -> bool:
    """Whether a layer of the network does more than its own, by `fuse`."""
    return any(getattr(module, "fused", False) for module in net.modules())


PACKED: dict[type[nn.Module], Callable[[Any, QuantizedLayer], nn.Module]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
    nn.ConvTranspose1d: PackedConvTranspose1d,
    nn.ConvTranspose2d: PackedConvTranspose2d,
    nn.Embedding: PackedEmbedding,
}


def pack(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    *,
    batchnorm: BatchNormMode = "keep",
    precision: Precision = "int8",
) -> nn.Module:
    """A copy of the model in which the named layers are packed; in eval mode.

    model: the float network, or the prepared one that `layers` were frozen from; it stays as it is.
    batchnorm: "absorb" turns every BatchNorm into one scale and one shift a channel,
    "power_of_two" rounds those scales too (`subbyte.batchnorm`); codes stay as they are.
    precision: of the activations in products, "int8", "int16" or "float32" (`subbyte.kernels`);
    the attribute `precision` of a packed layer changes it later.
    Raises SubbyteError for a name the model does not have, a shape that differs, or a prepared
    layer that `layers` leaves out.
    """
    check_mode(batchnorm)
    kernels.check_precision(precision)
    if batchnorm != "keep":
        model = absorb_batchnorm(model, rounded=batchnorm == "power_of_two")
    net = copy.deepcopy(model)
    by_owner = _by_owner(net, layers)
    replaced: dict[int, nn.Module] = {}
    for parent in reversed(list(net.modules())):  # children first: attention takes its out_proj
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in by_owner:
                packed = replaced.get(id(child)) or _packed(child, by_owner[id(child)])
                replaced[id(child)] = packed
                setattr(parent, name, packed)
    if id(net) in by_owner:
        net = _packed(net, by_owner[id(net)])
    for module in net.modules():
        if isinstance(module, PackedLinear | PackedConv2d | PackedMultiheadAttention):
            module.precision = precision
    return net.eval()


def _by_owner(
    net: nn.Module, layers: Mapping[str, QuantizedLayer]
) -> dict[int, dict[str, QuantizedLayer]]:
    """id of each module to replace -> its quantized weights, by the last part of their names."""
    known = {site.name: site for site in sites(net)}
    missing = sorted(set(layers) - set(known))
    if missing:
        raise SubbyteError(f"the model has no layer {missing[0]!r}; it has {', '.join(known)}")
    by_owner: dict[int, dict[str, QuantizedLayer]] = {}
    for name, layer in layers.items():
        site = known[name]
        owner = net.get_submodule(site.owner)
        _check_fit(site, layer, owner)
        _check_plain(name, owner)
        part = site.parameter.removesuffix("_weight")
        by_owner.setdefault(id(owner), {})[part] = layer
    _check_all_prepared(net, known.values(), layers)
    for module in net.modules():  # attention reads its out_proj's weight, so it must know it packed
        if isinstance(module, nn.MultiheadAttention) and id(module.out_proj) in by_owner:
            by_owner.setdefault(id(module), {})
    return by_owner


def _packed(module: nn.Module, layers: Mapping[str, QuantizedLayer]) -> nn.Module:
    """The packed counterpart of one module, whose children may be packed already."""
    if isinstance(module, nn.MultiheadAttention):
        packed: nn.Module = PackedMultiheadAttention(module, layers)
    else:
        kind = supported_type(module)
        assert kind is not None
        packed = PACKED[kind](module, layers["weight"])
    return packed.train(module.training)


def _check_fit(site: Site, layer: QuantizedLayer, owner: nn.Module) -> None:
    """Weight and bias have the shapes of the layer that they go into."""
    bias = getattr(owner, "bias", None) if site.parameter == "weight" else None
    wanted = {"shape": site.shape, "bias": None if bias is None else tuple(bias.shape)}
    found = {
        "shape": tuple(layer.weight.shape),
        "bias": None if layer.bias is None else tuple(layer.bias.shape),
    }
    rows = site.shape[site.channel_axis]
    if layer.adapter is not None and layer.adapter.up.shape[0] != rows:
        raise SubbyteError(
            f"the adapter of '{site.name}' has {layer.adapter.up.shape[0]} rows, the layer has "
            f"{rows} output channels"
        )
    for part, shape in wanted.items():
        if found[part] != shape:
            raise SubbyteError(
                f"layer '{site.name}' has {part} {shape}, its codes come with {found[part]}; "
                "they are of another network"
            )


def _check_plain(name: str, owner: nn.Module) -> None:
    """Packing replaces the module, so it must not carry what the packed one has no place for."""
    hooks = len(owner._forward_hooks) + len(owner._forward_pre_hooks) + len(owner._backward_hooks)
    if hooks:
        raise SubbyteError(
            f"layer '{name}' has {hooks} hooks, which packing would drop; remove them"
        )
    if owner._buffers:
        raise SubbyteError(
            f"layer '{name}' has buffers of its own ({', '.join(owner._buffers)}), which packing "
            "would drop; keep it float"
        )


def _check_all_prepared(net: nn.Module, known: Any, layers: Mapping[str, QuantizedLayer]) -> None:
    for site in known:
        owner = net.get_submodule(site.owner)
        prepared = site.parameter in getattr(owner, "parametrizations", {})
        if prepared and site.name not in layers:
            raise SubbyteError(f"layer '{site.name}' is prepared but not among the frozen layers")
