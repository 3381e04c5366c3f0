"""Bits per weight on disk, against log2(N) and against the entropy of the codes.

Without --file: a reference network with its first weights is prepared with LowRes, frozen, packed
and saved, for each number of levels, in radix words and compressed. With --file: packed files as
they are (trained networks). Measured on the saved files, scales included; only layers of at least
10 000 weights count, for a scale and a last word weigh on small ones.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from common import append
from rich.console import Console
from rich.table import Table

import subbyte as sb
from subbyte import LowRes, SubbyteError
from subbyte.models import build
from subbyte.report import size_report
from subbyte.report.size import LayerSize, SizeReport, bits

LEVELS = (2, 3, 4, 5, 9, 17)
LARGE = 10_000

Subject: TypeAlias = tuple[str, bool | None, SizeReport]  # what, compress, measured


@dataclass(frozen=True, slots=True)
class Row:
    """One file. disk_*, entropy, information: bits per weight, of the large layers together.

    overhead_percent: manifest and header in the whole file.
    """

    what: str
    compress: bool | None  # as it was asked for; of a given file it is not known
    levels: str
    encoding: str
    layers: int
    weights: int
    information: float
    entropy: float
    disk: float
    disk_worst: float  # largest of a layer
    file_bytes: int
    overhead_percent: float


def main() -> None:
    options = parse()
    try:
        reports = given(options.file) if options.file else made(options.network, options.levels)
        rows = [measure(*subject) for subject in reports]
    except SubbyteError as error:
        raise SystemExit(str(error)) from None
    for row in rows:
        path = append("file_size", asdict(row))
    print_table(rows)
    print(f"added to {path.name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="cvnn1")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS)
    parser.add_argument("--file", type=Path, nargs="+", help="measure these instead")
    return parser.parse_args()


def given(paths: list[Path]) -> Iterator[Subject]:
    for path in paths:
        yield str(path), None, size_report(path)


def made(network: str, levels: Sequence[int]) -> Iterator[Subject]:
    """A file in words and a compressed one, for each number of levels."""
    with tempfile.TemporaryDirectory() as folder:
        for n in levels:
            torch.manual_seed(0)
            model = build(network)
            sb.prepare(model, LowRes(levels=n))
            net = sb.pack(sb.freeze(model))
            for compress in (False, True):
                path = Path(folder) / f"{n}-{compress}.safetensors"
                sb.save(net, path, compress=compress)
                yield f"{network}, first weights", compress, size_report(path)


def measure(what: str, compress: bool | None, report: SizeReport) -> Row:
    large = [layer for layer in report.layers if layer.n_weights >= LARGE]
    if not large:
        raise SystemExit(f"{what} has no layer of at least {LARGE:,} weights")
    n_weights = sum(layer.n_weights for layer in large)
    overhead = report.file_bytes - report.disk_bytes - report.float_bytes
    return Row(
        what,
        compress,
        "+".join(map(str, sorted({layer.levels for layer in large}))),
        "+".join(sorted({layer.encoding for layer in large})),
        len(large),
        n_weights,
        sum(math.log2(layer.levels) * layer.n_weights for layer in large) / n_weights,
        sum(layer.entropy * layer.n_weights for layer in large) / n_weights,
        bits(sum(layer.disk_bytes for layer in large), n_weights),
        max(map(on_disk, large)),
        report.file_bytes,
        100 * overhead / report.file_bytes,
    )


def on_disk(layer: LayerSize) -> float:
    return bits(layer.disk_bytes, layer.n_weights)


def print_table(rows: list[Row]) -> None:
    view = Table(title=f"Bits per weight, layers of at least {LARGE:,} weights")
    for heading in ("file", "levels", "encoding"):
        view.add_column(heading, overflow="fold")
    for heading in ("log2(N)", "entropy", "disk", "over log2(N)", "over entropy", "worst layer",
                    "file bytes", "manifest"):  # fmt: skip
        view.add_column(heading, justify="right")
    for row in rows:
        figures = (f"{value:.3f}" for value in (row.information, row.entropy, row.disk))
        view.add_row(
            row.what, row.levels, row.encoding, *figures, percent_over(row.disk, row.information),
            percent_over(row.disk, row.entropy), f"{row.disk_worst:.3f}", f"{row.file_bytes:,}",
            f"{row.overhead_percent:.2f} %",
        )  # fmt: skip
    Console(width=150).print(view)


def percent_over(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.2f} %" if base else "-"


if __name__ == "__main__":
    main()
