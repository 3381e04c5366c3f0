"""Post-training quantization of a folder whose float weights do not fit in memory.

    done = sb.quantize_folder("folder", sb.CoRa(bits=4), calibration=batches, task="language")
    subbyte.storage.save_pretrained(sb.pack(done), "folder", "out")

The network is a chain of blocks. Each in turn gets its weights, is quantized by `quantize` as a
network of its own, for what the packed blocks before it hand on, and is freed. In memory are the
hidden states of the calibration, and one block with what `quantize` needs for it; packed weights go
to a temporary file. What lies before the blocks is rounded first, without statistics, and a head
last, with the statistics of what reaches it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.account import note_on_size
from subbyte.core.memory import give_back
from subbyte.core.plan import Plan
from subbyte.core.quantized import Evidence, Quantized
from subbyte.core.ready import check_weight, copied
from subbyte.core.recipe import Recipe, as_recipe
from subbyte.core.sites import Site, join, sites
from subbyte.errors import SubbyteError
from subbyte.modules import pack
from subbyte.ptq.blockwork import Work, start_work
from subbyte.ptq.cora import CoRa
from subbyte.ptq.entrance import set_cache
from subbyte.ptq.evidence.statistics import Statistics, input_statistics
from subbyte.ptq.judge import Verdict, teaching
from subbyte.ptq.listen import Listener, Notes
from subbyte.ptq.measuring import known_layer, note_unmeasured
from subbyte.ptq.on_demand import put_value
from subbyte.ptq.one_block import (
    BLOCK,
    Block,
    HiddenStates,
    batches_of,
    common_call,
    plan_of,
    recipe_of,
)
from subbyte.ptq.planning import chosen_plan, solver_of
from subbyte.ptq.published import PublishedCoRa
from subbyte.ptq.quantize import far_warning, quantize
from subbyte.ptq.run import Run
from subbyte.ptq.steps.chain import BlockCall, Chain
from subbyte.tasks import Task
from subbyte.tasks.batches import Batch, in_batches

_BATCH = 64


def quantize_folder(
    folder: str | Path,
    method: CoRa | PublishedCoRa | Recipe,
    *,
    calibration: Iterable[Any],
    task: Task | str,
    plan: Plan | None = None,
    seed: int = 0,
    listener: Listener | None = None,
) -> Quantized:
    """Quantize a folder of `transformers` block by block; the float network is never in memory.

    Parameters as of `quantize`; the calibration's examples are all of one length, without padding.
    A budget (`target_bits`) is met in each block by itself; there is no tuning. Seven parameters:
    each is a user's choice of its own. The result's network has no values of the weights that were
    quantized; `pack` does not need them. Raises SubbyteError, before the long work, for weights
    that are missing, a network that is no chain of blocks, and what `quantize` refuses.
    """
    notes, started = Notes(listener), time.perf_counter()
    with torch.inference_mode(False):
        work = start_work(folder, as_recipe(method), (calibration, task), plan, notes)
        done, held_out = _by_block(work, seed)
    verdict = _verdict(work, done, held_out)
    for note in (*note_on_size(done.parameters), *far_warning(work.task, verdict)):
        notes.add(note)
    seconds = time.perf_counter() - started
    evidence = Evidence(
        work.solved_plan(), seconds, 0, work.task.name, verdict.distance, verdict.agreement
    )
    return replace(done, notes=tuple(notes.taken), evidence=evidence)


# ---------------------------------------------------------------- in the order of the network


def _by_block(work: Work, seed: int) -> tuple[Quantized, Chain]:
    """The result, and where the packed network stands behind its blocks with the examples held
    out."""
    rest = _layers_outside(work)
    for site in rest:
        if site.owner in work.before:
            _solve_outside(work, site, {})
    _keep_outside(work)
    give_back()
    partly = pack(Quantized(work.result, work.layers), precision="float32")
    set_cache(partly, False)
    batches = in_batches(teaching(work.examples), _BATCH)
    student = Chain(partly, work.blocks, batches)
    held_out = Chain(partly, work.blocks, work.judge.batches)
    own = common_call(student)
    for i, path in enumerate(work.blocks):
        packed = _solved_block(work, i, student, own, seed)
        held_out.pass_through(packed)
        del packed
        give_back()
        work.notes.progress("blocks", i + 1, len(work.blocks))
        work.notes.tell(f"{path} is packed")
    for site in rest:
        if site.owner not in work.before:
            _solve_outside(work, site, _seen(work, site, student, batches))
    return Quantized(work.result, work.layers), held_out


def _verdict(work: Work, done: Quantized, held_out: Chain) -> Verdict:
    """How far the packed network is from the float one, without a block in memory."""
    packed, model = pack(done), work.weights.model
    set_cache(packed, False)
    with (
        work.weights.on_demand(work.blocks),
        work.teacher.behind(model),
        held_out.behind(packed),
    ):
        return work.judge.verdict(packed)


def _layers_outside(work: Work) -> list[Site]:
    """Layers that are quantized and in no block."""
    names = {x.name for x in work.plan.quantized if not work.in_block(x.name)}
    found = [site for site in sites(work.weights.model) if site.name in names]
    other = names - {site.name for site in found}
    if other:
        raise SubbyteError(
            f"'{min(other)}' lies outside of the blocks and is no plain layer; add a rule that "
            "keeps it float"
        )
    return found


def _solve_outside(work: Work, site: Site, statistics: Mapping[str, Statistics]) -> None:
    planned = next(x for x in work.plan.layers if x.name == site.name)
    model = work.weights.model
    with work.weights.filled(site.owner, recurse=False) as owner:
        check_weight(owner.get_parameter(site.parameter), site.name)
        run = Run(
            model, replace(work.plan, layers=(planned,)), {site.name: site}, work.examples, None,
            work.task, work.judge, work.notes,
        )  # fmt: skip
        note_unmeasured(run, statistics)
        known = known_layer(run, site, statistics.get(site.name), {})
        chosen = chosen_plan(run, [known])
        work.take({site.name: solver_of(run, chosen)(known)}, chosen, None)


def _seen(
    work: Work, site: Site, student: Chain, batches: Sequence[Batch]
) -> dict[str, Statistics]:
    """Statistics of a layer behind the blocks, on what the packed ones hand on."""
    model = work.weights.model
    with work.weights.on_demand(work.blocks), student.behind(model):
        return input_statistics(model, [site], batches, task=work.task)


def _keep_outside(work: Work) -> None:
    """What stays float outside of the blocks gets its values; what is shared stays shared."""
    model = work.weights.model
    names = {x.name for x in work.plan.quantized}
    chosen = [site for site in sites(model) if site.name in names]
    weights = {id(model.get_submodule(x.owner).get_parameter(x.parameter)) for x in chosen}
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if work.in_block(name) or id(parameter) in weights:
            continue
        if id(parameter) not in made:
            value = work.spool.on_disk(work.weights.value(parameter))
            made[id(parameter)] = nn.Parameter(value, requires_grad=False)
        put_value(work.result, name, made[id(parameter)])


def _solved_block(work: Work, i: int, student: Chain, own: BlockCall, seed: int) -> nn.Module:
    """The block, packed as it will run; the student has passed it in float arithmetic."""
    path = work.blocks[i]
    chosen = [x for x in work.plan.quantized if x.name.startswith(f"{path}.")]
    with work.weights.filled(path) as block:
        work.teacher.pass_block(i)
        if not chosen:
            student.pass_through(block)
            _keep(work, path, block.state_dict())
            return copied(block)
        done = quantize(
            Block(block, own), recipe_of(chosen, path), calibration=batches_of(student.hidden),
            task=HiddenStates(), plan=plan_of(chosen, path), seed=seed,
        )  # fmt: skip
    assert done.plan is not None
    work.take(done.layers, done.plan, path)
    _keep(work, path, _state_of_block(done))
    for note in done.notes:
        work.notes.add(f"{path}: {note}")
    student.pass_through(pack(done, precision="float32").get_submodule(BLOCK))
    return pack(done).get_submodule(BLOCK)


def _state_of_block(done: Quantized) -> dict[str, Tensor]:
    """What is no quantized weight, by its name in the block."""
    quantized = {join(x.owner, x.parameter) for x in sites(done.model) if x.name in done.layers}
    state = done.model.state_dict()
    return {n.removeprefix(f"{BLOCK}."): v for n, v in state.items() if n not in quantized}


def _keep(work: Work, path: str, state: Mapping[str, Tensor]) -> None:
    """Float values of a block go to the result."""
    for name, value in state.items():
        put_value(work.result, join(path, name), work.spool.on_disk(value))
