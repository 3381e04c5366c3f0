"""What each layer gets, on either road: levels, rank, bytes. Printed, saved, edited, then used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from subbyte.core.account import FloatParameter
from subbyte.core.atomic import write_atomically
from subbyte.core.grids import PerGroup
from subbyte.core.jsontext import to_json
from subbyte.errors import SubbyteError


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One layer. levels: 0 keeps it float, None is what the method says.

    rank: of the adapter, post-training alone. n_bytes: codes, scales and adapter, once known.
    predicted: rise of the loss per example, where it was measured. reason: why it stays float
    though nobody asked for it. group: inputs that share a scale, None for a scale per channel.
    method: how, as in `Rule`; not part of what is saved.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    levels: int | None
    rank: int = 0
    n_bytes: int = 0
    predicted: float | None = None
    reason: str = ""
    group: int | None = None
    method: Any = field(default=None, compare=False)

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a whole network. `str(plan)` is a table for people.

    layers: what can be quantized. float_parameters: the rest.
    """

    layers: tuple[PlannedLayer, ...]
    float_parameters: tuple[FloatParameter, ...] = ()

    @property
    def quantized(self) -> tuple[PlannedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.levels != 0)

    @property
    def layer_bits_per_weight(self) -> float:
        """Codes, scales and adapters over the quantized weights; 0 as long as it is not known."""
        weights = sum(layer.n_weights for layer in self.quantized)
        return 8 * sum(layer.n_bytes for layer in self.quantized) / max(1, weights)

    def following(self, given: Plan) -> Plan:
        """This plan with the levels and ranks of another; layers that it leaves out stay float.

        Raises SubbyteError for a layer of `given` that this network has not, or not for quantizing.
        """
        wanted = {layer.name: layer for layer in given.layers}
        own = {layer.name: layer for layer in self.layers if not layer.reason}
        for name, layer in wanted.items():
            if name not in own and layer.levels != 0:
                raise SubbyteError(
                    f"the plan names layer '{name}', which the network has not (or not for "
                    f"quantizing); it has {', '.join(own)}"
                )
        return replace(self, layers=tuple(_following(x, wanted.get(x.name)) for x in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layers = [
            {f.name: getattr(layer, f.name) for f in fields(layer) if f.name != "method"}
            for layer in self.layers
        ]
        return {"layers": layers, "float": [asdict(p) for p in self.float_parameters]}

    def save(self, path: str | Path) -> None:
        """A JSON file that `load` reads; edit its levels and ranks as you like."""
        write_atomically(Path(path), (to_json(self.to_dict()) + "\n").encode())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Raises SubbyteError naming file and fault."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            kept = tuple(FloatParameter(**value) for value in content.get("float", ()))
            return Plan(tuple(_layer(value) for value in content["layers"]), kept)
        except OSError as error:
            raise SubbyteError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SubbyteError(f"{path}: not a plan: {error!r}; make one with plan.save") from None

    def __str__(self) -> str:
        by_method = any(layer.method is not None for layer in self.layers)
        hidden = "levels" if by_method else "method"
        columns = [self._column(heading) for heading in _COLUMNS if heading != hidden]
        columns = [column for column in columns if any(column[1:])]
        widths = [max(map(len, column)) for column in columns]
        rows = zip(*columns, strict=True)
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        for parameter in self.float_parameters:
            if parameter.n_dims >= 2:
                lines.append(
                    f"float: {parameter.name}, {parameter.n_values:,} values: {parameter.reason}"
                )
        return "\n".join(line.rstrip() for line in (*lines, *self._totals()))

    def _column(self, heading: str) -> list[str]:
        return [heading, *(_COLUMNS[heading](layer) for layer in self.layers)]

    def _totals(self) -> list[str]:
        quantized = sum(layer.n_weights for layer in self.quantized)
        kept = sum(layer.n_weights for layer in self.layers) - quantized
        others = sum(p.n_values for p in self.float_parameters)
        lines = [
            f"{quantized:,} weights quantized; {kept:,} weights of layers kept float; "
            f"{others:,} other values float"
        ]
        if self.layer_bits_per_weight:
            loss = sum(layer.predicted or 0.0 for layer in self.layers)
            lines.append(
                f"{self.layer_bits_per_weight:.3f} bits per weight of the quantized layers, "
                f"predicted rise of loss {loss:.3g}"
            )
        return lines


def _levels_text(layer: PlannedLayer) -> str:
    if layer.levels == 0:
        return f"float: {layer.reason}" if layer.reason else "float"
    return "" if layer.levels is None else str(layer.levels)


def _method_text(layer: PlannedLayer) -> str:
    return _levels_text(layer) if layer.method is None else str(layer.method)


_COLUMNS = {
    "layer": lambda x: x.name or "(the network)",
    "type": lambda x: x.type,
    "shape": lambda x: "x".join(map(str, x.shape)),
    "weights": lambda x: f"{x.n_weights:,}",
    "levels": _levels_text,
    "group": lambda x: "" if x.group is None else str(x.group),
    "rank": lambda x: str(x.rank) if x.n_bytes else "",
    "bytes": lambda x: f"{x.n_bytes:,}" if x.n_bytes else "",
    "predicted loss": lambda x: "" if x.predicted is None else f"{x.predicted:.2g}",
    "method": _method_text,
}


def _following(own: PlannedLayer, given: PlannedLayer | None) -> PlannedLayer:
    if own.reason or own.levels == 0:
        return own
    if given is None or given.levels == 0:
        return replace(own, levels=0, rank=0, n_bytes=0, predicted=None)
    return replace(
        own, levels=given.levels, rank=given.rank, group=given.group, predicted=given.predicted
    )


def _layer(value: Mapping[str, Any]) -> PlannedLayer:
    levels = value["levels"]
    layer = PlannedLayer(
        name=str(value["name"]),
        type=str(value["type"]),
        shape=tuple(int(n) for n in value["shape"]),
        levels=None if levels is None else int(levels),
        rank=int(value.get("rank", 0)),
        group=None if value.get("group") is None else PerGroup(value["group"]).size,
        n_bytes=int(value.get("n_bytes", 0)),
        predicted=value.get("predicted"),
        reason=str(value.get("reason", "")),
    )
    if layer.levels not in (0, None) and not 2 <= layer.levels <= 256:
        raise ValueError(f"levels of '{layer.name}' are {layer.levels}, not 0 or 2 to 256")
    if layer.rank < 0:
        raise ValueError(f"rank of '{layer.name}' is {layer.rank}")
    return layer
