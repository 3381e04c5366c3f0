"""The shared library of the runtime, and its C interface (native/include/subbyte.h)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from ..errors import SubbyteError
except ImportError:  # the package `subbyte_runtime`, on its own

    class SubbyteError(Exception):  # type: ignore[no-redef]
        """What a user can correct, in one line."""


MOST_DIMENSIONS = 16
LIBRARY = (
    "SUBBYTE_RUNTIME"  # environment variable: the library's path, instead of the package's own
)
_NAME = "libsubbyte_runtime" + (".dylib" if sys.platform == "darwin" else ".so")


class CTensor(ctypes.Structure):
    """`subbyte_tensor`."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MOST_DIMENSIONS),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
    )


class COptions(ctypes.Structure):
    """`subbyte_options`."""

    _fields_ = (
        ("precision", ctypes.c_int),
        ("verify", ctypes.c_int),
        ("memory", ctypes.c_uint64),
    )


class CStep(ctypes.Structure):
    """`subbyte_step`."""

    _fields_ = (
        ("op", ctypes.c_char_p),
        ("out", ctypes.c_char_p),
        ("layer", ctypes.c_char_p),
        ("how", ctypes.c_char_p),
        ("seconds", ctypes.c_double),
    )


SeenStep = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(CStep))
SeenValue = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(CTensor))

_HANDLE, _TENSORS, _INT = ctypes.c_void_p, ctypes.POINTER(CTensor), ctypes.c_int32
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # what each takes; they return an int but for two
    "subbyte_open": (ctypes.c_char_p, ctypes.POINTER(COptions), ctypes.POINTER(_HANDLE)),
    "subbyte_open_memory": (
        ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(COptions), ctypes.POINTER(_HANDLE),
    ),
    "subbyte_close": (_HANDLE,),
    "subbyte_input_count": (_HANDLE,),
    "subbyte_input": (_HANDLE, _INT, _TENSORS),
    "subbyte_outputs": (_HANDLE, _TENSORS, _INT, _TENSORS, _INT, ctypes.POINTER(_INT)),
    "subbyte_run": (_HANDLE, _TENSORS, _INT, _TENSORS, _INT, _INT),
    "subbyte_profile": (_HANDLE, _TENSORS, _INT, _TENSORS, _INT, _INT, SeenStep, ctypes.c_void_p),
    "subbyte_watch": (_HANDLE, _TENSORS, _INT, _INT, SeenValue, ctypes.c_void_p),
    "subbyte_command": (_INT, ctypes.POINTER(ctypes.c_char_p)),
    "subbyte_last_error": (),
}  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded. Raises SubbyteError if it is not there."""
    for path in places():
        if path.is_file():
            return _declared(ctypes.CDLL(str(path)))
    raise SubbyteError(
        f"the runtime ({_NAME}) was not built; install subbyte with a C++ compiler, or name the "
        f"library in the environment variable {LIBRARY}"
    )


def places() -> Iterator[Path]:
    """Where the library may lie, the first that counts first."""
    if os.environ.get(LIBRARY):
        yield Path(os.environ[LIBRARY])
        return
    here = Path(__file__).resolve().parent
    yield here / _NAME
    yield here.parent / _NAME
    core = importlib.util.find_spec("subbyte._native") if "subbyte" in sys.modules else None
    if core is not None and core.origin:  # an editable install keeps them together elsewhere
        yield Path(core.origin).parent / _NAME


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    for name, takes in _FUNCTIONS.items():
        function = getattr(found, name)
        function.argtypes = list(takes)
        function.restype = ctypes.c_int
    found.subbyte_close.restype = None
    found.subbyte_last_error.restype = ctypes.c_char_p
    return found


def check(code: int) -> None:
    """Raises SubbyteError, with what the library says, for a code other than 0."""
    if code:
        raise SubbyteError(library().subbyte_last_error().decode(errors="replace"))
