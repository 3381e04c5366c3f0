"""OpenVINO files: a graph (.xml) and its constants (.bin)."""

from __future__ import annotations

from subbyte.errors import SubbyteError
from subbyte.export.base import FORMS, Built, Exporter, Request


def build(request: Request) -> Built:
    raise SubbyteError("not yet")


EXPORTER = Exporter(".xml", "OpenVINO", FORMS, build, ("openvino", "onnxscript"), "openvino")
