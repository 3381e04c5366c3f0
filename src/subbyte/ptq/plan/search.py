"""Levels and ranks of all layers under one budget of bytes, in closed form.

The predicted rise of the loss adds up over the layers, and for one layer it is known for every
number of levels and every rank at once: 1/2 of what `reclaimed` leaves. So the best plan is a
knapsack: for a price of a byte every layer takes its cheapest option, the price is bisected until
the budget is met, and what is left over is spent greedily. The network is not run at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.core.functional import n_groups
from subbyte.core.grids import n_words
from subbyte.core.group import ALONE, Group
from subbyte.core.plan import Plan, PlannedLayer
from subbyte.core.rtn import rtn
from subbyte.core.sites import Site
from subbyte.errors import SubbyteError
from subbyte.ptq.evidence.statistics import Statistics
from subbyte.ptq.solvers.codes import gptq, matrix_grid, quick_errors
from subbyte.ptq.solvers.lowrank import Metric, adapter_bytes, largest_rank, reclaimed

LEVELS = (2, 3, 4, 5, 8, 9, 16, 17, 32, 64, 256)
GROUPS = (None, 128, 64, 32)
MOST_RANK = 16
LARGE = 2**14  # weights from which on a matrix may have scales per group
_SAMPLED = 64  # rows of each kind that stand for a large matrix
_BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class _Option:
    levels: int
    rank: int
    n_bytes: int
    loss: float
    group: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What is known of a layer. matrix: float [out, width]. starved: it saw fewer vectors than it
    has inputs."""

    site: Site
    matrix: Tensor
    groups: int
    statistics: Statistics | None
    effect: Tensor | None
    starved: bool = False


def work(layer: Layer) -> float:
    """What solving a layer costs, beside the others."""
    return float(layer.matrix.numel() * layer.matrix.shape[1])


def code_bytes(layer: Layer, levels: int, group: int | None = None) -> int:
    """Radix words, and a scale per channel or per group of inputs."""
    grid = matrix_grid(layer.matrix, levels, group)
    scales = n_groups(layer.matrix.shape, grid) * grid.scale_domain.bits // 8
    return 8 * n_words(layer.site.n_weights, levels) + scales


def extra_bytes(layer: Layer, rank: int, adapter_bits: int) -> int:
    """The adapter."""
    out, width = layer.matrix.shape
    return adapter_bytes(out, width, layer.groups, rank, adapter_bits) if rank else 0


def layer_bytes(layer: Layer, planned: PlannedLayer, adapter_bits: int) -> int:
    """Codes, scales and adapter of a layer whose levels are known."""
    assert planned.levels
    rank = planned.rank
    return code_bytes(layer, planned.levels, planned.group) + extra_bytes(layer, rank, adapter_bits)


def search(
    layers: Sequence[Layer],
    target_bits: float,
    *,
    levels: Sequence[int] = LEVELS,
    groups: Sequence[int | None] = (),
    adapter_bits: int = 8,
    most_rank: int = MOST_RANK,
    group: Group = ALONE,
) -> Plan:
    """The plan with the least predicted loss of at most `target_bits` bits per weight.

    groups: sizes of groups of inputs to choose among, None for a scale per channel; large matrices
    choose among these in place of ranks. Empty: ranks, and a scale per channel, for all.
    group: processes that share the layers; all of them get the plan. Seven parameters: the budget,
    and everything that there is to choose among. Raises SubbyteError, with the smallest budget that
    can be met, if that is too little.
    """

    def options_of(layer: Layer) -> list[_Option]:
        if groups and layer.site.n_weights >= LARGE and layer.groups == 1:
            return grouped_options(layer, levels, groups)
        return _options(layer, levels, adapter_bits, most_rank)

    options = group.each(options_of, layers, work)
    own = [layers[i] for i in range(len(layers))]  # who listens has heard of each by now
    weights = sum(layer.site.n_weights for layer in own)
    budget = int(target_bits * weights / 8)
    least = sum(min(option.n_bytes for option in own) for own in options)
    if least > budget:
        raise SubbyteError(
            f"target_bits={target_bits:g} cannot be met; the smallest plan with these levels has "
            f"{8 * least / weights:.3f} bits per weight"
        )
    chosen = _spend(_priced(options, budget), options, budget)
    return Plan(tuple(_planned(layer, option) for layer, option in zip(own, chosen, strict=True)))


