"""One packed layer as operators of ONNX, over a weight that is float32 once the file is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from subbyte.export.onnx.pieces import Piece
from subbyte.export.onnx.writer import Writer

MakeWeight = Callable[[Writer, Piece], Any]
_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def float_product(writer: Writer, piece: Piece, x: Any, plus: Any | None, make: MakeWeight) -> Any:
    """activation(product + bias + plus), the weight made by `make`."""
    weight = make(writer, piece)
    if piece.kind == "Embedding":
        return writer.op("Gather", weight, x, axis=0)
    y = _linear(writer, piece, x, weight) if piece.kind == "Linear" else conv(
        writer, piece, x, weight, _bias(writer, piece)
    )  # fmt: skip
    return finished(writer, piece, y, plus)


def finished(writer: Writer, piece: Piece, y: Any, plus: Any | None) -> Any:
    """activation(y + plus)."""
    if plus is not None:
        y = writer.op("Add", y, plus)
    if piece.activation == "relu":
        return writer.op("Relu", y)
    if piece.activation == "relu6":
        return writer.op("Clip", y, writer.constant(0.0), writer.constant(6.0))
    return y


def _bias(writer: Writer, piece: Piece) -> Any:
    return None if piece.bias is None else writer.constant(piece.bias.float())


def _linear(writer: Writer, piece: Piece, x: Any, weight: Any) -> Any:
    bias = _bias(writer, piece)
    if len(x.shape) == 2:
        inputs = (x, weight) if bias is None else (x, weight, bias)
        return writer.op("Gemm", *inputs, transB=1)
    y = writer.op("MatMul", x, writer.op("Transpose", weight, perm=[1, 0]))
    return y if bias is None else writer.op("Add", y, bias)


def conv(writer: Writer, piece: Piece, x: Any, weight: Any, bias: Any) -> Any:
    """The convolution of any kind, of one image too."""
    x, given = geometry(writer, piece, x)
    return convolved(writer, piece, (x, weight, bias), given)


def convolved(writer: Writer, piece: Piece, inputs: Any, given: dict[str, Any]) -> Any:
    """inputs: x, weight, and bias or None; given: attributes, as `geometry` gives them."""
    x, weight, bias = inputs
    alone = x.shape is not None and len(x.shape) == len(piece.shape) - 1
    if alone:
        x = writer.op("Unsqueeze", x, writer.constant([0]))
    kind = "ConvTranspose" if piece.kind.startswith("ConvTranspose") else "Conv"
    y = writer.op(kind, *((x, weight) if bias is None else (x, weight, bias)), **given)
    return writer.op("Squeeze", y, writer.constant([0])) if alone else y


def geometry(writer: Writer, piece: Piece, x: Any) -> tuple[Any, dict[str, Any]]:
    """x, padded where the operator cannot do it, and the operator's attributes."""
    layer = piece.layer
    given = {"strides": list(layer.stride), "dilations": list(layer.dilation),
             "group": layer.groups}  # fmt: skip
    if piece.kind.startswith("ConvTranspose"):
        extra = list(layer.output_padding)
        return x, given | {"pads": [*layer.padding] * 2, "output_padding": extra}
    begin, end = list(layer.pads[-2::-2]), list(layer.pads[::-2])
    if layer.padding_mode == "zeros":
        x, more = unpadded(x, len(begin))
        return x, given | {"pads": [a + b for a, b in zip([*begin, *end], more, strict=True)]}
    outer = [0] * (len(x.shape) - len(begin))
    wide = writer.constant([*outer, *begin, *outer, *end])
    padded = writer.op("Pad", x, wide, mode=_PAD_MODES[layer.padding_mode])
    padded.shape = ir.Shape([None] * len(x.shape))
    return padded, given


def unpadded(x: Any, n_dims: int) -> tuple[Any, list[int]]:
    """What a Pad with zeros was given, and its pads of the last n_dims; else x and zeros.

    Between a convolution and what is before it a Pad would be computed in float32.
    """
    node = x.producer()
    pads = ir.convenience.get_const_tensor(node.inputs[1]) if pads_zeros(node) else None
    if pads is not None:
        wide = pads.numpy().reshape(2, -1)
        outer, inner = wide[:, :-n_dims], wide[:, -n_dims:]
        if not outer.any() and (inner >= 0).all():
            return node.inputs[0], inner.flatten().tolist()
    return x, [0] * (2 * n_dims)


def pads_zeros(node: Any) -> bool:
    """Whether a node is a Pad with zeros along every axis, or cuts."""
    if node is None or node.op_type != "Pad" or any(node.inputs[3:]):
        return False
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return False
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    value = ir.convenience.get_const_tensor(node.inputs[2])
    return value is not None and not value.numpy().any()
