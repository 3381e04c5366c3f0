"""A curve of every variation, by epoch, from the lines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from subbyte.experiments.judge import Lines
from subbyte.experiments.settings import Experiment
from subbyte.train.curves import new_figure

TITLES = {
    "test_top1": "test top-1 / %",
    "train_loss": "training loss",
    "changed": "share of weights that change level in an epoch",
    "rounded_top1": "test top-1 of the rounded weights / %",
    "distance": "distance to the levels / step",
}
_COLORS = ("#4c4c4c", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a8a00",
           "#7b3294", "#a6611a")  # fmt: skip


def save_curve(experiment: Experiment, own: Lines, path: Path) -> None:
    """The median over the seeds of each variation, epoch by epoch, up to the shortest run."""
    curve = experiment.curve or ""
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for i, variation in enumerate(experiment.variations):
        curves = [x["curves"][curve] for (v, _), x in sorted(own.items())
                  if v == variation and curve in x["curves"]]  # fmt: skip
        if curves:
            values = medians(curves)
            axes.plot(range(1, 1 + len(values)), values, ".-", label=variation,
                      color=_COLORS[i % len(_COLORS)])  # fmt: skip
    axes.set(xlabel="epoch", ylabel=TITLES.get(curve, curve))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def medians(curves: Sequence[Sequence[float | None]]) -> list[float]:
    """Over the curves, per epoch; NaN where one has no value, which leaves a gap."""
    return [
        statistics.median(map(float, column)) if None not in column else float("nan")
        for column in zip(*curves, strict=False)
    ]
