"""How codes become bytes: digits in words (`radix`), and a weight made of them as one value."""

from subbyte.packing import radix
from subbyte.packing.matrix import PackedMatrix
from subbyte.packing.stored import StoredTensor

__all__ = ["PackedMatrix", "StoredTensor", "radix"]
