from collections.abc import Sequence

from torch import Tensor

# Sizes, types, devices and gaps are checked: whatever does not fit is a ValueError.

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
        x: Tensor,
        y: Tensor,
        bias: Tensor | None,
        plus: Tensor | None,
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
        x: Tensor,
        y: Tensor,
        last: bool,
        bias: Tensor | None,
        plus: Tensor | None,
        low: float,
        high: float,
        planes: int,
        threads: int,
    ) -> list[int]: ...

class Origin:
    def __init__(self, words: Tensor, scale: Tensor) -> None: ...
    def same(self, words: Tensor, scale: Tensor) -> bool: ...
    def glance(self, words: Tensor, scale: Tensor) -> bool: ...

class ReadyLinear:
    def __init__(
        self,
        panel: Panel,
        origin: Origin,
        words: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        versions: Sequence[int],
    ) -> None: ...
    @property
    def stale(self) -> bool: ...
    def holds(self) -> bool: ...
    def __call__(
        self, x: object, low: float, high: float, planes: int, threads: int
    ) -> Tensor | None: ...

class ReadyConv:
    def __init__(
        self,
        panel: ConvPanels,
        origin: Origin,
        words: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        versions: Sequence[int],
    ) -> None: ...
    @property
    def stale(self) -> bool: ...
    def holds(self) -> bool: ...
    def __call__(
        self, x: object, low: float, high: float, planes: int, threads: int
    ) -> Tensor | None: ...

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
def make_panel_of_groups(
    words: Tensor,
    levels: int,
    digits: int,
    rows: int,
    row_length: int,
    shared: int,
    scale: Tensor,
    unit: float,
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
