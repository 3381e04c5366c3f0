"""A network with its quantized layers replaced by packed ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from subbyte import kernels
from subbyte.core.as_linear import with_linears
from subbyte.core.quantized import Quantized
from subbyte.core.ready import check_plain, copied
from subbyte.core.sites import Site, join, sharing_sites, sites, supported_type, unsupported
from subbyte.core.tensors import QuantizedLayer
from subbyte.errors import SubbyteError
from subbyte.kernels import Precision
from subbyte.methods.base import is_prepared
from subbyte.modules.absorb import BatchNormMode, absorb_batchnorm, check_mode
from subbyte.modules.attention import PackedMultiheadAttention
from subbyte.modules.conv import (
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedConvTranspose1d,
    PackedConvTranspose2d,
    PackedConvTranspose3d,
)
from subbyte.modules.embedding import PackedEmbedding
from subbyte.modules.linear import PackedLinear
from subbyte.modules.recurrent import PackedGRU, PackedLSTM, PackedRNN

PACKED: dict[type[nn.Module], type[Any]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
    nn.ConvTranspose1d: PackedConvTranspose1d,
    nn.ConvTranspose2d: PackedConvTranspose2d,
    nn.ConvTranspose3d: PackedConvTranspose3d,
    nn.Embedding: PackedEmbedding,
}
"""What stands for a layer with one weight; made of the layer and its QuantizedLayer."""

SEVERAL: dict[type[nn.Module], type[Any]] = {
    nn.MultiheadAttention: PackedMultiheadAttention,
    nn.LSTM: PackedLSTM,
    nn.GRU: PackedGRU,
    nn.RNN: PackedRNN,
}
"""What stands for a layer with several weights; made of the layer and those that are quantized, by
the last part of their names."""


def pack(
    quantized: Quantized | nn.Module,
    layers: Quantized | Mapping[str, QuantizedLayer] | None = None,
    *,
    batchnorm: BatchNormMode = "keep",
    precision: Precision = "auto",
) -> nn.Module:
    """A copy of the float network in which the quantized layers are packed; in eval mode.

    quantized: of `sb.freeze` or `sb.quantize`; it stays as it is. Or a float network, followed by
    layers of your own making, by name.
    batchnorm: "absorb" turns every BatchNorm into one scale and one shift a channel,
    "power_of_two" rounds those scales too (`subbyte.modules.absorb`); codes stay as they are.
    precision: of the activations in products, "int8", "int16", "float32", or "auto": the fastest
    that the machine has within the error of int8 (`subbyte.kernels`); the attribute `precision` of
    a packed layer changes it later.
    Raises SubbyteError for a name the model does not have, a shape that differs, or a prepared
    layer that is not among the quantized ones.
    """
    if layers is not None and isinstance(quantized, nn.Module):
        own = layers.layers if isinstance(layers, Quantized) else layers
        quantized = Quantized(quantized, own)
    if not isinstance(quantized, Quantized):
        raise SubbyteError(
            f"pack takes what freeze and quantize return, not {type(quantized).__name__}; for "
            "layers of your own give Quantized(model, layers)"
        )
    found = quantized.layers
    model = with_linears(quantized.model, found)
    check_mode(batchnorm)
    kernels.check_precision(precision)
    if batchnorm != "keep":
        model = absorb_batchnorm(model, rounded=batchnorm == "power_of_two")
    net = copied(model)
    shared = _shared(net, found)
    by_owner = _by_owner(net, found, shared)
    replaced: dict[int, Any] = {}
    for parent in reversed(list(net.modules())):  # children first: attention takes its out_proj
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in by_owner:
                packed = replaced.get(id(child)) or _packed(child, by_owner[id(child)])
                replaced[id(child)] = packed
                setattr(parent, name, packed)
    for first, others in shared.items():
        for other in others:
            replaced[id(other)].packed = replaced[id(first)].packed  # one weight for both
    _replace_elsewhere(net, replaced)
    if id(net) in by_owner:
        net = _packed(net, by_owner[id(net)])
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoder) and _attends_packed(module):
            module.use_nested_tensor = False  # nested tensors reach torch's own layers only
        if isinstance(module, PackedLinear | PackedConv2d | PackedMultiheadAttention):
            module.precision = precision
    return net.eval()


def _replace_elsewhere(net: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Packed layers in place of their float twins where forward may look besides the modules.

    A network may keep its layers in a plain list, dict or tuple as well. Raises SubbyteError for a
    twin that something else holds (a bound method, an object of its own): it would run in float.
    """
    for path, module in net.named_modules():
        for name, value in list(vars(module).items()):
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            if isinstance(value, nn.Module | list | dict | tuple | set | deque):
                value = _replaced(value, replaced)
                vars(module)[name] = value
            if any(id(twin) in replaced for twin in _modules_in(value, 0)):
                raise SubbyteError(
                    f"attribute '{join(path, name)}' ({type(value).__name__}) holds a layer that "
                    "is being packed and would go on in float; keep layers in attributes, lists "
                    "or dicts, or add a rule that keeps that layer float"
                )