def _planned(layer: Layer, option: _Option) -> PlannedLayer:
    site = layer.site
    return PlannedLayer(
        site.name, site.type, site.shape, option.levels, option.rank, option.n_bytes,
        None if layer.statistics is None else option.loss, group=option.group,
    )  # fmt: skip


def _options(
    layer: Layer, levels: Sequence[int], adapter_bits: int, most_rank: int
) -> list[_Option]:
    out, width = layer.matrix.shape
    most = min(most_rank, largest_rank(out, width, layer.groups))
    gram = None if layer.statistics is None else layer.statistics.gram
    metric = Metric(gram, layer.effect, layer.groups, width)
    found = []
    for n in levels:
        error = layer.matrix - quick(layer.matrix, gram, n)
        left = 0.5 * reclaimed(error, metric, most)
        codes = code_bytes(layer, n)
        found += [
            _Option(n, rank, codes + extra_bytes(layer, rank, adapter_bits), float(left[rank]))
            for rank in range(most + 1)
        ]
    return found


def grouped_options(
    layer: Layer, levels: Sequence[int], groups: Sequence[int | None]
) -> list[_Option]:
    """Choices of levels and group size for a large matrix, by the errors of some of its rows."""
    wide = layer.matrix.shape[1]
    sizes = [size for size in groups if size is None or size < wide]
    choices = [(n, size) for n in levels for size in sizes]
    rows, weights = sampled_rows(layer.effect, len(layer.matrix))
    gram = None if layer.statistics is None else layer.statistics.gram
    errors = quick_errors(layer.matrix[rows], gram, choices)
    losses = 0.5 * (errors * weights).sum(1)
    return [
        _Option(n, 0, code_bytes(layer, n, size), float(loss), size)
        for (n, size), loss in zip(choices, losses, strict=True)
    ]


def sampled_rows(effect: Tensor | None, out: int) -> tuple[Tensor, Tensor]:
    """Rows, and weights so that the weighted sum of their errors stands for that of all rows.

    The rows of most effect count as what they are; of the others, some stand for all.
    """
    effect = torch.ones(out, dtype=torch.float64) if effect is None else effect
    if out <= 2 * _SAMPLED:
        return torch.arange(out), effect
    order = effect.argsort(descending=True, stable=True)
    first, rest = order[:_SAMPLED], order[_SAMPLED:].sort().values
    others = rest[torch.linspace(0, len(rest) - 1, _SAMPLED).long()]
    mean = effect[rest].sum() / len(others)
    return torch.cat([first, others]), torch.cat([effect[first], mean.expand(len(others))])


def quick(matrix: Tensor, gram: Tensor | None, levels: int) -> Tensor:
    """The quantized weight as a first look gives it: one scale tried, no refinement."""
    grid = matrix_grid(matrix, levels, None)
    if gram is None:
        return rtn(matrix, None, grid).dequantize()
    return gptq(matrix, gram, grid, sweeps=0, factors=(1.0,)).dequantize()


def _priced(options: Sequence[Sequence[_Option]], budget: int) -> list[_Option]:
    """Every layer's best option at the lowest price of a byte that meets the budget."""

    def at(price: float) -> list[_Option]:
        return [min(own, key=lambda o: (o.loss + price * o.n_bytes, o.n_bytes)) for own in options]

    low, high = 0.0, 1.0
    if sum(o.n_bytes for o in at(low)) <= budget:
        return at(low)
    while sum(o.n_bytes for o in at(high)) > budget:
        high *= 4
        if high > 1e300:  # the losses do not matter any more
            return [min(own, key=lambda o: o.n_bytes) for own in options]
    low = 1e-30
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if sum(o.n_bytes for o in at(middle)) > budget:
            low = middle
        else:
            high = middle
    return at(high)


def _spend(
    chosen: list[_Option], options: Sequence[Sequence[_Option]], budget: int
) -> list[_Option]:
    """What is left of the budget goes, a layer at a time, where a byte gains most."""
    chosen = list(chosen)
    while True:
        left = budget - sum(option.n_bytes for option in chosen)
        best: tuple[float, int, _Option] | None = None
        for i, own in enumerate(options):
            now = chosen[i]
            for option in own:
                gain, price = now.loss - option.loss, option.n_bytes - now.n_bytes
                if gain <= 0 or price > left:
                    continue
                worth = gain / max(price, 1)
                if best is None or worth > best[0]:
                    best = (worth, i, option)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
