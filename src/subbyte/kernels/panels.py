"""Packed weights laid out anew for the core, once, at the first product (docs/adr/0007-kernels.md).

Outside the modules, by the identity of their words: a panel goes when the words go, and is made
anew when they or the scales change.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subbyte.core.functional import read_scale
from subbyte.core.grids import Grid
from subbyte.kernels.served import _native, integers
from subbyte.packing import radix


@dataclass(frozen=True, slots=True)
class _Entry:
    """A repacked weight, and what it was made of."""

    words: weakref.ref[Tensor]
    scale: weakref.ref[Tensor]
    versions: tuple[int, int]
    key: tuple[Any, ...]
    panel: Any


_PANELS: dict[int, _Entry] = {}  # by the identity of the words


def _found(words: Tensor, scale: Tensor, key: tuple[Any, ...]) -> Any:
    """The panel of these words; None if there is none, or if they or the scales have changed.

    Asked at every call, so it looks at as little as will do.
    """
    entry = _PANELS.get(id(words))
    if (
        entry is not None
        and entry.words() is words
        and entry.scale() is scale
        and entry.versions == (_version(words), _version(scale))
        and entry.key == key
    ):
        return entry.panel
    return None


def _keep(words: Tensor, scale: Tensor, key: tuple[Any, ...], panel: Any) -> Any:
    """The panel, remembered until its words are gone."""
    number, versions = id(words), (_version(words), _version(scale))
    reference = weakref.ref(words, lambda _: _PANELS.pop(number, None))
    _PANELS[number] = _Entry(reference, weakref.ref(scale), versions, key, panel)
    return panel


def _version(tensor: Tensor) -> int:
    """Counts changes in place; inference tensors do not keep it (to ask them is slow)."""
    return -1 if tensor.is_inference() else tensor._version


def panel_bytes(words: Tensor) -> int:
    """Bytes of memory that the panel of these words takes now, 0 if it has none."""
    entry = _PANELS.get(id(words))
    return 0 if entry is None or entry.words() is not words else entry.panel.bytes


def _scales(scale: Tensor, grid: Grid, rows: int, factor: int) -> Tensor:
    """float32 [rows]: what the integers of a row are multiplied with."""
    assert grid.affine is not None
    unit = read_scale(scale, grid.scale_domain) / (factor * grid.affine[1])
    return unit.expand(rows).contiguous()


def linear_panel(words: Tensor, scale: Tensor, grid: Grid, shape: Sequence[int]) -> Any:
    key = grid, shape, _native.tier()
    panel = _found(words, scale, key)
    if panel is not None:
        return panel
    factor, center = integers(grid)  # type: ignore[misc]
    rows, k = shape
    panel = _native.make_panel(
        words.contiguous(), grid.n_levels, radix.digits_per(grid.n_levels, 64), 0, rows, k,
        torch.arange(k, dtype=torch.int32), _scales(scale, grid, rows, factor), factor, center,
    )  # fmt: skip
    return _keep(words, scale, key, panel)


def conv_panels(
    words: Tensor, scale: Tensor, grid: Grid, shape: Sequence[int], geometry: tuple[int, ...]
) -> Any:
    """geometry: stride, dilation, padding (top, bottom, left, right), groups."""
    key = grid, shape, geometry, _native.tier()
    panels = _found(words, scale, key)
    if panels is not None:
        return panels
    factor, center = integers(grid)  # type: ignore[misc]
    sizes = [shape[1] * geometry[-1], shape[0], *shape[2:], *geometry]
    panels = _native.make_conv(
        words.contiguous(), grid.n_levels, radix.digits_per(grid.n_levels, 64), sizes,
        _scales(scale, grid, shape[0], factor), factor, center,
    )  # fmt: skip
    return _keep(words, scale, key, panels)
