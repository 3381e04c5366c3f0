"""Every parameter of a network: quantized, or float and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from subbyte.core.as_linear import in_other_form, is_conv1d
from subbyte.core.sites import join, own_parameters, owners_of_tied_weights, sites, unsupported
from subbyte.core.tensors import QuantizedLayer

_NAMED = 6  # parameters that one note names


@dataclass(frozen=True, slots=True)
class FloatParameter:
    """A parameter that stays float. n_bytes: at its own width."""

    name: str
    n_dims: int
    n_values: int
    n_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class ParameterAccount:
    """One parameter. levels: of its codes, 0 for float. n_bytes: codes, scales and adapter, or the
    float values. reason: why it is float, "" where it is not."""

    name: str
    n_values: int
    n_bytes: int
    levels: int
    reason: str


def float_parameters(model: nn.Module, quantized: Collection[str]) -> tuple[FloatParameter, ...]:
    """Each parameter that is no weight of the layers of these names, once, with the reason."""
    weights = {join(s.owner, s.parameter) for s in sites(model) if s.name in quantized}
    return tuple(_float_parameters(model, weights))


def _float_parameters(model: nn.Module, taken: Collection[str]) -> Iterator[FloatParameter]:
    tied, refused = owners_of_tied_weights(model), unsupported(model)
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = {site.parameter for site in sites(module) if not site.owner}
        for part, value in own_parameters(module).items():
            name = join(path, part)
            counted = name in taken or id(value) in seen
            seen.add(id(value))
            if counted:
                continue
            reason = _reason(module, value.ndim, part in own, tied.get(name))
            if value.ndim > 1 and path in refused:
                reason = "{}: {}".format(*refused[path])
            n_bytes = value.numel() * value.element_size()
            yield FloatParameter(name, value.ndim, value.numel(), n_bytes, reason)


def _reason(module: nn.Module, n_dims: int, is_weight: bool, owners: list[str] | None) -> str:
    """Why a parameter is float, in words."""
    kind = type(module).__name__
    if n_dims < 2:
        return f"a bias, norm or other vector of {kind}"
    if owners is not None:
        return f"shared by {', '.join(owners)}"
    if in_other_form(module):
        what = "Conv1D stays" if is_conv1d(module) else "a stack of experts stays"
        return f"{what} float in training, and where the recipe or the plan says so"
    if is_weight:
        return "the recipe or the plan keeps it float"
    return f"{kind} is no layer that can be quantized"


def accounts(
    model: nn.Module, layers: Mapping[str, QuantizedLayer]
) -> tuple[ParameterAccount, ...]:
    """All parameters, each once: the quantized weights first."""
    weights = [
        ParameterAccount(
            join(site.owner, site.parameter), site.n_weights, layers[site.name].n_bytes,
            layers[site.name].weight.grid.n_levels, "",
        )
        for site in sites(model) if site.name in layers
    ]  # fmt: skip
    kept = [
        ParameterAccount(p.name, p.n_values, p.n_bytes, 0, p.reason)
        for p in float_parameters(model, layers)
    ]
    return (*weights, *kept)


def notes_on_float(kept: Collection[FloatParameter]) -> tuple[str, ...]:
    """A line for every reason why parameters of two or more dimensions stay float."""
    groups: dict[str, list[FloatParameter]] = {}
    for parameter in kept:
        if parameter.n_dims > 1:
            groups.setdefault(parameter.reason, []).append(parameter)
    return tuple(_line(reason, group) for reason, group in groups.items())


def _line(reason: str, group: list[FloatParameter]) -> str:
    names = ", ".join(f"'{p.name}'" for p in group[:_NAMED])
    more = f" and {len(group) - _NAMED} more" if len(group) > _NAMED else ""
    verb = "stays" if len(group) == 1 else "stay"
    return f"{names}{more} {verb} float ({sum(p.n_values for p in group):,} values): {reason}"


def note_on_size(found: Collection[ParameterAccount]) -> tuple[str, ...]:
    """One line if the network takes no less than it would in float16."""
    n_bytes, n_values = sum(p.n_bytes for p in found), sum(p.n_values for p in found)
    if n_bytes < 2 * n_values:
        return ()
    kept = sum(p.n_values for p in found if not p.levels)
    return (
        f"the network takes {n_bytes:,} bytes, no less than its {2 * n_values:,} in float16: "
        f"{kept:,} of {n_values:,} values stay float",
    )
