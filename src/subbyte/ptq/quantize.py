"""Post-training quantization: calibrate, plan, solve, correct, tune; labels are never needed.

    result = sb.quantize(model, sb.CoRa(bits=3), calibration=batches)
    sb.save(result.model, "net.safetensors")

CoRa: "Reclaiming Residual Knowledge", arXiv:2408.00923. `published(bits)` is the paper's form (its
quantizer, plain SVD, its rank search, `subbyte.ptq.published`). The default departs from it, because
rounding noise is nearly white and a plain SVD of it reclaims little: codes by GPTQ, adapters in the
metric of the inputs and the loss, ranks and levels in closed form, then a short tuning.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from subbyte.errors import SubbyteError
from subbyte.layers import Site, join, owners_of_tied_weights, sites, unsupported
from subbyte.modules import pack
from subbyte.ptq.calibration import Statistics, effects, input_statistics
from subbyte.ptq.codes import channel_grid, gptq, rtn
from subbyte.ptq.lowrank import Metric, fit_adapter
from subbyte.ptq.norms import correct_norms, has_norms
from subbyte.ptq.plan import LayerPlan, RankPlan
from subbyte.ptq.search import LEVELS, Layer, layer_bytes, search
from subbyte.ptq.tune import divergence, tune
from subbyte.tensors import QuantizedLayer, QuantizedTensor, as_matrix, as_weight

CodesBy = Literal["gptq", "rtn"]
_HELD_OUT = 5  # one calibration image in so many judges, the others teach
_EFFECT_BATCH = 16
_NORM_VALUES = 2**23  # input values of the batch that corrects the norms


@dataclass(frozen=True, slots=True)
class CoRa:
    """Which codes, which adapters, how long to tune.

    levels or bits (2^bits levels): of every layer; neither: searched a layer, with the ranks.
    target_bits: the budget in real bits a weight (codes, scales, adapters); None: no adapters.
    codes: "gptq" or "rtn". adapter_bits: 8 or 16. tune: iterations, at most 250, 0 for none.
    """

    levels: int | None = None
    bits: int | None = None
    target_bits: float | None = None
    codes: CodesBy = "gptq"
    adapter_bits: int = 8
    tune: int = 250
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
    method: CoRa,
    *,
    calibration: Iterable[Any],
    plan: RankPlan | None = None,
    seed: int = 0,
    listener: Listener | None = None,
) -> Quantization:
    """Quantize a trained network; the network itself stays as it is.

    calibration: batches of inputs as the network takes them, or (inputs, labels) pairs whose labels
    are not used. plan: levels and ranks to use in place of a search. seed: of the pseudo-labels and
    the tuning. Layers that cannot be quantized stay float and are named in the notes. Raises
    SubbyteError for no calibration images, inputs that are not finite (naming the layer) and a
    budget that cannot be met (naming the smallest).
    """
    started = time.perf_counter()
    work = _Work(model, method, _inputs(calibration), seed, listener)
    work.calibrate()
    chosen = work.plan() if plan is None else work.checked(plan)
    work.tell(str(chosen))
    work.solve(chosen)
    work.correct()
    work.tune()
    packed = pack(work.model, work.layers)
    return Quantization(
        packed, chosen, time.perf_counter() - started, work.iterations, work.agreement(packed),
        tuple(work.notes),
    )  # fmt: skip


def _inputs(calibration: Iterable[Any]) -> Tensor:
    """All calibration inputs in one tensor."""
    found = [b[0] if isinstance(b, tuple | list) else b for b in calibration]
    if not found or not sum(len(x) for x in found):
        raise SubbyteError("no calibration images; give at least one batch")
    return torch.cat([torch.as_tensor(x) for x in found])


class _Work:
    """One run: the network so far, its layers so far, and what was noted."""

    def __init__(
        self, model: nn.Module, method: CoRa, images: Tensor, seed: int, listener: Listener | None
    ) -> None:
        self.teacher = copy.deepcopy(model).eval()
        self.model = copy.deepcopy(model).eval()  # its norms and biases may change
        self.method, self.images, self.listener = method, images, listener
        self.generator = torch.Generator().manual_seed(seed)
        self.layers: dict[str, QuantizedLayer] = {}
        self.iterations = 0
        self.notes: list[str] = []
        self.sites = self._sites()
        self.statistics: Mapping[str, Statistics] = {}
        self.known: list[Layer] = []

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
                found[site.name] = site
        if not found:
            raise SubbyteError(f"{type(self.model).__name__} has no layer that can be quantized")
        return found

    # ------------------------------------------------------------ steps

    def calibrate(self) -> None:
        batches = list(self.images.split(64))
        own = list(self.sites.values())
        self.tell(f"calibrating on {len(self.images):,} images")
        self.statistics = input_statistics(self.model, own, batches)
        small = list(self.images.split(_EFFECT_BATCH))
        effect = effects(self.model, own, self.statistics, small, self.generator)
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
            self.known.append(Layer(site, matrix, groups, statistics, effect.get(site.name)))

    def plan(self) -> RankPlan:
        method = self.method
        levels = LEVELS if method.n_levels is None else (method.n_levels,)
        if method.target_bits is not None:
            return search(
                self.known, method.target_bits, levels=levels, adapter_bits=method.adapter_bits
            )
        assert method.n_levels is not None
        return self.checked(
            RankPlan(
                tuple(
                    LayerPlan(x.site.name, x.site.type, x.site.shape, method.n_levels, 0, 0)
                    for x in self.known
                )
            )
        )

    def checked(self, plan: RankPlan) -> RankPlan:
        """The plan with bytes as they are, for this network."""
        by_name = {layer.name: layer for layer in plan.layers}
        for name in by_name:
            if name not in self.sites:
                raise SubbyteError(
                    f"the plan names layer '{name}', which the network has not (or not for "
                    f"quantizing); it has {', '.join(self.sites)}"
                )
        planned = []
        for layer in self.known:
            site = layer.site
            given = by_name.get(site.name) or LayerPlan(site.name, site.type, site.shape, 0, 0, 0)
            size = (
                layer_bytes(layer, given.levels, given.rank, self.method.adapter_bits)
                if (given.levels)
                else 0
            )
            planned.append(
                LayerPlan(
                    site.name,
                    site.type,
                    site.shape,
                    given.levels,
                    given.rank,
                    size,
                    given.predicted,
                )  # fmt: skip
            )
        return RankPlan(tuple(planned))

    def solve(self, plan: RankPlan) -> None:
        for layer, planned in zip(self.known, plan.layers, strict=True):
            if planned.levels:
                self.layers[layer.site.name] = self._solved(layer, planned.levels, planned.rank)

    def _solved(self, layer: Layer, levels: int, rank: int) -> QuantizedLayer:
        """Codes and adapter by turns: codes for what the adapter leaves, and back."""
        site, matrix = layer.site, layer.matrix
        gram = None if layer.statistics is None else layer.statistics.gram
        metric = Metric(gram, layer.effect, layer.groups, matrix.shape[1])
        codes, adapter = self._codes(matrix, gram, levels), None
        for turn in range(self.method.rounds if rank else 0):
            if adapter is not None:
                codes = self._codes(matrix - adapter.product(), gram, levels)
            adapter = fit_adapter(
                matrix - codes.dequantize(), metric, rank, self.method.adapter_bits
            )
            assert turn >= 0
        grid = channel_grid(levels, site.channel_axis)
        weight = QuantizedTensor(
            as_weight(codes.codes, site.shape, site.channel_axis).contiguous(), codes.scale, grid
        )
        return QuantizedLayer(weight, self._bias(site), adapter)

    def _codes(self, matrix: Tensor, gram: Tensor | None, levels: int) -> QuantizedTensor:
        grid = channel_grid(levels, 0)
        if self.method.codes == "rtn" or gram is None:
            return rtn(matrix, None, grid)
        return gptq(matrix, gram, grid)

    def _bias(self, site: Site) -> Tensor | None:
        bias = getattr(self.model.get_submodule(site.owner), "bias", None)
        return None if bias is None or site.parameter != "weight" else bias.detach().clone()

    def correct(self) -> None:
        if not self.method.correct_norms or not has_norms(self.model):
            return
        model = copy.deepcopy(self.model)
        per_image = max(1, self.images[0].numel())
        correct_norms(model, self.layers, self._teaching()[: max(32, _NORM_VALUES // per_image)])
        self._keep_if_better("corrected norms", model, self.layers)

    def tune(self) -> None:
        if not self.method.tune:
            return
        if len(self.images) < 2 * _HELD_OUT:
            self.note(f"not tuned: {len(self.images)} calibration images are too few to judge by")
            return
        done = tune(
            self.model, self.teacher, self.layers, self.sites, self._teaching(), self.method.tune,
            self.generator,
        )  # fmt: skip
        self.iterations = self.method.tune
        self._keep_if_better(f"{self.method.tune} iterations of tuning", done.model, done.layers)

    # ------------------------------------------------------------ judging

    def _keep_if_better(
        self, what: str, model: nn.Module, layers: dict[str, QuantizedLayer]
    ) -> None:
        """Only what brings the held-out images closer to the float network is kept."""
        before = self._distance(pack(self.model, self.layers))
        after = self._distance(pack(model, layers))
        better = after < before
        self.note(
            f"{what}: {'kept' if better else 'dropped'}, divergence from the float network on "
            f"held-out images {before:.4f} -> {after:.4f}"
        )
        if better:
            self.model, self.layers = model, layers

    def _teaching(self) -> Tensor:
        """Calibration images but those that judge."""
        judge = torch.arange(len(self.images)) % _HELD_OUT == 0
        return self.images[~judge] if len(self.images) >= _HELD_OUT else self.images

    def _judging(self) -> Sequence[Tensor]:
        return self.images[::_HELD_OUT].split(64)

    @torch.no_grad()
    def _distance(self, net: nn.Module) -> float:
        """Mean divergence of the held-out images; infinite if any logit is not finite."""
        total = 0.0
        for x in self._judging():
            logits = net(x)
            if not logits.isfinite().all():
                return float("inf")
            total += float(divergence(logits, self.teacher(x))) * len(x)
        return total / max(1, sum(len(x) for x in self._judging()))

    @torch.no_grad()
    def agreement(self, net: nn.Module) -> float:
        same = total = 0
        for x in self._judging():
            hits = net(x).argmax(-1) == self.teacher(x).argmax(-1)
            same, total = same + int(hits.sum()), total + hits.numel()
        return 100.0 * same / max(1, total)
