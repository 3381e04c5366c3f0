"""The folder of a run: one process at a time, and nothing in it is overwritten unasked."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from subbyte.errors import SubbyteError
from subbyte.train.checkpoint import read_checkpoint

LOCK = ".lock"  # stays, empty: to remove it would let two processes in


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Holds the folder, which is made if it is missing. Raises SubbyteError if another process, or
    another run of this one, holds it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("a")
    except OSError as error:
        raise SubbyteError(
            f"cannot write {out}: {error.strerror or error}; choose another 'out'"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SubbyteError(
                f"{out}: another run is training in this folder; wait for it, or choose another "
                "'out'"
            ) from None
        yield


def refuse_run(checkpoint: Path) -> None:
    """Raises SubbyteError if there is a run already, finished or not."""
    if checkpoint.is_file():
        epoch = read_checkpoint(checkpoint)["epoch"]
        raise SubbyteError(
            f"{checkpoint.parent} holds a run of {epoch} epochs; resume (--resume) goes on with "
            "it, fresh (--fresh) begins anew, and another 'out' keeps both"
        )
