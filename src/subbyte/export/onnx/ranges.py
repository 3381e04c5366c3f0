"""Ranges of activations, of calibration batches: what int8 convolutions need to be told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.errors import SubbyteError
from subbyte.export.base import in_order
from subbyte.export.onnx.ready import Ready
from subbyte.graph.trace import Example


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest value seen; holds 0, which padding needs."""

    low: float = 0.0
    high: float = 0.0

    def with_(self, x: Tensor) -> Range:
        low, high = torch.aminmax(x.detach())
        return Range(min(self.low, float(low)), max(self.high, float(high)))

    @property
    def scale(self) -> float:
        """Of 8 bits without sign."""
        return (self.high - self.low) / 255 or 1.0

    @property
    def zero(self) -> int:
        """The code of 0."""
        return round(-self.low / self.scale)


@dataclass(frozen=True, slots=True)
class Ranges:
    """Of one layer: inputs, what is added to the product, the product with its bias, the result."""

    x: Range = Range()
    plus: Range = Range()
    product: Range = Range()
    result: Range = Range()


def ranges_of(ready: Ready, calibration: Iterable[Example]) -> Mapping[str, Ranges]:
    """Of each convolution with packed weights, by name; the network runs in float32.

    Raises SubbyteError for calibration without a batch, or with values that are not finite.
    """
    watched = {n: _Watched(n, layer) for n, layer in ready.layers.items() if is_conv(layer)}
    net, inputs = ready.calling(watched), ready.source.program.inputs
    n = 0
    with torch.inference_mode():
        for batch in calibration:
            net(*in_order(ready.source.program, _inputs(batch, len(inputs))))
            n += 1
    if not n:
        raise SubbyteError("calibration holds no batch; give a few hundred examples")
    return {name: layer.ranges for name, layer in watched.items()}


def _inputs(batch: Any, n: int) -> Any:
    """Without the labels that a loader of pairs gives."""
    if isinstance(batch, list | tuple) and len(batch) > n:
        return tuple(batch[:n])
    return batch


def is_conv(layer: nn.Module) -> bool:
    """Whether it is a convolution of packed weights, not a transposed one."""
    return type(layer).__name__ in ("PackedConv1d", "PackedConv2d", "PackedConv3d")


class _Watched(nn.Module):
    """A packed convolution in float32 that remembers its ranges."""

    def __init__(self, name: str, layer: Any) -> None:
        super().__init__()
        self.name, self.layer = name, layer
        self.ranges = Ranges()

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        layer, seen = self.layer, self.ranges
        product = _bare(layer, x)
        y = product if plus is None else product + plus
        kind = getattr(layer, "activation", "none")
        y = y if kind == "none" else y.relu() if kind == "relu" else y.clamp(0, 6)
        if not y.isfinite().all():
            raise SubbyteError(
                f"calibration gives layer '{self.name}' values that are NaN or infinite"
            )
        self.ranges = replace(
            seen, x=seen.x.with_(x), product=seen.product.with_(product),
            plus=seen.plus if plus is None else seen.plus.with_(plus), result=seen.result.with_(y),
        )  # fmt: skip
        return y


def _bare(layer: Any, x: Tensor) -> Tensor:
    """The convolution and its bias, without what follows."""
    function, padding = type(layer).function, layer.padding
    if layer.padding_mode != "zeros":
        x, padding = nn.functional.pad(x, layer.pads, mode=layer.padding_mode), 0
    found: Tensor = function(
        x, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups
    )
    return found
