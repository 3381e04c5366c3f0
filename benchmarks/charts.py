"""The README's picture: accuracy of ResNet-20 on CIFAR-10 against the bytes of the whole file.

python benchmarks/charts.py          # writes docs/results/overview.png from the raw lines
"""

from __future__ import annotations

import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tables import BUDGETS, ROOT, lines, newest

PARAMETERS = 269_722  # of ResNet-20, running statistics not counted
CODES = ("#0072b2", "#d55e00", "#009e73", "#555555")


def main() -> None:
    found = newest(lines("cora", network="resnet20"), "method", "seed")
    groups = {
        "CoRa, searched levels and ranks": BUDGETS,
        "CoRa, 4 and 3 levels in every layer": ("4 levels", "3 levels"),
        "CoRa as published (with labels)": ("published, 4 bits", "published, 3 bits"),
    }
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for (label, methods), color in zip(groups.items(), CODES, strict=False):
        points = []
        for method in methods:
            own = [x for x in found if x["method"] == method]
            top1 = [x["top1"] for x in own]
            points.append((statistics.median(x["bytes"] for x in own) / 1000,
                           statistics.mean(top1), min(top1), max(top1)))  # fmt: skip
        kb, mean, low, high = (list(v) for v in zip(*sorted(points), strict=True))
        bars = [[m - a for m, a in zip(mean, low, strict=True)],
                [b - m for m, b in zip(mean, high, strict=True)]]  # fmt: skip
        axes.errorbar(kb, mean, yerr=bars, marker="o", capsize=3, label=label, color=color)
    top1 = found[0]["top1_float"]
    for name, width in (("float32", 4), ("float16", 2)):
        kb = PARAMETERS * width / 1000
        axes.plot(kb, top1, "s", color=CODES[3])
        axes.annotate(name, (kb, top1), textcoords="offset points", xytext=(-8, -16), ha="right")
    axes.axhline(top1, color=CODES[3], linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    ticks = (80, 100, 150, 200, 500, 1000)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("size of the whole file, kB")
    axes.set_ylabel("top-1 on the test set, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "results" / "overview.png", dpi=130)


if __name__ == "__main__":
    main()
