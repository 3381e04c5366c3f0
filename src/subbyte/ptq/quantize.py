"""Post-training quantization: calibrate, plan, solve in order, tune; labels are never needed.

    done = sb.quantize(model, sb.CoRa(bits=3), calibration=batches)
    sb.save(sb.pack(done), "net.safetensors")

The default departs from CoRa as published (`subbyte.ptq.published`), because rounding noise is
nearly white and a plain SVD of it reclaims little: codes by GPTQ, layer by layer for what the
quantized layers before hand on, adapters in the metric of the inputs and the loss, ranks and levels
in closed form, then a short tuning. Each step after the first codes is a pure function from
Quantized to Quantized; held-out examples decide whether its outcome is kept.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.account import float_parameters, note_on_size, notes_on_float
from subbyte.core.conv1d import conv1d_in_place
from subbyte.core.grids import PerTensor, ScaleDomain
from subbyte.core.plan import Plan, PlannedLayer
from subbyte.core.quantized import Evidence, Quantized
from subbyte.core.ready import check_ready, unwrapped
from subbyte.core.recipe import Recipe, as_recipe
from subbyte.core.sites import Site, bias_of, sharing_sites, sites
from subbyte.core.tensors import QuantizedLayer, as_matrix
from subbyte.errors import SubbyteError
from subbyte.modules import pack
from subbyte.ptq.calibration import gathered
from subbyte.ptq.cora import CoRa, common, solve_layer
from subbyte.ptq.entrance import checked_task, float_twin, set_cache, uses_cache
from subbyte.ptq.evidence.sensitivity import sensitivity
from subbyte.ptq.evidence.statistics import (
    Statistics,
    input_statistics,
    rounds_needed,
)
from subbyte.ptq.judge import HELD_OUT, Judge, Verdict, judging, teaching
from subbyte.ptq.listen import Listener, Notes
from subbyte.ptq.plan.search import GROUPS, LEVELS, Layer, layer_bytes, search
from subbyte.ptq.published import PublishedCoRa, published_layers, search_ranks
from subbyte.ptq.steps.chain import blocks_of
from subbyte.ptq.steps.in_order import solve_in_order
from subbyte.ptq.steps.norms import correct_norms, has_norms
from subbyte.ptq.steps.tune import tune
from subbyte.tasks import Classification, Task
from subbyte.tasks.batches import (
    Batch,
    Examples,
    in_batches,
    one_batch,
    some_batches,
    values_an_example,
)

_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d")
_LARGE = 2**24
_EFFECT_BATCH = 16
_EFFECT_BATCH_TOKENS = 512  # the pass back keeps what every layer was given
_EFFECT_TOKENS = 8192  # each goes forth and back through the network and its vocabulary
_IN_ORDER = 640  # examples for the passes in order; twice as many took twice as long for little
_IN_ORDER_TOKENS = 2**14
_NORM_VALUES = 2**25  # input values of the batch that corrects the norms


def quantize(
    model: nn.Module,
    method: CoRa | PublishedCoRa | Recipe,
    *,
    calibration: Iterable[Any],
    task: Task | str | None = None,
    plan: Plan | None = None,
    seed: int = 0,
    listener: Listener | None = None,
) -> Quantized:
    """Quantize a trained network; the network itself stays as it is. Works on the CPU, in float32.

    method: for every layer; or a recipe whose rules give CoRa values, or None for float.
    calibration: batches as the network takes them (`subbyte.ptq.calibration`): tensors, tuples,
    dicts, with or without labels, which PublishedCoRa alone uses. task: what the network is for
    (`subbyte.tasks`), as a value or a name of TASKS; guessed from its outputs where it is plain.
    plan: levels and ranks to use in place of a search; it may come from `prepare`. seed: of the
    pseudo-labels and the tuning. Seven parameters: each is a user's choice of its own.
    What cannot be quantized stays float and is named in the notes. Raises SubbyteError, before the
    long work, for batches that the network cannot run, outputs that its task cannot read, and
    weights without values or not finite; later for inputs that are not finite (naming the layer)
    and a budget that cannot be met (naming the smallest).
    """
    with torch.inference_mode(False):  # a caller may be in it, and steps here need gradients
        run = _started(model, as_recipe(method), (calibration, task), plan, Notes(listener))
        done = _quantized(run, seed, searching=plan is None)
    set_cache(done.model, uses_cache(unwrapped(model)))
    return done


def _quantized(run: _Run, seed: int, searching: bool) -> Quantized:
    """What `quantize` does once everything was checked."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    if any(isinstance(m, PublishedCoRa) for m in run.methods):
        outcome = _published(run, generator, searching)
    else:
        outcome = _reclaimed(run, generator, seed)
    done = outcome.done
    verdict = run.judge.verdict(pack(done))
    for note in (*note_on_size(done.parameters), *_warning(run.task, verdict)):
        run.notes.add(note)
    seconds = time.perf_counter() - started
    evidence = Evidence(
        _as_solved(outcome.plan, done.layers), seconds, outcome.iterations, run.task.name,
        verdict.distance, verdict.agreement,
    )  # fmt: skip
    return replace(done, notes=tuple(run.notes.taken), evidence=evidence)


