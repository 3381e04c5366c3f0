"""How codes become bytes. A packing knows codes and level counts, never values or methods."""

from subbyte.packing import radix

__all__ = ["radix"]
