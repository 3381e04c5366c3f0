"""ONNX files."""

from __future__ import annotations

from subbyte.errors import SubbyteError
from subbyte.export.base import FORMS, Built, Exporter, Request


def build(request: Request) -> Built:
    raise SubbyteError("not yet")


EXPORTER = Exporter(".onnx", "ONNX", FORMS, build, ("onnx", "onnxscript", "onnx_ir"), "export")
