"""Levels and ranks of all layers under one budget of bytes, in closed form.

The predicted rise of the loss adds up over the layers, and for one layer it is known for every
number of levels and every rank at once: 1/2 of what `reclaimed` leaves. So the best plan is a
knapsack: for a price of a byte every layer takes its cheapest option, the price is bisected until
the budget is met, and what is left over is spent greedily. The network is not run at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from subbyte.core.grids import n_words
from subbyte.core.plan import Plan, PlannedLayer
from subbyte.core.rtn import rtn
from subbyte.core.sites import Site
from subbyte.errors import SubbyteError
from subbyte.ptq.evidence.statistics import Statistics
from subbyte.ptq.solvers.codes import channel_grid, gptq, scale_domain
from subbyte.ptq.solvers.lowrank import Metric, adapter_bytes, largest_rank, reclaimed

LEVELS = (2, 3, 4, 5, 8, 9, 16, 17, 32, 64, 256)
MOST_RANK = 16
_BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class _Option:
    levels: int
    rank: int
    n_bytes: int
    loss: float


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


def code_bytes(layer: Layer, levels: int) -> int:
    """Radix words and a scale per channel."""
    scales = len(layer.matrix) * scale_domain(layer.matrix).bits // 8
    return 8 * n_words(layer.site.n_weights, levels) + scales


def extra_bytes(layer: Layer, rank: int, adapter_bits: int) -> int:
    """The adapter."""
    out, width = layer.matrix.shape
    return adapter_bytes(out, width, layer.groups, rank, adapter_bits) if rank else 0


def layer_bytes(layer: Layer, levels: int, rank: int, adapter_bits: int) -> int:
    """Codes, scales and adapter."""
    return code_bytes(layer, levels) + extra_bytes(layer, rank, adapter_bits)


def search(
    layers: Sequence[Layer],
    target_bits: float,
    *,
    levels: Sequence[int] = LEVELS,
    adapter_bits: int = 8,
    most_rank: int = MOST_RANK,
) -> Plan:
    """The plan with the least predicted loss of at most `target_bits` bits per weight.

    Raises SubbyteError, with the smallest budget that can be met, if that is too little.
    """
    options = [_options(layer, levels, adapter_bits, most_rank) for layer in layers]
    weights = sum(layer.site.n_weights for layer in layers)
    budget = int(target_bits * weights / 8)
    least = sum(min(option.n_bytes for option in own) for own in options)
    if least > budget:
        raise SubbyteError(
            f"target_bits={target_bits:g} cannot be met; the smallest plan with these levels has "
            f"{8 * least / weights:.3f} bits per weight"
        )
    chosen = _spend(_priced(options, budget), options, budget)
    return Plan(
        tuple(_planned(layer, option) for layer, option in zip(layers, chosen, strict=True))
    )


def _planned(layer: Layer, option: _Option) -> PlannedLayer:
    site = layer.site
    return PlannedLayer(
        site.name, site.type, site.shape, option.levels, option.rank, option.n_bytes,
        None if layer.statistics is None else option.loss,
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


def quick(matrix: Tensor, gram: Tensor | None, levels: int) -> Tensor:
    """The quantized weight as a first look gives it: one scale tried, no refinement."""
    grid = channel_grid(levels, 0, scale_domain(matrix))
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
