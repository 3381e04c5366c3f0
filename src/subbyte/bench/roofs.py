"""What the machine gives at best, measured now: products from register to register, reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from subbyte.bench.timing import in_turn
from subbyte.kernels import tier

try:
    from subbyte import _native
except ImportError:  # no compiler: no kernels, and no roofs either
    _native = None  # type: ignore[assignment]

SIZES = tuple(1 << n for n in (18, 20, 22, 24, 28))  # bytes; the last one is beyond any cache
_ROUNDS = 200_000  # of 12 vectors: milliseconds
_PASS_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Roofs:
    """Rates of all threads together; an operation is a multiplication or an addition."""

    int8_gops: float  # byte products by the instructions of the tier in use
    float32_gflops: float
    read_gb_s: tuple[tuple[int, float], ...]  # reading so many bytes again and again

    @property
    def memory_gb_s(self) -> float:
        """Reading from memory, not from a cache."""
        return self.read_gb_s[-1][1]

    def reading(self, n_bytes: int) -> float:
        """GB/s for this many bytes that are read again and again."""
        return next((rate for size, rate in self.read_gb_s if size >= n_bytes), self.memory_gb_s)

    def seconds(self, n_bytes: int, operations: int) -> float:
        """The least time to read the bytes and to multiply, whichever takes longer."""
        return max(n_bytes / self.reading(n_bytes), operations / self.int8_gops) / 1e9

    def to_dict(self) -> dict[str, Any]:
        return {
            "int8_gops": self.int8_gops,
            "float32_gflops": self.float32_gflops,
            "read_gb_s": [{"bytes": size, "gb_s": rate} for size, rate in self.read_gb_s],
        }


def measure_roofs(threads: int, seconds: float) -> Roofs | None:
    """In about so many seconds; None without the C++ core."""
    name = tier()
    if name is None:
        return None
    work: dict[str, Callable[[], int]] = {
        "int8": partial(_native.spin_int8, name, _ROUNDS, threads),
        "float32": partial(_native.spin_float, _ROUNDS, threads),
    }
    for size in SIZES:
        work[f"read {size}"] = partial(
            _native.Stream(size).read, max(1, _PASS_BYTES // size), threads
        )
    amounts = {key: call() for key, call in work.items()}
    times = in_turn(work, seconds)
    rate = {key: amounts[key] / times[key].low / 1e9 for key in work}  # a roof is the best
    reading = tuple((size, rate[f"read {size}"]) for size in SIZES)
    return Roofs(2 * rate["int8"], 2 * rate["float32"], reading)
