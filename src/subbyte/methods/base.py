"""How training reaches a grid: a parametrization with four hooks, so that one loop serves all.

A method is a frozen dataclass of options; its `quantizer` builds the `nn.Module` that
`torch.nn.utils.parametrize` puts in front of a weight. The weight that the optimizer updates stays
float32 and complete: float checkpoints load into a prepared model, and `float_state_dict` reads
them back.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from subbyte.core.account import float_parameters, note_on_size, notes_on_float
from subbyte.core.functional import FLOAT16_MAX, spread
from subbyte.core.grids import ScaleDomain
from subbyte.core.group import local
from subbyte.core.plan import Plan, PlannedLayer
from subbyte.core.quantized import Quantized
from subbyte.core.ready import check_ready, check_weight, copied, make_plain
from subbyte.core.recipe import Recipe, as_recipe
from subbyte.core.sites import Site, join, sites, stored_weight
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor
from subbyte.errors import SubbyteError


class WeightQuantizer(nn.Module):
    """What stands in front of one weight during training. Subclasses give forward and quantize.

    soft: the forward pass sees weights that are not on the grid yet, so that rounding at the end
    changes the network; training scores the rounded weights too.
    """

    soft: ClassVar[bool] = False

    def forward(self, w: Tensor) -> Tensor:
        """What the layer sees in the forward pass; w's shape and dtype."""
        raise NotImplementedError(type(self))

    def quantize(self, w: Tensor) -> QuantizedTensor:
        """The weight for good, codes and scale; w is finite float32."""
        raise NotImplementedError(type(self))

    def penalty(self, w: Tensor, progress: float) -> Tensor | float:
        """Added to the loss: a sum over weights, of which w may be a part (see `penalty`).

        progress: the fraction of training done, 0 to 1.
        """
        return 0.0

    def after_step(self, w: Tensor, progress: float) -> None:
        """In place on the float weight, or a part of it, without gradient, after each optimizer
        step."""

    def pull(self, progress: float) -> float | None:
        """How strongly weights are drawn to their levels now, for the record; None: not at all."""
        return None

    def initial_state(self, w: Tensor) -> dict[str, Tensor]:
        """Buffers that depend on the weights at the start; made again for a float checkpoint."""
        return {}


@runtime_checkable
class Method(Protocol):
    """A training method: frozen options that build a quantizer for each site."""

    def quantizer(self, w: Tensor, site: Site) -> WeightQuantizer: ...


@runtime_checkable
class Leveled(Protocol):
    """A method whose number of levels can be chosen, so that it can follow a plan."""

    def with_levels(self, levels: int) -> Method:
        """The same options with so many levels. Raises SubbyteError for a number it has not."""
        ...


def describe(method: Any, *always: str) -> str:
    """`LowRes(levels=5, beta=1.2)`: the named options, and those that are not at their default."""
    shown = [
        f"{option.name}={getattr(method, option.name)!r}"
        for option in dataclasses.fields(method)
        if option.name in always or getattr(method, option.name) != option.default
    ]
    return f"{type(method).__name__}({', '.join(shown)})"


def prepare(model: nn.Module, method: Method | Recipe, *, plan: Plan | None = None) -> Plan:
    """Put quantizers in front of the model's weights, in place; any training loop works from here.

    plan: levels to use in place of the method's own, for the layers that it names; it may come from
    `quantize`. What cannot be quantized stays float, with the reason in the plan. Call it before
    DDP, FSDP or torch.compile wrap the model. Returns the plan (print it). Raises SubbyteError,
    before anything is changed, for a recipe that does not fit, weights that are not float32 or not
    finite, or a model that is prepared already.
    """
    recipe = as_recipe(method)
    _check_methods(recipe)
    chosen = recipe.plan(model)
    if plan is not None:
        chosen = _leveled(chosen.following(plan))
    wanted = {layer.name: layer for layer in chosen.quantized}
    own = [site for site in sites(model) if site.name in wanted]
    if not own:
        raise SubbyteError("the recipe keeps every layer in float; give a rule a method")
    for site in own:
        _check_owner(model.get_submodule(site.owner), site)
    check_ready(model, own)
    built = {site: _built(model, site, wanted[site.name].method) for site in own}
    for site, (quantizer, _) in built.items():
        owner = model.get_submodule(site.owner)
        if not any(is_prepared(owner, name) for name in getattr(owner, "parametrizations", {})):
            owner.register_load_state_dict_pre_hook(_accept_float_weights)
        parametrize.register_parametrization(owner, site.parameter, quantizer)
    levels = {site.name: tensor.grid.n_levels for site, (_, tensor) in built.items()}
    layers = [dataclasses.replace(x, levels=levels.get(x.name, 0)) for x in chosen.layers]
    return dataclasses.replace(chosen, layers=tuple(layers))