def _replaced(value: Any, replaced: Mapping[int, nn.Module]) -> Any:
    """The same container with packed layers in it; containers that change are changed in place."""
    if isinstance(value, nn.Module):
        return replaced.get(id(value), value)
    if isinstance(value, dict):
        for key, item in list(value.items()):
            value[key] = _replaced(item, replaced)
    elif isinstance(value, list | deque):
        for i, item in enumerate(value):
            value[i] = _replaced(item, replaced)
    elif type(value) in (tuple, set):
        return type(value)(_replaced(item, replaced) for item in value)
    return value


_DEPTH = 4  # of objects in objects that are looked through for layers


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    """Modules that a plain value holds: in containers, bound methods, partials, attributes."""
    if isinstance(value, nn.Module):
        yield from value.modules()
        return
    if depth == _DEPTH or isinstance(value, Tensor | str | bytes | int | float | type | None):
        return
    inner: Any = ()
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset | deque):
        inner = value
    elif isinstance(value, MethodType):
        inner = (value.__self__,)
    elif isinstance(value, partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif hasattr(value, "__dict__") and not callable(value):
        inner = vars(value).values()
    for item in inner:
        yield from _modules_in(item, depth + 1)


def _shared(
    net: nn.Module, layers: Mapping[str, QuantizedLayer]
) -> dict[nn.Module, list[nn.Module]]:
    """Modules whose quantized weight others use as well -> these others."""
    groups = sharing_sites(net)
    return {
        net.get_submodule(first.owner): [
            net.get_submodule(site.owner) for site in groups[first.name]
        ]
        for first in sites(net)
        if first.name in groups and first.name in layers
    }


def _by_owner(
    net: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    shared: Mapping[nn.Module, Sequence[nn.Module]],
) -> dict[int, dict[str, QuantizedLayer]]:
    """id of each module to replace -> its quantized weights, by the last part of their names."""
    known = {site.name: site for site in sites(net)}
    missing = sorted(set(layers) - set(known))
    if missing:
        found = unsupported(net).get(missing[0])
        if found is not None:
            raise SubbyteError(f"layer '{missing[0]}' ({found[0]}) cannot be packed: {found[1]}")
        raise SubbyteError(f"the model has no layer {missing[0]!r}; it has {', '.join(known)}")
    by_owner: dict[int, dict[str, QuantizedLayer]] = {}
    for name, layer in layers.items():
        site = known[name]
        owner = net.get_submodule(site.owner)
        _check_fit(site, layer, owner)
        check_plain(name, owner)
        part = site.parameter.removesuffix("_weight")
        by_owner.setdefault(id(owner), {})[part] = layer
        for other in shared.get(owner, ()):
            bias: Tensor | None = getattr(other, "bias", None)
            by_owner[id(other)] = {part: replace(layer, bias=bias)}
    _check_all_prepared(net, known.values(), layers)
    for module in net.modules():  # attention reads its out_proj's weight, so it must know it packed
        if isinstance(module, nn.MultiheadAttention) and id(module.out_proj) in by_owner:
            by_owner.setdefault(id(module), {})
    return by_owner


def _packed(module: nn.Module, layers: Mapping[str, QuantizedLayer]) -> nn.Module:
    """The packed counterpart of one module, whose children may be packed already."""
    kind = supported_type(module)
    assert kind is not None
    packed: nn.Module
    if kind in SEVERAL:
        packed = SEVERAL[kind](module, layers)
    else:
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


def _check_all_prepared(net: nn.Module, known: Any, layers: Mapping[str, QuantizedLayer]) -> None:
    for site in known:
        owner = net.get_submodule(site.owner)
        if is_prepared(owner, site.parameter) and site.name not in layers:
            raise SubbyteError(f"layer '{site.name}' is prepared but not among the frozen layers")


def _attends_packed(encoder: nn.Module) -> bool:
    return any(isinstance(module, PackedMultiheadAttention) for module in encoder.modules())


def is_fused(net: nn.Module) -> bool:
    """Whether a layer of the network does more than its own, by `fuse`."""
    return any(getattr(module, "fused", False) for module in net.modules())
