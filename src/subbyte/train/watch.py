"""What quantized weights do while they are trained: how far from their levels, how many move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from subbyte.data import ImageSet
from subbyte.functional import divide
from subbyte.methods import freeze, quantizers
from subbyte.modules import pack
from subbyte.tensors import QuantizedLayer, QuantizedTensor
from subbyte.train.evaluate import evaluate


@dataclass(frozen=True, slots=True)
class Watch:
    """Figures of all prepared layers together, weighted by their number of weights; None in float.

    distance: mean of |w - w_hat| over one step between levels (weights spread evenly between two
    levels have 0.25). changed: share of the weights on another level than an epoch ago.
    rounded_top1: percent, of the network as it would be frozen now; None as well if the method
    rounds in every forward pass.
    """

    distance: float | None = None
    changed: float | None = None
    rounded_top1: float | None = None


Codes = dict[str, Tensor]


def codes_of(model: nn.Module) -> Codes:
    """Each prepared layer's codes as they are now; empty for a float model."""
    return {name: layer.weight.codes for name, layer in _frozen(model).items()}


def watch(model: nn.Module, before: Mapping[str, Tensor], test: ImageSet) -> tuple[Watch, Codes]:
    """The figures and the codes after an epoch; before: the codes of the epoch before."""
    layers = _frozen(model)
    if not layers:
        return Watch(), {}
    codes = {name: layer.weight.codes for name, layer in layers.items()}
    n_weights = sum(code.numel() for code in codes.values())
    changed = sum(int((code != before[name]).sum()) for name, code in codes.items())
    away, soft = 0.0, False
    for site, quantizer, w in quantizers(model):
        weight = layers[site.name].weight
        away += float(in_steps(w.detach() - weight.dequantize(), weight).abs().sum())
        soft |= quantizer.soft
    rounded = evaluate(pack(model, layers), test).top1 if soft else None
    return Watch(away / n_weights, changed / n_weights, rounded), codes


def in_steps(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """x in units of the distance between neighbouring levels (their mean, if they differ)."""
    grid = weight.grid
    step = (grid.levels[-1] - grid.levels[0]) / (grid.n_levels - 1)
    return divide(x, weight.scale * step, grid)


def _frozen(model: nn.Module) -> dict[str, QuantizedLayer]:
    """`freeze`, or nothing for a float model."""
    return freeze(model) if any(True for _ in quantizers(model)) else {}
