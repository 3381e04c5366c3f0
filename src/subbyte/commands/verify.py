"""`subbyte verify`: whether a file is what was written."""

from __future__ import annotations

from pathlib import Path

from subbyte.commands import options as o
from subbyte.commands.output import print_json
from subbyte.errors import SubbyteError
from subbyte.storage import read
from subbyte.storage.pretrained import PACKED, is_folder


def verify(
    file: o.PackedFile,
    json_: o.Json = False,
) -> None:
    """Compare a packed file, or a packed folder of transformers, with its checksums."""
    path = Path(file) / PACKED if is_folder(file) else Path(file)
    found = read(path)
    if not found.digests:
        raise SubbyteError(
            f"{path} has no checksums: an older subbyte made it; load and save it once to add them"
        )
    if json_:
        print_json({"file": str(path), "bytes": found.n_bytes, "tensors": len(found.names)})
        return
    print(f"{path}: {len(found.names)} tensors, {found.n_bytes:,} bytes, all as they were written")
