"""What all steps of post-training work from, once everything that can be refused was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from subbyte.core.account import float_parameters, notes_on_float
from subbyte.core.as_linear import given_form_in_place
from subbyte.core.group import ALONE, Group
from subbyte.core.plan import Plan
from subbyte.core.ready import check_ready, unwrapped
from subbyte.core.recipe import Recipe
from subbyte.core.sites import Site, sites
from subbyte.errors import SubbyteError
from subbyte.ptq.calibration import gathered
from subbyte.ptq.cora import CoRa, common
from subbyte.ptq.entrance import checked_task, float_twin
from subbyte.ptq.judge import Judge, judging, teaching
from subbyte.ptq.listen import Notes
from subbyte.ptq.published import PublishedCoRa
from subbyte.ptq.steps.chain import blocks_of
from subbyte.tasks import Task
from subbyte.tasks.batches import Examples, one_batch

_LARGE = 2**24  # weights


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What all steps work from.

    teacher: the float network. plan: which layers are quantized, by which method. sites: of these
    layers, by name. examples, labels: the calibration. blocks: of a network that is a chain of
    them (`steps.chain`) and large; empty for all others. group: processes that share the work, each
    of which has all of these values.
    """

    teacher: nn.Module
    plan: Plan
    sites: Mapping[str, Site]
    examples: Examples
    labels: Tensor | None
    task: Task
    judge: Judge
    notes: Notes
    blocks: tuple[str, ...] = ()
    group: Group = ALONE

    @property
    def teaching(self) -> Examples:
        return teaching(self.examples)

    @property
    def methods(self) -> list[Any]:
        return [layer.method for layer in self.plan.quantized]


def start_run(
    model: nn.Module,
    recipe: Recipe,
    given_for: tuple[Iterable[Any], Task | str | None],
    plan: Plan | None,
    notes: Notes,
    group: Group = ALONE,
) -> Run:
    """Everything that can be refused is refused here. given_for: calibration batches and task."""
    check_methods(recipe)
    twin = float_twin(model)
    base = recipe.plan(twin, shared=True)
    base = base if plan is None else base.following(plan)
    names = {layer.name for layer in base.quantized}
    twin = given_form_in_place(twin, unwrapped(model), names)
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
    judge = Judge(twin, judging(given.examples), task, group)
    large = sum(site.n_weights for site in chosen.values()) > _LARGE
    blocks = blocks_of(twin, one_batch(given.examples[:2])) if large else ()
    examples, labels = given.examples, given.labels
    return Run(twin, base, chosen, examples, labels, task, judge, notes, blocks, group)


def check_methods(recipe: Recipe) -> None:
    """Raises SubbyteError for methods that are not of post-training, or do not go together."""
    methods = [rule.method for rule in recipe.rules if rule.method is not None]
    for method in methods:
        if not isinstance(method, CoRa | PublishedCoRa):
            raise SubbyteError(f"{method!r} is no method of quantize; give CoRa(bits=3), or so")
    ours = [method for method in methods if isinstance(method, CoRa)]
    if len(ours) != len(methods) and len(set(methods)) > 1:
        raise SubbyteError("PublishedCoRa searches over the network; give all rules the same one")
    if ours:
        common(ours)
