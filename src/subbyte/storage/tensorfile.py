"""A safetensors file, written a tensor at a time: what is written is not held a second time.

Header and order are those of the package safetensors: larger types first, then by name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from subbyte.core.atomic import write_parts_atomically
from subbyte.core.memory import bytes_of
from subbyte.errors import SubbyteError
from subbyte.storage.digests import HEADER, sealed

_TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
_ORDER = list(_TYPES)
_ALIGNED = 8  # bytes, on which the first tensor lies


def write_safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> int:
    """Write whole or not at all (temporary file, fsync, rename); returns the size in bytes.

    Raises SubbyteError for a tensor of a type that such a file does not hold.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise SubbyteError(f"'{name[:200]}' is {tensor.dtype}, which safetensors does not hold")
    order = sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name].dtype), name))
    header = _header(tensors, order, metadata)
    header = sealed(header) if HEADER in metadata else header
    n_bytes = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    parts = (bytes_of(tensors[name]) for name in order)
    write_parts_atomically(path, itertools.chain([header], parts), n_bytes)
    return n_bytes


def _header(
    tensors: Mapping[str, Tensor], order: Sequence[str], metadata: Mapping[str, str]
) -> bytes:
    """The header with its length before it."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        own, start = tensors[name], end
        end += own.nbytes
        described[name] = {
            "dtype": _TYPES[own.dtype], "shape": list(own.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text
