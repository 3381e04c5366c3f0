"""The exporter of C source: its forms, and what it tells of the files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from subbyte.core.follow import BATCHNORMS
from subbyte.core.grids import ScaleDomain
from subbyte.errors import SubbyteError
from subbyte.export.base import Built, Exporter, Request, Source
from subbyte.export.c.arena import plan
from subbyte.export.c.integers import lower_integers
from subbyte.export.c.listing import Listing, View
from subbyte.export.c.lower import lower
from subbyte.export.c.text import Signature, header, outputs_in_place, source
from subbyte.export.c.values import Values, values_of
from subbyte.export.c.words import best_width
from subbyte.graph.fuse import fuse
from subbyte.graph.network import PROGRAM
from subbyte.modules import PackedWeight

INTEGERS = {"int16": (8, 16), "int8": (4, 8)}  # form -> bits behind the point, and in all
Macros = tuple[tuple[str, int], ...]
FORMS = ("auto", "float", "small", *INTEGERS)
_RESERVED = ("main", "x", "y", "arena", "number", "word", "wide")


def build(request: Request) -> Built:
    """net.c and net.h. Raises SubbyteError for what C source does not hold, naming it."""
    if request.form in INTEGERS:
        return integer_files(request, *INTEGERS[request.form])
    if request.form == "auto" and is_fixed_point(request.net):
        return integer_files(request, *INTEGERS["int16"])
    return float_files(request.name, read_fused(request), request.form == "small")


def is_fixed_point(net: nn.Module) -> bool:
    """Whether all weights are whole numbers times powers of two, and no BatchNorm is left."""
    packed = [m for m in net.modules() if isinstance(m, PackedWeight)]
    norms = any(isinstance(m, BATCHNORMS) for m in net.modules())
    return bool(packed) and not norms and all(_is_whole(m) for m in packed)


def _is_whole(packed: PackedWeight) -> bool:
    whole = all(level.is_integer() for level in packed.grid.levels)
    return whole and packed.grid.scale_domain is ScaleDomain.POWER_OF_TWO and packed.up is None


def float_files(name: str, found: Source, small: bool = False) -> Built:
    """Activations in float32; weights are decoded where they are used.

    small: scales and biases of products are rounded to float16.
    """
    values = values_of(found)
    listing = Listing("float", width_of(found.net), small)
    outputs = lower(values, listing)
    about = ("activations are float32", *(["scales and biases are float16"] if small else []))
    return finished(name, values, listing, outputs, ("small" if small else "float", about, ()))


def integer_files(request: Request, fraction: int, bits: int) -> Built:
    """Activations are whole numbers times 2^-fraction, of `bits` where layers read them."""
    values = values_of(request.read())
    listing = Listing("int32_t", width_of(request.net))
    state, outputs = lower_integers(values, listing, fraction, bits)
    behind = [state.fact(view).fraction for view in outputs]
    about = (
        f"integers alone: inputs are round(x * 2^{fraction}), saturated to {bits} bits;",
        f"outputs are whole numbers times {', '.join(f'2^{-n}' for n in behind)}",
        *state.notes,
    )
    macros = [("INPUT_FRACTION", fraction), ("INPUT_BITS", bits)]
    macros += [(f"Y{k if len(behind) > 1 else ''}_FRACTION", n) for k, n in enumerate(behind)]
    form = f"int{bits}, {fraction} bits behind the point"
    return finished(request.name, values, listing, outputs, (form, about, tuple(macros)))


def read_fused(request: Request) -> Source:
    """With norms, sums and activations inside the products, where the network can be traced so.

    Not with adapters: a norm in their factors would widen these from 16 bits to 32.
    """
    if any(isinstance(m, PackedWeight) and m.up is not None for m in request.net.modules()):
        return request.read()
    program = getattr(request.net, "meta", {}).get(PROGRAM)
    example = request.example
    if example is None and program is not None:
        whole = request.read()
        given = zip(program.inputs, whole.example, strict=True)
        example = {i.name: x for i, x in given}
    try:
        return replace(request, net=fuse(request.net), example=example).read()
    except SubbyteError:
        return request.read()


def width_of(net: nn.Module) -> int:
    """The width of words for all packed weights of a network."""
    packed = [m for m in net.modules() if isinstance(m, PackedWeight)]
    return best_width([(m.n_weights, m.grid.n_levels) for m in packed])


def finished(
    name: str,
    values: Values,
    listing: Listing,
    outputs: Sequence[View],
    of: tuple[str, tuple[str, ...], Macros],
) -> Built:
    """The two files of a listing. of: (form, lines about it, macros)."""
    form, about, macros = of
    names = outputs_in_place(listing, outputs)
    placed = plan(listing.buffers, listing.steps, ())
    size = listing.number_bytes
    signature = Signature(
        identifier(name), _inputs(values, listing),
        tuple(zip(names, (v.size for v in outputs), strict=True)), listing.number,
        (*_about(name, values, outputs), *about,
         f"arena: {placed.size * size:,} bytes of memory, static",
         f"constants: {listing.n_bytes:,} bytes"),
        macros,
    )  # fmt: skip
    files = {
        ".c": source(signature, listing, placed, f"{name}.h").encode(),
        ".h": header(signature, placed.size * size, listing.n_bytes).encode(),
    }
    notes = (
        *about,
        f"arena {placed.size * size:,} bytes, constants {listing.n_bytes:,} bytes; batch 1",
    )
    return Built(files, form, tuple(listing.stored.items()), notes)


def _inputs(values: Values, listing: Listing) -> tuple[tuple[str, str, int], ...]:
    inputs = values.source.program.inputs
    tensors = [values.of[i.name] for i in inputs]
    names = ["x"] if len(inputs) == 1 else [f"x{k}" for k in range(len(inputs))]
    kinds = [listing.number if t.is_floating_point() else "int32_t" for t in tensors]
    return tuple(zip(names, kinds, (t.numel() for t in tensors), strict=True))


def _about(name: str, values: Values, outputs: Sequence[View]) -> list[str]:
    given = ", ".join(
        f"{i.name} {list(values.of[i.name].shape)}" for i in values.source.program.inputs
    )
    back = ", ".join(str(list(v.shape)) for v in outputs)
    return [
        f"{name}: a network by subbyte, C99, one example per call.",
        f"takes {given}, gives {back}, in C order",
    ]


def identifier(name: str) -> str:
    """A name of C from a file's name."""
    word = re.sub(r"\W", "_", name, flags=re.ASCII)
    if not word or word[0].isdigit() or word[0] == "_":
        word = f"net{word}" if word.startswith("_") else f"net_{word}"
    return f"{word}_network" if word in _RESERVED or word in _KEYWORDS else word


_KEYWORDS = frozenset(
    [
        "auto",
        "break",
        "case",
        "char",
        "const",
        "continue",
        "default",
        "do",
        "double",
        "else",
        "enum",
        "extern",
        "float",
        "for",
        "goto",
        "if",
        "inline",
        "int",
        "long",
        "register",
        "restrict",
        "return",
        "short",
        "signed",
        "sizeof",
        "static",
        "struct",
        "switch",
        "typedef",
        "union",
        "unsigned",
        "void",
        "volatile",
        "while",
    ]
)

EXPORTER = Exporter(".c", "C source", FORMS, build)
