"""A program of PyTorch (.pt2), through torch.export."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.errors import SubbyteError
from subbyte.export.base import Built, Exporter, Request
from subbyte.graph.layers import build_layer, settings_of
from subbyte.modules import PACKED, PackedMultiheadAttention, PackedWeight

FORMS = ("auto", "packed", "plain")
PACKED_NOTE = "weights stay packed; open it with `import subbyte` and torch.export.load(path)"
PLAIN_NOTE = "weights are decoded to float32; torch.export.load(path) opens it without subbyte"


def build(request: Request) -> Built:
    """One .pt2, with a free batch. Raises SubbyteError for a network that cannot be exported."""
    source = request.read()
    plain = request.form == "plain"
    net = decoded(source.net) if plain else source.net
    args = tuple(_doubled(x) for x in source.example)
    exported = _exported(net, args)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    packed = [n for n, m in source.net.named_modules() if isinstance(m, PackedWeight)]
    kinds = tuple((n.removesuffix(".packed"), "float32" if plain else "packed") for n in packed)
    notes = (PLAIN_NOTE if plain else PACKED_NOTE, *fixed_batch(exported, args))
    return Built({".pt2": buffer.getvalue()}, "plain" if plain else "packed", kinds, notes)


def fixed_batch(exported: Any, args: tuple[Tensor, ...]) -> tuple[str, ...]:
    """A note if torch.export made the batch a constant, as packed look-up tables do."""
    more = tuple(torch.cat([x, x[:1]]) if x.ndim else x for x in args)
    try:
        with torch.no_grad():
            exported.module()(*more)
    except (AssertionError, RuntimeError):  # its guards
        n = next(x.shape[0] for x in args if x.ndim)
        return (
            f"torch.export fixes the batch at {n}; give an example of the batch that is to run",
        )
    return ()


def _doubled(x: Tensor) -> Tensor:
    """A batch of one is taken for a constant."""
    return torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x


def _exported(net: nn.Module, args: tuple[Tensor, ...]) -> Any:
    """torch.export with every first dimension free."""
    free = torch.export.Dim.AUTO
    shapes = tuple({0: free} if x.ndim else {} for x in args)
    try:
        return torch.export.export(net, args, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the network's forward does with traced tensors
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise SubbyteError(
            f"{type(net).__name__} cannot be exported: {first.strip()[:300]}"
        ) from None


def decoded(net: nn.Module) -> nn.Module:
    """A copy of a packed network with float32 weights in layers of torch.nn."""
    net = copy.deepcopy(net)
    if type(net) in _PACKED:
        return _plain("", net)
    for path, module in list(net.named_modules()):
        if type(module) in _PACKED:
            parent, _, own = path.rpartition(".")
            setattr(net.get_submodule(parent), own, _plain(path, module))
    return net.eval()


_PACKED = (*PACKED.values(), PackedMultiheadAttention)


class _Then(nn.Module):
    """A layer, and what `fuse` had moved into it."""

    def __init__(self, layer: nn.Module, activation: str) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, input: Tensor, plus: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(input)
        y = y if plus is None else y + plus
        return (
            y
            if self.activation == "none"
            else y.clamp(0, 6 if self.activation == "relu6" else None)
        )


def _plain(path: str, module: Any) -> nn.Module:
    """The float layer that a packed one stands for."""
    layer: Any = build_layer(path, settings_of(module)).to_empty(device="cpu")
    if isinstance(module, PackedMultiheadAttention):
        _fill_attention(layer, module)
    else:
        layer.weight.data.copy_(module.weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.data.copy_(module.bias)
    layer = layer.eval().requires_grad_(False)
    return _Then(layer, module.activation) if getattr(module, "fused", False) else layer  # type: ignore[no-any-return]


def _fill_attention(layer: Any, module: Any) -> None:
    for part in ("in_proj",) if module.joint else ("q_proj", "k_proj", "v_proj"):
        getattr(layer, f"{part}_weight").data.copy_(getattr(module, part)())
    for name in ("in_proj_bias", "bias_k", "bias_v"):
        if getattr(module, name) is not None:
            getattr(layer, name).data.copy_(getattr(module, name))
    layer.out_proj.weight.data.copy_(module.out_proj.weight)
    if layer.out_proj.bias is not None:
        layer.out_proj.bias.data.copy_(module.out_proj.bias)


EXPORTER = Exporter(".pt2", "PyTorch program", FORMS, build)
