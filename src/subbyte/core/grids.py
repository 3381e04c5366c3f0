"""What a code means: levels, how finely scales are shared, and which scales are legal.

A `Grid` holds everything a reader needs to turn codes into values, and nothing about how the codes
were found. It is pure Python (no torch), frozen, and is its own serialized form (`to_dict`).
"""

from __future__ import annotations

import enum
import itertools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from subbyte.errors import SubbyteError

MAX_LEVELS = 256
MAX_GROUP = 2**20
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


class ScaleDomain(enum.Enum):
    """The numbers a scale may be, and so how it is stored."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    POWER_OF_TWO = "power_of_two"  # stored as an int8 exponent, -126 to 127

    @property
    def bits(self) -> int:
        """Stored bits of one scale."""
        return {"float32": 32, "float16": 16, "power_of_two": 8}[self.value]


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole weight."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each index of `axis` (0: output channels of Linear and Conv)."""

    axis: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.axis, int) or isinstance(self.axis, bool) or self.axis < 0:
            raise SubbyteError(f"PerChannel axis is {self.axis!r}; give a dimension, 0 or more")


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale for every `size` consecutive inputs of each output row.

    The weight is seen as a matrix [out, width], dimension 0 and the rest flattened in order; the
    last group of a row may be shorter. Scales lie row by row. size: a multiple of 4.
    """

    size: int

    def __post_init__(self) -> None:
        whole = isinstance(self.size, int) and not isinstance(self.size, bool)
        if not whole or not 4 <= self.size <= MAX_GROUP or self.size % 4:
            raise SubbyteError(
                f"PerGroup size is {self.size!r}; give a multiple of 4 from 4 to {MAX_GROUP}"
            )

    def per_row(self, width: int) -> int:
        """Scales of a row of `width` inputs."""
        return -(-width // self.size)


Granularity = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True, slots=True)
class Grid:
    """N values a weight may take (unit scale), and the rules for the scales that multiply them.

    levels: strictly increasing, 2 to 256 finite values. A weight is `levels[code] * scale`.
    affine: derived; (offset, inverse) if every level i is exactly (i + offset) / inverse with both
    multiples of one half. Then codes need no search, and float32 arithmetic gives the same bits as
    a table look-up. All grids made by `uniform` and `fixed_point` are such; others may not be.
    Raises SubbyteError if the levels are not such a list.
    """

    levels: tuple[float, ...]
    granularity: Granularity = field(default_factory=PerTensor)
    scale_domain: ScaleDomain = ScaleDomain.FLOAT32
    affine: tuple[float, float] | None = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)  # products look grids up at each call

    def __post_init__(self) -> None:
        if not 2 <= len(self.levels) <= MAX_LEVELS:
            raise SubbyteError(f"a grid of {len(self.levels)} levels; use 2 to {MAX_LEVELS}")
        if not all(abs(level) <= FLOAT32_MAX for level in self.levels):
            raise SubbyteError(f"grid levels {self.levels} are not all finite in float32")
        stored = [_float32(level) for level in self.levels]
        if any(b <= a for a, b in itertools.pairwise(stored)):
            raise SubbyteError(f"grid levels {self.levels} do not strictly increase in float32")
        object.__setattr__(self, "affine", _affine(self.levels))
        key = self.levels, self.granularity, self.scale_domain
        object.__setattr__(self, "_hash", hash(key))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process hashes strings otherwise, so the hash is not carried along."""
        return Grid, (self.levels, self.granularity, self.scale_domain)

    @property
    def n_levels(self) -> int:
        return len(self.levels)

    @property
    def bits(self) -> float:
        """Information content of one code, log2 of the number of levels."""
        return math.log2(self.n_levels)

    @property
    def step(self) -> float | None:
        """Distance between neighbouring levels if all are equal (to 1e-9 of it), else None."""
        step = (self.levels[-1] - self.levels[0]) / (self.n_levels - 1)
        ideal = (self.levels[0] + step * i for i in range(self.n_levels))
        even = all(abs(a - b) <= 1e-9 * step for a, b in zip(self.levels, ideal, strict=True))
        return step if even else None

    @property
    def has_zero(self) -> bool:
        return 0.0 in self.levels

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `Grid.from_dict` gives an equal grid back."""
        axis = self.granularity.axis if isinstance(self.granularity, PerChannel) else None
        found = {
            "levels": list(self.levels),
            "channel_axis": axis,
            "scale_domain": self.scale_domain.value,
        }
        group = isinstance(self.granularity, PerGroup)
        return found | ({"group": self.granularity.size} if group else {})  # type: ignore[union-attr]

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Grid:
        """Grid from its `to_dict` form. Raises SubbyteError naming what is malformed."""
        try:
            levels = tuple(_number(level) for level in value["levels"])
            axis, group = value["channel_axis"], value.get("group")
            domain = ScaleDomain(value["scale_domain"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SubbyteError(f"not a grid: {error!r} in {str(value)[:120]}") from None
        return Grid(levels, _granularity(axis, group), domain)


def _granularity(axis: Any, group: Any) -> Granularity:
    if group is None:
        return PerTensor() if axis is None else PerChannel(axis)
    if axis is not None:
        raise SubbyteError(f"a grid has channel_axis {axis!r} and group {group!r}; give one")
    return PerGroup(group)


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _affine(levels: tuple[float, ...]) -> tuple[float, float] | None:
    """(offset, inverse), multiples of one half, with level i == (i + offset) / inverse; or None."""
    inverse = (len(levels) - 1) / (levels[-1] - levels[0])
    if inverse > 2**40:  # far from any grid in use; rounding would overflow
        return None
    inverse = round(2 * inverse) / 2
    offset = round(2 * levels[0] * inverse) / 2
    if inverse and all(level == (i + offset) / inverse for i, level in enumerate(levels)):
        return offset, inverse
    return None


def digits_per(n_levels: int, word_bits: int) -> int:
    """Most base-N digits that fit in a word: the largest d with N^d <= 2^word_bits.

    Raises SubbyteError unless N is 2 to 256.
    """
    if not 2 <= n_levels <= MAX_LEVELS:
        raise SubbyteError(f"codes of {n_levels} levels have no digits; use 2 to {MAX_LEVELS}")
    digits, value = 0, n_levels
    while value <= 1 << word_bits:
        digits, value = digits + 1, value * n_levels
    return digits


def n_words(count: int, n_levels: int) -> int:
    """64-bit words that `count` codes take."""
    return -(-count // digits_per(n_levels, 64))


def uniform(
    n: int,
    granularity: Granularity = PerTensor(),
    scale_domain: ScaleDomain = ScaleDomain.FLOAT32,
) -> Grid:
    """N equally spaced levels from -1 to +1: i / h - 1 with h = (N - 1) / 2.

    arXiv:2502.08795. Raises SubbyteError if n is not an integer from 2 to 256.
    """
    if not isinstance(n, int) or isinstance(n, bool) or not 2 <= n <= MAX_LEVELS:
        raise SubbyteError(f"levels={n!r}; use a whole number from 2 to {MAX_LEVELS}")
    return Grid(tuple((2 * i - (n - 1)) / (n - 1) for i in range(n)), granularity, scale_domain)


def fixed_point(bits: int, granularity: Granularity = PerTensor()) -> Grid:
    """The symmetric integers -(2^(b-1) - 1) .. 2^(b-1) - 1 times a power of two.

    bits: 2 to 8, giving 3, 7, 15 .. 255 levels. arXiv:1907.07220.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise SubbyteError(f"bits={bits!r}; fixed point takes a whole number from 2 to 8")
    top = 2 ** (bits - 1) - 1
    levels = tuple(float(i) for i in range(-top, top + 1))
    return Grid(levels, granularity, ScaleDomain.POWER_OF_TWO)


def fixed_point_bits(levels: int) -> int:
    """The bits of a fixed-point grid. Raises SubbyteError unless levels are 3, 7, 15 .. 255."""
    bits = levels.bit_length()
    if levels not in (2**b - 1 for b in range(2, 9)):
        raise SubbyteError(f"levels={levels!r}; fixed point has 3, 7, 15, 31, 63, 127 or 255")
    return bits
