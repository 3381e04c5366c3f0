"""Loss and accuracy over the epochs, drawn without a display and without pyplot's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subbyte.errors import SubbyteError
from subbyte.train.checkpoint import EpochRecord

COLORS = ("#4c4c4c", "#0072b2", "#d55e00", "#009e73")  # apart for colour-blind eyes too

Histories = Mapping[str, Sequence[EpochRecord]]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, inches. Raises SubbyteError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SubbyteError("pictures need matplotlib; pip install 'subbyte[data]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_curves(histories: Histories, path: Path) -> None:
    """A picture of its own. Raises SubbyteError without matplotlib."""
    figure = new_figure(9.5, 3.6)
    plot_curves(figure.subplots(1, 2), histories)
    figure.savefig(path, dpi=120)


def plot_curves(pair: Sequence[Any], histories: Histories) -> None:
    """Loss (train solid, test dashed) and test accuracy into two axes, a colour a run."""
    loss, top1 = pair
    for (name, history), color in zip(histories.items(), COLORS, strict=False):
        epochs = [record.epoch for record in history]
        loss.plot(
            epochs, [r.train_loss for r in history], ".-", color=color, label=f"{name}, train"
        )
        loss.plot(epochs, [r.test_loss for r in history], ".--", color=color, label=f"{name}, test")
        top1.plot(epochs, [r.test_top1 for r in history], ".-", color=color, label=name)
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    top1.set(xlabel="epoch", ylabel="test top-1 / %")
    for axes in pair:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
