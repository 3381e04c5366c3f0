"""From a packed network to the bytes of an ONNX file."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from subbyte.errors import SubbyteError
from subbyte.export.base import Built, Request, Source
from subbyte.export.onnx.fast import Fast, small
from subbyte.export.onnx.pieces import Piece, Pieces
from subbyte.export.onnx.products import float_product
from subbyte.export.onnx.ready import Ready, prepared
from subbyte.export.onnx.standins import DOMAIN, stand_ins
from subbyte.export.onnx.weights import float_weight
from subbyte.export.onnx.writer import Writer
from subbyte.graph.program import Program

OPSET = 20
Lower = Callable[[Writer, Piece, Any, Any], tuple[Any, str]]  # -> the result, stored as


def build(request: Request) -> Built:
    """The file in the form that is asked for."""
    ready = prepared(request.read())
    fast = None if request.form == "small" else Fast(ready, request.calibration)
    graph = Graph.of(ready)
    data, layers = graph.lowered(fast or small)
    serves = fast is not None and fast.serves(layers)
    notes = () if fast is None else fast.notes(layers)
    if request.form == "fast" and not serves:
        raise SubbyteError(f"form fast makes no layer of this network faster: {'; '.join(notes)}")
    return Built({".onnx": data}, "fast" if serves else "small", layers, notes, graph.twin)


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A network as torch.onnx gives it, its packed products still one node each."""

    ready: Ready
    pieces: Pieces
    model: Any

    @staticmethod
    def of(ready: Ready, opset: int = OPSET) -> Graph:
        """Raises SubbyteError for an operator that ONNX lacks, naming it."""
        standing, pieces = stand_ins(ready.layers)
        return Graph(ready, pieces, _exported(ready.calling(standing), ready.source, opset))

    def lowered(self, lower: Lower) -> tuple[bytes, tuple[tuple[str, str], ...]]:
        """The file, with each packed product as `lower` writes it; and how each is stored."""
        model = self.model.clone()
        layers = _replace(model.graph, self.pieces, lower)
        RemoveUnusedNodesPass()(model)
        _tidy(model, self.ready.source.program)
        return _bytes(model), layers

    def twin(self) -> bytes:
        """The same in float32."""
        return self.lowered(plain)[0]


def plain(writer: Writer, piece: Piece, x: Any, plus: Any) -> tuple[Any, str]:
    """Everything float32: what other forms are compared with."""
    return float_product(writer, piece, x, plus, float_weight), "float32"


def _exported(net: nn.Module, source: Source, opset: int) -> Any:
    """torch.onnx's graph, the first dimension of every input free."""
    shapes = tuple(
        {0: torch.export.Dim.DYNAMIC} if x.ndim and i.shape[0] is None else {}
        for x, i in zip(source.example, source.program.inputs, strict=True)
    )
    example = tuple(torch.cat([x, x]) if s and x.shape[0] == 1 else x
                    for x, s in zip(source.example, shapes, strict=True))  # fmt: skip
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                net, example, dynamo=True, dynamic_shapes=shapes, opset_version=opset,
                optimize=True, verbose=False,
            )  # fmt: skip
    except Exception as error:  # of torch.export, or an operator that ONNX lacks
        raise SubbyteError(f"the network cannot be written as ONNX: {_reason(error)}") from error
    assert program is not None
    return program.model


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:300]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _replace(graph: Any, pieces: Pieces, lower: Lower) -> tuple[tuple[str, str], ...]:
    """Write every piece's operators in its node's place."""
    writer, stored = Writer(graph), dict[str, str]()
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        piece = pieces[node.attributes["name"].as_string()]
        x, plus = (*node.inputs, None)[:2]
        writer.anchor = node
        result, stored[piece.name] = lower(writer, piece, x, plus)
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return tuple(stored.items())


def _tidy(model: Any, program: Program) -> None:
    """Names of inputs and outputs as the network has them; nothing of how the file was made."""
    graph = model.graph
    for value, given in zip(graph.inputs, program.inputs, strict=True):
        value.name = given.name
    taken = {value.name for value in graph.inputs}
    for value, name in zip(graph.outputs, output_names(program), strict=True):
        value.name = name if name not in taken else f"{name}_out"
    numbers = itertools.count()
    for i, node in enumerate(graph):
        node.name = f"n{i}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.name, value.shape, value.type = f"v{next(numbers)}", None, None
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    model.opset_imports.pop(DOMAIN, None)
    model.graph.opset_imports["com.microsoft"] = 1
    model.producer_name, model.producer_version = "subbyte", None


def output_names(program: Program) -> list[str]:
    """Of the outputs in their order: keys of a dict, else output, output_1, ..."""
    found = list(_leaves(program.output, ""))
    return [name or ("output" if i == 0 else f"output_{i}") for i, name in enumerate(found)]


def _leaves(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}_{i}" if name else "")
    elif isinstance(value, dict) and "map" in value:
        for key, item in value["map"].items():
            yield from _leaves(item, str(key))
    elif value is not None:
        yield name


def _bytes(model: Any) -> bytes:
    proto = ir.to_proto(model)
    if proto.ByteSize() >= 2**31:
        raise SubbyteError("the ONNX file would be over 2 GB, which one file cannot hold")
    data: bytes = proto.SerializeToString()
    return data