def _built(
    model: nn.Module, site: Site, method: Method | None
) -> tuple[WeightQuantizer, QuantizedTensor]:
    """The quantizer of a layer, and what `freeze` would make of the weight as it is now: what it
    refuses is refused before training."""
    assert method is not None
    weight = stored_weight(model.get_submodule(site.owner), site.parameter)
    _check_master(weight, site.name)
    quantizer = _quantizer(method, weight, site)
    return quantizer, _quantized(quantizer, weight, site.name)


def _leveled(plan: Plan) -> Plan:
    """The plan's levels as options of its methods."""
    return dataclasses.replace(plan, layers=tuple(_with_levels(x) for x in plan.layers))


def _with_levels(layer: PlannedLayer) -> PlannedLayer:
    if layer.levels in (0, None):
        return layer
    assert layer.levels is not None
    if layer.rank:
        raise SubbyteError(
            f"the plan gives layer '{layer.name}' an adapter of rank {layer.rank}; training has "
            "none: set its rank to 0"
        )
    if not isinstance(layer.method, Leveled):
        raise SubbyteError(
            f"the plan gives layer '{layer.name}' {layer.levels} levels, and {layer.method} has no "
            "choice of levels"
        )
    try:
        return dataclasses.replace(layer, method=layer.method.with_levels(layer.levels))
    except SubbyteError as error:
        raise SubbyteError(f"layer '{layer.name}': {error}") from None


def freeze(model: nn.Module) -> Quantized:
    """Quantize the weights of a prepared model for good; the model itself stays as it is.

    Raises SubbyteError for a model that was not prepared, or weights with NaN or infinite values
    (naming the layer).
    """
    plain, layers = without_quantizers(model), frozen_layers(model)
    done = Quantized(plain, layers, notes_on_float(float_parameters(plain, layers)))
    return dataclasses.replace(done, notes=(*done.notes, *note_on_size(done.parameters)))


def without_quantizers(model: nn.Module) -> nn.Module:
    """A float32 copy of a prepared model with its own weights in place of the quantizers."""
    plain = copied(model).float()
    own: dict[str, dict[str, Tensor]] = {}
    for site, _, weight in quantizers(plain):
        own.setdefault(site.owner, {})[site.parameter] = weight
    for owner, weights in own.items():
        make_plain(plain.get_submodule(owner), weights)
    return plain


def frozen_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """What `freeze` makes of each prepared layer, by layer name; errors as there."""
    layers = {}
    for site, quantizer, weight in quantizers(model):
        check_weight(weight, site.name)
        owner = model.get_submodule(site.owner)
        bias = getattr(owner, "bias", None) if site.parameter == "weight" else None
        if bias is not None and not bias.isfinite().all():
            raise SubbyteError(f"bias of '{site.name}' has NaN or infinite values")
        if weight.dtype != torch.float32:
            quantizer = copy.deepcopy(quantizer).float()
        tensor = _quantized(quantizer, weight.float(), site.name)
        stored = None if bias is None else bias.detach().float().clone()
        layers[site.name] = QuantizedLayer(tensor, stored)
    if not layers:
        raise SubbyteError("the model has no quantizers; call prepare(model, method) first")
    return layers


def penalty(model: nn.Module, progress: float) -> Tensor | float:
    """Sum of all quantizers' penalties: add it to the loss.

    Of a network that FSDP2 has sharded: the part of this process's shards.
    """
    total: Tensor | float = 0.0
    for _, quantizer, weight in quantizers(model):
        total = total + quantizer.penalty(local(weight), progress)
    return total


