"""What quantizing by block works from; what can be refused is refused before the first block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from subbyte.core.account import notes_on_float
from subbyte.core.as_linear import linears_in_place, with_linears
from subbyte.core.plan import Plan, PlannedLayer
from subbyte.core.ready import copied
from subbyte.core.recipe import Recipe
from subbyte.core.spool import Spool
from subbyte.core.tensors import QuantizedLayer
from subbyte.errors import SubbyteError
from subbyte.packing.stored import stored
from subbyte.ptq.calibration import gathered
from subbyte.ptq.cora import CoRa
from subbyte.ptq.entrance import checked_task, set_cache
from subbyte.ptq.judge import Judge, judging
from subbyte.ptq.listen import Notes
from subbyte.ptq.on_demand import OnDemand
from subbyte.ptq.one_block import outside
from subbyte.ptq.planning import as_solved
from subbyte.ptq.run import check_methods
from subbyte.ptq.steps.chain import Chain, blocks_of
from subbyte.storage.pretrained import empty_model
from subbyte.storage.shards import open_shards
from subbyte.tasks import Task
from subbyte.tasks.batches import Examples, one_batch


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What is known before the first block, and what has been found since.

    weights: the float network. blocks: paths of its blocks. before: modules that it runs before
    them. plan: which layers are quantized, by which method. judge, teacher: of the examples held
    out, and where the float network stands with them. result: the network without its quantized
    weights. layers, planned: by layer, as they are solved.
    """

    weights: OnDemand
    blocks: tuple[str, ...]
    before: frozenset[str]
    plan: Plan
    examples: Examples
    task: Task
    judge: Judge
    teacher: Chain
    result: nn.Module
    notes: Notes
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    planned: dict[str, PlannedLayer] = field(default_factory=dict)
    spool: Spool = field(default_factory=Spool)

    def take(self, layers: Mapping[str, QuantizedLayer], plan: Plan, path: str | None) -> None:
        """Solved layers, with the plan that they follow; path: of the block that names them."""
        for name, layer in layers.items():
            full = name if path is None else outside(name, path)
            weight = stored(layer.weight, self.spool.on_disk)
            self.layers[full] = replace(layer, weight=weight)
            own = next(x for x in plan.layers if x.name == name)
            self.planned[full] = replace(own, name=full)

    def solved_plan(self) -> Plan:
        own = (self.planned.get(x.name, replace(x, method=None)) for x in self.plan.layers)
        return as_solved(replace(self.plan, layers=tuple(own)), self.layers)

    def in_block(self, name: str) -> bool:
        return name.startswith(tuple(f"{path}." for path in self.blocks))


def start_work(
    folder: str | Path,
    recipe: Recipe,
    given_for: tuple[Iterable[Any], Task | str],
    plan: Plan | None,
    notes: Notes,
) -> Work:
    """Everything that can be refused is refused here. given_for: calibration batches and task."""
    recipe = _untuned(recipe, notes)
    model = empty_model(folder)
    weights = OnDemand(model, open_shards(folder, model))
    base = recipe.plan(linears_in_place(copied(model)), shared=True)
    base = base if plan is None else base.following(plan)
    result = with_linears(copied(model), {x.name for x in base.quantized})
    set_cache(model, False)
    given = gathered(given_for[0], model)
    with weights.on_demand():
        task, _ = checked_task(model, given.examples, given_for[1])
        blocks = blocks_of(model, one_batch(given.examples[:2]))
    _check_chain(model, blocks)
    weights.used.clear()
    judge = Judge(model, judging(given.examples), task)
    with weights.on_demand(blocks):
        teacher = Chain(model, blocks, judge.batches)
    for note in (*given.notes, *notes_on_float(base.float_parameters)):
        notes.add(note)
    return Work(
        weights, blocks, frozenset(weights.used), base, given.examples, task, judge, teacher,
        result, notes,
    )  # fmt: skip


def _untuned(recipe: Recipe, notes: Notes) -> Recipe:
    """The recipe without tuning, which needs the whole network."""
    check_methods(recipe)
    methods = [rule.method for rule in recipe.rules if rule.method is not None]
    other = next((m for m in methods if not isinstance(m, CoRa)), None)
    if other is not None:
        raise SubbyteError(f"{other!r} needs the whole network; by block, give CoRa(bits=3), or so")
    if any(m.tune for m in methods):
        notes.add("not tuned: tuning needs the whole network")
    rules = (r if r.method is None else replace(r, method=replace(r.method, tune=0))
             for r in recipe.rules)  # fmt: skip
    return Recipe(tuple(rules))


def _check_chain(model: nn.Module, blocks: Sequence[str]) -> None:
    """Raises SubbyteError for a network that cannot be taken apart into blocks."""
    kind = type(model).__name__
    if not blocks:
        raise SubbyteError(
            f"{kind} is no chain of blocks, each of which takes what the one before it returns and "
            "is given the same besides; it has to be quantized as a whole"
        )
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((path for path in blocks if name.startswith(f"{path}.")), "")
        owners.setdefault(id(parameter), set()).add(owner)
        if len(owners[id(parameter)]) > 1:
            raise SubbyteError(
                f"blocks of {kind} share '{name}' with one another or with the rest; it has to be "
                "quantized as a whole"
            )
