"""Which layer gets which method: patterns on names and types, checked before any work starts.

The first rule that matches a layer decides. Nothing is passed over in silence: a rule that matches
nothing and a layer that no rule names are errors. What cannot be quantized stays float and is named
with its reason; it is an error only where a rule asks for it by name or type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from subbyte.core.account import FloatParameter, float_parameters
from subbyte.core.plan import Plan, PlannedLayer
from subbyte.core.sites import Site, join, owners_of_tied_weights, sharing_sites, sites, unsupported
from subbyte.errors import SubbyteError


@dataclass(frozen=True, slots=True)
class Rule:
    """Layers whose name and type match get `method`; None keeps them in float.

    method: LowRes, SGM and the like for `prepare`, CoRa for `quantize`. names, types: exact names,
    or shell patterns (`*`, `?`, `[ab]`), e.g. "layer1.*" and "Conv*". A type is the torch.nn class:
    Linear, Conv1d .. Conv3d, ConvTranspose1d .. 3d, Embedding, LSTM, GRU, RNN, MultiheadAttention
    (its input projections; its output projection is the Linear `<name>.out_proj`). A weight of a
    layer that holds several goes by its own name (`lstm.weight_ih_l0`) and by the layer's (`lstm`).
    """

    names: str = "*"
    types: str = "*"
    method: Any = None

    def __post_init__(self) -> None:
        """Raises SubbyteError for patterns that are no text, such as a method in their place."""
        for field in ("names", "types"):
            value = getattr(self, field)
            if not isinstance(value, str):
                raise SubbyteError(
                    f"{field} of a Rule are a name or a pattern in quotes, not {value!r}; "
                    "a method goes by its name: Rule(names, method=...)"
                )

    def matches(self, names: tuple[str, ...], type_name: str) -> bool:
        """names: of a layer, or of one of its weights and the layer. They may hold brackets."""
        named = any(name == self.names or fnmatchcase(name, self.names) for name in names)
        return named and (type_name == self.types or fnmatchcase(type_name, self.types))

    @property
    def is_catch_all(self) -> bool:
        """Whether it is for whatever no other rule names."""
        return (self.names, self.types) == ("*", "*")

    def __str__(self) -> str:
        return f"Rule(names={self.names!r}, types={self.types!r})"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules in order; the first match wins."""

    rules: tuple[Rule, ...]

    def plan(self, model: nn.Module, *, shared: bool = False) -> Plan:
        """The plan for a model; what cannot be quantized stays float with its reason.

        shared: a weight that a table and a head share is one layer, by the name of the first.

        Raises SubbyteError, naming layers, for a rule that decides nothing, a layer without a rule,
        and a rule that asks by name or type for what cannot be quantized.
        """
        found = sites(model)
        others = unsupported(model)
        if not found:
            why = "".join(f"; '{n}' ({kind}): {why}" for n, (kind, why) in others.items())
            raise SubbyteError(
                f"{type(model).__name__} has no layer that can be quantized{why[:200]}"
            )
        names = [(site.names, site.type) for site in found]
        self._check_rules(names + [((path,), kind) for path, (kind, _) in others.items()])
        for path, (kind, reason) in others.items():
            self._check_not_asked(path, kind, reason)
        tied = owners_of_tied_weights(model)
        groups = sharing_sites(model) if shared else {}
        others_of = {other.name for group in groups.values() for other in group}
        served = {join(site.owner, site.parameter) for site in found if site.name in groups}
        tied = {name: own for name, own in tied.items() if served.isdisjoint(own)}
        planned = tuple(self._planned(s, tied) for s in found if s.name not in others_of)
        return Plan(planned, _outside(model, found))

    def _planned(self, site: Site, tied: Mapping[str, list[str]]) -> PlannedLayer:
        method, reason = self._method(site), ""
        parameter = join(site.owner, site.parameter)
        if method is not None and parameter in tied:
            reason = f"its weight is shared by {sorted(tied[parameter])}"
            self._check_not_asked(site.name, site.type, reason)
            method = None
        levels = 0 if method is None else None
        return PlannedLayer(site.name, site.type, site.shape, levels, reason=reason, method=method)

    def _check_not_asked(self, name: str, type_name: str, reason: str) -> None:
        """Nobody asked by name or type for a method on what cannot be quantized."""
        rule = self._first((name,), type_name)
        if rule is not None and rule.method is not None and not rule.is_catch_all:
            raise SubbyteError(
                f"layer '{name}' ({type_name}) cannot be quantized, as {rule} asks: {reason}; add "
                f"the rule Rule({name!r}, method=None) first, to keep it float"
            )

    def _first(self, names: tuple[str, ...], type_name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(names, type_name)), None)

    def _method(self, site: Site) -> Any:
        rule = self._first(site.names, site.type)
        if rule is None:
            raise SubbyteError(
                f"no rule matches layer '{site.name}' ({site.type}); add a rule for it, for "
                "instance a last one with names='*' and method None to keep it in float"
            )
        return rule.method

    def _check_rules(self, layers: list[tuple[tuple[str, ...], str]]) -> None:
        """Every rule decides about some layer; layers: (names, type)."""
        for number, rule in enumerate(self.rules, 1):
            hits = [layer for layer in layers if rule.matches(*layer)]
            if not hits:
                names = ", ".join(own[0] for own, _ in layers[:8])
                more = ", ..." if len(layers) > 8 else ""
                raise SubbyteError(
                    f"rule {number}, {rule}, matches no layer; there are: {names}{more}"
                )
            decides = any(self._first(*layer) is rule for layer in hits)
            if not decides and not rule.is_catch_all:
                raise SubbyteError(
                    f"rule {number}, {rule}, never applies: an earlier rule takes "
                    f"'{hits[0][0][0]}' and all others; move it up or drop it"
                )


def as_recipe(method: Any) -> Recipe:
    """A recipe as it is, or one rule that gives every layer the method."""
    return method if isinstance(method, Recipe) else Recipe((Rule(method=method),))


def _outside(model: nn.Module, found: tuple[Site, ...]) -> tuple[FloatParameter, ...]:
    """Parameters that are no weight of a layer that could be quantized."""
    weights = {join(site.owner, site.parameter) for site in found}
    return tuple(p for p in float_parameters(model, ()) if p.name not in weights)
