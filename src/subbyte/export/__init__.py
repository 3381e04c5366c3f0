"""How others read a packed network: files of other tools, by suffix.

`EXPORTERS` has an entry for each suffix; a new target is one file here and one entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from subbyte.core.atomic import check_writable, write_atomically
from subbyte.core.ready import unwrapped
from subbyte.errors import SubbyteError
from subbyte.export import onnx, openvino
from subbyte.export.base import FORMS, Built, Check, Exported, Exporter, Request
from subbyte.graph.trace import Example

__all__ = ["EXPORTERS", "FORMS", "Built", "Check", "Exported", "Exporter", "Request", "export"]

EXPORTERS: dict[str, Exporter] = {
    exporter.suffix: exporter for exporter in (onnx.EXPORTER, openvino.EXPORTER)
}


def export(
    net: nn.Module,
    path: str | Path,
    *,
    example: Example | None = None,
    form: str = "auto",
    calibration: Sequence[Example] | None = None,
    check: bool = True,
) -> Exported:
    """Write a packed network as a file that other tools read; its suffix says which.

    example: inputs that forward takes, a batch of at least one; a network that was opened from a
    file with a program needs none. form: "small" is the smallest file, "fast" the fastest run,
    "auto" chooses by the layers. calibration: batches of inputs, for forms that need to know the
    range of activations. check: run the file at once where its runtime is installed, beside the
    packed network. The files appear whole or not at all. Raises SubbyteError for what the target
    cannot hold, naming the layer, and for a package that is missing, naming the extra.
    """
    path = Path(path)
    exporter = exporter_of(path)
    if form not in exporter.forms:
        raise SubbyteError(f"form={form!r}; a {path.suffix} file takes {', '.join(exporter.forms)}")
    exporter.require()
    check_writable(path)
    net = unwrapped(net)
    modes = [(module, module.training) for module in net.modules()]
    request = Request(net.eval(), path.stem, form, example, calibration)
    try:
        built = exporter.build(request)
        for suffix, data in reversed(
            list(built.files.items())
        ):  # the file that names the others is last
            write_atomically(path.with_suffix(suffix), data)
        done = _described(path, exporter, built)
        found = exporter.check(request, built, str(path)) if check and exporter.check else None
        return replace(done, check=found)
    finally:
        for module, training in modes:
            module.training = training


def exporter_of(path: Path) -> Exporter:
    """The exporter of a file's suffix. Raises SubbyteError, with the suffixes there are."""
    if path.suffix not in EXPORTERS:
        known = ", ".join(f"{e.suffix} ({e.what})" for e in EXPORTERS.values())
        raise SubbyteError(f"no file of the kind '{path.suffix}' can be written; there are {known}")
    return EXPORTERS[path.suffix]


def _described(path: Path, exporter: Exporter, built: Built) -> Exported:
    n_bytes = sum(map(len, built.files.values()))
    return Exported(str(path), exporter.what, built.form, n_bytes, built.layers, built.notes)
