"""One self-contained HTML page of packed files and runs: charts, and the same figures as tables.

The page loads nothing from elsewhere. Charts are SVG drawings of matplotlib; each has a text that
says what it shows, and a table below it holds its figures for those who do not see it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from subbyte.report.size import LayerSize, SizeReport, bits
from subbyte.train.checkpoint import EpochRecord
from subbyte.train.curves import COLORS, new_figure, plot_curves

_BARS = 40  # layers of a chart; the tables hold all
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding: .3rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child { text-align: left; white-space: nowrap; } td { white-space: nowrap; }
.scroll { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.warning { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: #fdf1ea; }
"""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What the page is about: a packed file, a run's history, or both."""

    name: str
    size: SizeReport | None = None
    history: tuple[EpochRecord, ...] = ()


def page(subjects: Sequence[Subject]) -> str:
    """The HTML. Raises SubbyteError without matplotlib."""
    parts = [_totals(subjects), *_histories(subjects)]
    for subject in subjects:
        if subject.size is not None:
            parts += _layers(subject.name, subject.size)
    title = " and ".join(escape(subject.name) for subject in subjects)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


# ---------------------------------------------------------------- figures


Row = Sequence[Any]


def _table(caption: str, head: Sequence[str], rows: Iterable[Row], name: str) -> str:
    """The first column names its row."""
    columns = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table id="{escape(name)}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


TOTALS: dict[str, Callable[[SizeReport], str]] = {
    "bytes of the file": lambda s: f"{s.file_bytes:,}",
    "parameters of the whole network": lambda s: f"{s.n_parameters:,}",
    "bits per parameter, the whole file": lambda s: f"{bits(s.file_bytes, s.n_parameters):.3f}",
    "quantized weights": lambda s: f"{s.n_weights:,}",
    "bits per quantized weight": lambda s: f"{bits(s.disk_bytes, s.n_weights):.3f}",
    "bytes of codes, scales and adapters": lambda s: f"{s.disk_bytes:,}",
    "bytes that stayed float": lambda s: f"{s.float_bytes:,}",
    "bytes of manifest and header": lambda s: f"{s.overhead_bytes:,}",
    "bytes of the same network in float16": lambda s: f"{s.float16_bytes:,}",
}


def _totals(subjects: Sequence[Subject]) -> str:
    sized = [(subject.name, subject.size) for subject in subjects if subject.size is not None]
    if not sized:
        return ""
    rows = [[what, *(figure(size) for _, size in sized)] for what, figure in TOTALS.items()]
    head = ["", *(name for name, _ in sized)]
    warnings = [
        f'<p class="warning">{escape(f"{name}: {text}")}</p>'
        for name, size in sized
        for text in (size.warning, size.float16_warning)
        if text
    ]
    return "<h2>Size</h2>" + "".join(warnings) + _table("Whole files", head, rows, "totals")


def _histories(subjects: Sequence[Subject]) -> list[str]:
    runs = {subject.name: subject.history for subject in subjects if subject.history}
    if not runs:
        return []
    figure = new_figure(9.5, 3.6)
    plot_curves(figure.subplots(1, 2), runs)
    parts = ["<h2>Training</h2>", _svg(figure, "Loss and test accuracy by epoch; table below")]
    for name, history in runs.items():
        rows = [
            [r.epoch, f"{r.train_loss:.4f}", f"{r.test_loss:.4f}", f"{r.test_top1:.2f}",
             f"{r.lr:.3g}"]
            for r in history
        ]  # fmt: skip
        head = ["epoch", "train loss", "test loss", "test top-1 %", "learning rate"]
        parts.append(_table(f"Epochs of {name}", head, rows, f"epochs-{name}"))
    return parts


def _layers(name: str, size: SizeReport) -> list[str]:
    parts = [f"<h2>Layers of {escape(name)}</h2>"]
    if size.layers:
        what = "Bytes of the largest quantized layers, and the share of weights on each level"
        parts.append(_svg(_bars(size.layers), what))
    rows = [
        [x.name, x.type, " x ".join(map(str, x.shape)), x.levels, f"{x.disk_bits:.3f}",
         f"{x.disk_bytes:,}", f"{x.entropy:.3f}", x.rank or "",
         " ".join(f"{100 * share:.1f}" for share in x.level_shares) if x.levels <= 17 else ""]
        for x in size.layers
    ]  # fmt: skip
    head = ["layer", "type", "shape", "levels", "bits per weight", "bytes", "entropy of the codes",
            "rank of the adapter", "% of the weights on each level"]  # fmt: skip
    parts.append(_table("Quantized layers", head, rows, f"layers-{name}"))
    kept = sorted(size.float_tensors, key=lambda t: -t.n_bytes)
    rows = [[t.name, f"{t.n_values:,}", f"{t.n_bytes:,}"] for t in kept]
    parts.append(_table("What stayed float", ["tensor", "values", "bytes"], rows, f"float-{name}"))
    return parts


# ---------------------------------------------------------------- charts


def _bars(layers: Sequence[LayerSize]) -> Any:
    """Bytes of the largest layers on the left; on the right their weights on the levels."""
    largest = sorted(layers, key=lambda x: -x.disk_bytes)[:_BARS]
    own = [x for x in layers if x in largest]  # in the order of the network
    figure = new_figure(9.5, 1.2 + 0.24 * len(own))
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(own))
    left.barh(places, [x.disk_bytes for x in own], color=COLORS[1])
    left.set_yticks(places, [_short(x.name) for x in own], fontsize="small")
    left.invert_yaxis()
    left.set(xlabel="bytes in the file")
    for place, layer in zip(places, own, strict=True):
        start = 0.0
        for i, share in enumerate(layer.level_shares):
            shade = 0.15 + 0.7 * i / max(1, layer.levels - 1)
            right.barh(place, share, left=start, color=(shade, shade, shade))
            start += share
    right.set(xlabel="share of the weights, lowest level (dark) to highest", xlim=(0, 1))
    return figure


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else "..." + name[3 - most :]


def _svg(figure: Any, label: str) -> str:
    """The drawing as an element of the page; the same bytes for the same figures."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "subbyte", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
