"""`subbyte export`: a packed file in; a file that other tools open out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from subbyte.bench import from_network, parse_numbers
from subbyte.commands import options as o
from subbyte.commands.networks import packed_network
from subbyte.commands.output import show
from subbyte.commands.quantize import drawn
from subbyte.data import load_images
from subbyte.export import Exported
from subbyte.export import export as write
from subbyte.graph.network import PROGRAM
from subbyte.storage.pretrained import is_folder
from subbyte.train.evaluate import preprocess_of

SAMPLES = 256
_BATCH = 32


def export(
    file: o.ExportedFile,
    to: o.To,
    form: o.Form = "auto",
    calibrate: o.CalibrateRange = None,
    samples: o.RangeSamples = SAMPLES,
    split: o.Split = "train",
    size: o.Size = None,
    model: o.Model = None,
    input_: o.Input = None,
    json_: o.Json = False,
) -> None:
    """Write a packed file for another tool (ONNX, OpenVINO, ...), and check it there."""
    net = packed_network(file, model, "int8")
    batches = None if calibrate is None else _batches(net, calibrate, split, samples, size)
    example = None if _holds_all(net, file) else _example(net, file, input_, batches)
    done = write(net, to, example=example, form=form, calibration=batches)
    show(done, table, json_)


def _holds_all(net: nn.Module, file: Path) -> bool:
    return is_folder(file) or PROGRAM in getattr(net, "meta", {})


def _example(
    net: nn.Module, file: Path, input_: str | None, batches: list[Tensor] | None
) -> Tensor:
    """An input as the network takes it: of --calibrate, if there is one."""
    if batches is not None:
        return batches[0][:2]
    size = None if input_ is None else parse_numbers("--input", input_)
    _, example = from_network(net, str(file), size)
    return torch.stack([example, example])


def _batches(
    net: nn.Module, source: str, split: str, samples: int, size: int | None
) -> list[Tensor]:
    images = drawn(load_images(source, split, size=size), samples, seed=0)
    preprocess = preprocess_of(net)
    return [preprocess(x) for x in images.images.split(_BATCH)]


def table(result: Exported) -> Table:
    """The result for people; notes below."""
    view = Table(title=escape(f"{result.path}: {result.target}, form {result.form}"))
    view.add_column("what")
    view.add_column("value", justify="right")
    for what, value in rows(result):
        view.add_row(escape(what), escape(value))
    view.caption = escape("\n".join(result.notes)) or None
    view.caption_justify = "left"
    return view


def rows(result: Exported) -> list[tuple[str, str]]:
    """Size, how layers are stored, and what the check has found."""
    kinds: dict[str, int] = {}
    for _, stored in result.layers:
        kinds[stored] = kinds.get(stored, 0) + 1
    found = [("bytes", f"{result.n_bytes:,}")]
    found += [(f"layers as {stored}", str(count)) for stored, count in kinds.items()]
    return found + _checked(result.check)


def _checked(check: Any) -> list[tuple[str, str]]:
    if check is None:
        return [("checked", "no: nothing that runs it is installed here")]
    return [
        ("bytes of the packed file", f"{check.packed_bytes:,}"),
        (f"largest difference in {check.runtime}", f"{check.difference:.2e}"),
        ("agreement of argmax", f"{check.agreement:.2%}"),
        (f"ms in {check.runtime}", f"{check.ms:.3f}"),
        ("ms of the packed network", f"{check.packed_ms:.3f}"),
        (f"ms of float32 in {check.runtime}", f"{check.float_ms:.3f}"),
    ]
