"""From a program to a listing: every node to kernel calls, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.follow import BATCHNORMS
from subbyte.errors import SubbyteError
from subbyte.export.c import layers
from subbyte.export.c.layers import Frame, Product
from subbyte.export.c.listing import INPUT, Listing, View
from subbyte.export.c.moves import strided
from subbyte.export.c.operators import FLOAT, Call
from subbyte.export.c.values import Values, argument
from subbyte.graph.operators import ITEM
from subbyte.graph.program import LAYER, Node
from subbyte.modules.absorb import Affine
from subbyte.modules.attention import PackedMultiheadAttention
from subbyte.modules.conv import (
    PackedConv1d,
    PackedConv2d,
    PackedConvTranspose1d,
    PackedConvTranspose2d,
)
from subbyte.modules.embedding import PackedEmbedding
from subbyte.modules.linear import PackedLinear

INDEX_KERNELS = ("packed_embedding", "plain_embedding")


def lower(values: Values, listing: Listing) -> list[View]:
    """Fills the listing; returns the outputs. Raises SubbyteError for what C cannot hold."""
    views: dict[str, Any] = inputs_of(values, listing)
    for node in values.source.program.nodes:
        if node.out in values.fixed:
            continue
        before = len(listing.steps)
        views[node.out] = _node(listing, node, values, views)
        check_types(listing, node, values, before)
        made = views[node.out]
        probe(listing, node.out, made[0] if node.op == LAYER and isinstance(made, list) else made)
    return outputs_of(values, listing, views)


def inputs_of(values: Values, listing: Listing) -> dict[str, Any]:
    """The caller's arrays: floats, or whole numbers of 32 bits."""
    found: dict[str, Any] = {}
    inputs = values.source.program.inputs
    for at, given in enumerate(inputs):
        x: Tensor = values.of[given.name]
        if not x.is_floating_point() and x.dtype not in (torch.int64, torch.int32):
            raise SubbyteError(
                f"input '{given.name}' is {given.dtype}; C source takes floats and whole numbers"
            )
        name = "x" if len(inputs) == 1 else f"x{at}"
        found[given.name] = View(listing.buffer(INPUT, x.numel(), name), tuple(x.shape))
    return found


def probe(listing: Listing, name: str, view: Any) -> None:
    """Note a value that a step has made, for whoever follows the run."""
    if isinstance(view, View) and listing.steps and listing.steps[-1].out.buffer == view.buffer:
        listing.probes.append((len(listing.steps), name, view))


def check_types(listing: Listing, node: Node, values: Values, before: int) -> None:
    """Whole numbers are for look-ups alone. Raises SubbyteError, naming the operator."""
    whole = {
        f"x{at}" if len(values.source.program.inputs) > 1 else "x"
        for at, given in enumerate(values.source.program.inputs)
        if not values.of[given.name].is_floating_point()
    }
    for step in listing.steps[before:]:
        reads = {
            listing.buffers[v.buffer].name
            for v in step.reads
            if listing.buffers[v.buffer].kind == INPUT
        }
        if reads & whole and step.kernel not in INDEX_KERNELS:
            raise SubbyteError(
                f"operator '{node.op}' ({node.out}) computes with whole numbers it is given, which "
                "C source does not hold; it looks them up in tables alone"
            )


def outputs_of(values: Values, listing: Listing, views: Mapping[str, Any]) -> list[View]:
    """What the network returns, flat."""
    found = flat(values.source.program.output, values, views)
    constants = (listing.constant(v, "output") if isinstance(v, Tensor) else v for v in found)
    outputs = [v for v in constants if isinstance(v, View)]
    if not outputs:
        raise SubbyteError("the network returns no tensor")
    return outputs


def flat(value: Any, values: Values, views: Mapping[str, Any]) -> list[Any]:
    if isinstance(value, list):
        return [x for item in value for x in flat(item, values, views)]
    if isinstance(value, dict) and "map" in value:
        return [x for item in value["map"].values() for x in flat(item, values, views)]
    found = resolved(value, values, views)
    return list(found) if isinstance(found, list | tuple) else [found]


