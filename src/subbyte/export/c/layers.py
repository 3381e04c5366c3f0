"""Products of weights and activations: Linear, convolutions, attention, look-up tables, norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from subbyte.errors import SubbyteError
from subbyte.export.c.listing import Listing, View
from subbyte.export.c.weights import (
    Weight,
    factor_of,
    plain_weight,
    swapped,
    transposed_weight,
    weight_of,
)
from subbyte.modules import PackedMultiheadAttention, PackedWeight
from subbyte.modules.absorb import Affine, as_affine

ACTIVATIONS = {"none": "NONE", "relu": "RELU", "relu6": "RELU6"}


@dataclass(frozen=True, slots=True)
class Product:
    """What goes into one product. weight: packed, or a float tensor."""

    name: str
    weight: PackedWeight | Tensor
    bias: Tensor | None = None
    plus: View | None = None
    activation: str = "none"


@dataclass(frozen=True, slots=True)
class Frame:
    """The window of a convolution, height and width. pads: top, left. groups: of channels."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    groups: int = 1


def pair(value: Any, lone: int = 1) -> tuple[int, int]:
    """A setting of one or two dimensions; `lone` for the height that one dimension lacks."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return (lone, int(values[0])) if len(values) == 1 else (int(values[0]), int(values[1]))


def bias_of(listing: Listing, product: Product) -> str:
    """An array, or no pointer; whole numbers for a fixed-point network."""
    bias = product.bias
    if bias is None:
        return "0"
    data = bias.detach().float().numpy() if bias.is_floating_point() else bias.numpy()
    return listing.kept(data, f"{product.name}.bias")


# ---------------------------------------------------------------- Linear


def linear(listing: Listing, x: View, product: Product) -> View:
    """x [..., in] -> [..., out], the adapter included."""
    weight = product.weight
    out = weight.shape[0]
    plus = product.plus
    if isinstance(weight, PackedWeight) and weight.up is not None:
        plus = _low_rank_linear(listing, x, product)
    kind = weight_of(listing, product.name, weight)
    y = listing.new((*x.shape[:-1], out))
    return _linear_step(listing, x, y, (kind, plus), product)


def _linear_step(
    listing: Listing, x: View, y: View, what: tuple[Weight, View | None], product: Product
) -> View:
    weight, plus = what
    sizes = (y.size // y.shape[-1], x.shape[-1], y.shape[-1])
    args = (
        x, y, bias_of(listing, product), plus or "0", weight.pointer,
        listing.struct("int", sizes, "sizes"), ACTIVATIONS[product.activation],
    )  # fmt: skip
    over = () if plus is None else (plus,)
    return listing.step(f"{weight.kind}_linear", args, y, over)


def _low_rank_linear(listing: Listing, x: View, product: Product) -> View:
    """up (scale * down x), plus what else is to be added."""
    down, up, name = *_factors(listing, product), product.name
    packed = cast(Any, product.weight)
    inner = listing.new((*x.shape[:-1], packed.down.shape[0]))
    _linear_step(listing, x, inner, (down, None), Product(name, packed))
    y = listing.new((*x.shape[:-1], packed.shape[0]))
    return _linear_step(listing, inner, y, (up, product.plus), Product(name, packed))


def _factors(listing: Listing, product: Product) -> tuple[Weight, Weight]:
    packed, name = cast(Any, product.weight), product.name
    down = factor_of(listing, f"{name}.down", packed.down, packed.adapter_scale)
    return down, factor_of(listing, f"{name}.up", packed.up, None)


# ---------------------------------------------------------------- convolutions


def window(listing: Listing, x: View, y: View, frame: Frame) -> str:
    """The struct of a window that goes over x [channels, h, w] and gives y."""
    (channels, in_h, in_w), (out, out_h, out_w) = planes(x), planes(y)
    fields = (
        channels, in_h, in_w, out, out_h, out_w, frame.groups, *frame.kernel, *frame.stride,
        *frame.dilation, *frame.pads,
    )  # fmt: skip
    if max(fields) >= 2**15:
        raise SubbyteError(
            f"a window over {x.shape} has a size of {max(fields)}; C source holds up to 32767"
        )
    return listing.struct("window", fields, "window")


def planes(view: View) -> tuple[int, int, int]:
    """[1, channels, h, w] or [1, channels, w] as channels, h, w."""
    rest = view.shape[2:]
    return view.shape[1], rest[0] if len(rest) == 2 else 1, rest[-1]


def conv(listing: Listing, x: View, product: Product, frame: Frame, shape: Sequence[int]) -> View:
    """x [1, in, ...] -> [1, out, ...] of `shape`, the adapter included."""
    weight, plus = product.weight, product.plus
    if isinstance(weight, PackedWeight) and weight.up is not None:
        plus = _low_rank_conv(listing, x, product, frame, shape)
    kind = weight_of(listing, product.name, weight)
    return _conv_step(listing, x, listing.new(shape), (kind, plus, frame), product)


def _conv_step(listing: Listing, x: View, y: View, what: Any, product: Product) -> View:
    weight, plus, frame = what
    args = (
        x, y, bias_of(listing, product), plus or "0", weight.pointer,
        window(listing, x, y, frame), ACTIVATIONS[product.activation],
    )  # fmt: skip
    over = () if plus is None else (plus,)
    return listing.step(f"{weight.kind}_conv", args, y, over)


def _low_rank_conv(
    listing: Listing, x: View, product: Product, frame: Frame, shape: Sequence[int]
) -> View:
    packed = cast(Any, product.weight)
    down, up = _factors(listing, product)
    bare = Product(product.name, packed)
    inner = listing.new((1, packed.down.shape[0], *shape[2:]))
    _conv_step(listing, x, inner, (down, None, frame), bare)
    one = Frame((1, 1), groups=frame.groups)
    return _conv_step(listing, inner, listing.new(shape), (up, product.plus, one), bare)


def conv_transpose(
    listing: Listing, x: View, product: Product, frame: Frame, shape: Sequence[int]
) -> View:
    """x [1, in, ...] -> [1, out, ...] of `shape`; the weight is [in, out / groups, ...]."""
    weight = product.weight
    if isinstance(weight, Tensor):
        kind = plain_weight(listing, product.name, swapped(weight.detach(), frame.groups))
    else:
        kind = transposed_weight(listing, product.name, weight, frame.groups)
    y = listing.new(shape)
    bias = bias_of(listing, product)
    args = (x, y, bias, kind.pointer, window(listing, x, y, frame))
    return listing.step(f"{kind.kind}_conv_transpose", args, y)


# ---------------------------------------------------------------- norms and tables


def norm(listing: Listing, x: View, name: str, layer: nn.Module) -> View:
    """A BatchNorm or what one was absorbed into, x [1, channels, ...]."""
    affine = layer if isinstance(layer, Affine) else as_affine(name, cast(Any, layer))
    return affine_step(listing, x, name, (affine.scale, affine.shift))


def affine_step(listing: Listing, x: View, name: str, of: tuple[Tensor, Tensor]) -> View:
    scale, shift = of
    y = listing.new(x.shape)
    args = (
        x, y, listing.constant(scale, f"{name}.scale"), listing.constant(shift, f"{name}.shift"),
        str(x.shape[1]), str(x.size // x.shape[1]),
    )  # fmt: skip
    return listing.step("affine", args, y, (x,))


def embedding(listing: Listing, x: View, name: str, table: PackedWeight | Tensor) -> View:
    """x, whole numbers [...] -> [..., width]."""
    entries, width = table.shape
    y = listing.new((*x.shape, width))
    if isinstance(table, PackedWeight) and table.up is not None:
        raise SubbyteError(
            f"layer '{name}' is a table with an adapter, which C source does not hold; quantize it "
            "without one (a rule with max_rank=0)"
        )
    kind = weight_of(listing, name, table)
    return listing.step(
        f"{kind.kind}_embedding", (x, y, kind.pointer, str(x.size), str(entries)), y
    )


# ---------------------------------------------------------------- attention


@dataclass(frozen=True, slots=True)
class Heads:
    """Where queries, keys, values and results lie: (step of a token, step of a head), in values."""

    count: int
    key_count: int
    width: int
    value_width: int
    queries: int
    keys: int
    steps: tuple[tuple[int, int], ...]
    causal: bool = False


def attention(
    listing: Listing, qkv: Sequence[View], shape: Sequence[int], heads: Heads, mask: Any, scale: str
) -> View:
    """softmax(scale Q K' + mask) V into a new value of `shape`. Six parameters."""
    y, some = listing.new(shape), listing.new((heads.keys,))
    mask_view, mask_head, mask_query = mask
    fields = (
        heads.count, heads.count // heads.key_count, heads.queries, heads.keys, heads.width,
        heads.value_width, int(heads.causal), *(s for pair in heads.steps for s in pair),
        mask_head, mask_query,
    )  # fmt: skip
    args = (*qkv, mask_view, y, some, listing.struct("heads", fields, "heads"), scale)
    return listing.step("attention", args, y)


def multihead(listing: Listing, name: str, layer: PackedMultiheadAttention, args: Any) -> View:
    """`nn.MultiheadAttention` of one example; args: views, and the mask as a tensor or None."""
    query, key, value, mask = args
    if layer.bias_k is not None or layer.add_zero_attn:
        raise SubbyteError(
            f"layer '{name}' extends keys (bias_k, add_zero_attn), C source does not"
        )
    width, n = layer.embed_dim, layer.num_heads
    queries, keys = query.size // width, key.size // key.shape[-1]
    if layer.joint and query == key == value:
        whole = _projected(listing, name, layer, "in_proj", query)
        parts = [View(whole.buffer, (1,), width * k) for k in range(3)]
        token = 3 * width
    else:
        parts = _separate(listing, name, layer, (query, key, value))
        token = width
    d = width // n
    heads = Heads(n, n, d, d, queries, keys, ((token, d),) * 3 + ((width, d),))
    mixed = attention(
        listing, parts, query.shape, heads, mask_of(listing, mask, n, (queries, keys)),
        f"{d**-0.5!r}f",
    )  # fmt: skip
    return linear_module(listing, mixed, f"{name}.out_proj", layer.out_proj)


def _separate(listing: Listing, name: str, layer: Any, inputs: Sequence[View]) -> list[View]:
    if layer.joint:
        raise SubbyteError(
            f"layer '{name}' projects query, key and value by one weight, and they are not one "
            "tensor; C source holds self-attention, or a weight for each (kdim, vdim)"
        )
    pairs = zip(("q_proj", "k_proj", "v_proj"), inputs, strict=True)
    return [_projected(listing, name, layer, part, x) for part, x in pairs]


def _projected(listing: Listing, name: str, layer: Any, part: str, x: View) -> View:
    held = getattr(layer, part)
    weight = held if isinstance(held, PackedWeight) else held.weight
    bias = layer.in_proj_bias
    if bias is not None and part != "in_proj":
        at = ("q_proj", "k_proj", "v_proj").index(part)
        bias = bias[at * layer.embed_dim : (at + 1) * layer.embed_dim]
    return linear(listing, x, Product(f"{name}.{part}", weight, bias))


def linear_module(listing: Listing, x: View, name: str, layer: Any) -> View:
    """A Linear, packed or float."""
    weight = (
        layer.packed if isinstance(getattr(layer, "packed", None), PackedWeight) else layer.weight
    )
    return linear(listing, x, Product(name, weight, layer.bias))


def mask_of(
    listing: Listing, mask: Tensor | None, heads: int, size: tuple[int, int]
) -> tuple[str | View, int, int]:
    """A mask that is known, as what is added: (values, step of a head, step of a query)."""
    if mask is None:
        return "0", 0, 0
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    one = mask.reshape(-1, *mask.shape[-2:])
    one = one.expand(one.shape[0], *size)
    if one.shape[0] not in (1, heads):
        one = mask.expand(*mask.shape[:-3], heads, *size).reshape(-1, *size)[:heads]
    head = size[0] * size[1] if one.shape[0] > 1 else 0
    return listing.constant(one, "mask"), head, size[1]
