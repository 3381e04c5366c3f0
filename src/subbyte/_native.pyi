from collections.abc import Sequence

from torch import Tensor

def radix_pack(codes: Tensor, levels: int, digits: int, words: Tensor) -> None: ...
def radix_unpack(words: Tensor, levels: int, digits: int, codes: Tensor) -> None: ...
def tiers() -> list[str]: ...
def tier() -> str: ...
def select_tier(name: str) -> None: ...
def has_openmp() -> bool: ...
def spin_int8(tier: str, rounds: int, threads: int) -> int: ...
def spin_float(rounds: int, threads: int) -> int: ...

class Stream:
    def __init__(self, bytes: int) -> None: ...
    def read(self, passes: int, threads: int) -> int: ...

class Panel:
    @property
    def rows(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def bits(self) -> float: ...
    def linear(
        self,
        x: int,
        n: int,
        y: int,
        bias: int,
        plus: int,
        low: float,
        high: float,
        planes: int,
        threads: int,
    ) -> list[int]: ...

class ConvPanels:
    @property
    def bytes(self) -> int: ...
    def conv2d(
        self,
        x: int,
        n: int,
        h: int,
        w: int,
        y: int,
        last: bool,
        bias: int,
        plus: int,
        low: float,
        high: float,
        planes: int,
        threads: int,
    ) -> list[int]: ...

def make_panel(
    words: Tensor,
    levels: int,
    digits: int,
    first_row: int,
    rows: int,
    row_length: int,
    order: Tensor,
    scale: Tensor,
    factor: int,
    center: int,
) -> Panel: ...
def make_conv(
    words: Tensor,
    levels: int,
    digits: int,
    sizes: Sequence[int],
    scale: Tensor,
    factor: int,
    center: int,
) -> ConvPanels: ...
