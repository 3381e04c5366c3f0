"""Packed weights laid out anew for the core, once, at the first product (docs/adr/0007-kernels.md).

They are kept by the memory of their words, outside the modules: a panel goes when that memory goes.
It is made anew when the words or the scales change, which is noticed

- at once, if PyTorch counts the change (`_version`), if it replaces a tensor, or if it reaches one
  of the blocks of 256 bytes that each call looks at: four of the words and four of the scales, so
  all of what takes no more than 1 kB;
- after as many calls as a quarter of the blocks, if it goes past PyTorch (through `.data` or a
  NumPy view, or within `inference_mode`) and changes other blocks only: calls look at all in turn.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subbyte.core.functional import n_groups
from subbyte.core.grids import PerGroup
from subbyte.errors import SubbyteError
from subbyte.kernels.served import _native, integers
from subbyte.kernels.values import Window
from subbyte.packing import PackedMatrix, radix


@dataclass(frozen=True, slots=True)
class _Entry:
    """A repacked weight, and what it was made of."""

    storage: weakref.ref[Any]  # of the words; its end is the entry's
    versions: tuple[int, int] | None
    key: tuple[Any, ...]  # grid, shape
    window: Window | None
    tier: str
    origin: Any
    panel: Any


_PANELS: dict[int, _Entry] = {}  # by the address of the words


def panel_of(matrix: PackedMatrix, window: Window | None = None) -> Any:
    """The core's `Panel` of a matrix, or its `ConvPanels` of a weight [out, in / groups, kh, kw].

    Asked at every call, so it looks at as little as will do.
    """
    words, scale = matrix.words, matrix.scale
    entry = matrix.made.get("panel")
    if (
        entry is not None
        and entry.window is window
        and entry.tier == _native.tier()
        and (entry.versions is None or entry.versions == (words._version, scale._version))
        and entry.origin.glance(words, scale)
    ):
        return entry.panel
    entry = matrix.made["panel"] = _looked_up(matrix, window)
    return entry.panel


def panel_bytes(words: Tensor) -> int:
    """Bytes of memory that the panel of these words takes now, 0 if it has none."""
    entry = _PANELS.get(words.data_ptr())
    return 0 if entry is None else entry.panel.bytes


def _looked_up(matrix: PackedMatrix, window: Window | None) -> _Entry:
    """The panel of these words, the old one if every byte is still what it was; remembered."""
    _check(matrix)
    words, scale = matrix.words, matrix.scale
    address, key, tier = words.data_ptr(), (matrix.grid, matrix.shape), _native.tier()
    entry = _PANELS.get(address)
    if (
        entry is not None
        and (entry.key, entry.window, entry.tier) == (key, window, tier)
        and entry.origin.same(words, scale)
    ):
        panel = entry.panel
    else:
        panel = _make_linear(matrix) if window is None else _make_conv(matrix, window)
    storage = weakref.ref(words.untyped_storage(), lambda _: _PANELS.pop(address, None))
    origin = _native.Origin(words, scale)
    entry = _Entry(storage, _versions(matrix), key, window, tier, origin, panel)
    _PANELS[address] = entry
    return entry


def _check(matrix: PackedMatrix) -> None:
    """Raises SubbyteError for tensors that are no packed weight on the CPU."""
    words, scale = matrix.words, matrix.scale
    if not (words.is_cpu and scale.is_cpu):
        raise SubbyteError(
            f"activations are on cpu, the packed weight on {words.device} and its scales on "
            f"{scale.device}; move them together"
        )
    n_bytes = 8 * radix.n_words(matrix.n_weights, matrix.grid.n_levels)
    n_scales = n_groups(matrix.shape, matrix.grid)
    if tuple(words.shape) != (n_bytes,) or tuple(scale.shape) != (n_scales,):
        raise SubbyteError(
            f"a packed weight {list(matrix.shape)} of {matrix.grid.n_levels} levels has words "
            f"[{n_bytes}] and scale [{n_scales}], not {list(words.shape)} and {list(scale.shape)}"
        )


def _versions(matrix: PackedMatrix) -> tuple[int, int] | None:
    """Counts of changes in place; inference tensors keep none."""
    if matrix.words.is_inference() or matrix.scale.is_inference():
        return None
    return matrix.words._version, matrix.scale._version


def _make_linear(matrix: PackedMatrix) -> Any:
    n_levels, (rows, k) = matrix.grid.n_levels, matrix.shape
    factor, center = integers(matrix.grid)  # type: ignore[misc]
    if isinstance(matrix.grid.granularity, PerGroup):
        return _native.make_panel_of_groups(
            matrix.words, n_levels, radix.digits_per(n_levels, 64), rows, k,
            matrix.grid.granularity.size, matrix.unit().detach(), _unit(matrix, factor), factor,
            center,
        )  # fmt: skip
    return _native.make_panel(
        matrix.words, n_levels, radix.digits_per(n_levels, 64), 0, rows, k,
        torch.arange(k, dtype=torch.int32), _scales(matrix, factor), factor, center,
    )  # fmt: skip


def _make_conv(matrix: PackedMatrix, window: Window) -> Any:
    n_levels, (rows, width, *kernel) = matrix.grid.n_levels, matrix.shape
    factor, center = integers(matrix.grid)  # type: ignore[misc]
    sizes = [width * window.groups, rows, *kernel, *window.plain()]
    return _native.make_conv(
        matrix.words, n_levels, radix.digits_per(n_levels, 64), sizes, _scales(matrix, factor),
        factor, center,
    )  # fmt: skip


def _scales(matrix: PackedMatrix, factor: int) -> Tensor:
    """float32 [out]: what the integers of a row are multiplied with."""
    assert matrix.grid.affine is not None
    unit = matrix.unit().detach() / (factor * matrix.grid.affine[1])
    return unit.expand(matrix.shape[0]).contiguous()


def _unit(matrix: PackedMatrix, factor: int) -> float:
    """Of levels as integers."""
    assert matrix.grid.affine is not None
    return 1 / (factor * matrix.grid.affine[1])
