"""One chart: accuracy against the bytes of the whole file, over roads, levels and networks.

python benchmarks/charts.py          # writes docs/results/overview.png from the experiments' lines
"""

from __future__ import annotations

import statistics
from typing import Any

from tables import ROOT, figures

from subbyte.train.curves import COLORS, new_figure

RESNET20 = {
    "CoRa, searched levels and ranks": [
        ("cora/budgets-resnet20", v) for v in ("4.25-bits", "3.45-bits", "2.45-bits")
    ],
    "CoRa, 4 and 3 levels in every layer": [
        ("cora/budgets-resnet20", v) for v in ("4-levels", "3-levels")
    ],
    "SGM, 2 and 3 bits": [
        ("sgm/resnet20-2-bits", "short-reach"),
        ("sgm/resnet20-3-bits", "short-reach"),
    ],
    "TWN": [("sgm/against-baselines", "twn-labels")],
    "CoRa as published (with labels)": [
        ("cora/budgets-resnet20", v) for v in ("published-4-bits", "published-3-bits")
    ],
}
CVNN1 = {
    "LowRes, N levels": [("lowres/accuracy-by-levels", f"{n}-levels") for n in (2, 3, 4, 5, 9, 17)],
}
PLAIN = {"float32": 4, "float16": 2, "int8": 1, "int4": 0.5}  # bytes per weight
PARAMETERS = {"ResNet-20": 269_722, "CVNN1": 551_146}  # running statistics not counted
PALETTE = (*COLORS[1:], "#cc79a7", "#e69f00")


def main() -> None:
    figure = new_figure(10.5, 4.2)
    left, right = figure.subplots(1, 2)
    panel(left, "ResNet-20", RESNET20, figures("cora/budgets-resnet20", "4.25-bits", "top1_float"))
    panel(right, "CVNN1", CVNN1, figures("lowres/accuracy-by-levels", "float", "top1"))
    figure.savefig(ROOT / "docs" / "results" / "overview.png", dpi=130)


def panel(axes: Any, network: str, groups: dict[str, Any], floats: list[float]) -> None:
    """The groups as lines with their range; the sizes of plain formats as marks on the axis."""
    for (label, runs), color in zip(groups.items(), PALETTE, strict=False):
        points = sorted(point for run in runs if (point := measured(*run)) is not None)
        if points:
            kb, middle, low, high = zip(*points, strict=True)
            bars = [[m - a for m, a in zip(middle, low, strict=True)],
                    [b - m for m, b in zip(middle, high, strict=True)]]  # fmt: skip
            axes.errorbar(kb, middle, yerr=bars, marker="o", capsize=3, label=label, color=color)
    top1 = statistics.median(floats)
    axes.axhline(top1, color=COLORS[0], linewidth=0.8, linestyle=":", label="float32")
    for name, width in PLAIN.items():
        kb = PARAMETERS[network] * width / 1000
        axes.axvline(kb, color="#bbbbbb", linewidth=0.8)
        axes.annotate(name, (kb, 0.99), xycoords=("data", "axes fraction"), rotation=90,
                      fontsize="x-small", ha="right", va="top")  # fmt: skip
    axes.set_xscale("log")
    ticks = [t for t in (80, 100, 150, 200, 300, 500, 1000, 2000) if t <= PARAMETERS[network] / 200]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set(title=f"{network}, CIFAR-10", xlabel="size of the whole file, kB",
             ylabel="top-1 on the test set, %")  # fmt: skip
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="x-small", loc="lower right", bbox_to_anchor=(0.97, 0.05))


def measured(name: str, variation: str) -> tuple[float, float, float, float] | None:
    """kB of the file, and the median, lowest and highest top-1; None without lines."""
    size, top1 = figures(name, variation, "bytes"), figures(name, variation, "top1")
    if not size or not top1:
        return None
    return statistics.median(size) / 1000, statistics.median(top1), min(top1), max(top1)


if __name__ == "__main__":
    main()
