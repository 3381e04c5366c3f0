"""Layers that a program calls whole, by name: packed ones, and norms.

A program keeps what a layer was constructed with, so that a file opens without the network's class:
the float layer is built without memory, and packed from the file's codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subbyte.core.follow import BATCHNORMS
from subbyte.errors import SubbyteError
from subbyte.modules import (
    PACKED,
    PackedConv2d,
    PackedLinear,
    PackedMultiheadAttention,
)
from subbyte.modules.absorb import Affine

MAX_SIZE = 2**31  # of a constructor's argument


@dataclass(frozen=True, slots=True)
class LayerKind:
    """settings: constructor arguments that a program keeps. takes: a call's arguments in order.
    dims: of a convolution's window.

    shape: an uninitialised result of the right shape, type and layout, for tracing.
    """

    module: type[Any]
    settings: tuple[str, ...]
    takes: tuple[str, ...]
    shape: Callable[..., Any]
    dims: int = 0


def _conv_shape(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def shape(layer: Any, x: Tensor, plus: Tensor | None = None) -> Tensor:
        weight, padding = x.new_empty(layer.packed.shape), layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer.pads), 0
        return function(x, weight, None, layer.stride, padding, layer.dilation, layer.groups)

    return shape


def _transposed_shape(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def shape(layer: Any, x: Tensor) -> Tensor:
        return function(
            x, x.new_empty(layer.packed.shape), None, layer.stride, layer.padding,
            layer.output_padding, layer.groups, layer.dilation,
        )  # fmt: skip

    return shape


def _linear_shape(layer: Any, x: Tensor, plus: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], layer.out_features))


def _embedding_shape(layer: Any, indices: Tensor) -> Tensor:
    size = (*indices.shape, layer.packed.shape[1])
    return torch.empty(size, dtype=layer.packed.dtype_of.dtype, device=indices.device)


def _same_shape(layer: Any, x: Tensor) -> Tensor:
    return torch.empty_like(x)


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
         "bias", "padding_mode")  # fmt: skip
_TRANSPOSED = ("in_channels", "out_channels", "kernel_size", "stride", "padding",
               "output_padding", "groups", "bias", "dilation")  # fmt: skip
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_ATTENTION = ("embed_dim", "num_heads", "dropout", "bias", "add_bias_kv", "add_zero_attn", "kdim",
              "vdim", "batch_first")  # fmt: skip
_SIDE = ("x", "plus")  # what a fused layer adds comes beside

LAYERS: dict[str, LayerKind] = {
    "Linear": LayerKind(nn.Linear, ("in_features", "out_features", "bias"), _SIDE, _linear_shape),
    "Conv1d": LayerKind(nn.Conv1d, _CONV, ("x",), _conv_shape(F.conv1d), 1),
    "Conv2d": LayerKind(nn.Conv2d, _CONV, _SIDE, _conv_shape(F.conv2d), 2),
    "Conv3d": LayerKind(nn.Conv3d, _CONV, ("x",), _conv_shape(F.conv3d), 3),
    "ConvTranspose1d": LayerKind(
        nn.ConvTranspose1d, _TRANSPOSED, ("x",), _transposed_shape(F.conv_transpose1d), 1
    ),
    "ConvTranspose2d": LayerKind(
        nn.ConvTranspose2d, _TRANSPOSED, ("x",), _transposed_shape(F.conv_transpose2d), 2
    ),
    "ConvTranspose3d": LayerKind(
        nn.ConvTranspose3d, _TRANSPOSED, ("x",), _transposed_shape(F.conv_transpose3d), 3
    ),
    "Embedding": LayerKind(
        nn.Embedding, ("num_embeddings", "embedding_dim", "padding_idx"), ("x",), _embedding_shape
    ),
    "MultiheadAttention": LayerKind(
        nn.MultiheadAttention,
        _ATTENTION,
        ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask",
         "average_attn_weights", "is_causal"),
        lambda *_: None,  # traced by an operation of its own: two results
    ),
    "BatchNorm1d": LayerKind(nn.BatchNorm1d, _NORM, ("x",), _same_shape),
    "BatchNorm2d": LayerKind(nn.BatchNorm2d, _NORM, ("x",), _same_shape),
    "BatchNorm3d": LayerKind(nn.BatchNorm3d, _NORM, ("x",), _same_shape),
}  # fmt: skip

WHOLE = (*PACKED.values(), PackedMultiheadAttention, *BATCHNORMS, Affine)
FUSED = (PackedLinear, PackedConv2d)  # what `fuse` may move something into


def type_of(layer: nn.Module) -> str:
    """The entry of LAYERS for a module that a program calls whole."""
    if isinstance(layer, Affine):  # a reader puts it in the place of a norm (the key "affine")
        return "BatchNorm2d"
    return type(layer).__name__.removeprefix("Packed")


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """What a program keeps of a module: type, constructor arguments, and what `fuse` put in."""
    kind = type_of(layer)
    found: dict[str, Any] = {"type": kind}
    for name in LAYERS[kind].settings:
        found[name] = _plain(_setting(layer, name))
    if isinstance(layer, FUSED) and layer.activation != "none":
        found["activation"] = layer.activation
    return found


def _setting(layer: Any, name: str) -> Any:
    if isinstance(layer, Affine):
        return {"num_features": layer.scale.numel(), "eps": 1e-5, "momentum": None, "affine": True,
                "track_running_stats": True}[name]  # fmt: skip
    if isinstance(layer, PackedMultiheadAttention):
        special = {"bias": layer.in_proj_bias is not None, "add_bias_kv": layer.bias_k is not None}
        return special.get(name, getattr(layer, name, None))
    if name == "bias":
        return layer.bias is not None
    return getattr(layer, name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def build_layer(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """The float module of a program's layer, without memory. Raises SubbyteError, naming it."""
    kind = LAYERS[settings["type"]]
    given = {key: settings.get(key) for key in kind.settings}
    for key, value in given.items():
        _check_setting(name, key, value, kind.dims)
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        with torch.device("meta"):
            return kind.module(**arguments)  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise SubbyteError(f"layer {name!r:.99} of the program cannot be: {first[:200]}") from None


_FLAGS = ("bias", "affine", "track_running_stats", "add_bias_kv", "add_zero_attn", "batch_first")
_REALS = ("eps", "momentum", "dropout")
_MAYBE = ("padding_idx", "momentum", "kdim", "vdim")  # None is a value
_WINDOW = ("kernel_size", "stride", "padding", "output_padding", "dilation")  # one a dimension
_MODES = ("zeros", "reflect", "replicate", "circular")


def _check_setting(name: str, key: str, value: Any, dims: int) -> None:
    window = key in _WINDOW and isinstance(value, list) and len(value) == dims
    values = value if window else [value]
    if key == "padding_mode":
        good = value in _MODES
    elif key in _FLAGS:
        good = isinstance(value, bool)
    elif key in _REALS:
        good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    else:
        least = 0 if key in ("padding", "output_padding", "padding_idx") else 1
        good = all(type(v) is int and least <= v < MAX_SIZE for v in values)
        good |= key == "padding" and value in ("same", "valid")
    if not good and not (value is None and key in _MAYBE):
        raise SubbyteError(f"layer {name!r:.99} of the program has {key} = {value!r:.80}")
