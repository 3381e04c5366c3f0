"""A few hundred steps without labels: scales, adapters, norms and biases learn, codes stay.

The quantized network is brought closer to the float one: the Kullback-Leibler divergence of its
softmax from the float network's, on flipped and shifted calibration images. Every value learns
relative to its own size (value = start + size * theta, Adam on theta), so that factors of any scale
and rank take steps of the same relative length; plain factors of rank 4 diverged. The best state on
held-out images decides whether anything is kept (`subbyte.ptq.quantize`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from subbyte.data import random_crop, random_flip
from subbyte.functional import decode, round_scale
from subbyte.layers import Site
from subbyte.ptq.lowrank import stored
from subbyte.tensors import LowRank, QuantizedLayer, QuantizedTensor, as_matrix, as_weight

BATCH = 64
LR = 2e-3
_CROP = 8  # a shift of at most 1/8 of the image's side


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """The network whose norms and biases were tuned, and its layers."""

    model: nn.Module
    layers: dict[str, QuantizedLayer]
    losses: tuple[float, ...]


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

    codes: Tensor

    def __init__(self, layer: QuantizedLayer, site: Site) -> None:
        super().__init__()
        self.layer, self.site = layer, site
        weight = layer.weight
        unit = decode(weight.codes, torch.ones_like(weight.scale), weight.grid)
        self.register_buffer("unit", as_matrix(unit, site.channel_axis))
        self.scale = nn.Parameter(torch.zeros_like(weight.scale))  # relative to what it was
        self.register_buffer("scale_start", weight.scale.clone())
        if layer.adapter is not None:
            left, right = _balanced(layer.adapter)
            self.up, self.down = _Relative(left), _Relative(right)

    def scales(self) -> Tensor:
        return self.scale_start * (1 + self.scale)  # type: ignore[operator]

    def factors(self) -> tuple[Tensor, Tensor]:
        """up [groups, out / groups, rank], down [groups, rank, width]."""
        return self.up(), self.down()

    def forward(self, _: Tensor) -> Tensor:
        matrix = self.unit * self.scales()[:, None]  # type: ignore[operator]
        if self.layer.adapter is not None:
            up, down = self.factors()
            matrix = matrix + (up @ down).reshape(matrix.shape)
        return as_weight(matrix, self.site.shape, self.site.channel_axis)

    @torch.no_grad()
    def read(self, bias: Tensor | None) -> QuantizedLayer:
        """The layer as it is now, rounded to what is stored."""
        old = self.layer.weight
        scale = round_scale(self.scales().abs(), old.grid.scale_domain)
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
    model: nn.Module,
    teacher: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    sites: Mapping[str, Site],
    images: Tensor,
    iterations: int,
    generator: torch.Generator,
    *,
    lr: float = LR,
    step: Callable[[int, float], None] | None = None,
) -> Tuned:
    """Tune against the float network `teacher`; neither model is changed.

    model: the float network with the norms and biases to start from. images: inputs of the network
    [n, ...]. step: called with the number of the iteration and its loss.
    """
    student, teacher = _laid_out(copy.deepcopy(model).eval()), _laid_out(copy.deepcopy(teacher))
    weights = {}
    for name, layer in layers.items():
        owner = student.get_submodule(sites[name].owner)
        weights[name] = _Weight(layer, sites[name])
        parametrize.register_parametrization(
            owner, sites[name].parameter, weights[name], unsafe=True
        )
    _learn_vectors(student)
    parameters = [p for name, p in student.named_parameters() if not name.endswith("original")]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    losses = []
    for i, x in enumerate(_draw(images, iterations, generator)):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * i / iterations))
        with torch.no_grad():
            target = teacher(x)
        with torch.enable_grad(), parametrize.cached():
            loss = divergence(student(x), target)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step is not None:
            step(i, losses[-1])
    return _read(student, model, weights, sites, losses)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean KL of softmax(logits) from softmax(target), nats an image (or token)."""
    logits, target = logits.flatten(0, -2), target.flatten(0, -2)
    return F.kl_div(
        logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True
    )


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


def _draw(images: Tensor, iterations: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches in epochs without replacement, flipped and shifted."""
    order = torch.empty(0, dtype=torch.long)
    batch = min(BATCH, len(images))
    for _ in range(iterations):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)
        index, order = order[:batch], order[batch:]
        x = images[index]
        if x.ndim == 4:
            x = random_crop(x, x.shape[-1] // _CROP, generator)
            x = random_flip(x, generator).contiguous(memory_format=torch.channels_last)
        yield x


def _laid_out(model: nn.Module) -> nn.Module:
    """In place: channels last doubles the speed of convolutions on a CPU."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@torch.no_grad()
def _read(
    student: nn.Module,
    model: nn.Module,
    weights: Mapping[str, _Weight],
    sites: Mapping[str, Site],
    losses: Sequence[float],
) -> Tuned:
    tuned = copy.deepcopy(model)
    for path, module in student.named_modules():
        for name in getattr(module, "parametrizations", {}):
            if isinstance(module.parametrizations[name][0], _Relative):  # type: ignore[index]
                getattr(tuned.get_submodule(path), name).copy_(getattr(module, name))
    layers = {}
    for name, weight in weights.items():
        owner = tuned.get_submodule(sites[name].owner)
        bias = getattr(owner, "bias", None) if sites[name].parameter == "weight" else None
        layers[name] = weight.read(bias)
    return Tuned(tuned, layers, tuple(losses))
