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

from subbyte.core.account import note_on_size
from subbyte.core.group import ALONE, Group
from subbyte.core.plan import Plan
from subbyte.core.quantized import Evidence, Quantized
from subbyte.core.ready import unwrapped
from subbyte.core.recipe import Recipe, as_recipe
from subbyte.core.tensors import QuantizedLayer
from subbyte.errors import SubbyteError
from subbyte.modules import pack
from subbyte.ptq.cora import CoRa, common
from subbyte.ptq.entrance import set_cache, uses_cache
from subbyte.ptq.judge import HELD_OUT, Verdict
from subbyte.ptq.listen import Listener, Notes
from subbyte.ptq.measuring import (
    known_layer,
    measured,
    mosaics_of,
    note_unmeasured,
    seen_more,
    sensitivities,
    starved_layers,
)
from subbyte.ptq.plan.search import Layer, work
from subbyte.ptq.planning import as_solved, chosen_plan, compensates, note_scales, solver_of
from subbyte.ptq.published import PublishedCoRa, published_layers, search_ranks
from subbyte.ptq.run import Run, start_run
from subbyte.ptq.steps.in_order import solve_in_order
from subbyte.ptq.steps.norms import correct_norms, has_norms
from subbyte.ptq.steps.tune import tune
from subbyte.tasks import Classification, Task
from subbyte.tasks.batches import (
    Batch,
    in_batches,
    one_batch,
    some_batches,
    values_an_example,
)

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
    group: Group = ALONE,
) -> Quantized:
    """Quantize a trained network; the network itself stays as it is. Works on the CPU, in float32.

    method: for every layer; or a recipe whose rules give CoRa values, or None for float.
    calibration: batches as the network takes them (`subbyte.ptq.calibration`): tensors, tuples,
    dicts, with or without labels, which PublishedCoRa alone uses. task: what the network is for
    (`subbyte.tasks`), as a value or a name of TASKS; guessed from its outputs where it is plain.
    plan: levels and ranks to use in place of a search; it may come from `prepare`. seed: of the
    pseudo-labels and the tuning. group: processes that share the work (`subbyte.core.group`); each
    calls this with the same values and gets the same network. Eight parameters: each is a user's
    choice of its own.
    What cannot be quantized stays float and is named in the notes. Raises SubbyteError, before the
    long work, for batches that the network cannot run, outputs that its task cannot read, and
    weights without values or not finite; later for inputs that are not finite (naming the layer)
    and a budget that cannot be met (naming the smallest).
    """
    with torch.inference_mode(False):  # a caller may be in it, and steps here need gradients
        notes = Notes(listener)
        run = start_run(model, as_recipe(method), (calibration, task), plan, notes, group)
        done = _quantized(run, seed, searching=plan is None)
    set_cache(done.model, uses_cache(unwrapped(model)))
    return done


def _quantized(run: Run, seed: int, searching: bool) -> Quantized:
    """What `quantize` does once everything was checked."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    if any(isinstance(m, PublishedCoRa) for m in run.methods):
        outcome = _published(run, generator, searching)
    else:
        outcome = _reclaimed(run, generator, seed)
    done = outcome.done
    verdict = run.judge.verdict(pack(done))
    for note in (*note_on_size(done.parameters), *far_warning(run.task, verdict)):
        run.notes.add(note)
    seconds = time.perf_counter() - started
    evidence = Evidence(
        as_solved(outcome.plan, done.layers), seconds, outcome.iterations, run.task.name,
        verdict.distance, verdict.agreement,
    )  # fmt: skip
    return replace(done, notes=tuple(run.notes.taken), evidence=evidence)


def far_warning(task: Task, verdict: Verdict) -> Iterator[str]:
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
class _Outcome:
    done: Quantized
    plan: Plan
    iterations: int


# ---------------------------------------------------------------- the two roads


def _reclaimed(run: Run, generator: torch.Generator, seed: int) -> _Outcome:
    """Ours: codes layer by layer, then every step in turn."""
    method = common(run.methods)
    adapters = any(m.target_bits is not None for m in run.methods)
    adapters |= any(layer.rank for layer in run.plan.layers)
    statistics = measured(run)
    tables = any(site.type == "Embedding" for site in run.sites.values())
    by_row: Mapping[str, Tensor] = {}
    if adapters or tables:
        by_row, more = sensitivities(run, statistics, generator)
        statistics |= more
    note_unmeasured(run, statistics)
    starved = starved_layers(statistics)
    seen = {name: statistics[name] for name in starved}
    known = [  # which takes the memory of the sums
        known_layer(run, site, statistics.pop(name, None), by_row)
        for name, site in run.sites.items()
    ]
    chosen = chosen_plan(run, known)
    run.notes.tell(str(chosen))
    mosaics = mosaics_of(run, starved, seed)
    known = list(seen_more(run, known, seen, mosaics))
    solve = solver_of(run, chosen)
    in_order = method.in_order and any(x.statistics for x in known) and compensates(run)
    steps: list[_Step] = []
    at_once = in_order and bool(run.blocks)
    if at_once:  # to solve all of it twice would be half of the time
        start = _in_order(run, known, solve, mosaics, Quantized(run.teacher, {}))
        run.notes.add("layers solved in order, a block at a time")
    else:
        solve_each = run.notes.counted("solving layers", solve, len(known))
        solved = run.group.each(solve_each, known, work)
        layers = {x.site.name: own for x, own in zip(known, solved, strict=True)}
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
    note_scales(run, done)
    return _Outcome(done, chosen, iterations)


def _published(run: Run, generator: torch.Generator, searching: bool) -> _Outcome:
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
    chosen = as_solved(replace(run.plan, layers=tuple(planned)), layers)
    run.notes.tell(str(chosen))
    done = Quantized(copy.deepcopy(run.teacher), layers)
    return _Outcome(done, chosen, method.iterations if searching else 0)


# ---------------------------------------------------------------- judged steps

_IN_ORDER_NOTE = "layers solved in order"


@dataclass(frozen=True, slots=True)
class _Step:
    """what: for the note. unless: a step that, where it was kept, leaves this one nothing to do."""

    what: str
    take: Callable[[Quantized], Quantized]
    unless: str = ""


def _improved(start: Quantized, steps: Sequence[_Step], run: Run) -> Quantized:
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
    run: Run,
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
        start, known, solve, batches, task=run.task, more=mosaics, starved=starved, group=run.group
    )


def _norms(run: Run, start: Quantized) -> Quantized:
    few = max(32, _NORM_VALUES // max(1, values_an_example(run.examples)))
    return correct_norms(start, run.teacher, one_batch(run.teaching[:few]))


def _tuned(run: Run, iterations: int, generator: torch.Generator, start: Quantized) -> Quantized:
    def step(i: int, loss: float) -> None:
        run.notes.progress("tuning", i + 1, iterations)

    return tune(start, run.teacher, run.teaching, iterations, run.task, generator, step=step)
