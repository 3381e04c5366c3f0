"""What quantized weights do while they are trained: how far from their levels, how many move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte.data import ImageSet
from subbyte.functional import divide
from subbyte.methods import freeze, quantizers
from subbyte.models import Network
from subbyte.modules import pack
from subbyte.tensors import QuantizedLayer, QuantizedTensor
from subbyte.train.evaluate import evaluate

BINS_PER_STEP = 40


@dataclass(frozen=True, slots=True)
class Watch:
    """Figures of all prepared layers together, weighted by their number of weights.

    distance: mean of |w - w_hat| over one step between levels (uniform over a step would be 0.25).
    changed: share of the weights on another level than an epoch ago. rounded_top1: percent, of the
    network as it would be frozen now; None if the method rounds in every forward pass anyway.
    """

    distance: float
    changed: float
    rounded_top1: float | None


Codes = dict[str, Tensor]


def codes_of(model: nn.Module) -> Codes:
    """Each prepared layer's codes as they are now; empty for a float model."""
    return {name: layer.weight.codes for name, layer in _frozen(model).items()}


def watch(model: Network, before: Mapping[str, Tensor], test: ImageSet) -> Watch | None:
    """The figures after an epoch; before: `codes_of` the epoch before. None for a float model."""
    layers = _frozen(model)
    if not layers:
        return None
    n_weights = n_changed = 0
    moved = 0.0
    soft = False
    for site, quantizer, w in quantizers(model):
        weight = layers[site.name].weight
        n_weights += w.numel()
        n_changed += int((weight.codes != before[site.name]).sum())
        moved += float(in_steps(w.detach() - weight.dequantize(), weight).abs().sum())
        soft |= quantizer.soft
    rounded = evaluate(pack(model, layers), test).top1 if soft else None
    return Watch(moved / n_weights, n_changed / n_weights, rounded)


def in_steps(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """x in units of the distance between neighbouring levels (their mean, if they differ)."""
    grid = weight.grid
    step = (grid.levels[-1] - grid.levels[0]) / (grid.n_levels - 1)
    return divide(x, weight.scale * step, grid)


def histograms(model: nn.Module) -> dict[str, Tensor]:
    """Counts of each layer's float weights, int32 [bins], over the grid and a step on each side.

    BINS_PER_STEP bins lie between two neighbouring levels.
    """
    layers = _frozen(model)
    counted = {}
    for site, _, w in quantizers(model):
        weight = layers[site.name].weight
        reach = (weight.grid.n_levels + 1) / 2
        x = in_steps(w.detach(), weight).clamp(-reach, reach)
        counted[site.name] = torch.histc(x.cpu(), round(2 * reach) * BINS_PER_STEP, -reach, reach)
    return {name: counts.int() for name, counts in counted.items()}


def _frozen(model: nn.Module) -> dict[str, QuantizedLayer]:
    """`freeze`, or nothing for a float model."""
    return freeze(model) if any(True for _ in quantizers(model)) else {}
