"""The two files of an exported network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from subbyte.export.c.arena import Placed
from subbyte.export.c.listing import ARENA, INPUT, Listing, Step, View

KINDS = ("packed", "plain", "half", "byte")
OUTPUT = "output"
_MATH = re.compile(r"\b(\w*(sqrt|exp|log|tanh|sin|cos|erf|pow)f|INFINITY)\b")


@dataclass(frozen=True, slots=True)
class Signature:
    """name: of the C function. inputs: (name, C type, elements). outputs: (name, elements)."""

    name: str
    inputs: tuple[tuple[str, str, int], ...]
    outputs: tuple[tuple[str, int], ...]
    number: str
    about: tuple[str, ...]  # lines of the comment on top
    macros: tuple[tuple[str, int], ...] = ()  # further ones, without the prefix

    @property
    def prefix(self) -> str:
        return self.name.upper()

    @property
    def prototype(self) -> str:
        given = [f"const {ctype} *{name}" for name, ctype, _ in self.inputs]
        back = [f"{self.number} *{name}" for name, _ in self.outputs]
        return f"void {self.name}({', '.join(given + back)})"


def header(signature: Signature, arena_bytes: int, constant_bytes: int) -> str:
    """The .h: sizes as macros, and the function."""
    p = signature.prefix
    sizes = [(f"{n.upper()}_SIZE", size) for n, _, size in signature.inputs]
    sizes += [(f"{n.upper()}_SIZE", size) for n, size in signature.outputs]
    sizes += [("ARENA_BYTES", arena_bytes), ("CONSTANT_BYTES", constant_bytes), *signature.macros]
    macros = "\n".join(f"#define {p}_{name} {value}" for name, value in sizes)
    return (
        f"{_comment(signature.about)}\n#ifndef {p}_H\n#define {p}_H\n\n#include <stdint.h>\n\n"
        f'{macros}\n\n#ifdef __cplusplus\nextern "C" {{\n#endif\n\n{signature.prototype};\n\n'
        f"#ifdef __cplusplus\n}}\n#endif\n\n#endif\n"
    )


def source(signature: Signature, listing: Listing, placed: Placed, header_name: str) -> str:
    """The .c: types, kernels, constants, arena and the function."""
    kernels = _kernels(listing)
    body = _body(signature, listing, placed)
    arrays = "\n".join(listing.arrays.values())
    arena = f"static number arena[{max(1, placed.size)}];\n" if placed.size else ""
    code = f"{kernels}\n{arrays}\n\n{arena}\n{body}"
    math = "#include <math.h>\n" if _MATH.search(code) else ""
    return f"{_comment(signature.about)}\n{_head(signature, listing, header_name, math)}\n{code}"


def _head(signature: Signature, listing: Listing, header_name: str, math: str) -> str:
    p, bits = signature.prefix, listing.word_bits
    words = (
        f"#define WORD_BITS {bits}\ntypedef uint{bits}_t word;\ntypedef uint{2 * bits}_t wide;\n"
        if any(step.kernel.startswith("packed_") for step in listing.steps)
        else ""
    )
    return (
        f'#include "{header_name}"\n\n#include <limits.h>\n{math}#include <stddef.h>\n\n'
        "#if INT_MAX < 2147483647\n#error an int of 32 bits is needed\n#endif\n\n"
        f"/* Define it to follow the run: called with the name, place and size of each value. */\n"
        f"#ifndef {p}_PROBE\n#define {p}_PROBE(name, values, count) ((void)0)\n#endif\n\n"
        f"typedef {listing.number} number;\n{_stored(listing)}{words}"
    )


def _stored(listing: Listing) -> str:
    """How scales and biases lie in the file, and how one is read."""
    if listing.halves:
        return "typedef uint16_t stored; /* float16 */\n#define STORED(v) half_value(v)\n"
    return "typedef number stored;\n#define STORED(v) (v)\n"


def _comment(lines: Iterable[str]) -> str:
    """Lines as a comment of C; a name may hold anything, so what would end it is taken out."""
    return (
        "/* "
        + "\n   ".join(line.replace("*/", "* /").replace("/*", "/ *") for line in lines)
        + " */"
    )


def _body(signature: Signature, listing: Listing, placed: Placed) -> str:
    probes: dict[int, list[str]] = {}
    for at, name, view in listing.probes:
        place = pointer(listing, placed, view)
        probes.setdefault(at, []).append(
            f'    {signature.prefix}_PROBE("{name}", {place}, {view.size});'
        )
    lines = [f"{signature.prototype}\n{{"]
    for at, step in enumerate(listing.steps):
        lines += [_call(listing, placed, step), *probes.get(at + 1, ())]
    return "\n".join([*lines, "}"]) + "\n"


def _call(listing: Listing, placed: Placed, step: Step) -> str:
    args = (a if isinstance(a, str) else pointer(listing, placed, a) for a in step.args)
    return f"    {step.kernel}({', '.join(args)});"


def pointer(listing: Listing, placed: Placed, view: View) -> str:
    buffer = listing.buffers[view.buffer]
    base, offset = (
        ("arena", placed.offsets[view.buffer]) if buffer.kind == ARENA else (buffer.name, 0)
    )
    at = offset + view.offset
    return f"{base} + {at}" if at else base


# ---------------------------------------------------------------- kernels


@cache
def _sections() -> dict[str, str]:
    """kernels.c by section, those of KIND for each kind, in the order of the file."""
    text = (files("subbyte.export.c") / "kernels.c").read_text()
    found: dict[str, str] = {}
    for part in text.split("\n//! ")[1:]:
        name, _, code = part.partition("\n")
        for kind in KINDS if "KIND" in name else ("",):
            own = code.replace("KIND_AT_ONCE", f"{kind.upper()}_AT_ONCE").replace("KIND", kind)
            found[name.strip().replace("KIND", kind)] = own.strip("\n") + "\n"
    return found


def _kernels(listing: Listing) -> str:
    """The text of all kernels that steps call, and of what these call."""
    known = {**_sections(), **listing.generated}
    needed: set[str] = set()
    waiting = {step.kernel for step in listing.steps} | (
        {"half_value"} if _reads(listing) else set()
    )
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting |= _mentioned(known[name], known) - needed
    return "\n".join(text for name, text in known.items() if name in needed)


def _reads(listing: Listing) -> bool:
    """Whether scales or biases are stored as float16."""
    return listing.halves and any(ctype == "stored" for ctype, _ in listing.sizes)


def _mentioned(text: str, known: Mapping[str, Any]) -> set[str]:
    words = set(re.findall(r"[A-Za-z_]\w*", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)))
    return words & known.keys()


def input_type(listing: Listing, is_float: bool) -> str:
    return listing.number if is_float else "int32_t"


def outputs_in_place(listing: Listing, outputs: Sequence[View]) -> list[str]:
    """Gives the outputs their names; what no step can write straight is copied at the end."""
    names = ["y"] if len(outputs) == 1 else [f"y{at}" for at in range(len(outputs))]
    for name, view in zip(names, outputs, strict=True):
        buffer = listing.buffers[view.buffer]
        alone = sum(v.buffer == view.buffer for v in outputs) == 1
        if buffer.kind == ARENA and alone and buffer.size == view.size:
            listing.buffers[view.buffer] = type(buffer)(OUTPUT, buffer.size, name)
        else:
            out = View(listing.buffer(OUTPUT, view.size, name), view.shape)
            places = (*(1,) * 5, view.size, *(0,) * 5, 1, *(0,) * 5, 1)
            listing.step(
                "copy", (view, out, listing.struct("int", places, "places"), str(view.size)), out
            )
    return names


def is_input(listing: Listing, view: View) -> bool:
    return listing.buffers[view.buffer].kind == INPUT