def _warning(task: Task, verdict: Verdict) -> Iterator[str]:
    """A line if the packed network is far from the float one."""
    if task.is_far(verdict.distance, verdict.agreement):
        agreement = verdict.agreement
        share = "" if agreement is None else f", it agrees on {agreement:.1f} % of the {task.item}s"
        yield (
            f"WARNING: the packed network is far from the float one on held-out examples: distance "
            f"{verdict.distance:.3g} ({task.name}){share}. Try more bits, scales per group "
            "(group=64), or more calibration examples"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What all steps work from.

    teacher: the float network. plan: which layers are quantized, by which method. sites: of these
    layers, by name. examples, labels: the calibration.
    """

    teacher: nn.Module
    plan: Plan
    sites: Mapping[str, Site]
    examples: Examples
    labels: Tensor | None
    task: Task
    judge: Judge
    notes: Notes

    @property
    def teaching(self) -> Examples:
        return teaching(self.examples)

    @property
    def methods(self) -> list[Any]:
        return [layer.method for layer in self.plan.quantized]


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    done: Quantized
    plan: Plan
    iterations: int


def _started(
    model: nn.Module,
    recipe: Recipe,
    given_for: tuple[Iterable[Any], Task | str | None],
    plan: Plan | None,
    notes: Notes,
) -> _Run:
    """Everything that can be refused is refused here. given_for: calibration batches and task."""
    _check_methods(recipe)
    twin = float_twin(model)
    base = recipe.plan(twin, shared=True)
    base = base if plan is None else base.following(plan)
    names = {layer.name for layer in base.quantized}
    twin = conv1d_in_place(twin, unwrapped(model), names)
    chosen = {site.name: site for site in sites(twin) if site.name in names}
    if not chosen:
        why = next((f": {layer.reason}" for layer in base.layers if layer.reason), "")
        raise SubbyteError(
            f"{type(twin).__name__} has no layer left that is quantized{why}; give one a method"
        )
    check_ready(twin, list(chosen.values()))
    calibration, wanted = given_for
    given = gathered(calibration, twin)
    task, guess = checked_task(twin, given.examples, wanted)
    kept = notes_on_float(float_parameters(twin, names))
    for note in (*given.notes, *((guess,) if guess else ()), *kept):
        notes.add(note)
    judge = Judge(twin, judging(given.examples), task)
    return _Run(twin, base, chosen, given.examples, given.labels, task, judge, notes)


def _check_methods(recipe: Recipe) -> None:
    methods = [rule.method for rule in recipe.rules if rule.method is not None]
    for method in methods:
        if not isinstance(method, CoRa | PublishedCoRa):
            raise SubbyteError(f"{method!r} is no method of quantize; give CoRa(bits=3), or so")
    ours = [method for method in methods if isinstance(method, CoRa)]
    if len(ours) != len(methods) and len(set(methods)) > 1:
        raise SubbyteError("PublishedCoRa searches over the network; give all rules the same one")
    if ours:
        common(ours)


# ---------------------------------------------------------------- the two roads


def _reclaimed(run: _Run, generator: torch.Generator, seed: int) -> _Outcome:
    """Ours: codes layer by layer, then every step in turn."""
    method = common(run.methods)
    adapters = any(m.target_bits is not None for m in run.methods)
    adapters |= any(layer.rank for layer in run.plan.layers)
    statistics = _measured(run)
    tables = any(site.type == "Embedding" for site in run.sites.values())
    by_row: Mapping[str, Tensor] = {}
    if adapters or tables:
        by_row, more = _sensitivity(run, statistics, generator)
        statistics |= more
    _note_unmeasured(run, statistics)
    starved = _starved(statistics)
    seen = {name: statistics[name] for name in starved}
    known = [  # which takes the memory of the sums
        _known(run, site, statistics.pop(name, None), by_row) for name, site in run.sites.items()
    ]
    chosen = _chosen(run, known)
    run.notes.tell(str(chosen))
    mosaics = _mosaics(run, starved, seed)
    known = list(_seen_more(run, known, seen, mosaics))
    solve = _solver(run, chosen)
    in_order = method.in_order and any(x.statistics for x in known) and _compensates(run)
    steps: list[_Step] = []
    at_once = in_order and _is_large_chain(run)
    if at_once:  # to solve all of it twice would be half of the time
        start = _in_order(run, known, solve, mosaics, Quantized(run.teacher, {}))
        run.notes.add("layers solved in order, a block at a time")
    else:
        solve_each = run.notes.counted("solving layers", solve, len(known))
        layers = {x.site.name: solve_each(x) for x in known}
        start = Quantized(copy.deepcopy(run.teacher), layers)
    if in_order and not at_once:
        steps.append(_Step(_IN_ORDER_NOTE, partial(_in_order, run, known, solve, mosaics)))
    if method.correct_norms and has_norms(run.teacher) and not at_once:
        steps.append(_Step("corrected norms", partial(_norms, run), unless=_IN_ORDER_NOTE))
    iterations = method.tune if len(run.examples) >= 2 * HELD_OUT else 0
    if iterations:
        what = f"{iterations} iterations of tuning"
        steps.append(_Step(what, partial(_tuned, run, iterations, generator)))
    done = _improved(start, steps, run)
    if method.tune and not iterations:
        n = len(run.examples)
        run.notes.add(f"not tuned: {n} calibration examples are too few to judge by")
    _note_scales(run, done)
    return _Outcome(done, chosen, iterations)


def _published(run: _Run, generator: torch.Generator, searching: bool) -> _Outcome:
    """The paper's: a search by gradient descent, then codes and plain adapters."""
    method: PublishedCoRa = run.methods[0]
    if not isinstance(run.task, Classification):
        raise SubbyteError(
            f"the published search is for classifiers, not for the task '{run.task.name}'; use CoRa"
        )
    ranks = {layer.name: layer.rank for layer in run.plan.layers}
    if searching:
        labels = run.labels if method.labels else None
        ranks = search_ranks(run.teacher, run.sites, run.examples, labels, method, generator)
    planned = [
        replace(
            x, levels=2**method.bits if x.levels is None else x.levels, rank=ranks.get(x.name, 0),
            method=None,
        )
        for x in run.plan.layers
    ]  # fmt: skip
    layers = published_layers(run.teacher, run.sites, planned, method)
    chosen = _as_solved(replace(run.plan, layers=tuple(planned)), layers)
    run.notes.tell(str(chosen))
    done = Quantized(copy.deepcopy(run.teacher), layers)
    return _Outcome(done, chosen, method.iterations if searching else 0)


def _is_large_chain(run: _Run) -> bool:
    """Whether the network is a chain of blocks with more than _LARGE weights to quantize."""
    large = sum(site.n_weights for site in run.sites.values()) > _LARGE
    return large and bool(blocks_of(run.teacher, one_batch(run.examples[:2])))


# ---------------------------------------------------------------- judged steps

_IN_ORDER_NOTE = "layers solved in order"


@dataclass(frozen=True, slots=True)
class _Step:
    """what: for the note. unless: a step that, where it was kept, leaves this one nothing to do."""

    what: str
    take: Callable[[Quantized], Quantized]
    unless: str = ""


def _improved(start: Quantized, steps: Sequence[_Step], run: _Run) -> Quantized:
    """Of each step's outcome only what brings the held-out examples closer to the float network."""
    best, before = start, None
    kept: set[str] = set()
    for step in steps:
        if step.unless in kept:
            continue
        outcome = step.take(best)
        before = run.judge.distance(best) if before is None else before
        after = run.judge.distance(outcome)
        better = after < before
        for note in outcome.notes:
            run.notes.add(note)
        run.notes.add(
            f"{step.what}: {'kept' if better else 'dropped'}, distance from the float network on "
            f"held-out examples {before:.4f} -> {after:.4f}"
        )
        if better:
            best, before = replace(outcome, notes=()), after
            kept.add(step.what)
    return best


def _in_order(
    run: _Run,
    known: Sequence[Layer],
    solve: Callable[[Layer], QuantizedLayer],
    mosaics: Sequence[Batch],
    start: Quantized,
) -> Quantized:
    run.notes.tell("solving again, layer by layer, for the inputs of the quantized network")
    examples = run.teaching
    some = examples[:: max(1, round(len(examples) / _IN_ORDER))]
    starved = [x.site.name for x in known if x.starved]
    batches = some_batches(in_batches(some, 64), _IN_ORDER_TOKENS)
    solve = run.notes.counted("solving in order", solve, len(known))
    return solve_in_order(
        start, known, solve, batches, task=run.task, more=mosaics, starved=starved
    )


def _norms(run: _Run, start: Quantized) -> Quantized:
    few = max(32, _NORM_VALUES // max(1, values_an_example(run.examples)))
    return correct_norms(start, run.teacher, one_batch(run.teaching[:few]))


def _tuned(run: _Run, iterations: int, generator: torch.Generator, start: Quantized) -> Quantized:
    def step(i: int, loss: float) -> None:
        run.notes.progress("tuning", i + 1, iterations)

    return tune(start, run.teacher, run.teaching, iterations, run.task, generator, step=step)


# ---------------------------------------------------------------- what the examples show


def _measured(run: _Run) -> dict[str, Statistics]:
    """Of the teaching examples."""
    run.notes.tell(f"calibrating on {len(run.teaching):,} examples")
    shared = sharing_sites(run.teacher)
    heads = [head for name, own in shared.items() if name in run.sites for head in own]
    own = [*run.sites.values(), *heads]
    batches = run.notes.over("statistics of inputs", in_batches(run.teaching, 64))
    return input_statistics(run.teacher, own, batches, task=run.task)


def _sensitivity(
    run: _Run, statistics: Mapping[str, Statistics], generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
    run.notes.tell("measuring what errors do to the outputs")
    batches = in_batches(run.teaching, _EFFECT_BATCH, _EFFECT_BATCH_TOKENS)
    batches = some_batches(batches, _EFFECT_TOKENS)
    watched = run.notes.over("effects of errors", batches)
    return sensitivity(
        run.teacher, list(run.sites.values()), statistics, watched, run.task, generator
    )


def _note_unmeasured(run: _Run, statistics: Mapping[str, Statistics]) -> None:
    for site in run.sites.values():
        if site.name not in statistics:
            run.notes.add(
                f"layer '{site.name}' ({site.type}) has no input statistics (not reached by "
                "the calibration examples, or of a kind without): round to nearest"
            )


def _known(
    run: _Run, site: Site, statistics: Statistics | None, by_row: Mapping[str, Tensor]
) -> Layer:
    weight = getattr(run.teacher.get_submodule(site.owner), site.parameter).detach()
    groups = 1 if statistics is None else len(statistics.gram)
    sure = None if statistics is None else statistics.shrunk()
    matrix = as_matrix(weight, site.channel_axis)
    return Layer(site, matrix, groups, sure, by_row.get(site.name))


def _mosaics(run: _Run, starved: Mapping[str, int], seed: int) -> Sequence[Batch]:
    """More inputs, if the task makes any and layers saw fewer vectors than they have inputs."""
    most = max(starved.values(), default=0)
    found = run.task.more(run.teaching, most, seed) if most else ()
    if len(found):
        run.notes.tell(f"few inputs for {', '.join(starved)}: {most} mosaics per image as well")
    return found


def _starved(seen: Mapping[str, Statistics]) -> dict[str, int]:
    rounds = {n: rounds_needed(x.patches, x.gram.shape[-1]) for n, x in seen.items()}
    return {name: needed for name, needed in rounds.items() if needed}


def _seen_more(
    run: _Run, known: Sequence[Layer], seen: Mapping[str, Statistics], mosaics: Sequence[Batch]
) -> Iterator[Layer]:
    """Layers that saw too little with the statistics of the mosaics, too.

    After the search: an error costs what it does on images as they are.
    """
    more: dict[str, Statistics] = {}
    if len(mosaics):
        own = [run.sites[name] for name in seen if name in run.sites]
        more = input_statistics(run.teacher, own, mosaics)
    for layer in known:
        name = layer.site.name
        if name in more:
            layer = replace(layer, statistics=seen[name].pooled(more[name]).shrunk())
        yield replace(layer, starved=name in seen)


# ---------------------------------------------------------------- plans and codes


def _chosen(run: _Run, known: Sequence[Layer]) -> Plan:
    """Levels, ranks and bytes of every layer: as the plan says, by the method, or searched."""
    wanted = {layer.name: layer for layer in run.plan.layers}
    found: dict[str, PlannedLayer] = {}
    searched: dict[CoRa, list[Layer]] = {}
    for layer in known:
        own = wanted[layer.site.name]
        method: CoRa = own.method
        if own.levels is None and method.target_bits is not None:
            searched.setdefault(method, []).append(layer)
        else:
            levels = own.levels or method.n_levels
            group = _group(layer, method) if own.levels is None else own.group
            found[own.name] = _sized(layer, replace(own, levels=levels, group=group), method)
    for method, layers in searched.items():
        found |= {layer.name: layer for layer in _searched(run, layers, method).layers}
    chosen = (replace(found.get(x.name, x), method=None) for x in run.plan.layers)
    return replace(run.plan, layers=tuple(chosen))


def _searched(run: _Run, layers: Sequence[Layer], method: CoRa) -> Plan:
    assert method.target_bits is not None
    levels = LEVELS if method.n_levels is None else (method.n_levels,)
    groups: Sequence[int | None] = () if method.group is None else (method.group,)
    if method.group is None and not any(x.type in _CONVOLUTIONS for x in run.sites.values()):
        groups = GROUPS
    layers = run.notes.over("search", layers)
    return search(
        layers, method.target_bits, levels=levels, groups=groups, adapter_bits=method.adapter_bits
    )


def _group(layer: Layer, method: CoRa) -> int | None:
    """The method's group size, where the layer has rows of inputs that are longer."""
    fits = layer.site.channel_axis == 0 and layer.groups == 1
    wide = method.group is not None and method.group < layer.matrix.shape[1]
    return method.group if fits and wide else None


def _sized(layer: Layer, planned: PlannedLayer, method: CoRa) -> PlannedLayer:
    if planned.levels is None:
        raise SubbyteError(
            f"the plan leaves the levels of layer '{planned.name}' to a method that has none"
        )
    return replace(planned, n_bytes=layer_bytes(layer, planned, method.adapter_bits))


def _solver(run: _Run, chosen: Plan) -> Callable[[Layer], QuantizedLayer]:
    """Codes, adapter and bias of a layer, as the plan says."""
    planned = {layer.name: layer for layer in chosen.layers}
    methods = {layer.name: layer.method for layer in run.plan.layers}

    def solve(layer: Layer) -> QuantizedLayer:
        name, bias = layer.site.name, bias_of(run.teacher, layer.site)
        solved = solve_layer(layer, planned[name], methods[name])
        return replace(solved, bias=None if bias is None else bias.clone())

    return solve


def _compensates(run: _Run) -> bool:
    return any(method.solver.compensates for method in run.methods)


def _note_scales(run: _Run, done: Quantized) -> None:
    for name, layer in done.layers.items():
        grid = layer.weight.grid
        if not isinstance(grid.granularity, PerTensor) and grid.scale_domain is ScaleDomain.FLOAT32:
            run.notes.add(
                f"layer '{name}' has float32 scales: its weights need some that float16 has not"
            )


def _as_solved(plan: Plan, layers: Mapping[str, QuantizedLayer]) -> Plan:
    """The plan with the bytes that the layers really take."""
    sized = [
        replace(x, n_bytes=layers[x.name].n_bytes) if x.name in layers else x for x in plan.layers
    ]
    return replace(plan, layers=tuple(sized))
