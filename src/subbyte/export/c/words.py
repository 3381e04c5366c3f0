"""Codes as base-N digits that a microcontroller decodes by a multiplication, without a division.

A word of W bits holds the d digits c_0 .. c_{d-1} (N^d <= 2^W) as a fraction, rounded up:

    q = ceil(2^W v / N^d)    with v = c_0 N^(d-1) + ... + c_{d-1}

so the first digit is the part of q N above 2^W, and what is left, times N, gives the next one. The
rounding adds less than 1 / N^d to the fraction, and j digits on less than N^j / N^d: never a digit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from subbyte.core.grids import digits_per

WIDTHS = (8, 16, 32)


def to_words(codes: NDArray[np.uint8], n_levels: int, width: int) -> NDArray[np.uint64]:
    """Words of codes [count], each below 2^width; digits behind the end are 0."""
    digits = digits_per(n_levels, width)
    rows = -(-codes.size // digits)
    padded = np.zeros(rows * digits, dtype=np.uint64)
    padded[: codes.size] = codes
    value = np.zeros(rows, dtype=np.uint64)
    for column in padded.reshape(rows, digits).T:
        value = value * np.uint64(n_levels) + column
    top = n_levels**digits
    if top == 1 << width:
        return value
    # value < 2^32, so value << 32 fits in 64 bits
    return (value * np.uint64(1 << width) + np.uint64(top - 1)) // np.uint64(top)


def from_words(words: NDArray[np.uint64], n_levels: int, width: int) -> NDArray[np.uint8]:
    """All digits of the words, those behind the end too: what the C code does, in NumPy."""
    found = np.empty((words.size, digits_per(n_levels, width)), dtype=np.uint8)
    left, mask = words.copy(), np.uint64((1 << width) - 1)
    for k in range(found.shape[1]):
        product = left * np.uint64(n_levels)
        found[:, k], left = product >> np.uint64(width), product & mask
    return found.flatten()


def n_bytes(count: int, n_levels: int, width: int) -> int:
    """Bytes of `count` codes in words of `width` bits."""
    return -(-count // digits_per(n_levels, width)) * width // 8


def best_width(sizes: Sequence[tuple[int, int]]) -> int:
    """The width with the fewest bytes for weights of (count, levels); the narrower one of two."""
    return min(WIDTHS, key=lambda width: (sum(n_bytes(c, n, width) for c, n in sizes), width))
