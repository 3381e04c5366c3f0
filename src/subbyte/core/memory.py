"""Memory that is free, given back to the system."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def give_back() -> None:
    """Free what only cycles hold, and have the C library return its free pages, which it keeps
    where smaller pieces lie between them. Nothing but the former where it is not glibc."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
