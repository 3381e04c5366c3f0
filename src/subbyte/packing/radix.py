"""Base-N digits in 64-bit words: how codes lie in memory and in the file.

A word holds the largest d digits with N^d <= 2^64 (64, 40, 32, 27, 20, 15 for N = 2, 3, 4, 5, 9,
17). Codes are taken in C order; the first is the least significant digit of the first word; digits
that are left over in the last word are 0. Words are little-endian and kept as bytes (uint8), for
torch and safetensors move uint8 everywhere. docs/format.md is the specification.

`radix-bytes` is the same with bytes for words (N^d <= 256). It is a little larger, but zstd finds
its entropy, which it cannot in 64-bit words.
"""

from __future__ import annotations

import sys

import torch
import zstandard
from torch import Tensor

from subbyte.core.grids import digits_per as digits_per
from subbyte.core.grids import n_words as n_words
from subbyte.errors import SubbyteError

try:
    from subbyte import _native
except ImportError:  # a source tree without a compiler: the torch path does everything
    _native = None  # type: ignore[assignment]

_LOW = 0xFFFFFFFF
_ZSTD_LEVEL = 19
MAX_GROWTH = 100  # of compressed codes: a small file must not take all memory
_FREE_BYTES = 2**16  # what any layer may hold
_AT_ONCE = 2**18  # words that are looked at in one go


def why_not_native(device: torch.device) -> str | None:
    """Why the C++ core does not serve this device, in words; None if it does."""
    if _native is None:
        return "the C++ core (subbyte._native) was not built"
    if device.type != "cpu":
        return f"the C++ core works on CPU tensors, this one is on {device}"
    return None


# ---------------------------------------------------------------- 64-bit words


def pack(codes: Tensor, n_levels: int) -> Tensor:
    """Words of `codes` (uint8, any shape) as little-endian bytes, uint8 [8 * n_words].

    Raises SubbyteError if a code is n_levels or more.
    """
    _check_codes(codes, n_levels)
    flat = codes.contiguous().flatten()
    if why_not_native(codes.device):
        return pack_torch(flat, n_levels)
    out = torch.empty(8 * n_words(flat.numel(), n_levels), dtype=torch.uint8)
    _native.radix_pack(flat, n_levels, digits_per(n_levels, 64), out)
    return out


def unpack(packed: Tensor, n_levels: int, count: int) -> Tensor:
    """Codes, uint8 [count], of words made by `pack` (uint8 [8 * n_words], any device).

    It trusts its input: run `check_words` on words from a file first.
    """
    return radix_unpack(packed, n_levels, count)


def unpack_rows(packed: Tensor, n_levels: int, rows: Tensor, length: int) -> Tensor:
    """Codes, uint8 [n, length], of `rows` (int64 [n]) of a table whose rows hold `length` codes.

    Only the words that hold them are read. Rows must be in the table.
    """
    digits = digits_per(n_levels, 64)
    first = rows * length // digits  # the word in which a row starts
    span = (length + digits - 2) // digits + 1  # words that a row touches at most
    words = packed.reshape(-1, 8)
    index = first[:, None] + torch.arange(span, device=rows.device)
    found = words[index.clamp(max=len(words) - 1)].flatten()
    codes = unpack(found, n_levels, len(rows) * span * digits).reshape(len(rows), span * digits)
    start = (rows * length - first * digits)[:, None]
    return codes.gather(1, start + torch.arange(length, device=rows.device))


@torch.library.custom_op("subbyte::radix_unpack", mutates_args=())
def radix_unpack(packed: Tensor, n_levels: int, count: int) -> Tensor:
    """The op behind `unpack`: opaque to torch.compile and torch.export, so digits stay packed."""
    if why_not_native(packed.device):
        return unpack_torch(packed, n_levels, count)
    out = torch.empty(count, dtype=torch.uint8)
    _native.radix_unpack(packed.contiguous(), n_levels, digits_per(n_levels, 64), out)
    return out


@radix_unpack.register_fake
def _(packed: Tensor, n_levels: int, count: int) -> Tensor:
    return packed.new_empty(count)


def check_words(packed: Tensor, n_levels: int, count: int) -> str | None:
    """What is wrong with words read from a file, in words; None if `unpack` may have them."""
    fault = check_size(packed, n_levels, count)
    if fault is None and count and not _are_digits(packed, n_levels, count):
        fault = f"a word holds a code above the grid (more than {n_levels} levels) or a stray digit"
    return fault


def check_size(packed: Tensor, n_levels: int, count: int) -> str | None:
    """As `check_words`, without a look at what the words hold."""
    expected = 8 * n_words(count, n_levels)
    if packed.dtype == torch.uint8 and tuple(packed.shape) == (expected,):
        return None
    found = f"{str(packed.dtype).removeprefix('torch.')} {list(packed.shape)}"
    return f"{count} codes of {n_levels} levels take uint8 [{expected}], not {found}"


