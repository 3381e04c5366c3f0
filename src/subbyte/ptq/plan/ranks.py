"""What each layer gets: levels, rank of its adapter, bytes. Printed, saved, edited, then used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subbyte.core.atomic import write_atomically
from subbyte.core.jsontext import to_json
from subbyte.errors import SubbyteError


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer. n_bytes: codes, scales and adapter; predicted: rise of the loss, nats an image.

    levels 0 keeps the layer float. predicted is None where nothing was measured.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    levels: int
    rank: int
    n_bytes: int
    predicted: float | None = None

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The plan of a whole network. `str(plan)` is a table for people."""

    layers: tuple[LayerPlan, ...]

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.levels)

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales and adapters, everything counted, over the quantized weights."""
        weights = sum(layer.n_weights for layer in self.quantized)
        return 8 * sum(layer.n_bytes for layer in self.quantized) / max(1, weights)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    def save(self, path: str | Path) -> None:
        """A JSON file that `load` reads; edit its levels and ranks as you like."""
        write_atomically(Path(path), (to_json(self.to_dict()) + "\n").encode())

    @staticmethod
    def load(path: str | Path) -> RankPlan:
        """Raises SubbyteError naming file and fault."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return RankPlan(tuple(_layer(value) for value in content["layers"]))
        except OSError as error:
            raise SubbyteError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise SubbyteError(f"{path}: not a plan: {error!r}; make one with plan.save") from None

    def __str__(self) -> str:
        rows = [("layer", "type", "shape", "levels", "rank", "bytes", "predicted loss")]
        for layer in self.layers:
            rows.append(
                (
                    layer.name,
                    layer.type,
                    "x".join(map(str, layer.shape)),
                    str(layer.levels) if layer.levels else "float",
                    str(layer.rank),
                    f"{layer.n_bytes:,}",
                    "" if layer.predicted is None else f"{layer.predicted:.2g}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        total = sum(layer.predicted or 0.0 for layer in self.layers)
        lines.append(
            f"{self.bits_per_weight:.3f} bits a weight, predicted rise of loss {total:.3g}"
        )
        return "\n".join(line.rstrip() for line in lines)


def _layer(value: Mapping[str, Any]) -> LayerPlan:
    layer = LayerPlan(
        name=str(value["name"]),
        type=str(value["type"]),
        shape=tuple(int(n) for n in value["shape"]),
        levels=int(value["levels"]),
        rank=int(value["rank"]),
        n_bytes=int(value.get("n_bytes", 0)),
        predicted=value.get("predicted"),
    )
    if layer.levels != 0 and not 2 <= layer.levels <= 256:
        raise ValueError(f"levels of '{layer.name}' are {layer.levels}, not 0 or 2 to 256")
    if layer.rank < 0:
        raise ValueError(f"rank of '{layer.name}' is {layer.rank}")
    return layer
