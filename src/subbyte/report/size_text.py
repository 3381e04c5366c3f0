"""What a packed file weighs, for people: text of a given width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from subbyte.report import text
from subbyte.report.fold import Fold, folds
from subbyte.report.size import FloatLayer, LayerSize, SizeReport, bits
from subbyte.storage import WORDS

Row = Fold[LayerSize]

_FLOAT_ROWS = 12  # of what stayed float, the largest
_NINE = 9  # levels whose shares are shown one by one


@dataclass(frozen=True, slots=True)
class Column:
    """keep: columns with the lowest go first where the width is short; KEPT never go."""

    heading: str
    cell: Callable[[Row], str]
    total: Callable[[SizeReport], str]
    keep: int


KEPT = 100


def size_text(report: SizeReport, width: int = 100, *, wide: bool = False) -> str:
    """The whole report. wide: each layer by itself, with all columns, however wide that is."""
    blocks = [
        text.wrapped(text.plain(report.path), width),
        _layers(report, None if wide else width),
        _sums(report, width),
        _stayed_float(report, None if wide else width),
        _notes(report, width),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


# ---- layers


def alike(layer: LayerSize) -> tuple[object, ...]:
    """What the layers of one row have in common; all else is stated as `least..largest`."""
    return (layer.type, layer.shape, layer.grid, layer.rank, layer.n_scales, layer.adapter_bytes,
            layer.panel_bytes)  # fmt: skip


def _layers(report: SizeReport, width: int | None) -> list[str]:
    """The table of layers; width None: every layer, every column."""
    if width is None:
        rows = tuple(Fold(layer.name, (layer,)) for layer in report.layers)
        columns = _columns(report, rows)
        head, cells = _cells(report, rows, columns)
        return text.table(head, cells, text.natural_width(head, cells))
    rows = folds(report.layers, lambda layer: layer.name, alike)
    columns = _columns(report, rows)
    shown = _fitting(report, rows, columns, width)
    lines = text.table(*_cells(report, rows, shown), width)
    left_out = [column.heading for column in columns if column not in shown]
    more = [f"no room for: {', '.join(left_out)}"] if left_out else []
    if any(len(row.items) > 1 for row in rows):
        more.append("rows of several layers show totals of bytes, and least..largest of the rest")
    return lines + text.wrapped("; ".join([*more, "--wide shows every layer and column"]), width)


def _columns(report: SizeReport, rows: Sequence[Row]) -> tuple[Column, ...]:
    """The columns that have something to say."""
    folded = any(len(row.items) > 1 for row in rows)
    adapted = any(layer.rank for layer in report.layers)
    found = (
        Column("layers", _count, lambda r: str(len(r.layers)), KEPT if folded else -1),
        Column("type", lambda row: text.plain(row.items[0].type), _nothing, 4),
        Column("shape", lambda row: "x".join(map(str, row.items[0].shape)), _nothing, KEPT),
        Column("levels", lambda row: str(row.items[0].levels), _nothing, KEPT),
        Column("rank", lambda row: str(row.items[0].rank), _nothing, KEPT if adapted else -1),
        Column("log2(levels)", _range(lambda layer: layer.information_bits),
               lambda r: f"{r.weighted(x.information_bits for x in r.layers):.3f}", 2),
        Column("bits in memory", _range(lambda layer: layer.memory_bits),
               lambda r: f"{bits(r.memory_bytes, r.n_weights):.3f}", 3),
        Column("bits in file", _range(lambda layer: layer.disk_bits),
               lambda r: f"{bits(r.disk_bytes, r.n_weights):.3f}", KEPT),
        Column("entropy", _range(lambda layer: layer.entropy),
               lambda r: f"{r.weighted(x.entropy for x in r.layers):.3f}", KEPT),
        Column("bytes", lambda row: f"{sum(layer.disk_bytes for layer in row.items):,}",
               lambda r: f"{r.disk_bytes:,}", KEPT),
        Column("panels", _panels, lambda r: _bytes(r.panel_bytes),
               -1 if report.panel_bytes is None else 5),
        Column("scale", _scale, _nothing, 1),
        Column("share of each level, %", _shares, _nothing, 0),
    )  # fmt: skip
    return tuple(column for column in found if column.keep >= 0)


def _cells(
    report: SizeReport, rows: Iterable[Row], columns: Sequence[Column]
) -> tuple[list[str], list[list[str]]]:
    """The head, and the rows with the total below."""
    head = ["layer", *(column.heading for column in columns)]
    cells = [[text.plain(row.name), *(column.cell(row) for column in columns)] for row in rows]
    total = ["total", *(column.total(report) for column in columns)]
    return head, [*cells, total]


def _fitting(
    report: SizeReport, rows: Sequence[Row], columns: Sequence[Column], width: int
) -> Sequence[Column]:
    """As many columns as the width has room for: beside the names, else below them."""
    order = sorted(columns, key=lambda column: column.keep)
    optional = [column for column in order if column.keep < KEPT]
    tries = [[c for c in columns if c not in optional[:n]] for n in range(len(optional) + 1)]
    for needs in (text.natural_width, text.under_names):
        for shown in tries:
            if needs(*_cells(report, rows, shown)) <= width:
                return shown
    return tries[-1]


def _nothing(_: SizeReport) -> str:
    return ""


def _count(row: Row) -> str:
    return str(len(row.items))


def _range(of: Callable[[LayerSize], float]) -> Callable[[Row], str]:
    """A figure of a row's layers: one where all are shown alike, else `least..largest`."""
    return lambda row: _span([of(layer) for layer in row.items], ".3f")


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}..{high}"


