"""OpenVINO files: a graph (.xml) and its constants (.bin)."""

from __future__ import annotations

from subbyte.export.base import FORMS, Built, Check, Exporter, Request

PACKAGES = ("openvino", "onnx", "onnxscript", "onnx_ir")


def _build(request: Request) -> Built:
    from subbyte.export.through_onnx import build  # the packages may be missing

    return build(request)


def _check(request: Request, built: Built, path: str) -> Check | None:
    from subbyte.export.through_onnx import check

    return check(request, built, path)


EXPORTER = Exporter(".xml", "OpenVINO", FORMS, _build, PACKAGES, "openvino", _check)
