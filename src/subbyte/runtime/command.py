"""The command `subbyte-run`: the library's own, called with the words of the command line."""

from __future__ import annotations

import ctypes
import os
import sys

from .library import library


def main() -> None:
    """Ends the process with the command's exit code."""
    words = [os.fsencode(word) for word in ("subbyte-run", *sys.argv[1:])]
    sys.exit(library().subbyte_command(len(words), (ctypes.c_char_p * (len(words) + 1))(*words)))
