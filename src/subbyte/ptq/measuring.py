"""What the examples show of each layer: statistics, effects of errors, and more inputs for some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from subbyte.core.sites import Site, sharing_sites
from subbyte.core.tensors import as_matrix
from subbyte.ptq.evidence.sensitivity import sensitivity
from subbyte.ptq.evidence.statistics import Statistics, input_statistics, rounds_needed
from subbyte.ptq.plan.search import Layer
from subbyte.ptq.run import Run
from subbyte.ptq.steps.chain import recomputed
from subbyte.tasks.batches import SCORED_TOKENS, Batch, in_batches, some_batches

_EFFECT_BATCH = 16
_EFFECT_TOKENS = 8192  # each goes forth and back through the network and its vocabulary


def measured(run: Run) -> dict[str, Statistics]:
    """Of the teaching examples."""
    run.notes.tell(f"calibrating on {len(run.teaching):,} examples")
    shared = sharing_sites(run.teacher)
    heads = [head for name, own in shared.items() if name in run.sites for head in own]
    own = [*run.sites.values(), *heads]
    batches = run.notes.over("statistics of inputs", in_batches(run.teaching, 64, SCORED_TOKENS))
    return input_statistics(run.teacher, own, batches, task=run.task, group=run.group)


def sensitivities(
    run: Run, statistics: Mapping[str, Statistics], generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
    run.notes.tell("measuring what errors do to the outputs")
    batches = in_batches(run.teaching, _EFFECT_BATCH, SCORED_TOKENS)
    batches = some_batches(batches, _EFFECT_TOKENS)
    watched = run.notes.over("effects of errors", batches)
    with recomputed(run.teacher, run.blocks):
        return sensitivity(
            run.teacher, list(run.sites.values()), statistics, watched, run.task, generator,
            run.group,
        )  # fmt: skip


def note_unmeasured(run: Run, statistics: Mapping[str, Statistics]) -> None:
    for site in run.sites.values():
        if site.name not in statistics:
            run.notes.add(
                f"layer '{site.name}' ({site.type}) has no input statistics (not reached by "
                "the calibration examples, or of a kind without): round to nearest"
            )


def known_layer(
    run: Run, site: Site, statistics: Statistics | None, by_row: Mapping[str, Tensor]
) -> Layer:
    weight = getattr(run.teacher.get_submodule(site.owner), site.parameter).detach()
    groups = 1 if statistics is None else len(statistics.gram)
    sure = None if statistics is None else statistics.shrunk()
    matrix = as_matrix(weight, site.channel_axis)
    return Layer(site, matrix, groups, sure, by_row.get(site.name))


def mosaics_of(run: Run, starved: Mapping[str, int], seed: int) -> Sequence[Batch]:
    """More inputs, if the task makes any and layers saw fewer vectors than they have inputs."""
    most = max(starved.values(), default=0)
    found = run.task.more(run.teaching, most, seed) if most else ()
    if len(found):
        run.notes.tell(f"few inputs for {', '.join(starved)}: {most} mosaics per image as well")
    return found


def starved_layers(seen: Mapping[str, Statistics]) -> dict[str, int]:
    rounds = {n: rounds_needed(x.patches, x.gram.shape[-1]) for n, x in seen.items()}
    return {name: needed for name, needed in rounds.items() if needed}


def seen_more(
    run: Run, known: Sequence[Layer], seen: Mapping[str, Statistics], mosaics: Sequence[Batch]
) -> Iterator[Layer]:
    """Layers that saw too little with the statistics of the mosaics, too.

    After the search: an error costs what it does on images as they are.
    """
    more: dict[str, Statistics] = {}
    if len(mosaics):
        own = [run.sites[name] for name in seen if name in run.sites]
        more = input_statistics(run.teacher, own, mosaics, group=run.group)
    for layer in known:
        name = layer.site.name
        if name in more:
            layer = replace(layer, statistics=seen[name].pooled(more[name]).shrunk())
        yield replace(layer, starved=name in seen)
