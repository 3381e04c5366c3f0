"""Pictures, drawn without a display and without touching pyplot's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from subbyte.errors import SubbyteError
from subbyte.functional import level_shares
from subbyte.tensors import QuantizedTensor
from subbyte.train import EpochRecord

COLORS = ("#4c4c4c", "#0072b2", "#d55e00", "#009e73")  # apart for colour-blind eyes too


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Float weights of a layer in units of its scale, and what they were quantized to."""

    title: str
    layer: str
    weights: Tensor
    quantized: QuantizedTensor


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure. Raises SubbyteError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SubbyteError("pictures need matplotlib; pip install 'subbyte[data]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_demo(
    histories: Mapping[str, Sequence[EpochRecord]], histograms: Sequence[Histogram], path: Path
) -> None:
    """Training curves on top, one histogram for each quantized version below."""
    figure = new_figure(9.5, 7)
    top, bottom = figure.subfigures(2, 1)
    plot_curves(top.subplots(1, 2), histories)
    for axes, histogram in zip(bottom.subplots(1, len(histograms)), histograms, strict=True):
        plot_histogram(axes, histogram)
    figure.savefig(path, dpi=120)


def plot_curves(pair: Sequence[Any], histories: Mapping[str, Sequence[EpochRecord]]) -> None:
    """Loss (train solid, test dashed) and test accuracy over the epochs, a colour a run."""
    loss, top1 = pair
    for (name, history), color in zip(histories.items(), COLORS, strict=False):
        epochs = [record.epoch for record in history]
        loss.plot(epochs, [r.train_loss for r in history], color=color, label=f"{name}, train")
        loss.plot(epochs, [r.test_loss for r in history], "--", color=color, label=f"{name}, test")
        top1.plot(epochs, [r.test_top1 for r in history], color=color, label=name)
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    top1.set(xlabel="epoch", ylabel="test top-1 / %")
    for axes in pair:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


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
