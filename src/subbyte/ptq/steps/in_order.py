"""Layers in the order of execution, each for what the quantized layers before it hand on.

The float network's layer computes W x. In the quantized network the same layer sees z, which is x
and all that was lost on the way, and computes W_hat z. With

    H = mean of z z'        C = mean of x z'        T = W C H^-1

the mean of |W x - W_hat z|^2 is that of (T - W_hat) H (T - W_hat)' and a constant: T is the float
weight that undoes most of what came before, and the codes and the adapter are for T, in the metric
of H. Where the layer has a bias, or a BatchNorm behind it, which stay float, the means of x and z
are taken out of H and C first, and the bias, or the norm's mean, makes up for their difference.
(The norm's variance stays: T shrinks what is noise, and to blow it up again was measured worse.)

GPTQ (arXiv:2210.17323) takes z for the inputs of W itself; GPTAQ (Li et al., arXiv:2504.02692)
brings x in, inside its loop over the columns. The closed form before any solver, convolutions,
adapters, biases and norms are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.follow import norms_behind
from subbyte.core.group import ALONE, Group
from subbyte.core.quantized import Quantized
from subbyte.core.ready import copied
from subbyte.core.sites import Site, bias_of
from subbyte.core.tensors import QuantizedLayer, as_matrix, as_weight
from subbyte.ptq.evidence.statistics import (
    MEASURED,
    PATCHES,
    Statistics,
    fitting,
    inputs_of,
    inputs_seen,
    patches_an_image,
)
from subbyte.ptq.plan.search import Layer
from subbyte.ptq.plan.search import work as work_of
from subbyte.ptq.solvers.codes import damped
from subbyte.ptq.steps.chain import Chain, blocks_of
from subbyte.tasks.base import Task
from subbyte.tasks.batches import Batch, call

STAGES = 32  # of more layers, neighbours share a pass over the images
AHEAD_BYTES = 2**30  # of the float network's patches: so many stages share its pass
_KEPT = 0.01  # of the means

Solve = Callable[[Layer], QuantizedLayer]
_Patches = dict[str, list[Tensor]]  # chunks [groups, width, n] of each layer


@torch.no_grad()
def solve_in_order(
    start: Quantized,
    known: Sequence[Layer],
    solve: Solve,
    batches: Sequence[Batch],
    *,
    task: Task | None = None,
    more: Sequence[Batch] = (),
    starved: Collection[str] = (),
    group: Group = ALONE,
) -> Quantized:
    """Solve every layer of `known`, in the order in which the float network runs them.

    start: its float network is where this begins; its layers are solved anew. known: layers to
    quantize, with the float network's statistics. solve: codes and adapter of a layer, in the
    metric of the statistics it is given. batches: inputs of the network; task: which of their
    positions are no padding. more: yet more, for the layers named in `starved` alone. Layers
    without statistics of inputs, and tables, are solved first, as they are. group: processes that
    share the batches, and the layers of a stage. parameters: eight, independent of each other.
    """
    held = (start.model.get_submodule(x.site.owner)._parameters for x in known)
    weights = [own[x.site.parameter] for own, x in zip(held, known, strict=True)]
    shared = [w for w in weights if w is not None]
    work = _Work(start.model, _Inputs(batches, more, starved, task), shared, group)
    measured = {layer.site.name: layer for layer in known if _has_inputs(layer)}
    others = [layer for layer in known if layer.site.name not in measured]
    for layer, solved in zip(others, group.each(solve, others, work_of), strict=True):
        work.take(layer, solved, None)
    needs = work.needs([layer.site for layer in measured.values()])
    blocks = () if starved else blocks_of(work.teacher, batches[0][:2])
    before, inside, after = _by_block(list(needs), blocks)
    _in_passes(work, measured, before, needs, solve)
    _in_blocks(work, measured, blocks, inside, solve)
    _in_passes(work, measured, after, needs, solve)
    return Quantized(work.model, work.layers, _unpaired_note(work.unpaired))


def _by_block(
    names: Sequence[str], blocks: Sequence[str]
) -> tuple[Sequence[str], list[list[str]], list[str]]:
    """Layers that run before all blocks, those of each block, and the others; in order."""
    inside = [[n for n in names if n.startswith(f"{block}.")] for block in blocks]
    taken = {name for own in inside for name in own}
    if not taken:
        return names, [], []
    first = min(i for i, name in enumerate(names) if name in taken)
    return names[:first], inside, [n for n in names[first:] if n not in taken]


def _in_passes(
    work: _Work,
    measured: Mapping[str, Layer],
    names: Sequence[str],
    needs: Mapping[str, int],
    solve: Solve,
) -> None:
    """Layers in stages, each of which runs the network from its inputs up to its last layer."""
    for ahead in _spans(list(_stages(names)), needs, AHEAD_BYTES):
        sites = [measured[name].site for names in ahead for name in names]
        wanted = list(work.patches(work.teacher, sites))
        for names in ahead:
            stage = [measured[name] for name in names]
            own = [layer.site for layer in stage]
            _solve_stage(work, stage, wanted, work.patches(work.student, own), solve)


def _in_blocks(
    work: _Work,
    measured: Mapping[str, Layer],
    blocks: Sequence[str],
    inside: Sequence[Sequence[str]],
    solve: Solve,
) -> None:
    """Layers of a chain of blocks; each block is run from what the one before gave."""
    if not inside:
        return
    teacher = Chain(work.teacher, blocks, work.batches)
    student = Chain(work.student, blocks, work.batches)
    for i, names in enumerate(inside):
        own = [measured[name].site for name in names]
        stages = work.stages_of_block(teacher, i, own)
        wanted = list(work.block_patches(teacher, i, own))
        for stage_names in stages:
            stage = [measured[name] for name in stage_names]
            sites = [layer.site for layer in stage]
            _solve_stage(work, stage, wanted, work.block_patches(student, i, sites), solve)
        teacher.pass_block(i)
        student.pass_block(i)


def _solve_stage(
    work: _Work,
    stage: Sequence[Layer],
    wanted: Sequence[_Patches],
    seen: Iterable[_Patches],
    solve: Solve,
) -> None:
    paired = work.paired([layer.site for layer in stage], wanted, seen)

    def solved(layer: Layer) -> QuantizedLayer:
        pair = paired.get(layer.site.name)
        return solve(layer if pair is None else work.adapted(layer, pair))

    for layer, own in zip(stage, work.group.each(solved, stage, work_of), strict=True):
        work.take(layer, own, paired.get(layer.site.name))


@dataclass(frozen=True, slots=True, eq=False)
class _Paired:
    """Means over patches, float64: of z z', x z' [groups, width, width]; of z, x [.., 1]."""

    zz: Tensor
    xz: Tensor
    z: Tensor
    x: Tensor
    patches: int

    def centred(self) -> _Paired:
        """With the means taken out, but for a share that keeps H positive when they are all."""
        z = (1 - _KEPT) * self.z
        return replace(self, zz=self.zz - z @ self.z.mT, xz=self.xz - self.x @ z.mT)


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """Of the network: for all layers, and more for the starved; the task knows what is padding."""

    batches: Sequence[Batch]
    more: Sequence[Batch]
    starved: Collection[str]
    task: Task | None


class _Work:
    """The float network, the one quantized so far (in float arithmetic), and its layers.

    batches, more: this process's own.
    """

    def __init__(
        self, teacher: nn.Module, inputs: _Inputs, weights: Iterable[Tensor], group: Group
    ) -> None:
        self.task, self.teacher, self.starved = inputs.task, teacher, inputs.starved
        self.group, self.all_batches = group, inputs.batches
        self.batches, self.more = group.dealt(inputs.batches), group.dealt(inputs.more)
        self.model = copied(teacher, weights)  # of these only the codes go on
        self.student = copied(teacher)
        self.norms = norms_behind(teacher, lambda: call(teacher, inputs.batches[0][:2]))
        self.layers: dict[str, QuantizedLayer] = {}
        self.unpaired: list[str] = []
        self.quota = patches_an_image(inputs.batches, PATCHES)

    def needs(self, layers: Sequence[Site]) -> dict[str, int]:
        """About the bytes of each layer's patches, in the order in which the layers first run.

        Layers that two examples do not reach (experts) come where a batch reaches them, or last.
        """
        few = self.all_batches[0][:2]
        seen = self._of_batch(self.teacher, layers, few)
        if len(seen) < len(layers):
            few = self.all_batches[0]
            seen = self._of_batch(self.teacher, layers, few)
        share = sum(len(x) for x in self.all_batches) / len(few) / self.group.size
        needs = {n: round(share * sum(x.nbytes for x in own)) for n, own in seen.items()}
        return needs | {site.name: 0 for site in layers if site.name not in needs}

    def patches(self, model: nn.Module, stage: Sequence[Site]) -> Iterator[_Patches]:
        """Of each batch; then of more batches, if any of the layers needs them."""
        starved = [site for site in stage if site.name in self.starved]
        for x in self.batches:
            yield self._of_batch(model, stage, x)
        for x in self.more if starved else ():
            yield self._of_batch(model, starved, x)

    def _of_batch(self, model: nn.Module, stage: Sequence[Site], x: Batch) -> _Patches:
        mask = None if self.task is None else self.task.mask(x)
        return _patches(model, stage, partial(call, model, x), self.quota * len(x), mask)

    def block_patches(self, chain: Chain, i: int, stage: Sequence[Site]) -> Iterator[_Patches]:
        """Of each batch, in block i of a chain that stands before it."""
        for b, x in enumerate(self.batches):
            mask = None if self.task is None else self.task.mask(x)
            run = partial(chain.run, i, b)
            yield _patches(chain.model, stage, run, self.quota * len(x), mask)

    def stages_of_block(self, chain: Chain, i: int, layers: Sequence[Site]) -> list[list[str]]:
        """Layers that see the same input are one stage; in the order of execution."""
        return self.group.told(lambda: self._stages_of_block(chain, i, layers))

    def _stages_of_block(self, chain: Chain, i: int, layers: Sequence[Site]) -> list[list[str]]:
        owners: dict[str, list[str]] = {}
        for site in layers:
            owners.setdefault(site.owner, []).append(site.name)
        with inputs_seen(chain.model, list(owners)) as seen:
            chain.run(i, 0)
        first = {owner: id(x) for (owner, call), x in seen.items() if call == 1}
        by_input = [list(own) for _, own in itertools.groupby(first, lambda owner: first[owner])]
        stages = [[name for owner in own for name in owners[owner]] for own in by_input]
        return [*stages, *([n] for owner, own in owners.items() if owner not in first for n in own)]

    def paired(
        self, stage: Sequence[Site], wanted: Sequence[_Patches], seen: Iterable[_Patches]
    ) -> dict[str, _Paired]:
        """wanted: the float network's patches of each batch, of these layers and maybe more. seen:
        the student's.

        A layer that is given other numbers of vectors in the two networks is left out: a router
        has sent it other tokens, and there is nothing to pair.
        """
        odd: set[str] = set()
        sums: dict[tuple[str, int], Tensor] = {}
        counts = dict.fromkeys((site.name for site in stage), 0)
        for x, z in zip(wanted, seen, strict=False):
            for name in z:
                if not _are_pairs(x.get(name, []), z[name]):
                    odd.add(name)
                if name in odd:
                    continue
                # z is of the first call alone, if the pass ended there
                for a, b in zip(x[name], z[name], strict=False):
                    products = (b @ b.mT, a @ b.mT, b.sum(2, True), a.sum(2, True))
                    for i, new in enumerate(products):
                        old = sums.get((name, i))
                        sums[name, i] = new.double() if old is None else old + new.double()
                    counts[name] += a.shape[2]
        odd = set().union(*self.group.gathered(odd))
        self.unpaired += [site.name for site in stage if site.name in odd]
        pooled = self.group.pooled(sums)
        totals = dict(zip(counts, map(int, self.group.sum(*counts.values())), strict=True))
        known = {name: n for name, n in totals.items() if n and name not in odd}
        means = {name: [pooled[name, i] / n for i in range(4)] for name, n in known.items()}
        return {n: _Paired(zz, xz, z, x, known[n]) for n, (zz, xz, z, x) in means.items()}

    def adapted(self, layer: Layer, paired: _Paired) -> Layer:
        """The layer with T for its weight and H for its metric.

        H is shrunk, as if more patches had been seen; in those, x = z, or else a classifier that
        sees one vector an image would undo the damage to these images alone.
        """
        if self.absorbs(layer.site):
            paired = paired.centred()
        statistics = Statistics(paired.zz, paired.patches).shrunk()
        h = damped(statistics.gram)
        damage = statistics.trust * (paired.xz - paired.zz)
        change = torch.linalg.solve(h, damage.mT).mT  # C H^-1 - 1
        rows = layer.matrix.double().reshape(len(h), -1, layer.matrix.shape[1])
        target = (rows + rows @ change).reshape(layer.matrix.shape).float()
        return replace(layer, matrix=target, statistics=statistics)

    def absorbs(self, site: Site) -> bool:
        """Whether a norm or a bias takes what the means have moved."""
        return site.name in self.norms or bias_of(self.model, site) is not None

    def take(self, layer: Layer, solved: QuantizedLayer, paired: _Paired | None) -> None:
        site = layer.site
        matrix = as_matrix(solved.weight.dequantize(), site.channel_axis)
        if solved.adapter is not None:
            matrix = matrix + solved.adapter.product()
        weight = getattr(self.student.get_submodule(site.owner), site.parameter)
        weight.copy_(as_weight(matrix, site.shape, site.channel_axis))
        if paired is not None and self.absorbs(site):
            self._absorb(site, layer.matrix.double(), matrix.double(), paired)
        bias = bias_of(self.model, site)
        self.layers[site.name] = replace(solved, bias=None if bias is None else bias.clone())

    def _absorb(self, site: Site, w: Tensor, w_hat: Tensor, paired: _Paired) -> None:
        groups, width = len(paired.zz), w.shape[1]
        got = (w_hat.reshape(groups, -1, width) @ paired.z).flatten()
        wanted = (w.reshape(groups, -1, width) @ paired.x).flatten()
        for net in (self.model, self.student):
            if site.name in self.norms:
                norm: Any = net.get_submodule(self.norms[site.name])
                norm.running_mean += got - wanted
            else:
                bias = bias_of(net, site)
                assert bias is not None
                bias += wanted - got


def _has_inputs(layer: Layer) -> bool:
    """Whether a layer has measured inputs that change with the layers before it."""
    return layer.statistics is not None and layer.site.type in MEASURED


def _are_pairs(x: Sequence[Tensor], z: Sequence[Tensor]) -> bool:
    """Whether the chunks of a pass through the float network go with those of the other; z may end
    after the first call."""
    return len(z) <= len(x) and all(a.shape == b.shape for a, b in zip(x, z, strict=False))


def _unpaired_note(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{', '.join(repr(name) for name in names)} got other numbers of vectors in the quantized "
        "network (a router's choice): solved for the float network's inputs",
    )


class _ReachedError(Exception):
    """All layers of interest have been seen; the rest of the network need not run."""


def _patches(
    model: nn.Module,
    stage: Sequence[Site],
    run: Callable[[], Any],
    most: int,
    mask: Tensor | None,
) -> _Patches:
    """Chunks of patches [groups, width, n] of each layer, in a pass that ends with the last one."""
    seen: dict[str, list[Tensor]] = {}
    last: list[Any] = [None, 0, ()]

    def receive(name: str, own: Tensor, patches: Iterator[Tensor]) -> None:
        if last[0] is not own or last[1] != own._version:  # else layers share what they are given
            last[:] = own, own._version, [chunk.contiguous() for chunk in patches]
        seen.setdefault(name, []).extend(last[2])
        if len(seen) == len(stage):
            raise _ReachedError

    with suppress(_ReachedError), inputs_of(model, stage, receive, most, mask):
        run()
    return seen


def _stages(names: Sequence[str]) -> Iterator[Sequence[str]]:
    size = -(-len(names) // STAGES)
    for i in range(0, len(names), max(1, size)):
        yield names[i : i + size]


def _spans(
    stages: Sequence[Sequence[str]], needs: Mapping[str, int], limit: int
) -> Iterator[list[Sequence[str]]]:
    """Neighbouring stages whose patches together fit the limit (one stage at least)."""
    return fitting(stages, lambda names: sum(needs[name] for name in names), limit)
