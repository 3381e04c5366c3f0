"""CoRa's options, and codes and adapter of one layer.

"Reclaiming Residual Knowledge", arXiv:2408.00923; its published form is `subbyte.ptq.published`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor

from subbyte.core.grids import PerGroup
from subbyte.core.plan import PlannedLayer
from subbyte.core.tensors import LowRank, QuantizedLayer
from subbyte.errors import SubbyteError
from subbyte.ptq.plan.search import Layer
from subbyte.ptq.solvers import SOLVERS, Solver, weight_of
from subbyte.ptq.solvers.lowrank import Metric, fit_adapter

MOST_TUNE = 100_000
_OF_THE_NETWORK = ("tune", "in_order", "correct_norms")


@dataclass(frozen=True, slots=True)
class CoRa:
    """Which codes, which adapters, how long to tune.

    levels or bits (2^bits levels): of every layer; neither: searched per layer, with the ranks.
    target_bits: the budget in real bits per weight of the layers that it quantizes (codes, scales,
    adapters; `Quantized.layer_bits_per_weight`), not of the whole network, whose float part no
    choice of codes can pay for; None: no adapters. codes: one of SOLVERS, "gptq", "rtn" or
    "k-sigma". in_order: with gptq, each layer makes up for the quantized ones before it, if
    held-out examples agree; then correct_norms has nothing left to do. adapter_bits: 8 or 16.
    group: inputs of a row that share a scale, a multiple of 4; None: a scale per channel, from
    which a search over the levels of a transformer departs where that is worth its bytes. tune:
    iterations, 0 for none. tune, in_order and correct_norms are of the network: all rules of a
    recipe must agree on them.
    """

    levels: int | None = None
    bits: int | None = None
    target_bits: float | None = None
    codes: str = "gptq"
    adapter_bits: int = 8
    tune: int = 250
    in_order: bool = True
    correct_norms: bool = True
    rounds: int = 3
    group: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.levels is not None:
            raise SubbyteError(f"bits={self.bits} and levels={self.levels}; give one of them")
        if self.bits is not None and self.bits not in range(1, 9):
            raise SubbyteError(f"bits={self.bits!r}; use 1 to 8")
        if self.levels is not None and self.levels not in range(2, 257):
            raise SubbyteError(f"levels={self.levels!r}; use 2 to 256")
        if self.n_levels is None and self.target_bits is None:
            raise SubbyteError("give bits or levels, or target_bits for a search over both")
        if self.target_bits is not None and not 0 < self.target_bits <= 32:
            raise SubbyteError(f"target_bits={self.target_bits!r}; use a number of bits up to 32")
        if self.codes not in SOLVERS:
            raise SubbyteError(f"codes={self.codes!r}; use one of {', '.join(SOLVERS)}")
        if self.adapter_bits not in (8, 16):
            raise SubbyteError(f"adapter_bits={self.adapter_bits!r}; use 8 or 16")
        if not isinstance(self.tune, int) or not 0 <= self.tune <= MOST_TUNE:
            raise SubbyteError(f"tune={self.tune!r}; use 0 to {MOST_TUNE} iterations")
        if self.group is not None:
            PerGroup(self.group)
            if self.codes == "k-sigma":
                raise SubbyteError("codes='k-sigma' has one scale per tensor; leave out group")
        if self.rounds < 1:
            raise SubbyteError(f"rounds={self.rounds!r}; use 1 or more")

    @property
    def n_levels(self) -> int | None:
        return self.levels if self.bits is None else 2**self.bits

    @property
    def solver(self) -> Solver:
        return SOLVERS[self.codes]()

    def with_levels(self, levels: int) -> CoRa:
        return replace(self, levels=levels, bits=None)


def common(methods: Collection[CoRa]) -> CoRa:
    """One of the methods of a recipe. Raises SubbyteError if they differ in what is of the whole
    network."""
    first, *others = methods
    for other in others:
        for option in _OF_THE_NETWORK:
            a, b = getattr(first, option), getattr(other, option)
            if a != b:
                raise SubbyteError(
                    f"the recipe's rules differ in {option}, {a} and {b}, which is of the whole "
                    "network; give all of them the same"
                )
    return first


def solve_layer(layer: Layer, planned: PlannedLayer, method: CoRa) -> QuantizedLayer:
    """Codes and adapter by turns: codes for what the adapter leaves, and back. Without the bias.

    planned: its levels and rank are known.
    """
    assert planned.levels
    matrix, rank = layer.matrix, planned.rank
    gram = None if layer.statistics is None else layer.statistics.gram
    solver, group = method.solver, planned.group
    codes, adapter = solver.solve(matrix, gram, planned.levels, group), None
    if not rank:  # the metric of a wide layer is large
        return QuantizedLayer(weight_of(codes, layer.site))
    metric = Metric(gram, layer.effect, layer.groups, matrix.shape[1])
    for _ in range(method.rounds):
        if adapter is not None:
            codes = solver.solve(matrix - adapter.product(), gram, planned.levels, group)
        adapter = _adapter(layer, matrix - codes.dequantize(), metric, rank, method.adapter_bits)
    return QuantizedLayer(weight_of(codes, layer.site), None, adapter)


def _adapter(layer: Layer, error: Tensor, metric: Metric, rank: int, bits: int) -> LowRank:
    try:
        return fit_adapter(error, metric, rank, bits)
    except SubbyteError as fault:
        raise SubbyteError(f"layer '{layer.site.name}': {fault}") from None