def resolved(value: Any, values: Values, views: Mapping[str, Any]) -> Any:
    """An argument: views for what depends on inputs, else tensors and numbers."""
    if isinstance(value, list):
        return [resolved(item, values, views) for item in value]
    if isinstance(value, dict) and "value" in value and value["value"] in views:
        return views[value["value"]]
    return argument(value, values.of, values.source)


def _node(listing: Listing, node: Node, values: Values, views: Mapping[str, Any]) -> Any:
    args = {key: resolved(value, values, views) for key, value in node.args.items()}
    if node.op == ITEM:
        return args["x"][args["index"]]
    if node.op == LAYER:
        layer = values.source.net.get_submodule(node.layer)
        return _layer(listing, node, layer, args, values.of[node.out])
    if node.op not in FLOAT:
        raise SubbyteError(f"operator '{node.op}' ({node.out}) has no kernel in C source")
    return FLOAT[node.op](Call(listing, node, args, values.of[node.out]))


def _layer(listing: Listing, node: Node, layer: nn.Module, args: dict[str, Any], value: Any) -> Any:
    name = node.layer
    if isinstance(layer, PackedMultiheadAttention):
        return _multihead(listing, name, layer, args)
    x: View = args["x"]
    if isinstance(layer, (Affine, *BATCHNORMS)):
        return layers.norm(listing, x, name, layer)
    if isinstance(layer, PackedEmbedding):
        return layers.embedding(listing, x, name, layer.packed)
    if isinstance(layer, PackedLinear):
        return layers.linear(listing, x, _product(listing, name, layer, args, value))
    if isinstance(layer, PackedConv1d | PackedConv2d):
        frame = frame_of(name, layer, layer.pads)
        return layers.conv(
            listing, x, _product(listing, name, layer, args, value), frame, value.shape
        )
    if isinstance(layer, PackedConvTranspose1d | PackedConvTranspose2d):
        frame = frame_of(name, layer, layer.padding)
        return layers.conv_transpose(
            listing, x, _product(listing, name, layer, args, value), frame, value.shape
        )
    kind = type(layer).__name__.removeprefix("Packed")
    raise SubbyteError(f"layer '{name}' is a {kind}, which C source has no kernel for")


def _product(
    listing: Listing, name: str, layer: Any, args: dict[str, Any], value: Tensor
) -> Product:
    plus = _spread(listing, args.get("plus"), value.shape)
    return Product(name, layer.packed, layer.bias, plus, getattr(layer, "activation", "none"))


def _spread(listing: Listing, plus: Any, shape: Sequence[int]) -> View | None:
    """What a fused layer adds, in the shape of its result."""
    if plus is None:
        return None
    view: View = listing.constant(plus, "plus") if isinstance(plus, Tensor) else plus
    return strided(listing, view, torch.empty(view.shape, device="meta").expand(tuple(shape)))


def frame_of(name: str, layer: Any, pads: Sequence[int]) -> Frame:
    """The window of a convolution. pads: left, right, top and bottom, or of height and width."""
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise SubbyteError(
            f"layer '{name}' pads with padding_mode='{layer.padding_mode}'; C source has 'zeros'"
        )
    lone = len(layer.packed.shape) == 3
    sizes = [layer.packed.shape[2:], layer.stride, layer.dilation]
    kernel, stride, dilation = (layers.pair(list(s)) for s in sizes)
    transposed = isinstance(layer, PackedConvTranspose1d | PackedConvTranspose2d)
    if transposed:
        before = (0, pads[0]) if lone else (pads[0], pads[1])
    else:
        before = (0, pads[0]) if lone else (pads[2], pads[0])
    return Frame(kernel, stride, dilation, before, layer.groups)


def _multihead(
    listing: Listing, name: str, layer: PackedMultiheadAttention, args: dict[str, Any]
) -> list[Any]:
    if args.get("key_padding_mask") is not None or isinstance(args.get("attn_mask"), View):
        raise SubbyteError(
            f"layer '{name}' is called with a mask that depends on the input, which C source does "
            "not hold"
        )
    mask = args.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = ~mask  # True is what nn.MultiheadAttention leaves out, and attention takes
    given = (*(args[key] for key in ("query", "key", "value")), mask)
    return [layers.multihead(listing, name, layer, given), None]
