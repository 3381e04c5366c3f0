"""What quantized weights do while they are trained: how far from their levels, how many move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte.core.functional import divide, spread
from subbyte.core.group import ALONE, Group
from subbyte.core.quantized import Quantized
from subbyte.core.tensors import QuantizedLayer, QuantizedWeight
from subbyte.data import ImageSet
from subbyte.methods import frozen_layers, quantizers, without_quantizers
from subbyte.modules import pack
from subbyte.train.evaluate import evaluate


@dataclass(frozen=True, slots=True)
class Watch:
    """Figures of all prepared layers together, weighted by their number of weights; None in float.

    distance: mean of |w - w_hat| over one step between levels (weights spread evenly between two
    levels have 0.25). changed: share of the weights on another level than an epoch ago.
    rounded_top1: percent, of the network as it would be frozen now; None as well if the method
    rounds in every forward pass. pull: the strongest pull to the levels that any method exerts
    (SGM's kappa); None if none does.
    """

    distance: float | None = None
    changed: float | None = None
    rounded_top1: float | None = None
    pull: float | None = None


Codes = dict[str, Tensor]


def codes_of(model: nn.Module) -> Codes:
    """Each prepared layer's codes as they are now; empty for a float model."""
    return {name: layer.weight.codes for name, layer in _frozen(model).items()}


def watch(
    model: nn.Module,
    before: Mapping[str, Tensor],
    test: ImageSet,
    progress: float,
    group: Group = ALONE,
) -> tuple[Watch, Codes]:
    """The figures and the codes after an epoch; before: the codes of the epoch before. group: as in
    `evaluate`."""
    layers = _frozen(model)
    if not layers:
        return Watch(), {}
    codes = {name: layer.weight.codes for name, layer in layers.items()}
    n_weights = sum(code.numel() for code in codes.values())
    changed = sum(int((code != before[name]).sum()) for name, code in codes.items())
    away, soft, pulls = 0.0, False, []
    for site, quantizer, w in quantizers(model):
        weight = layers[site.name].weight
        away += float(in_steps(w.detach() - weight.dequantize(), weight).abs().sum())
        soft |= quantizer.soft
        pulls += [quantizer.pull(progress)]
    rounded = None
    if soft:
        done = Quantized(without_quantizers(model), layers)
        rounded = evaluate(pack(done, precision="float32"), test, group=group).top1
    pull = max((pull for pull in pulls if pull is not None), default=None)
    return Watch(away / n_weights, changed / n_weights, rounded, pull), codes


def in_steps(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x in units of the distance between neighbouring levels (their mean, if they differ)."""
    grid = weight.grid
    step = (grid.levels[-1] - grid.levels[0]) / (grid.n_levels - 1)
    return divide(x, weight.scale * step, grid)


FAR = 0.01
"""A mean distance of 1 % of a step: from there on rounding may change the network."""


def far_from_levels(distance: float) -> str | None:
    """A warning with figure and remedy for weights that ended far from their levels, or None."""
    if distance < FAR:
        return None
    return (
        f"the weights ended {distance:.1%} of a step from their levels on average (good: below "
        f"{FAR:.0%}), so rounding changed the network; raise method.end or train longer"
    )


BINS = 120
Histograms = dict[str, list[int]]


def reach(n_levels: int) -> float:
    """Half the range of a histogram, in steps between levels: three quarters beyond the last."""
    return (n_levels - 1) / 2 + 0.75


def histograms(model: nn.Module) -> Histograms:
    """Counts of each layer's float weights in BINS equal bins, in steps from the grid's middle.

    The range is -reach to +reach; weights beyond it count in the last bin. Empty for a float model.
    """
    layers = _frozen(model)
    found = {}
    for site, _, w in quantizers(model):
        weight = layers[site.name].weight
        middle = (weight.grid.levels[0] + weight.grid.levels[-1]) / 2
        centred = w.detach() - spread(weight.scale * middle, w.shape, weight.grid)
        half = reach(weight.grid.n_levels)
        x = in_steps(centred, weight).float().cpu().clamp(-half, half)
        found[site.name] = torch.histc(x, BINS, -half, half).long().tolist()
    return found


def _frozen(model: nn.Module) -> dict[str, QuantizedLayer]:
    """`frozen_layers`, or nothing for a float model."""
    return frozen_layers(model) if any(True for _ in quantizers(model)) else {}
