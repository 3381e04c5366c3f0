"""The exporter of C source: its forms, and what it tells of the files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from subbyte.errors import SubbyteError
from subbyte.export.base import Built, Exporter, Request, Source
from subbyte.export.c.arena import plan
from subbyte.export.c.listing import Listing, View
from subbyte.export.c.lower import lower
from subbyte.export.c.text import Signature, header, outputs_in_place, source
from subbyte.export.c.values import Values, values_of
from subbyte.export.c.words import best_width
from subbyte.graph.fuse import fuse
from subbyte.graph.trace import traced
from subbyte.modules import PackedWeight

FORMS = ("auto", "float", "int16", "int8")
_RESERVED = ("main", "x", "y", "arena", "number", "word", "wide")


def build(request: Request) -> Built:
    """net.c and net.h. Raises SubbyteError for what C source does not hold, naming it."""
    found = request.read()
    return float_files(request.name, found)


def float_files(name: str, found: Source) -> Built:
    """Activations in float32; weights are decoded where they are used."""
    values = values_of(fused(found))
    listing = Listing("float", width_of(found.net))
    outputs = lower(values, listing)
    about = ("activations are float32",)
    return finished(name, values, listing, outputs, ("float", about, ()))


def fused(found: Source) -> Source:
    """The network with norms, sums and activations inside its products, where it can be traced."""
    try:
        net = fuse(found.net)
        given = zip(found.program.inputs, found.example, strict=True)
        program, constants = traced(net, {i.name: x for i, x in given})
    except SubbyteError:
        return found
    held: dict[str, Any] = {**dict(net.named_parameters(remove_duplicate=False))}
    held |= {**dict(net.named_buffers(remove_duplicate=False)), **constants}
    state = {name: held[name].detach() for name in sorted(program.state_names)}
    return replace(found, program=program, net=net, state=state)


def width_of(net: nn.Module) -> int:
    """The width of words for all packed weights of a network."""
    packed = [m for m in net.modules() if isinstance(m, PackedWeight)]
    return best_width([(m.n_weights, m.grid.n_levels) for m in packed])


def finished(
    name: str, values: Values, listing: Listing, outputs: Sequence[View], of: Any
) -> Built:
    """The two files of a listing. of: (form, lines about it, macros)."""
    form, about, macros = of
    names = outputs_in_place(listing, outputs)
    placed = plan(listing.buffers, listing.steps, ())
    size = _number_bytes(listing)
    signature = Signature(
        identifier(name), _inputs(values, listing),
        tuple(zip(names, (v.size for v in outputs), strict=True)), listing.number,
        (*_about(name, values, outputs), *about, f"arena: {placed.size * size:,} bytes of memory, static",
         f"constants: {listing.n_bytes:,} bytes"),
        macros,
    )  # fmt: skip
    files = {
        ".c": source(signature, listing, placed, f"{name}.h").encode(),
        ".h": header(signature, placed.size * size, listing.n_bytes).encode(),
    }
    notes = (f"arena {placed.size * size:,} bytes, constants {listing.n_bytes:,} bytes; batch 1",)
    return Built(files, form, tuple(listing.stored.items()), notes)


def _number_bytes(listing: Listing) -> int:
    return {"float": 4, "int32_t": 4, "int64_t": 8}[listing.number]


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
    return [f"{name}: a network by subbyte, C99, one example per call.", f"takes {given}, gives {back}, in C order"]


def identifier(name: str) -> str:
    """A name of C from a file's name."""
    word = re.sub(r"\W", "_", name, flags=re.ASCII)
    if not word or word[0].isdigit() or word[0] == "_":
        word = f"net{word}" if word.startswith("_") else f"net_{word}"
    return f"{word}_network" if word in _RESERVED or word in _KEYWORDS else word


_KEYWORDS = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline "
    "int long register restrict return short signed sizeof static struct switch typedef union "
    "unsigned void volatile while".split()
)

EXPORTER = Exporter(".c", "C source", FORMS, build)
