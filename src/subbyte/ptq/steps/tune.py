"""A few hundred steps without labels: scales, adapters, norms and biases learn, codes stay.

The quantized network is brought closer to the float one: the task's distance of their outputs
(`subbyte.tasks`), plus the mean relative squared error of the layers' inputs and the outputs. A
classifier is sure of the images that it was trained on, and there is little to learn from an
answer that is 1: hence its temperature of 4, and every other batch of blended pairs. Images are
flipped and shifted. Every value learns relative to its own size
(value = start + size * theta, Adam on theta), so that factors of any scale and rank take steps of
the same relative length; plain factors of rank 4 diverged. The steps are as long as there is
something to repair: in proportion to the relative error of the start. Held-out
images decide whether the outcome is kept (`subbyte.ptq.quantize`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from subbyte.core.functional import decode, round_scale, spread
from subbyte.core.quantized import Quantized
from subbyte.core.ready import copied
from subbyte.core.sites import Site, bias_of, sharing_sites, sites
from subbyte.core.tensors import LowRank, QuantizedLayer, QuantizedTensor, as_weight
from subbyte.ptq.entrance import channels_last
from subbyte.ptq.evidence.statistics import Seen, inputs_seen
from subbyte.ptq.solvers.lowrank import stored
from subbyte.tasks.base import Task, unpadded
from subbyte.tasks.batches import Batch, Examples, Ragged, batch_size, call

BATCH = 32
LR = 0.01  # times the root of the relative error that the tuning starts with


class _Relative(nn.Module):
    """A tensor that learns in units of its own root mean square."""

    start: Tensor
    size: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        start = start.detach().float()
        self.register_buffer("start", start)
        size = start.square().mean().sqrt()
        self.register_buffer("size", torch.where(size > 0, size, torch.ones_like(size)))
        self.theta = nn.Parameter(torch.zeros_like(start))

    def forward(self, _: Tensor | None = None) -> Tensor:
        return self.start + self.size * self.theta


class _Weight(nn.Module):
    """A quantized layer's weight from fixed codes, a learning scale and a learning adapter."""

    unit: Tensor
    scale_start: Tensor

    def __init__(self, layer: QuantizedLayer, site: Site) -> None:
        super().__init__()
        self.layer, self.site = layer, site
        weight = layer.weight
        unit = decode(weight.codes, torch.ones_like(weight.scale), weight.grid)
        self.register_buffer("unit", unit)
        self.scale = nn.Parameter(torch.zeros_like(weight.scale))  # relative to what it was
        self.register_buffer("scale_start", weight.scale.clone())
        if layer.adapter is not None:
            left, right = _balanced(layer.adapter)
            self.up, self.down = _Relative(left), _Relative(right)

    def scales(self) -> Tensor:
        """What the forward pass multiplies with: never below 0, which no file can store."""
        return self.scale_start * (1 + self.scale).clamp(min=0.0)  # type: ignore[operator]

    def factors(self) -> tuple[Tensor, Tensor]:
        """up [groups, out / groups, rank], down [groups, rank, width]."""
        return self.up(), self.down()

    def forward(self, _: Tensor) -> Tensor:
        weight = self.unit * spread(self.scales(), self.site.shape, self.layer.weight.grid)
        if self.layer.adapter is None:
            return weight
        up, down = self.factors()
        product = (up @ down).reshape(self.layer.adapter.up.shape[0], -1)
        return weight + as_weight(product, self.site.shape, self.site.channel_axis)

    @torch.no_grad()
    def read(self, bias: Tensor | None) -> QuantizedLayer:
        """The layer as it is now, rounded to what is stored."""
        old = self.layer.weight
        scale = round_scale(self.scales(), old.grid.scale_domain)
        weight = QuantizedTensor(old.codes, scale, old.grid)
        adapter = None
        if self.layer.adapter is not None:
            bits = 8 * self.layer.adapter.up.element_size()
            adapter = stored(*self.factors(), bits)
        return QuantizedLayer(weight, None if bias is None else bias.detach().clone(), adapter)


def _balanced(adapter: LowRank) -> tuple[Tensor, Tensor]:
    """Factors whose columns and rows of a rank have one norm; shapes as `factors`."""
    groups, rank = adapter.groups, adapter.rank
    down = adapter.down.float().reshape(groups, rank, -1)
    up = adapter.up.float().reshape(groups, -1, rank) * adapter.scale.reshape(groups, 1, rank)
    ratio = (up.norm(dim=1).clamp(min=1e-12) / down.norm(dim=2).clamp(min=1e-12)).sqrt()
    return up / ratio[:, None, :], down * ratio[:, :, None]


