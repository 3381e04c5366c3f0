"""Checksums of a packed file: of its header as a whole, and of every tensor.

The header's stands in the header, which is hashed with zeros in its place. Checksums find damage,
not forgery: whoever changes a file can change them too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from subbyte.core.memory import bytes_of
from subbyte.errors import SubbyteError

HEADER = "subbyte-sha256"  # metadata key of the header's checksum
_PLACE = "0" * 64
_SHORT = 16  # hexadecimal digits of a tensor's


def digest_of(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of SHA-256 over the tensor's bytes, in C order."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()[:_SHORT]


def digests_of(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """Of these tensors, in this order."""
    return [digest_of(tensors[name]) for name in names]


def unsealed() -> dict[str, str]:
    """Metadata that keeps a place for the header's checksum."""
    return {HEADER: _PLACE}


def sealed(data: bytes) -> bytes:
    """The bytes of a safetensors file with its header's checksum in its place."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[:end]
    assert header.count(_PLACE.encode()) == 1
    found = hashlib.sha256(header).hexdigest()
    return header.replace(_PLACE.encode(), found.encode()) + data[end:]


def check_header(path: Path, metadata: Mapping[str, str]) -> None:
    """Raises SubbyteError if the header of a file is not what was written."""
    stated = metadata.get(HEADER, "")
    with path.open("rb") as file:
        size = file.read(8)
        header = size + file.read(int.from_bytes(size, "little"))
    plain = header.replace(stated.encode(), _PLACE.encode()) if len(stated) == 64 else header
    if hashlib.sha256(plain).hexdigest() != stated:
        raise SubbyteError(
            "the header's checksum does not fit; the file is damaged, fetch it again"
        )


def check_tensors(
    tensors: Mapping[str, Tensor], names: Sequence[str], stated: Sequence[str]
) -> None:
    """Raises SubbyteError, naming the tensor, if one is not what was written."""
    if len(names) != len(stated):
        raise SubbyteError(f"the manifest has {len(stated)} checksums for {len(names)} tensors")
    for name, wanted in zip(names, stated, strict=True):
        if digest_of(tensors[name]) != wanted:
            raise SubbyteError(
                f"the checksum of tensor '{name[:200]}' does not fit; the file is damaged, fetch "
                "it again"
            )
