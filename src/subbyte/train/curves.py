"""A run's loss and accuracy over the epochs, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from subbyte.errors import SubbyteError
from subbyte.train.checkpoint import EpochRecord


def plot_curves(history: Sequence[EpochRecord], path: Path) -> None:
    """Draws without a display and leaves pyplot's state alone. SubbyteError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise SubbyteError(f"{path.name} needs matplotlib; pip install 'subbyte[data]'") from None
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, top1 = figure.subplots(1, 2)
    epochs = [record.epoch for record in history]
    loss.plot(epochs, [r.train_loss for r in history], ".-", label="train")
    loss.plot(epochs, [r.test_loss for r in history], ".-", label="test")
    loss.set_ylabel("cross-entropy")
    top1.plot(epochs, [r.train_top1 for r in history], ".-", label="train")
    top1.plot(epochs, [r.test_top1 for r in history], ".-", label="test")
    top1.set_ylabel("top-1 / %")
    for axes in (loss, top1):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