def tune(
    start: Quantized,
    teacher: nn.Module,
    images: Examples,
    iterations: int,
    task: Task,
    generator: torch.Generator,
    *,
    step: Callable[[int, float], None] | None = None,
) -> Quantized:
    """Tuned against the float network `teacher`; codes stay, scales and adapters, norms and biases
    do not.

    images: inputs of the network. task: what its outputs mean. step: called with the number of
    the iteration and its loss. Seven parameters: they are independent of each other.
    """
    own = {site.name: site for site in sites(start.model) if site.name in start.layers}
    student = channels_last(copied(start.model).eval())
    weights = _learning(student, start.layers, own)
    parameters = [p for name, p in student.named_parameters() if not name.endswith("original")]
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.99))
    owners = sorted({site.owner for site in own.values()})
    first = 0.0
    for i, x in enumerate(_draw(images, iterations, task, generator)):
        with torch.no_grad(), inputs_seen(teacher, owners) as wanted:
            target = task.outputs(call(teacher, x), x)
        with torch.enable_grad(), parametrize.cached(), inputs_seen(student, owners) as seen:
            y = task.outputs(call(student, x), x)
            apart = _relative_error(seen, wanted, y, target, task.mask(x))
            loss = task.distance(y, target).mean() + apart
            optimizer.zero_grad()
            loss.backward()
        first = float(apart.detach().sqrt()) if i == 0 else first
        optimizer.param_groups[0]["lr"] = rate(first, i, iterations)
        optimizer.step()
        if step is not None:
            step(i, float(loss.detach()))
    return _read(student, start, weights, own)


def rate(first: float, i: int, iterations: int) -> float:
    """The learning rate of iteration i: half a cosine from LR times the first error down to 0."""
    return LR * first * 0.5 * (1 + math.cos(math.pi * i / iterations))


def _learning(
    student: nn.Module, layers: Mapping[str, QuantizedLayer], own: Mapping[str, Site]
) -> dict[str, _Weight]:
    """In place: what learns in the student; its quantized weights by layer name."""
    weights, shared = {}, sharing_sites(student)
    for name, layer in layers.items():
        site = own[name]
        weights[name] = _Weight(layer, site)
        for owner in (site.owner, *(other.owner for other in shared.get(name, ()))):
            module = student.get_submodule(owner)
            parametrize.register_parametrization(module, site.parameter, weights[name], unsafe=True)
    _learn_vectors(student)
    return weights


def _relative_error(
    seen: Seen, wanted: Seen, y: Tensor, target: Tensor, mask: Tensor | None
) -> Tensor:
    """Mean over inputs and the outputs of the squared error over the squared value; no padding.

    Inputs of another shape than the float network's (a router's choice) do not count.
    """
    pairs = [
        (unpadded(a, mask), unpadded(wanted[key], mask)) for key, a in seen.items() if key in wanted
    ]
    errors = [
        (a - b).square().sum() / b.square().sum().clamp(min=torch.finfo(b.dtype).tiny)
        for a, b in [*pairs, (y, target)]
        if a.shape == b.shape
    ]
    return torch.stack(errors).mean()


def _learn_vectors(student: nn.Module) -> None:
    """Norms' affine terms and biases learn relative to their size; matrices that stay float not."""
    for module in list(student.modules()):
        if isinstance(module, _Weight | _Relative):
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is None or name == "original":
                continue
            if parameter.ndim == 1 and parameter.is_floating_point():
                parametrize.register_parametrization(module, name, _Relative(parameter.detach()))
            else:
                parameter.requires_grad_(False)


def _draw(
    images: Examples, iterations: int, task: Task, generator: torch.Generator
) -> Iterator[Batch]:
    """Batches in epochs without replacement, varied as the task says."""
    parts = images.parts if isinstance(images, Ragged) else (images,)
    queue: list[Batch] = []
    for i in range(iterations):
        if not queue:
            queue = _epoch(parts, generator)
        yield task.varied(queue.pop(), generator, i)


def _epoch(parts: Sequence[Batch], generator: torch.Generator) -> list[Batch]:
    """Whole batches of every part in a new order; what is over in a part waits for the next."""
    found = []
    for part in parts:
        size = min(batch_size(part, BATCH), len(part))
        order = torch.randperm(len(part), generator=generator)
        found += [part[own] for own in order.split(size) if len(own) == size]
    if len(parts) > 1:
        found = [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
    return found[::-1]


@torch.no_grad()
def _read(
    student: nn.Module, start: Quantized, weights: Mapping[str, _Weight], own: Mapping[str, Site]
) -> Quantized:
    """What the student has learnt, as it is stored."""
    tuned = copied(start.model)
    for path, module in student.named_modules():
        for name in getattr(module, "parametrizations", {}):
            if isinstance(module.parametrizations[name][0], _Relative):  # type: ignore[index]
                getattr(tuned.get_submodule(path), name).copy_(getattr(module, name))
    layers = {name: weight.read(bias_of(tuned, own[name])) for name, weight in weights.items()}
    return replace(start, model=tuned, layers=layers)
