"""ONNX files: plain operators, or the integer ones that onnxruntime is fast with."""

from __future__ import annotations

from subbyte.export.base import FORMS, Built, Check, Exporter, Request

PACKAGES = ("onnx", "onnxscript", "onnx_ir")


def _build(request: Request) -> Built:
    from subbyte.export.onnx.build import build  # the packages may be missing

    return build(request)


def _check(request: Request, built: Built, path: str) -> Check | None:
    from subbyte.export.onnx.check import check

    return check(request, built, path)


EXPORTER = Exporter(".onnx", "ONNX", FORMS, _build, PACKAGES, "export", _check)
