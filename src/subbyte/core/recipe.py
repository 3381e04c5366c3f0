"""Which layer gets which method: patterns on names and types, checked before any work starts.

The first rule that matches a layer decides. Nothing is passed over in silence: a rule that matches
nothing, a layer that no rule names and a layer that cannot be quantized are errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from subbyte.core.sites import Site, join, owners_of_tied_weights, sites, unsupported
from subbyte.errors import SubbyteError

if TYPE_CHECKING:
    from subbyte.methods.base import Method


@dataclass(frozen=True, slots=True)
class Rule:
    """Layers whose name and type match get `method`; None keeps them in float.

    names, types: exact names, or shell patterns (`*`, `?`, `[ab]`), e.g. "layer1.*" and "Conv*".
    A type is the torch.nn class: Linear, Conv1d .. Conv3d, ConvTranspose1d/2d, Embedding,
    MultiheadAttention (its input projections; its output projection is the Linear
    `<name>.out_proj`).
    """

    names: str = "*"
    types: str = "*"
    method: Method | None = None

    def matches(self, name: str, type_name: str) -> bool:
        named = name == self.names or fnmatchcase(name, self.names)  # a name may hold brackets
        return named and (type_name == self.types or fnmatchcase(type_name, self.types))

    def __str__(self) -> str:
        return f"Rule(names={self.names!r}, types={self.types!r})"


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    site: Site
    method: Method | None


@dataclass(frozen=True, slots=True)
class FloatParameter:
    name: str
    n_dims: int
    n_values: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What will happen to each layer. `str(plan)` is a table for people."""

    layers: tuple[PlannedLayer, ...]
    float_parameters: tuple[FloatParameter, ...]  # everything that is no layer's weight

    @property
    def quantized(self) -> tuple[PlannedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.method is not None)

    def __str__(self) -> str:
        rows = [("layer", "type", "shape", "weights", "method")]
        for layer in self.layers:
            site = layer.site
            shape = "x".join(map(str, site.shape))
            method = "float" if layer.method is None else str(layer.method)
            rows.append((site.name, site.type, shape, f"{site.n_weights:,}", method))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        quantized = sum(layer.site.n_weights for layer in self.quantized)
        small = sum(p.n_values for p in self.float_parameters if p.n_dims < 2)
        for parameter in self.float_parameters:
            if parameter.n_dims >= 2:
                lines.append(f"float, not a layer: {parameter.name}, {parameter.n_values:,} values")
        kept = sum(layer.site.n_weights for layer in self.layers) - quantized
        lines.append(
            f"{quantized:,} weights quantized; {kept:,} weights of layers kept float; "
            f"{small:,} other values (biases, norms) float"
        )
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules in order; the first match wins."""

    rules: tuple[Rule, ...]

    def plan(self, model: nn.Module) -> Plan:
        """The plan for a model. Raises SubbyteError, naming layers, when a rule or layer is off."""
        found = sites(model)
        others = unsupported(model)
        if not found and not others:
            raise SubbyteError(f"{type(model).__name__} has no layer that can be quantized")
        names = [(site.name, site.type) for site in found]
        self._check_rules(names + [(path, kind) for path, (kind, _) in others.items()])
        self._check_unsupported(others)
        planned = tuple(PlannedLayer(site, self._method(site)) for site in found)
        _check_tied(model, planned)
        return Plan(planned, _other_parameters(model, found))

    def _first(self, name: str, type_name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(name, type_name)), None)

    def _method(self, site: Site) -> Method | None:
        rule = self._first(site.name, site.type)
        if rule is None:
            raise SubbyteError(
                f"no rule matches layer '{site.name}' ({site.type}); add a rule for it, for "
                "instance a last one with names='*' and method None to keep it in float"
            )
        return rule.method

    def _check_rules(self, layers: list[tuple[str, str]]) -> None:
        """Every rule decides about some layer; layers: (name, type)."""
        for number, rule in enumerate(self.rules, 1):
            hits = [layer for layer in layers if rule.matches(*layer)]
            if not hits:
                names = ", ".join(name for name, _ in layers[:8])
                more = ", ..." if len(layers) > 8 else ""
                raise SubbyteError(
                    f"rule {number}, {rule}, matches no layer; there are: {names}{more}"
                )
            decides = any(self._first(*layer) is rule for layer in hits)
            if not decides and (rule.names, rule.types) != ("*", "*"):
                raise SubbyteError(
                    f"rule {number}, {rule}, never applies: an earlier rule takes '{hits[0][0]}' "
                    "and all others; move it up or drop it"
                )

    def _check_unsupported(self, others: dict[str, tuple[str, str]]) -> None:
        for path, (type_name, reason) in others.items():
            rule = self._first(path, type_name)
            if rule is None or rule.method is not None:
                raise SubbyteError(
                    f"layer '{path}' ({type_name}) cannot be quantized: {reason}; add the rule "
                    f"Rule({path!r}, method=None) first, to keep it float"
                )


def as_recipe(method: Method | Recipe) -> Recipe:
    """A recipe as it is, or one rule that gives every layer the method."""
    return method if isinstance(method, Recipe) else Recipe((Rule(method=method),))


def _check_tied(model: nn.Module, planned: tuple[PlannedLayer, ...]) -> None:
    tied = owners_of_tied_weights(model)
    for layer in planned:
        parameter = join(layer.site.owner, layer.site.parameter)
        if layer.method is not None and parameter in tied:
            raise SubbyteError(
                f"weight of '{layer.site.name}' is shared by {sorted(tied[parameter])}; quantizing "
                "one owner would leave the others in float. Untie the weights, or add a rule that "
                "keeps these layers in float"
            )


def _other_parameters(model: nn.Module, found: tuple[Site, ...]) -> tuple[FloatParameter, ...]:
    taken = {join(site.owner, site.parameter) for site in found}
    return tuple(
        FloatParameter(name, parameter.ndim, parameter.numel())
        for name, parameter in model.named_parameters()
        if name not in taken
    )
