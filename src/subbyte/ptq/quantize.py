"""Post-training quantization: calibrate, plan, solve in order, tune; labels are never needed.

    result = sb.quantize(model, sb.CoRa(bits=3), calibration=batches)
    sb.save(result.model, "net.safetensors")

CoRa: "Reclaiming Residual Knowledge", arXiv:2408.00923; the paper's form is in
`subbyte.ptq.published`. The default departs from it, because rounding noise is nearly white and a
plain SVD of it reclaims little: codes by GPTQ, layer by layer for what the quantized layers before
hand on, adapters in the metric of the inputs and the loss, ranks and levels in closed form, then a
short tuning.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from subbyte.core.sites import Site, join, owners_of_tied_weights, sites, unsupported
from subbyte.core.tensors import LowRank, QuantizedLayer, QuantizedTensor, as_matrix, as_weight
from subbyte.errors import SubbyteError
from subbyte.modules import pack
from subbyte.ptq.evidence.mosaics import Mosaics, rounds_needed
from subbyte.ptq.evidence.statistics import Statistics, effects, input_statistics
from subbyte.ptq.judge import HELD_OUT, Judge, judging, teaching
from subbyte.ptq.plan.ranks import LayerPlan, RankPlan
from subbyte.ptq.plan.search import LEVELS, Layer, layer_bytes, search
from subbyte.ptq.published import PublishedCoRa, published_layers, search_ranks
from subbyte.ptq.solvers.codes import channel_grid, gptq, rtn
from subbyte.ptq.solvers.lowrank import Metric, fit_adapter
from subbyte.ptq.steps.in_order import solve_in_order
from subbyte.ptq.steps.norms import correct_norms, has_norms
from subbyte.ptq.steps.tune import TEMPERATURE, tune

CodesBy = Literal["gptq", "rtn"]
_EFFECT_BATCH = 16
_IN_ORDER = 640  # images for the passes in order; twice as many took twice as long for little
_NORM_VALUES = 2**25  # input values of the batch that corrects the norms


@dataclass(frozen=True, slots=True)
class CoRa:
    """Which codes, which adapters, how long to tune.

    levels or bits (2^bits levels): of every layer; neither: searched a layer, with the ranks.
    target_bits: the budget in real bits a weight (codes, scales, adapters); None: no adapters.
    codes: "gptq" or "rtn". in_order: with gptq, each layer makes up for the quantized ones before
    it, if held-out images agree; then correct_norms has nothing left to do. adapter_bits: 8 or 16.
    tune: iterations, at most 250, 0 for none.
    """

    levels: int | None = None
    bits: int | None = None
    target_bits: float | None = None
    codes: CodesBy = "gptq"
    adapter_bits: int = 8
    tune: int = 250
    in_order: bool = True
    correct_norms: bool = True
    rounds: int = 3

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
        if self.codes not in get_args(CodesBy):
            raise SubbyteError(f"codes={self.codes!r}; use one of {', '.join(get_args(CodesBy))}")
        if self.adapter_bits not in (8, 16):
            raise SubbyteError(f"adapter_bits={self.adapter_bits!r}; use 8 or 16")
        if self.tune not in range(251):
            raise SubbyteError(f"tune={self.tune!r}; use 0 to 250 iterations")
        if self.rounds < 1:
            raise SubbyteError(f"rounds={self.rounds!r}; use 1 or more")

    @property
    def n_levels(self) -> int | None:
        return self.levels if self.bits is None else 2**self.bits


class Listener(Protocol):
    """What a caller may want to hear while it takes minutes."""

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Quantization:
    """model: packed, in eval mode. plan: what each layer got. notes: decisions worth a line.

    agreement: percent of the held-out calibration images on which it predicts the same class as
    the float network. iterations: tuning steps taken.
    """

    model: nn.Module
    plan: RankPlan
    seconds: float
    iterations: int
    agreement: float
    notes: tuple[str, ...] = field(default=())

    @property
    def bits_per_weight(self) -> float:
        return self.plan.bits_per_weight


def quantize(
    model: nn.Module,
    method: CoRa | PublishedCoRa,
    *,
    calibration: Iterable[Any],
    plan: RankPlan | None = None,
    seed: int = 0,
    listener: Listener | None = None,
) -> Quantization:
    """Quantize a trained network; the network itself stays as it is. Works on the CPU, in float32.

    calibration: batches of inputs as the network takes them, or (inputs, labels) pairs; labels are
    used by PublishedCoRa alone. plan: levels and ranks to use in place of a search. seed: of the
    pseudo-labels and the tuning. Layers that cannot be quantized stay float and are named in the
    notes. Raises SubbyteError for no calibration images, inputs that are not finite (naming the
    layer) and a budget that cannot be met (naming the smallest).
    """
    started = time.perf_counter()
    images, labels = _inputs(calibration)
    work = _Work(model, images, seed, listener)
    if isinstance(method, PublishedCoRa):
        chosen = work.published(method, labels, plan)
    else:
        chosen = work.reclaimed(method, plan)
    packed = pack(work.model, work.layers)
    seconds, agreement = time.perf_counter() - started, work.judge.agreement(packed)
    notes = tuple(work.notes)
    return Quantization(packed, chosen, seconds, work.iterations, agreement, notes)


def _inputs(calibration: Iterable[Any]) -> tuple[Tensor, Tensor | None]:
    """All calibration inputs in one tensor, and their labels if every batch has them."""
    found = [b if isinstance(b, tuple | list) else (b, None) for b in calibration]
    if not sum(len(x) for x, *_ in found):
        raise SubbyteError("no calibration images; give at least one batch")
    inputs = torch.cat([torch.as_tensor(x) for x, *_ in found])
    if any(len(pair) != 2 or pair[1] is None for pair in found):
        return inputs, None
    return inputs, torch.cat([torch.as_tensor(y) for _, y in found])


class _Work:
    """One run: the network so far, its layers so far, and what was noted."""

    def __init__(
        self, model: nn.Module, images: Tensor, seed: int, listener: Listener | None
    ) -> None:
        # channels last doubles the speed of convolutions on a CPU
        self.teacher: nn.Module = copy.deepcopy(model).cpu().float().eval()
        self.teacher = self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = copy.deepcopy(self.teacher)  # its norms and biases may change
        self.images, self.teaching, self.listener = images, teaching(images), listener
        self.judge = Judge(self.teacher, judging(images))
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.layers: dict[str, QuantizedLayer] = {}
        self.iterations = 0
        self.notes: list[str] = []
        self.sites = self._sites()
        self.statistics: Mapping[str, Statistics] = {}
        self.starved: Sequence[str] = ()  # layers that need mosaics
        self.mosaics: Sequence[Tensor] = ()
        self.known: list[Layer] = []
        self.distance: float | None = None  # of what is kept so far, once it was judged

    def tell(self, text: str) -> None:
        if self.listener is not None:
            self.listener.note(text)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.tell(text)

    def _sites(self) -> dict[str, Site]:
        """What will be quantized; the rest is named."""
        tied = owners_of_tied_weights(self.model)
        for path, (kind, reason) in unsupported(self.model).items():
            self.note(f"layer '{path}' ({kind}) stays float: {reason}")
        found = {}
        for site in sites(self.model):
            if join(site.owner, site.parameter) in tied:
                self.note(f"layer '{site.name}' stays float: its weight is shared")
            else:
                weight = getattr(self.model.get_submodule(site.owner), site.parameter)
                if not weight.isfinite().all():
                    raise SubbyteError(
                        f"weight of '{site.name}' has NaN or infinite values; load other weights"
                    )
                found[site.name] = site
        if not found:
            raise SubbyteError(f"{type(self.model).__name__} has no layer that can be quantized")
        return found

    # ------------------------------------------------------------ roads

    def reclaimed(self, method: CoRa, plan: RankPlan | None) -> RankPlan:
        """Ours: every step in turn."""
        adapters = method.target_bits is not None or any(
            layer.rank for layer in (() if plan is None else plan.layers)
        )
        self.calibrate(effect=adapters)
        chosen = self.plan(method) if plan is None else self.checked(plan, method)
        self.tell(str(chosen))
        self.see_more()
        self.solve(chosen, method)
        if not self.solve_in_order(chosen, method):
            self.correct(method)
        self.tune(method)
        return chosen

    def published(
        self, method: PublishedCoRa, labels: Tensor | None, plan: RankPlan | None
    ) -> RankPlan:
        """The paper's: a search by gradient descent, then codes and plain adapters."""
        if plan is None:
            ranks = search_ranks(
                self.teacher, self.sites, self.images, labels if method.labels else None, method,
                self.generator,
            )  # fmt: skip
            self.iterations = method.iterations
        else:
            ranks = {layer.name: layer.rank for layer in plan.layers}
        self.layers, chosen = published_layers(self.teacher, self.sites, ranks, method)
        self.tell(str(chosen))
        return chosen

    # ------------------------------------------------------------ steps

    def calibrate(self, effect: bool) -> None:
        """Statistics of the teaching images; effect: of the rows too, for a search and adapters."""
        images, own = self.teaching, list(self.sites.values())
        self.tell(f"calibrating on {len(images):,} images")
        self.statistics = input_statistics(self.model, own, images.split(64))
        by_row = self._effects(images) if effect else {}
        for site in own:
            statistics = self.statistics.get(site.name)
            if statistics is None:
                self.note(
                    f"layer '{site.name}' ({site.type}) has no input statistics (not reached by "
                    "the calibration images, or of a kind without): round to nearest"
                )
            weight = getattr(self.model.get_submodule(site.owner), site.parameter).detach()
            groups = 1 if statistics is None else len(statistics.gram)
            matrix = as_matrix(weight, site.channel_axis)
            sure = None if statistics is None else statistics.shrunk()
            self.known.append(Layer(site, matrix, groups, sure, by_row.get(site.name)))

    def see_more(self) -> None:
        """Of layers that saw fewer vectors than they have inputs, mosaics of the images added.

        After the search: an error costs what it does on images as they are.
        """
        images, seen = self.teaching, self.statistics
        rounds = {n: rounds_needed(x.patches, x.gram.shape[-1]) for n, x in seen.items()}
        self.starved = [name for name, needed in rounds.items() if needed]
        if images.ndim != 4 or not self.starved:
            return
        most = max(rounds.values())
        self.tell(f"few inputs for {', '.join(self.starved)}: {most} mosaics an image as well")
        self.mosaics = Mosaics(images, most, self.seed)
        starved = [self.sites[name] for name in self.starved]
        more = input_statistics(self.model, starved, self.mosaics)
        for i, layer in enumerate(self.known):
            name = layer.site.name
            if name in more:
                pooled = seen[name].pooled(more[name])
                self.known[i] = replace(layer, statistics=pooled.shrunk())

    def _effects(self, images: Tensor) -> dict[str, Tensor]:
        return effects(
            self.model, list(self.sites.values()), self.statistics, images.split(_EFFECT_BATCH),
            self.generator, temperature=TEMPERATURE,
        )  # fmt: skip

    def plan(self, method: CoRa) -> RankPlan:
        levels = LEVELS if method.n_levels is None else (method.n_levels,)
        if method.target_bits is not None:
            return search(
                self.known, method.target_bits, levels=levels, adapter_bits=method.adapter_bits
            )
        assert method.n_levels is not None
        same = [
            LayerPlan(x.site.name, x.site.type, x.site.shape, method.n_levels, 0, 0)
            for x in self.known
        ]
        return self.checked(RankPlan(tuple(same)), method)

    def checked(self, plan: RankPlan, method: CoRa) -> RankPlan:
        """The plan with bytes as they are, for this network."""
        by_name = {layer.name: layer for layer in plan.layers}
        for name in by_name:
            if name not in self.sites:
                raise SubbyteError(
                    f"the plan names layer '{name}', which the network has not (or not for "
                    f"quantizing); it has {', '.join(self.sites)}"
                )
        bits = method.adapter_bits
        sized = [_sized(layer, by_name.get(layer.site.name), bits) for layer in self.known]
        return RankPlan(tuple(sized))

    def solve(self, plan: RankPlan, method: CoRa) -> None:
        for layer, planned in zip(self.known, plan.layers, strict=True):
            if planned.levels:
                self.layers[layer.site.name] = self._solved(layer, planned, method)

    def solve_in_order(self, plan: RankPlan, method: CoRa) -> bool:
        """Whether it helped; if so, the norms behind the layers have moved as well."""
        if (
            not method.in_order
            or method.codes != "gptq"
            or not any(x.statistics for x in self.known)
        ):
            return False
        self.tell("solving again, layer by layer, for the inputs of the quantized network")
        planned = {layer.name: layer for layer in plan.quantized}
        known = [layer for layer in self.known if layer.site.name in planned]
        done = solve_in_order(
            self.teacher, known, lambda x: self._solved(x, planned[x.site.name], method),
            self._some(_IN_ORDER).split(64), more=self.mosaics, starved=self.starved,
        )  # fmt: skip
        return self._keep_if_better("layers solved in order", done.model, done.layers)

    def _solved(self, layer: Layer, planned: LayerPlan, method: CoRa) -> QuantizedLayer:
        """Codes and adapter by turns: codes for what the adapter leaves, and back."""
        levels, rank, bits = planned.levels, planned.rank, method.adapter_bits
        site, matrix = layer.site, layer.matrix
        gram = None if layer.statistics is None else layer.statistics.gram
        metric = Metric(gram, layer.effect, layer.groups, matrix.shape[1])
        codes, adapter = _codes(matrix, gram, levels, method), None
        for _ in range(method.rounds if rank else 0):
            if adapter is not None:
                codes = _codes(matrix - adapter.product(), gram, levels, method)
            adapter = _adapter(layer, matrix - codes.dequantize(), metric, rank, bits)
        grid = channel_grid(levels, site.channel_axis)
        weight = QuantizedTensor(
            as_weight(codes.codes, site.shape, site.channel_axis).contiguous(), codes.scale, grid
        )
        return QuantizedLayer(weight, self._bias(site), adapter)

    def _bias(self, site: Site) -> Tensor | None:
        bias = getattr(self.model.get_submodule(site.owner), "bias", None)
        return None if bias is None or site.parameter != "weight" else bias.detach().clone()

    def correct(self, method: CoRa) -> None:
        if not method.correct_norms or not has_norms(self.model):
            return
        model = copy.deepcopy(self.model)
        per_image = max(1, self.images[0].numel())
        images = self.teaching[: max(32, _NORM_VALUES // per_image)]
        correct_norms(model, self.teacher, self.layers, images)
        self._keep_if_better("corrected norms", model, self.layers)

    def tune(self, method: CoRa) -> None:
        if not method.tune:
            return
        if len(self.images) < 2 * HELD_OUT:
            self.note(f"not tuned: {len(self.images)} calibration images are too few to judge by")
            return
        done = tune(
            self.model, self.teacher, self.layers, self.sites, self.teaching, method.tune,
            self.generator,
        )  # fmt: skip
        self.iterations = method.tune
        self._keep_if_better(f"{method.tune} iterations of tuning", done.model, done.layers)

    # ------------------------------------------------------------ judging

    def _keep_if_better(
        self, what: str, model: nn.Module, layers: dict[str, QuantizedLayer]
    ) -> bool:
        """Only what brings the held-out images closer to the float network is kept."""
        before = self.distance
        if before is None:
            before = self.judge.distance(self.model, self.layers)
        after = self.judge.distance(model, layers)
        better = after < before
        self.note(
            f"{what}: {'kept' if better else 'dropped'}, divergence from the float network on "
            f"held-out images {before:.4f} -> {after:.4f}"
        )
        self.distance = min(before, after)
        if better:
            self.model, self.layers = model, layers
        return better

    def _some(self, most: int) -> Tensor:
        """About so many of the teaching images at most, from all over the set."""
        return self.teaching[:: max(1, round(len(self.teaching) / most))]


def _sized(layer: Layer, given: LayerPlan | None, adapter_bits: int) -> LayerPlan:
    """What the plan gives a layer, with its bytes; a layer that it leaves out stays float."""
    site = layer.site
    if given is None or not given.levels:
        return LayerPlan(site.name, site.type, site.shape, 0, 0, 0)
    size = layer_bytes(layer, given.levels, given.rank, adapter_bits)
    return LayerPlan(
        site.name, site.type, site.shape, given.levels, given.rank, size, given.predicted
    )


def _codes(matrix: Tensor, gram: Tensor | None, levels: int, method: CoRa) -> QuantizedTensor:
    grid = channel_grid(levels, 0)
    if method.codes == "rtn" or gram is None:
        return rtn(matrix, None, grid)
    return gptq(matrix, gram, grid)


def _adapter(layer: Layer, error: Tensor, metric: Metric, rank: int, bits: int) -> LowRank:
    try:
        return fit_adapter(error, metric, rank, bits)
    except SubbyteError as fault:
        raise SubbyteError(f"layer '{layer.site.name}': {fault}") from None
