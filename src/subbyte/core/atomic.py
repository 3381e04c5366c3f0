"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from subbyte.errors import SubbyteError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, or leave it as it was. Raises SubbyteError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_beside(path, data)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SubbyteError(
            f"cannot write {path} ({len(data):,} bytes): {reason}; what was there before is "
            "untouched. Free some space or choose another place"
        ) from None


def _write_beside(path: Path, data: bytes) -> None:
    """Through a temporary file that is gone afterwards, whatever happens (Ctrl-C too)."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_UMASK)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):  # after the rename there is none
                temporary.unlink()


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()  # once, at import: reading it means setting it, for all threads
