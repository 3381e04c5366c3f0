"""`subbyte inspect`: what a packed file holds, per layer."""

from __future__ import annotations

from subbyte.commands import options as o
from subbyte.commands.output import console, print_json
from subbyte.report import size_report, size_text
from subbyte.storage.pretrained import PACKED, is_folder


def inspect(
    file: o.PackedFile,
    wide: o.Wide = False,
    json_: o.Json = False,
) -> None:
    """Bits, bytes, entropy and scales of a packed file, per layer; alike layers are one row."""
    report = size_report(file / PACKED if is_folder(file) else file)
    if json_:
        print_json(report.to_dict())
        return
    print(size_text(report, console(100).width, wide=wide))
