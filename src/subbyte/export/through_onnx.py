"""OpenVINO's files, read from an ONNX graph of ours by OpenVINO itself.

Weights are int4 or int8 constants times scales, which its CPU plugin keeps as they are for Linear
layers (and rounds activations to int8 there). Convolutions run in int8 between QuantizeLinear and
DequantizeLinear, with scales of calibration.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import openvino as ov
import torch
from torch import Tensor

from subbyte.core.grids import PerGroup
from subbyte.errors import SubbyteError
from subbyte.export.base import Built, Check, Request
from subbyte.export.onnx.build import Graph
from subbyte.export.onnx.check import compared
from subbyte.export.onnx.fast import FLOAT, Fast
from subbyte.export.onnx.int8 import whole_levels
from subbyte.export.onnx.pieces import Piece, Weight
from subbyte.export.onnx.products import float_product
from subbyte.export.onnx.ready import prepared
from subbyte.export.onnx.weights import add_adapter, float_weight, scales
from subbyte.export.onnx.writer import Writer

OPSET = 21  # the first that has INT4
INT4, INT8, INDEX = "int4", "int8", "8-bit codes and a table of levels"


def build(request: Request) -> Built:
    """The two files. OpenVINO reads no base-N bytes: 4 or 8 bits hold a code."""
    ready = prepared(request.read())
    fast = None if request.form == "small" else Through(ready, request.calibration, packed=False)
    graph = Graph.of(ready, OPSET)
    data, layers = graph.lowered(fast or _small)
    notes = () if fast is None else fast.notes(layers)
    form = "small" if fast is None else "fast"
    return Built(_files(data, request.name), form, layers, notes, graph.twin)


class Through(Fast):
    """Convolutions of calibrated ranges in integers, everything else as `_small` has it."""

    def product(self, writer: Writer, piece: Piece, x: Any, plus: Any) -> tuple[Any, str]:
        return _small(writer, piece, x, plus)


def _small(writer: Writer, piece: Piece, x: Any, plus: Any) -> tuple[Any, str]:
    weight = piece.weight
    stored = FLOAT if isinstance(weight, Tensor) else _width(weight)
    return float_product(writer, piece, x, plus, _weight), stored


def _width(weight: Weight) -> str:
    found = whole_levels(weight.grid)
    if found is None or _grouped(weight) is None:
        return INDEX
    return INT4 if found[0].min() >= -8 and found[0].max() <= 7 else INT8


def _grouped(weight: Weight) -> tuple[int, ...] | None:
    """The shape in which scales of groups have a dimension of their own; None if there is none.

    OpenVINO 2026.4 multiplies int4 weights by a scale for each weight, and gives wrong results.
    """
    sharing = weight.grid.granularity
    if not isinstance(sharing, PerGroup):
        return weight.shape
    rows, width = weight.shape[0], weight.tensor.codes[0].numel()
    return None if width % sharing.size else (rows, width // sharing.size, sharing.size)


def _weight(writer: Writer, piece: Piece) -> Any:
    """float32 of whole levels in 4 or 8 bits; of others by a table."""
    weight = piece.weight
    if isinstance(weight, Tensor):
        return float_weight(writer, piece)
    key = ("openvino", piece.name)
    if key not in writer.known:
        made = _table(writer, weight) if _width(weight) == INDEX else _whole(writer, weight)
        writer.known[key] = add_adapter(writer, weight, made)
    return writer.known[key]


def _table(writer: Writer, weight: Weight) -> Any:
    levels = writer.constant(torch.tensor(weight.grid.levels, dtype=torch.float32))
    index = writer.op("Cast", writer.constant(weight.tensor.codes), to=6)  # int32
    return writer.op("Mul", writer.op("Gather", levels, index, axis=0), scales(writer, weight))


def _whole(writer: Writer, weight: Weight) -> Any:
    """Whole numbers times scales, which hold the step."""
    found, shape = whole_levels(weight.grid), _grouped(weight)
    assert found is not None
    assert shape is not None
    levels, step = found
    codes = levels[weight.tensor.codes.numpy()].reshape(shape)
    kind = ml_dtypes.int4 if _width(weight) == INT4 else np.int8
    value = writer.op("Cast", writer.constant(codes.astype(kind)), to=1)
    if shape == weight.shape:
        return writer.op("Mul", value, writer.constant(weight.scales() * step))
    scale = writer.constant((weight.tensor.scale * step).reshape(*shape[:2], 1))
    return writer.op("Reshape", writer.op("Mul", value, scale), writer.constant([*weight.shape]))


def _files(data: bytes, name: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.xml"
        try:
            ov.save_model(_read(data), path, compress_to_fp16=False)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise SubbyteError(f"OpenVINO cannot read the network: {lines[-1][:300]}") from None
        return {s: path.with_suffix(s).read_bytes() for s in (".xml", ".bin")}


def _read(data: bytes) -> Any:
    return ov.convert_model(io.BytesIO(data))


def check(request: Request, built: Built, path: str) -> Check | None:
    """In OpenVINO's CPU plugin, in float32 where it is not told otherwise."""
    assert built.twin is not None
    run, twin = session(path), session(built.twin())
    return compared(request, f"openvino {ov.__version__.split('-')[0]}", run, twin)


def session(model: str | bytes, threads: int | None = None) -> Any:
    """A call: tensors in the order of inputs -> arrays in the order of outputs."""
    core = ov.Core()
    read = core.read_model(model) if isinstance(model, str) else _read(model)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(read, "CPU", settings).create_infer_request()
    n = len(read.outputs)

    def call(xs: Any) -> list[Any]:
        request.infer([x.detach().numpy() for x in xs], share_inputs=True)
        return [request.get_output_tensor(i).data.copy() for i in range(n)]

    return call
