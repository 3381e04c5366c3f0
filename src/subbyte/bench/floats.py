"""The float network that a packed one stands for: what speed is compared with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.kernels import Activation, finish
from subbyte.modules import PACKED, SEVERAL

_FLOAT: dict[Any, Any] = {packed: kind for kind, packed in PACKED.items()}
_SEVERAL: Any = tuple(SEVERAL.values())
PACKED_TYPES: tuple[type[nn.Module], ...] = (*_FLOAT, *_SEVERAL)


def float_twin(net: nn.Module) -> nn.Module:
    """A copy with `torch.nn` layers of the decoded float32 weights; in eval mode."""
    twin = copy.deepcopy(net)
    if isinstance(twin, PACKED_TYPES):
        return _float_layer(twin).eval()
    for parent in list(twin.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, PACKED_TYPES):
                setattr(parent, name, _float_layer(child))
    return twin.eval().requires_grad_(False)


def _float_layer(layer: Any) -> nn.Module:
    if isinstance(layer, _SEVERAL):
        found: nn.Module = layer.float_layer()
        return found
    kind, weight = _FLOAT[type(layer)], layer.weight
    twin: Any
    with torch.device("meta"):
        if kind is nn.Linear:
            twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        elif kind is nn.Embedding:
            twin = nn.Embedding(*weight.shape)
        else:
            twin = _convolution(kind, layer, weight)
    twin.weight = _parameter(weight)
    if kind is not nn.Embedding and layer.bias is not None:
        twin.bias = _parameter(layer.bias)
    return _Then(twin, layer.activation) if getattr(layer, "fused", False) else twin


class _Then(nn.Module):
    """A float layer, and what a fused packed one does behind its products."""

    def __init__(self, layer: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        return finish(self.layer(x), plus, self.activation)


def _convolution(kind: Any, layer: Any, weight: Tensor) -> Any:
    names = ["stride", "padding", "dilation", "groups", "padding_mode"]
    names += ["output_padding"] if layer.transposed else []
    settings = {name: getattr(layer, name) for name in names}
    ends = (weight.shape[1] * layer.groups, weight.shape[0])
    if kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        ends = (weight.shape[0], weight.shape[1] * layer.groups)
    return kind(*ends, tuple(weight.shape[2:]), bias=layer.bias is not None, **settings)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=False)