@torch.no_grad()
def after_step(model: nn.Module, progress: float) -> None:
    """Call it after every `optimizer.step()`."""
    for _, quantizer, weight in quantizers(model):
        quantizer.after_step(local(weight), progress)


def quantizers(model: nn.Module) -> Iterator[tuple[Site, WeightQuantizer, nn.Parameter]]:
    """Site, quantizer and float weight of every prepared layer."""
    for site in sites(model):
        owner = model.get_submodule(site.owner)
        if is_prepared(owner, site.parameter):
            chain: Any = owner.parametrizations[site.parameter]  # type: ignore[index,union-attr]
            yield site, chain[0], chain.original


def float_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of a prepared model in the float network's own names: its float weights."""
    state = dict(model.state_dict())
    for site, quantizer, _ in quantizers(model):
        prefix = join(site.owner, f"parametrizations.{site.parameter}.")
        for name in quantizer.state_dict():
            del state[f"{prefix}0.{name}"]
        state[join(site.owner, site.parameter)] = state.pop(f"{prefix}original")
    return state


def _accept_float_weights(
    module: nn.Module, state: dict[str, Any], prefix: str, *_: object
) -> None:
    """Before loading: a float network's key becomes the quantizer's, with fresh initial state."""
    chains: Mapping[str, Any] = getattr(module, "parametrizations", {})
    for parameter, chain in chains.items():
        if not is_prepared(module, parameter) or prefix + parameter not in state:
            continue
        weight = state.pop(prefix + parameter)
        inside = f"{prefix}parametrizations.{parameter}."
        state[f"{inside}original"] = weight
        for name, value in chain[0].initial_state(weight.float()).items():
            state[f"{inside}0.{name}"] = value


def _quantizer(method: Method, weight: Tensor, site: Site) -> WeightQuantizer:
    """`method.quantizer`, with the layer's name in errors."""
    try:
        return method.quantizer(weight.detach(), site)
    except SubbyteError as error:
        raise SubbyteError(f"layer '{site.name}': {error}") from None


def is_prepared(owner: nn.Module, parameter: str) -> bool:
    """Whether a quantizer stands in front of this weight."""
    chains: Mapping[str, Any] = getattr(owner, "parametrizations", {})
    return parameter in chains and isinstance(chains[parameter][0], WeightQuantizer)


@torch.no_grad()
def _quantized(quantizer: WeightQuantizer, weight: Tensor, name: str) -> QuantizedTensor:
    """`quantizer.quantize`, with the layer's name in errors, and no weight lost to a scale that its
    domain has not."""
    try:
        tensor = quantizer.quantize(weight.detach())
    except SubbyteError as error:
        raise SubbyteError(f"layer '{name}': {error}") from None
    if tensor.grid.scale_domain is ScaleDomain.FLOAT16 and tensor.scale.max() >= FLOAT16_MAX:
        raise SubbyteError(
            f"layer '{name}': its weights need a scale above {FLOAT16_MAX:g}, which float16 has "
            "not; use scale_domain='float32'"
        )
    dead = spread(tensor.scale == 0, weight.shape, tensor.grid) & (weight != 0)
    if dead.any():
        raise SubbyteError(
            f"layer '{name}': {int(dead.sum())} weights that are not 0 get a scale of 0 and would "
            "vanish; use another statistic, scale domain or granularity, or keep the layer float"
        )
    return tensor


def _check_methods(recipe: Recipe) -> None:
    for rule in recipe.rules:
        method = rule.method
        if method is not None and (isinstance(method, type) or not isinstance(method, Method)):
            raise SubbyteError(f"{method!r} is no method; give a value such as LowRes(levels=5)")


def _check_owner(owner: nn.Module, site: Site) -> None:
    if parametrize.is_parametrized(owner, site.parameter):
        raise SubbyteError(
            f"weight of '{site.name}' already has a parametrization (prepared twice, "
            "or weight norm); start from the plain model"
        )


def _check_master(weight: Tensor, name: str) -> None:
    if weight.dtype != torch.float32:
        raise SubbyteError(
            f"weight of '{name}' is {weight.dtype}; call model.float() first, "
            "training needs float32 master weights"
        )
