"""An open network: `run`, `profile`, `watch`, with NumPy arrays in and out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .library import (
    MOST_DIMENSIONS,
    COptions,
    CTensor,
    SeenStep,
    SeenValue,
    SubbyteError,
    check,
    library,
)

Precision = Literal["int8", "int16", "float32", "dynamic"]
Array = NDArray[Any]

_PRECISIONS = ("int8", "int16", "float32", "dynamic")  # in the order of `subbyte_precision`
_DTYPES: tuple[Any, ...] = (  # in the order of `subbyte_dtype`; None: NumPy has no such type
    np.float32, np.float64, np.float16, None, np.int64, np.int32, np.int16, np.int8, np.uint8,
    np.bool_,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step of a run. layer: its name, or "". how: the arithmetic, as
    "int8", "int8, static scales" or "float32"."""

    op: str
    out: str
    layer: str
    how: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Input:
    """shape: None where any size goes."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


def open(
    path: str | os.PathLike[str],
    *,
    precision: Precision = "int8",
    threads: int | None = None,
    verify: bool = True,
    memory: int = 0,
) -> Network:
    """The network of a packed file that holds a program.

    precision: of the activations in products, as in `subbyte.load`. "int8" keeps them in 8 bits
    between layers where the file has their scales (`subbyte.calibrate_activations`); "dynamic"
    rounds them to int8 at each layer, as "int8" does where there are none. threads: of each run;
    the machine's cores if None. verify: by the file's checksums. memory: bytes that the values of
    one run may take, 0 for 16 GiB. Raises SubbyteError naming the file and the fault.
    """
    if precision not in _PRECISIONS:
        known = ", ".join(map(repr, _PRECISIONS))
        raise SubbyteError(f"precision={precision!r}; use one of {known}")
    options = COptions(_PRECISIONS.index(precision), int(verify), memory)
    handle = ctypes.c_void_p()
    name = os.fsencode(Path(path))
    if b"\0" in name:
        raise SubbyteError(f"{str(path)!r:.99} is no path")
    check(library().subbyte_open(name, options, handle))
    return Network(handle, threads or os.cpu_count() or 1)


class Network:
    """A packed network that runs without PyTorch; safe from several threads."""

    def __init__(self, handle: ctypes.c_void_p, threads: int) -> None:
        """Made by `open`."""
        self._library, self._handle = library(), handle
        self.threads = threads

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.subbyte_close(self._handle)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Names, shapes and types of what `run` takes."""
        found = []
        for index in range(self._library.subbyte_input_count(self._handle)):
            own = CTensor()
            check(self._library.subbyte_input(self._handle, index, own))
            shape = tuple(None if n < 0 else n for n in own.shape[: own.rank])
            found.append(Input((own.name or b"").decode(), shape, np.dtype(_DTYPES[own.dtype])))
        return tuple(found)

    def run(self, *inputs: Array, **named: Array) -> Any:
        """The network's output: an array, or a dict of arrays by name where there are several.

        Inputs in order, or by name. Raises SubbyteError for what does not fit.
        """
        given = self._given(inputs, named)
        results, outputs = self._room(given)
        check(
            self._library.subbyte_run(
                self._handle, given.tensors, len(given.arrays), outputs, len(results), self.threads
            )
        )
        return _plain(results)

    def profile(self, *inputs: Array, **named: Array) -> list[StepTime]:
        """The time of every step of one run, in order."""
        given, steps = self._given(inputs, named), []
        results, outputs = self._room(given)

        def seen(_: Any, step: Any) -> None:
            own = step.contents
            op, out, layer, how = (w.decode() for w in (own.op, own.out, own.layer, own.how))
            steps.append(StepTime(op, out, layer, how, own.seconds))

        check(
            self._library.subbyte_profile(
                self._handle, given.tensors, len(given.arrays), outputs, len(results),
                self.threads, SeenStep(seen), None,
            )
        )  # fmt: skip
        return steps

    def watch(self, seen: Callable[[str, Array], None], *inputs: Array, **named: Array) -> None:
        """One run that calls seen(name, value) for the result of every operation of the program."""
        given = self._given(inputs, named)

        def shown(_: Any, value: Any) -> None:
            own = value.contents
            seen((own.name or b"").decode(), _array(own))

        check(
            self._library.subbyte_watch(
                self._handle, given.tensors, len(given.arrays), self.threads, SeenValue(shown), None
            )
        )

    def _given(self, inputs: Sequence[Array], named: dict[str, Array]) -> _Given:
        known = {own.name: own.dtype for own in self.inputs}
        values = dict(zip(known, inputs, strict=False))
        if len(inputs) > len(known) or set(named) & set(values) or set(named) - set(known):
            raise SubbyteError(f"the network takes {', '.join(known)}, each once")
        values |= named
        missing = [name for name in known if name not in values]
        if missing:
            raise SubbyteError(f"input '{missing[0]}' is missing")
        return _Given([_checked(name, values[name], known[name]) for name in known])

    def _room(self, given: _Given) -> tuple[dict[str, Array], Any]:
        count = ctypes.c_int32()
        call = self._library.subbyte_outputs
        check(call(self._handle, given.tensors, len(given.arrays), None, 0, count))
        outputs = (CTensor * count.value)()
        check(call(self._handle, given.tensors, len(given.arrays), outputs, count.value, count))
        results = {}
        for own in outputs:
            array = np.empty(own.shape[: own.rank], _DTYPES[own.dtype])
            results[(own.name or b"").decode()] = array
            own.data = array.ctypes.data
        return results, outputs


class _Given:
    """Inputs in memory that the library reads, held as long as it does."""

    def __init__(self, arrays: list[Array]) -> None:
        self.arrays = arrays
        self.tensors = (CTensor * len(arrays))()
        for own, array in zip(self.tensors, arrays, strict=True):
            own.dtype = [np.dtype(d) if d else None for d in _DTYPES].index(array.dtype)
            own.rank = array.ndim
            own.shape[: array.ndim] = array.shape
            own.data = array.ctypes.data


def _checked(name: str, value: Any, wanted: np.dtype[Any]) -> Array:
    array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
    if array.dtype != wanted:
        raise SubbyteError(
            f"input '{name}' is {array.dtype}; the network takes {wanted}: convert it by "
            f"astype('{wanted}')"
        )
    if array.ndim > MOST_DIMENSIONS:
        raise SubbyteError(f"input '{name}' has {array.ndim} dimensions")
    return array


def _array(own: CTensor) -> Array:
    """A copy of a value that the library shows."""
    dtype = np.dtype(_DTYPES[own.dtype])
    shape = tuple(own.shape[: own.rank])
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(shape, dtype)
    data = ctypes.string_at(own.data, count * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _plain(results: dict[str, Array]) -> Any:
    return results["output"] if list(results) == ["output"] else results
