"""Damage that knows the packed file: header, manifest, program, tensors; checksums made to fit.

`damaged(data, draw)` is a file with one to three faults, of one draw of random numbers. What the
readers do with it is in fuzz.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zstandard

from subbyte.storage.digests import HEADER

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
         "BOOL": 1}  # fmt: skip
_DEEP = "@deep@"  # a string in whose place a deep list is written


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 255, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64,
    -(2**63) - 1, 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"), "", "x", "0",
    "self", "a.b", "..", "\x00", "\u2028", "x" * 50_000, "a." * 300, "class", "__class__",
    "forward", "training", "Linear", "float32", "relu", [], [1], [2**40, 2**40], [0, 2**64],
    ["x"] * 3000, [10**400] * 50, nested(60), nested(250), _DEEP, {}, {"value": "x"},
    {"state": "x"}, {"value": "n1"}, {"map": {"a": {"value": "x"}}}, {"x" * 9999: 1},
)  # fmt: skip


@dataclass
class Parts:
    """A safetensors file taken apart. tensors: name -> [dtype, shape, bytes]."""

    metadata: dict[str, str]
    manifest: Any
    tensors: dict[str, list[Any]]

    @staticmethod
    def of(data: bytes) -> Parts:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        metadata = header.pop("__metadata__")
        tensors = {}
        for name, x in header.items():
            first, last = x["data_offsets"]
            tensors[name] = [x["dtype"], x["shape"], data[end + first : end + last]]
        return Parts(metadata, json.loads(metadata.pop("subbyte")), tensors)

    def header(self) -> dict[str, Any]:
        """With the manifest's checksums made to fit, if it has as many as there are tensors."""
        manifest, at, found = self.manifest, 0, {}
        stated = manifest.get("sha256") if isinstance(manifest, dict) else None
        names = _stated(manifest)
        if isinstance(stated, list) and set(names) == set(self.tensors):
            manifest = manifest | {"sha256": [_digest(self.tensors[n][2]) for n in names]}
        text = json.dumps(manifest).replace(f'"{_DEEP}"', "[" * 20_000 + "]" * 20_000)
        for name, (dtype, shape, content) in self.tensors.items():
            offsets = [at, at := at + len(content)]
            found[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        return {"__metadata__": {**self.metadata, "subbyte": text}, **found}

    def to_bytes(self, header: dict[str, Any] | None = None) -> bytes:
        header = self.header() if header is None else header
        metadata = header.get("__metadata__")
        if isinstance(metadata, dict) and HEADER in metadata:
            metadata[HEADER] = "0" * 64
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = len(text).to_bytes(8, "little") + text
        place = f'"{HEADER}": "'.encode()
        found = hashlib.sha256(start).hexdigest().encode()
        start = start.replace(place + b"0" * 64, place + found, 1)
        return start + b"".join(content for _, _, content in self.tensors.values())


def _stated(manifest: Any) -> list[str]:
    """Names of tensors in the order of the checksums, as far as the manifest is one."""
    try:
        own = []
        for name, entry in manifest["layers"].items():
            parts = ["codes", "scale", *["bias"] * (entry["bias"] is True)]
            parts += ["up", "down", "adapter_scale"] * (entry.get("adapter") is True)
            own += [f"{name}.{part}".lstrip(".") for part in parts]
        return [*own, *map(str, manifest["state"])]
    except (KeyError, TypeError, AttributeError):
        return []


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# ---------------------------------------------------------------- faults of trees of JSON


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in a tree of dicts and lists, but for the checksums."""
    found = []
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if key != "sha256":
                found += [(*path, key), *places(value, (*path, key))]
    return found


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def change(tree: Any, draw: random.Random) -> None:
    """One key of a tree: replaced, deleted, repeated, renamed, nested, or another's value."""
    every = places(tree)
    if not every:
        return
    *parents, key = draw.choice(every)
    parent = at(tree, tuple(parents))
    old = parent[key]
    kind = draw.choice(("replace", "replace", "near", "delete", "other", "rename", "nest", "again"))
    if kind == "delete":
        del parent[key]
    elif kind == "other":
        parent[key] = copy.deepcopy(at(tree, draw.choice(every)))
    elif kind == "nest":
        parent[key] = draw.choice(([old], {"value": old}, {str(key): old}))
    elif kind == "near" and type(old) is int:
        parent[key] = draw.choice((old + 1, old - 1, -old, old * 2, old * 2**20, str(old)))
    elif kind == "again" and isinstance(old, list) and old:
        parent[key] = old * draw.choice((2, 3, 500))
    elif kind == "rename" and isinstance(parent, dict):
        parent[str(draw.choice(HOSTILE))[:60_000]] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(draw.choice(HOSTILE))


# ---------------------------------------------------------------- faults of files


def bits(data: bytes, draw: random.Random) -> bytes:
    """Of the plain bytes: changed, cut off, put in; no checksum fits."""
    found = bytearray(data)
    kind = draw.randrange(4)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if kind == 1:
        at = draw.randrange(len(data))
        return data[:at] + draw.randbytes(draw.choice((1, 8, 99))) + data[at:]
    end = 8 if kind == 2 else len(data)
    for _ in range(draw.choice((1, 2, 8))):
        found[draw.randrange(end)] = draw.randrange(256)
    return bytes(found)


def header(data: bytes, draw: random.Random) -> bytes:
    """Names, types, shapes and offsets of tensors as the file states them."""
    parts = Parts.of(data)
    tree = parts.header()
    for _ in range(draw.choice((1, 1, 2))):
        change(tree, draw)
    return parts.to_bytes(tree)


def manifest(data: bytes, draw: random.Random) -> bytes:
    parts = Parts.of(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        change(parts.manifest, draw)
    return parts.to_bytes()


def program(data: bytes, draw: random.Random) -> bytes:
    """Operators, attributes, shapes, names, order; the network where there is no program."""
    parts = Parts.of(data)
    tree = parts.manifest.get("program", parts.manifest["network"])
    for _ in range(draw.choice((1, 1, 2, 3))):
        change(tree, draw)
        nodes = tree.get("nodes") if isinstance(tree, dict) else None
        if isinstance(nodes, list) and len(nodes) > 1 and draw.random() < 0.2:  # cycles, repeats
            a, b = draw.sample(range(len(nodes)), 2)
            nodes[a], nodes[b] = nodes[b], nodes[a]
    return parts.to_bytes()


def tensors(data: bytes, draw: random.Random) -> bytes:
    """Type, shape and content of tensors; the file is whole."""
    parts = Parts.of(data)
    for name in draw.choices(list(parts.tensors), k=draw.choice((1, 1, 2))):
        parts.tensors[name] = tensor(parts.tensors[name], draw)
    if draw.random() < 0.1:
        name = draw.choice(("x", "", "0.codes", "a.b", "x" * 9999))
        parts.tensors.setdefault(name, ["F32", [1], bytes(4)])
    return parts.to_bytes()


def tensor(old: list[Any], draw: random.Random) -> list[Any]:
    """Another one: other content, another type of the same bytes, or another size."""
    dtype, shape, content = old
    kind = draw.randrange(5)
    if kind == 0:
        fill = draw.choice((b"\x00", b"\xff", b"\x7f", b"\x80", draw.randbytes(1)))
        return [dtype, shape, fill * len(content)]
    if kind == 1:
        return [dtype, shape, draw.randbytes(len(content))]
    if kind == 2:
        fitting = [name for name, size in SIZES.items() if len(content) % size == 0]
        other = draw.choice(fitting)
        return [other, [len(content) // SIZES[other]], content]
    if kind == 3:
        n = draw.choice((0, 1, 7, 8, 4096))
        return [dtype, draw.choice(([n], [1, n], [n, 1])), bytes(n * SIZES[dtype])]
    found = bytearray(content)
    for _ in range(draw.choice((1, 4))):
        if found:
            found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return [dtype, shape, bytes(found)]


def bomb(data: bytes, draw: random.Random) -> bytes:
    """A few bytes that say they are many: compressed codes, empty shapes, sizes of the network."""
    parts = Parts.of(data)
    layers = parts.manifest["layers"]
    name, entry = draw.choice(list(layers.items()))
    many = draw.choice((2**16, 2**24, 2**28))
    kind = draw.randrange(3)
    if kind == 0:
        entry["encoding"], entry["shape"] = "radix-bytes+zstd", [many, 8]
        own = zstandard.ZstdCompressor().compress(bytes(8 * many if many < 2**28 else 2**20))
        parts.tensors[f"{name}.codes"] = ["U8", [len(own)], own]
    elif kind == 1:
        entry["shape"] = draw.choice(([0, many], [many, 0], [0, 2**40], [0, 10**400], [2**20] * 2))
        parts.tensors[f"{name}.codes"] = ["U8", [0], b""]
    for tree in (parts.manifest["network"], parts.manifest.get("program")):
        if kind == 2 and tree is not None:
            numbers = [p for p in places(tree) if type(at(tree, p)) is int]
            *path, key = draw.choice(numbers)
            at(tree, tuple(path))[key] *= many
    return parts.to_bytes()


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    f.__name__: f for f in (bits, header, manifest, program, tensors, bomb)
}


def damaged(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """(kind, file). The same for the same draw."""
    kind = draw.choice(list(KINDS))
    return kind, KINDS[kind](data, draw)
