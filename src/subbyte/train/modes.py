"""How weights gather on their levels over the epochs: figures on top, a panel a layer below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subbyte.train.checkpoint import EpochRecord
from subbyte.train.curves import COLORS, new_figure
from subbyte.train.watch import BINS, Histograms, reach

_COLUMNS = 4


def save_modes(
    history: Sequence[EpochRecord],
    histograms: Sequence[Histograms],
    levels: dict[str, int],
    path: Path,
) -> None:
    """Draw a run of a soft method.

    histograms: before the first epoch and after each. levels: number of levels of each layer.
    Raises SubbyteError without matplotlib.
    """
    rows = math.ceil(len(levels) / _COLUMNS)
    figure = new_figure(3.1 * _COLUMNS, 3.2 + 1.7 * rows)
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.2, 1.7 * rows))
    _plot_figures(top.subplots(1, 3), history)
    bottom.suptitle("weights of each layer (steps between levels) over the epochs", fontsize=11)
    panels = bottom.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes, (name, n_levels) in zip(panels, levels.items(), strict=False):
        counts = np.array([epoch[name] for epoch in histograms], dtype=float).T
        _plot_layer(axes, name, counts, n_levels)
    for axes in panels[len(levels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


def _plot_figures(axes: Sequence[Any], history: Sequence[EpochRecord]) -> None:
    """Accuracy as trained and rounded; distance and changes; the pull."""
    epochs = [record.epoch for record in history]
    accuracy, moves, pull = axes
    for name, label, color in (
        ("test_top1", "float weights", COLORS[0]),
        ("rounded_top1", "rounded weights", COLORS[1]),
    ):
        accuracy.plot(epochs, [getattr(r, name) for r in history], ".-", color=color, label=label)
    accuracy.set(xlabel="epoch", ylabel="test top-1 / %")
    for name, label, color in (
        ("distance", "mean distance to the level / step", COLORS[2]),
        ("changed", "share that changed its level", COLORS[3]),
    ):
        moves.plot(epochs, [_positive(getattr(r, name)) for r in history], ".-", color=color,
                   label=label)  # fmt: skip
    moves.set(xlabel="epoch", yscale="log")
    pull.plot(epochs, [_positive(r.pull) for r in history], ".-", color=COLORS[0], label="pull")
    pull.set(xlabel="epoch", ylabel="pull kappa", yscale="log")
    for panel in axes:
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")


def _positive(value: float | None) -> float:
    """A logarithmic axis leaves out what is missing or 0."""
    return value if value else math.nan


def _plot_layer(axes: Any, name: str, counts: Any, n_levels: int) -> None:
    """counts: [BINS, epochs + 1]; dark is dense, on a logarithmic scale."""
    half = reach(n_levels)
    density = counts / counts.sum(axis=0) * BINS / (2 * half)
    axes.imshow(
        np.log10(density + 1e-3), aspect="auto", origin="lower", cmap="Greys", vmin=-2, vmax=1.3,
        extent=(-0.5, counts.shape[1] - 0.5, -half, half), interpolation="nearest",
    )  # fmt: skip
    axes.set_title(name, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