def _are_digits(packed: Tensor, n_levels: int, count: int) -> bool:
    """Whether each word is below N^d, and the last one below N to the number of its own digits."""
    digits = digits_per(n_levels, 64)
    left = count - (len(packed) // 8 - 1) * digits
    if int.from_bytes(bytes(packed[-8:].tolist()), "little") >= n_levels**left:
        return False
    lowest = -(2**63)  # words are unsigned: both sides of the comparison move down by 2^63
    top = n_levels**digits + lowest
    if top == -lowest:
        return True
    plain = packed if packed.storage_offset() % 8 == 0 else packed.clone()
    parts = plain.view(torch.int64).split(_AT_ONCE)
    return not any(bool(((part ^ lowest) >= top).any()) for part in parts)


def pack_torch(flat: Tensor, n_levels: int) -> Tensor:
    """`pack` in plain torch, on any device; the 64-bit word is built from two 32-bit halves."""
    digits = _as_rows(flat, digits_per(n_levels, 64)).long()
    high = torch.zeros_like(digits[:, 0])
    low = torch.zeros_like(high)
    for digit in digits.flip(1).unbind(1):  # Horner's rule from the most significant digit
        low = low * n_levels + digit
        high = (high * n_levels + (low >> 32)) & _LOW
        low = low & _LOW
    halves = torch.stack([low, high], dim=1).flatten()
    return _bytes_of(halves, 4)


def unpack_torch(packed: Tensor, n_levels: int, count: int) -> Tensor:
    """`unpack` in plain torch, on any device: long division of two 32-bit halves."""
    weights = 1 << (8 * torch.arange(4, device=packed.device))
    halves = (packed.reshape(-1, 2, 4).long() * weights).sum(-1)
    low, high = halves[:, 0], halves[:, 1]
    digits = []
    for _ in range(digits_per(n_levels, 64)):
        carry = ((high % n_levels) << 32) | low
        digits.append((carry % n_levels).to(torch.uint8))
        high, low = high // n_levels, carry // n_levels
    return torch.stack(digits, dim=1).flatten()[:count]


# ---------------------------------------------------------------- bytes, for zstd


def compress(codes: Tensor, n_levels: int) -> Tensor:
    """zstd frame over base-N bytes of `codes`; uint8 [bytes]. CPU."""
    _check_codes(codes, n_levels)
    rows = _as_rows(codes.contiguous().flatten(), digits_per(n_levels, 8)).int()
    value = torch.zeros_like(rows[:, 0])
    for digit in rows.flip(1).unbind(1):
        value = value * n_levels + digit
    frame = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(
        value.to(torch.uint8).numpy().tobytes()
    )
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def may_grow(stored: int, size: int) -> bool:
    """Whether a reader takes a frame of `stored` bytes that holds `size` bytes of codes."""
    return size <= max(_FREE_BYTES, MAX_GROWTH * stored)


def byte_count(count: int, n_levels: int) -> int:
    """Bytes that `compress` makes of `count` codes before zstd."""
    return -(-count // digits_per(n_levels, 8))


def decompress(frame: Tensor, n_levels: int, count: int) -> Tensor:
    """Codes, uint8 [count], of a frame made by `compress`; never allocates more than they take.

    Raises SubbyteError if the frame is damaged, of another size, or holds a code above the grid.
    """
    digits = digits_per(n_levels, 8)
    size = byte_count(count, n_levels)
    data = _inflate(frame.numpy().tobytes(), size)
    value = torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else frame.new_empty(0)
    if size and int(value.max()) >= n_levels**digits:
        raise SubbyteError(f"a byte holds a code above the grid of {n_levels} levels")
    value, columns = value.int(), []
    for _ in range(digits):
        columns.append((value % n_levels).to(torch.uint8))
        value = value // n_levels
    codes = torch.stack(columns, dim=1).flatten()
    if codes[count:].any():
        raise SubbyteError("a stray digit stands behind the last code")
    return codes[:count]


def _inflate(frame: bytes, size: int) -> bytes:
    """Decompressed frame of exactly `size` bytes."""
    try:
        stated = zstandard.frame_content_size(frame)
        if stated != size:
            raise SubbyteError(f"the compressed codes hold {stated} bytes, {size} are needed")
        if not may_grow(len(frame), size):
            raise SubbyteError(
                f"{len(frame)} bytes of compressed codes say that they hold {size}; more than "
                f"{MAX_GROWTH} times as many is no layer"
            )
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise SubbyteError(f"the compressed codes are damaged ({error})") from None


def _check_codes(codes: Tensor, n_levels: int) -> None:
    if codes.dtype != torch.uint8:
        raise SubbyteError(f"codes are {codes.dtype}, not torch.uint8")
    if codes.numel() and int(codes.max()) >= n_levels:
        raise SubbyteError(f"code {int(codes.max())} is above the grid of {n_levels} levels")


def _as_rows(flat: Tensor, width: int) -> Tensor:
    """flat [count] as [rows, width], zeros behind the end."""
    rows = -(-flat.numel() // width)
    return torch.nn.functional.pad(flat, (0, rows * width - flat.numel())).reshape(rows, width)


def _bytes_of(values: Tensor, n_bytes: int) -> Tensor:
    """The low `n_bytes` of each value, little-endian; uint8 [len * n_bytes]."""
    shifts = 8 * torch.arange(n_bytes, device=values.device)
    return ((values[:, None] >> shifts) & 0xFF).to(torch.uint8).flatten()


if sys.byteorder != "little":  # pragma: no cover - no such machine at hand
    _native = None  # type: ignore[assignment]  # the C++ core writes native words
