"""What becomes the body of the C function: steps over buffers, and constant arrays.

A value is a `View`: a contiguous part of a buffer. Buffers are the caller's inputs, constants, and
parts of one arena that `arena.plan` places by lifetime.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from subbyte.errors import SubbyteError

INPUT, CONSTANT, ARENA = "input", "constant", "arena"


@dataclass(frozen=True, slots=True)
class View:
    """Elements offset to offset + size of a buffer, in C order of shape."""

    buffer: int
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Buffer:
    """kind: INPUT, CONSTANT or ARENA. size: elements. name: the pointer in C, unless ARENA."""

    kind: str
    size: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """A call of a kernel. args: C text, or the views that pointers stand for. out: written whole
    or in parts. reads: views. over: of these, one that may lie where out does.
    """

    kernel: str
    args: tuple[str | View, ...]
    out: View
    reads: tuple[View, ...]
    over: tuple[View, ...] = ()


@dataclass
class Listing:
    """Grows while a network is lowered. number: the C type of activations."""

    number: str = "float"
    word_bits: int = 16
    halves: bool = False  # scales and biases of products are float16
    buffers: list[Buffer] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    arrays: dict[str, str] = field(default_factory=dict)  # name -> definition
    generated: dict[str, str] = field(default_factory=dict)  # kernels made by name -> text
    probes: list[tuple[int, str, View]] = field(default_factory=list)  # (steps before, name, value)
    stored: dict[str, str] = field(default_factory=dict)  # layer -> how its weights are stored
    sizes: list[tuple[str, int]] = field(default_factory=list)  # of arrays: (C type, elements)
    _known: dict[Any, str] = field(default_factory=dict)

    @property
    def number_bytes(self) -> int:
        return {"float": 4, "int32_t": 4, "int64_t": 8}[self.number]

    @property
    def n_bytes(self) -> int:
        """Of constant arrays."""
        own = {"number": self.number_bytes, "word": self.word_bits // 8}
        own["stored"] = 2 if self.halves else self.number_bytes
        return sum(n * {**_SIZES, **own}[ctype] for ctype, n in self.sizes)

    def buffer(self, kind: str, size: int, name: str = "") -> int:
        self.buffers.append(Buffer(kind, size, name))
        return len(self.buffers) - 1

    def new(self, shape: Sequence[int]) -> View:
        """Room in the arena."""
        return View(self.buffer(ARENA, math.prod(shape)), tuple(shape))

    def step(
        self, kernel: str, args: Sequence[str | View], out: View, over: Sequence[View] = ()
    ) -> View:
        """A call; returns out. over: what it reads that out may take the place of."""
        reads = tuple(a for a in args if isinstance(a, View) and a != out)
        self.steps.append(Step(kernel, tuple(args), out, reads, tuple(over)))
        return out

    def array(self, ctype: str, values: NDArray[Any], hint: str) -> str:
        """The name of a constant array; equal ones are stored once."""
        key = ctype, values.dtype.str, values.tobytes()
        if key not in self._known:
            self._known[key] = self._named(hint)
            self.sizes.append((ctype, values.size))
            self.arrays[self._known[key]] = _definition(ctype, self._known[key], values)
        return self._known[key]

    def kept(self, values: NDArray[Any], hint: str) -> str:
        """Scales or biases, float16 if `halves`. Raises SubbyteError where that is far off."""
        if not self.halves:
            return self.array("stored", values, hint)
        with np.errstate(over="ignore"):
            short = values.astype(np.float16)
        if not np.allclose(short.astype(np.float64), values, rtol=2**-10, atol=2**-24):
            raise SubbyteError(
                f"'{hint}' holds {np.abs(values).max():.3g}, which float16 does not; use "
                "form='float'"
            )
        return self.array("stored", short.view(np.uint16), hint)

    def struct(self, ctype: str, fields: Sequence[int | str], hint: str) -> str:
        """A pointer to a constant struct, or the array of a list of int."""
        key = ctype, tuple(fields)
        if key not in self._known:
            name = self._known[key] = self._named(hint)
            body = ", ".join(map(str, fields))
            brackets = "[]" if ctype == "int" else ""
            text = f"static const {ctype} {name}{brackets} = {{{body}}};"
            self.arrays[name] = _wrapped(text)
        name = self._known[key]
        return name if ctype == "int" else f"&{name}"

    def constant(self, value: Tensor, hint: str) -> View:
        """A tensor that does not depend on inputs: floats, or whole numbers of fixed point."""
        value = value.detach().contiguous()
        data = value.float().numpy() if value.is_floating_point() else value.long().numpy()
        name = self.array("number", data.reshape(-1), hint)
        return View(self.buffer(CONSTANT, data.size, name), tuple(value.shape))

    def once(self, key: Any, make: Callable[[], str]) -> str:
        """What `make` gave for this key the first time."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _named(self, hint: str) -> str:
        stem = re.sub(r"\W+", "_", hint).strip("_")[:40] or "network"
        stem = f"c_{stem}"
        taken = set(self._known.values())
        return next(n for n in (stem, *(f"{stem}_{k}" for k in range(10**6))) if n not in taken)


_SIZES = {"float": 4, "int32_t": 4, "uint16_t": 2, "int8_t": 1}


def _definition(ctype: str, name: str, values: NDArray[Any]) -> str:
    texts = map(literal, values.tolist()) if values.dtype.kind == "f" else map(str, values.tolist())
    return _wrapped(f"static const {ctype} {name}[] = {{{', '.join(texts)}}};")


def literal(value: float) -> str:
    """A float32 as C writes it, exactly."""
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = f"{np.float32(value):.9g}"
    return f"{text if set(text) & set('.e') else text + '.0'}f"


def _wrapped(text: str, width: int = 100) -> str:
    """Broken behind commas, so that lines stay short; textwrap takes minutes for megabytes."""
    lines, line = [], ""
    for part in text.split(", "):
        if line and len(line) + len(part) + 2 > width:
            lines.append(line + ",")
            line = "   "
        line = f"{line}{', ' if line.strip() else ' ' if line else ''}{part}"
    return "\n".join([*lines, line])
