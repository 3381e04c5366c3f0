"""Pictures of weights beside the curves of their training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from subbyte.core.functional import level_shares
from subbyte.core.tensors import QuantizedWeight
from subbyte.train.curves import COLORS, Histories, new_figure, plot_curves


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Float weights of a layer in units of its scale, and what they were quantized to."""

    title: str
    layer: str
    weights: Tensor
    quantized: QuantizedWeight


def plot_demo(histories: Histories, histograms: Sequence[Histogram], path: Path) -> None:
    """Training curves on top, one histogram for each quantized version below."""
    figure = new_figure(9.5, 7)
    top, bottom = figure.subfigures(2, 1)
    plot_curves(top.subplots(1, 2), histories)
    for axes, histogram in zip(bottom.subplots(1, len(histograms)), histograms, strict=True):
        plot_histogram(axes, histogram)
    figure.savefig(path, dpi=120)


def plot_histogram(axes: Any, histogram: Histogram) -> None:
    """Float weights as an outline, the share of each level as a bar on it."""
    grid = histogram.quantized.grid
    shares = level_shares(histogram.quantized.codes, grid.n_levels).tolist()
    axes.bar(grid.levels, shares, width=0.12, color=COLORS[1], alpha=0.6, label="share of level")
    axes.set(xlabel="weight / scale", ylabel="share", ylim=(0, 1.55 * max(shares)))
    density = axes.twinx()
    density.hist(histogram.weights.clamp(-3, 3).numpy(), bins=120, range=(-3, 3), density=True,
                 histtype="step", color=COLORS[2], label="float weights (density)")  # fmt: skip
    density.set_yticks([])
    axes.set_title(f"{histogram.title}: {histogram.layer}", fontsize="medium")
    handles = [*axes.get_legend_handles_labels()[0], *density.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize="small", loc="upper right")
