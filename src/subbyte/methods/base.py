"""How training reaches a grid: a parametrization with four hooks, so that one loop serves all.

A method is a frozen dataclass of options; its `quantizer` builds the `nn.Module` that
`torch.nn.utils.parametrize` puts in front of a weight. The weight that the optimizer updates stays
float32 and complete: float checkpoints load into a prepared model, and `float_state_dict` reads
them back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from subbyte.core.functional import spread
from subbyte.core.recipe import Plan, Recipe, as_recipe
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
        """Added to the loss; progress is the fraction of training done, 0 to 1."""
        return 0.0

    def after_step(self, w: Tensor, progress: float) -> None:
        """In place on the float weight, without gradient, after each optimizer step."""

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


def describe(method: Any, *always: str) -> str:
    """`LowRes(levels=5, beta=1.2)`: the named options, and those that are not at their default."""
    shown = [
        f"{option.name}={getattr(method, option.name)!r}"
        for option in dataclasses.fields(method)
        if option.name in always or getattr(method, option.name) != option.default
    ]
    return f"{type(method).__name__}({', '.join(shown)})"


def prepare(model: nn.Module, method: Method | Recipe) -> Plan:
    """Put quantizers in front of the model's weights, in place; any training loop works from here.

    Call it before DDP, FSDP or torch.compile wrap the model. Returns the plan (print it). Raises
    SubbyteError, before anything is changed, for a recipe that does not fit, tied weights, weights
    that are not float32 or not finite, or a model that is prepared already.
    """
    recipe = as_recipe(method)
    _check_methods(recipe)
    plan = recipe.plan(model)
    if not plan.quantized:
        raise SubbyteError("the recipe keeps every layer in float; give a rule a method")
    built = []
    for layer in plan.quantized:
        owner = model.get_submodule(layer.site.owner)
        _check_owner(owner, layer.site)
        weight = stored_weight(owner, layer.site.parameter)
        _check_weight(weight, layer.site.name)
        assert layer.method is not None
        quantizer = _quantizer(layer.method, weight, layer.site)
        _quantized(quantizer, weight, layer.site.name)  # what freeze would refuse, before training
        built.append((owner, layer.site, quantizer))
    for owner, site, quantizer in built:
        if not any(_is_prepared(owner, name) for name in getattr(owner, "parametrizations", {})):
            owner.register_load_state_dict_pre_hook(_accept_float_weights)
        parametrize.register_parametrization(owner, site.parameter, quantizer)
    return plan


def freeze(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Quantize the weights of a prepared model for good; the model itself stays as it is.

    Keys are layer names. Raises SubbyteError for a model that was not prepared, or weights with
    NaN or infinite values (naming the layer).
    """
    layers = {}
    for site, quantizer, weight in quantizers(model):
        _check_weight(weight, site.name)
        owner = model.get_submodule(site.owner)
        bias = getattr(owner, "bias", None) if site.parameter == "weight" else None
        if bias is not None and not bias.isfinite().all():
            raise SubbyteError(f"bias of '{site.name}' has NaN or infinite values")
        tensor = _quantized(quantizer, weight, site.name)
        layers[site.name] = QuantizedLayer(tensor, None if bias is None else bias.detach().clone())
    if not layers:
        raise SubbyteError("the model has no quantizers; call prepare(model, method) first")
    return layers


def penalty(model: nn.Module, progress: float) -> Tensor | float:
    """Sum of all quantizers' penalties: add it to the loss."""
    total: Tensor | float = 0.0
    for _, quantizer, weight in quantizers(model):
        total = total + quantizer.penalty(weight, progress)
    return total


@torch.no_grad()
def after_step(model: nn.Module, progress: float) -> None:
    """Call it after every `optimizer.step()`."""
    for _, quantizer, weight in quantizers(model):
        quantizer.after_step(weight, progress)


def quantizers(model: nn.Module) -> Iterator[tuple[Site, WeightQuantizer, nn.Parameter]]:
    """Site, quantizer and float weight of every prepared layer."""
    for site in sites(model):
        owner = model.get_submodule(site.owner)
        if _is_prepared(owner, site.parameter):
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
        if not _is_prepared(module, parameter) or prefix + parameter not in state:
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


def _is_prepared(owner: nn.Module, parameter: str) -> bool:
    chains: Mapping[str, Any] = getattr(owner, "parametrizations", {})
    return parameter in chains and isinstance(chains[parameter][0], WeightQuantizer)


@torch.no_grad()
def _quantized(quantizer: WeightQuantizer, weight: Tensor, name: str) -> QuantizedTensor:
    """`quantizer.quantize`, with the layer's name in errors, and no live weight lost to scale 0."""
    try:
        tensor = quantizer.quantize(weight.detach())
    except SubbyteError as error:
        raise SubbyteError(f"layer '{name}': {error}") from None
    dead = spread(tensor.scale == 0, weight.ndim, tensor.grid) & (weight != 0)
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


def _check_weight(weight: Tensor, name: str) -> None:
    if weight.is_meta:
        raise SubbyteError(f"weight of '{name}' is on the meta device; load its values first")
    if weight.numel() == 0:
        raise SubbyteError(
            f"weight of '{name}' is empty, shape {tuple(weight.shape)}; keep it float"
        )
    if weight.dtype != torch.float32:
        raise SubbyteError(
            f"weight of '{name}' is {weight.dtype}; call model.float() first, "
            "training needs float32 master weights"
        )
    if not weight.isfinite().all():
        n_bad = int((~weight.isfinite()).sum())
        raise SubbyteError(
            f"weight of '{name}' has {n_bad} NaN or infinite values; "
            "go back to an earlier checkpoint or lower the learning rate"
        )
