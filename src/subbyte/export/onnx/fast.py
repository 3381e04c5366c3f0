"""The form that onnxruntime runs fast: integers where a layer can be, each layer by its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from subbyte.export.onnx.int8 import ROUNDED, Int8
from subbyte.export.onnx.nbits import nbits, why_not_nbits
from subbyte.export.onnx.pieces import Piece
from subbyte.export.onnx.products import float_product
from subbyte.export.onnx.ranges import is_conv, ranges_of
from subbyte.export.onnx.ready import Ready
from subbyte.export.onnx.weights import small_weight
from subbyte.export.onnx.writer import Writer
from subbyte.graph.trace import Example

FLOAT, CODES = "float32", "codes, float32 once loaded"
CALIBRATE = (
    "convolutions run in float32: int8 ones need calibration (calibration=batches, --calibrate)"
)


def small(writer: Writer, piece: Piece, x: Any, plus: Any) -> tuple[Any, str]:
    """Weights alone are small; products are float32."""
    stored = FLOAT if isinstance(piece.weight, Tensor) else CODES
    return float_product(writer, piece, x, plus, small_weight), stored


class Fast:
    """Lowers Linear layers to MatMulNBits, convolutions to integers, the rest to small weights."""

    def __init__(
        self, ready: Ready, calibration: Sequence[Example] | None, packed: bool = True
    ) -> None:
        """packed: onnxruntime is to read it: base-N bytes, and its own operators."""
        self.packed = packed
        self.convs = any(map(is_conv, ready.layers.values()))
        watched = self.convs and calibration is not None
        self.int8 = Int8(ranges_of(ready, calibration or ()), packed) if watched else None
        self.reasons: dict[str, str] = {}

    def __call__(self, writer: Writer, piece: Piece, x: Any, plus: Any) -> tuple[Any, str]:
        if piece.layer is not None and is_conv(piece.layer):
            found = None if self.int8 is None else self.int8.conv(writer, piece, x, plus)
            if found is not None:
                return found
            if self.int8 is not None:
                self.reasons[piece.name] = "its bias is too large for its scale"
        elif self.packed and piece.kind == "Linear" and not isinstance(piece.weight, Tensor):
            reason = why_not_nbits(piece)
            if reason is None:
                return nbits(writer, piece, x, plus)
            self.reasons[piece.name] = reason
        return self.product(writer, piece, x, plus)

    def product(self, writer: Writer, piece: Piece, x: Any, plus: Any) -> tuple[Any, str]:
        """What is no integer product."""
        return small(writer, piece, x, plus)

    def serves(self, layers: Sequence[tuple[str, str]]) -> bool:
        """Whether any layer runs in integers."""
        return any(stored not in (FLOAT, CODES) for _, stored in layers)

    def notes(self, layers: Sequence[tuple[str, str]]) -> tuple[str, ...]:
        """What stays in float32, and what was rounded, in one line each."""
        found = [CALIBRATE] if self.convs and self.int8 is None else []
        found += [f"'{name}' runs in float32: {why}" for name, why in self.reasons.items()]
        rounded = [name for name, stored in layers if stored == ROUNDED]
        if rounded:
            found.append(
                f"weights of {len(rounded)} layers ({rounded[0]}, ...) are rounded to 8 bits for "
                "each channel: they have adapters, scales of groups or uneven levels"
            )
        return tuple(found)
