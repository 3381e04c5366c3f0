"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from subbyte.errors import SubbyteError

_PREFIX = ".subbyte-"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, or leave it as it was. Raises SubbyteError if that fails.

    A link stays, its target is replaced; the mode of an older file is kept. What is no ordinary
    file (a device, a folder) is refused.
    """
    write_parts_atomically(path, [data], len(data))


def write_parts_atomically(path: Path, parts: Iterable[bytes | memoryview], n_bytes: int) -> None:
    """As `write_atomically`, of data that is made part by part; n_bytes: of all of it."""
    with _explained(path, f" ({n_bytes:,} bytes)"):
        _check_kind(path)
        place = path.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        _write_beside(place, parts)


def check_writable(path: Path) -> None:
    """Raises SubbyteError if `path` could not be written, before long work starts."""
    with _explained(path, ""):
        _check_kind(path)
        place = path.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent):
            pass


@contextlib.contextmanager
def _explained(path: Path, size: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SubbyteError(
            f"cannot write {path}{size}: {reason}; what was there before is untouched. Free some "
            "space or choose another place"
        ) from None


def _check_kind(path: Path) -> None:
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device, a pipe or a socket"
        raise SubbyteError(f"cannot write {path}: it is {kind}; give the name of a file")


def _write_beside(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Through a temporary file that is gone afterwards, whatever happens (Ctrl-C too).

    It gets a name only once it is complete, where the system can do that. It is locked while it is
    written, so that `_sweep` can tell it from what a killed process has left.
    """
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_UMASK
    temporary = path.with_name(_PREFIX + secrets.token_hex(8))
    number = _open_nameless(path.parent)
    nameless = number is not None
    if number is None:
        number = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(number, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode)
            if nameless:
                # a folder's number makes Python follow the link in /proc instead of copying it
                os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):  # after the rename there is none
                temporary.unlink()


def _open_nameless(folder: Path) -> int | None:
    """A file in this folder without a name (Linux), or None where the system has no such thing."""
    try:
        if not Path("/proc/self/fd").exists():
            return None
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except (AttributeError, OSError):
        return None


def _sweep(path: Path) -> None:
    """Remove temporary files beside `path` that nobody is writing any more."""
    for stale in path.parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), stale.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.unlink()


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()  # once, at import: reading it means setting it, for all threads