def _panels(row: Row) -> str:
    known = [layer.panel_bytes for layer in row.items if layer.panel_bytes is not None]
    return _bytes(sum(known) if known else None)


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _scale(row: Row) -> str:
    low = min(layer.scale_min for layer in row.items)
    return _span([low, max(layer.scale_max for layer in row.items)], ".3g")


def _shares(row: Row) -> str:
    """Shares in percent; of more than nine levels the lowest and the highest."""
    shares = [[100 * share for share in layer.level_shares] for layer in row.items]
    if row.items[0].levels <= _NINE:
        return " ".join(_span(of_level, ".0f") for of_level in zip(*shares, strict=True))
    return _span([share for own in shares for share in own], ".1f")


# ---- sums


def _sums(report: SizeReport, width: int) -> list[str]:
    """The whole file, part by part."""
    kept, buffers = report.float_parameters, report.buffers
    n_kept, kept_bytes = sum(t.n_values for t in kept), sum(t.n_bytes for t in kept)
    rows = [
        _sum("quantized layers alone", report.n_weights, report.disk_bytes),
        _sum("float parameters", n_kept, kept_bytes),
        _sum("all parameters", report.n_parameters, report.parameter_bytes),
        ["buffers, which are no parameters", f"{sum(t.n_values for t in buffers):,}",
         f"{sum(t.n_bytes for t in buffers):,}", ""],
        ["manifest and header", "", f"{report.overhead_bytes:,}", ""],
        _sum("whole file", report.n_parameters, report.file_bytes),
        ["the same network in float16", "", f"{report.float16_bytes:,}", ""],
    ]  # fmt: skip
    return text.table(["whole network", "values", "bytes", "bits per weight"], rows, width)


def _sum(name: str, n_values: int, n_bytes: int) -> list[str]:
    per_weight = f"{bits(n_bytes, n_values):.3f}" if n_values else ""
    return [name, f"{n_values:,}", f"{n_bytes:,}", per_weight]


# ---- what stayed float


def _stayed_float(report: SizeReport, width: int | None) -> list[str]:
    """The largest float layers; width None: all of them, one by one."""
    rows = report.float_folds()
    if width is None:
        rows = tuple(Fold(layer.name, (layer,)) for row in rows for layer in row.items)
    shown = rows if width is None else rows[:_FLOAT_ROWS]
    rest = rows[len(shown) :]
    cells = [_float_row(text.plain(row.name), row.items, width is None) for row in shown]
    if rest:
        layers = [layer for row in rest for layer in row.items]
        name = f"{len(rest)} more rows, see --wide"
        cells.append([name, str(len(layers)), "", *_float_figures(layers)])
    head = ["stayed float", "layers", "tensors", "values", "bytes"]
    if not rows:
        return []
    return text.table(head, cells, text.natural_width(head, cells) if width is None else width)


def _float_row(name: str, layers: Sequence[FloatLayer], in_full: bool) -> list[str]:
    parts = [text.plain(part) for part in layers[0].parts]
    more = [] if in_full or len(parts) <= 2 else [f"{len(parts) - 2} more"]
    shown = parts[: len(parts) if not more else 2]
    return [name, str(len(layers)), ", ".join([*shown, *more]), *_float_figures(layers)]


def _float_figures(layers: Sequence[FloatLayer]) -> list[str]:
    n_values, n_bytes = sum(x.n_values for x in layers), sum(x.n_bytes for x in layers)
    return [f"{n_values:,}", f"{n_bytes:,}"]


# ---- notes


def _notes(report: SizeReport, width: int) -> list[str]:
    zipped = any(layer.encoding != WORDS for layer in report.layers)
    notes = [
        f"quantized weights are {report.reduction:.1f}x smaller than in float32"
        + ("; codes are compressed by zstd" if zipped else ""),
        _panel_words(report),
    ]
    if not report.knows_buffers:
        notes.append(
            "the file does not say which float tensors are parameters and which are buffers "
            "(running statistics); all but integers count as parameters"
        )
    warnings = [w for w in (report.float16_warning, report.warning) if w is not None]
    lines = [*notes, *(f"warning: {text.plain(warning)}" for warning in warnings)]
    return [part for line in lines for part in text.wrapped(line, width)]


def _panel_words(report: SizeReport) -> str:
    if report.tier is None:
        return "panels: none, the C++ core was not built; every layer decodes at each call"
    if report.panel_bytes is None:
        return "panels: not known, the file opens with its class only"
    return (
        f"panels: bytes repacked for {report.tier} at the first product, beside the words; 0: the "
        "layer decodes at each call"
    )
