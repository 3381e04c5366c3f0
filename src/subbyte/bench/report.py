"""What `bench` found, as values, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from subbyte.bench.roofs import Roofs
from subbyte.bench.timing import Spread


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one call.

    bfloat16: None where this CPU has no products of that type. fused: of the whole network after
    `fuse`; None for a layer, and where the network cannot be traced.
    """

    packed: Spread
    float32: Spread
    bfloat16: Spread | None
    fused: Spread | None = None

    @property
    def speedup(self) -> float:
        """Over float32, by the medians."""
        return self.float32.median / self.packed.median

    def to_dict(self) -> dict[str, Any]:
        spreads = {
            "packed": self.packed, "float32": self.float32, "bfloat16": self.bfloat16,
            "fused": self.fused,
        }  # fmt: skip
        seconds = {name: None if s is None else asdict(s) for name, s in spreads.items()}
        return {"seconds": seconds, "speedup": self.speedup}


@dataclass(frozen=True, slots=True)
class LayerBench:
    """One layer at one batch size, with the activations that reach it in the network."""

    name: str
    type: str  # the torch.nn class that it stands for
    shape: tuple[int, ...]  # of the weight
    levels: int
    batch: int
    times: Times
    operations: int  # multiplications and additions of a call
    panel_bytes: int  # of repacked weights that a call reads; 0 if it decodes
    why_not: str | None  # in words, why the kernels do not serve it; None if they do
    roof_seconds: float | None  # the machine's least time for products in bytes; None without
    ran: str  # what computed it: an instruction set and a precision, or PyTorch's float32

    @property
    def faster(self) -> str | None:
        """What took less time than the packed layer, by the medians; None if nothing did."""
        times = {"PyTorch float32": self.times.float32, "PyTorch bfloat16": self.times.bfloat16}
        found = {name: t.median for name, t in times.items() if t is not None}
        best = min(found, key=lambda name: found[name])
        return best if found[best] < self.times.packed.median else None

    @property
    def gb_s(self) -> float:
        """Packed weights read, a second."""
        return self.panel_bytes / self.times.packed.median / 1e9

    @property
    def gops(self) -> float:
        return self.operations / self.times.packed.median / 1e9

    @property
    def of_roof(self) -> float | None:
        """Share of the machine's best that was reached, 0 to 1."""
        return None if self.roof_seconds is None else self.roof_seconds / self.times.packed.median

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer": self.name,
            "type": self.type,
            "shape": list(self.shape),
            "levels": self.levels,
            "batch": self.batch,
            **self.times.to_dict(),
            "operations": self.operations,
            "panel_bytes": self.panel_bytes,
            "gb_s": self.gb_s,
            "gops": self.gops,
            "of_roof": self.of_roof,
            "why_not": self.why_not,
            "ran": self.ran,
            "faster": self.faster,
        }


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All layers at all batch sizes, and the whole network."""

    target: str
    tier: str | None  # None: no C++ core, so every layer decodes
    threads: int
    precision: str
    roofs: Roofs | None
    layers: tuple[LayerBench, ...]
    networks: tuple[tuple[int, Times], ...]  # batch size, times of the whole network

    @property
    def fallbacks(self) -> dict[str, str]:
        """Layers that the kernels do not serve, and why."""
        return {row.name: row.why_not for row in self.layers if row.why_not is not None}

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "tier": self.tier,
            "threads": self.threads,
            "precision": self.precision,
            "roofs": None if self.roofs is None else self.roofs.to_dict(),
            "layers": [row.to_dict() for row in self.layers],
            "network": [{"batch": n, **times.to_dict()} for n, times in self.networks],
        }


def table(report: BenchReport) -> Table:
    """The report for people."""
    view = Table(
        title=escape(report.target), caption=escape(_caption(report)), caption_justify="left"
    )
    with_bfloat16 = any(times.bfloat16 for times in _all_times(report))
    view.add_column("layer", no_wrap=True)
    for heading in ("type", "shape"):
        view.add_column(heading, overflow="fold")
    bfloat16 = ("bfloat16",) if with_bfloat16 else ()
    for heading in ("levels", "batch", "packed, ms", "quartiles", "float32", *bfloat16, "faster",
                    "GB/s", "GOP/s", "of roof"):  # fmt: skip
        view.add_column(heading, justify="right")
    view.add_column("ran on", overflow="fold")
    for row in report.layers:
        shape = "x".join(map(str, row.shape))
        served = row.why_not is None
        view.add_row(
            escape(row.name), row.type, shape, str(row.levels), str(row.batch),
            *_time_cells(row.times, with_bfloat16),
            f"{row.gb_s:.1f}" if served else "decodes",
            f"{row.gops:.1f}",
            "" if row.of_roof is None else f"{100 * row.of_roof:.0f} %", row.ran,
        )  # fmt: skip
    view.add_section()
    for batch, times in report.networks:
        cells = _time_cells(times, with_bfloat16)
        view.add_row("whole network", "", "", "", str(batch), *cells, "", "", "", "")
        if times.fused is not None:
            cells = _time_cells(replace(times, packed=times.fused), with_bfloat16)
            view.add_row("the same, fused", "", "", "", str(batch), *cells, "", "", "", "")
    return view


def _faster(report: BenchReport) -> list[str]:
    """What would be faster than packed layers, and for which."""
    found: dict[str, list[str]] = {}
    for row in report.layers:
        if row.faster is not None:
            text = f"{row.name} at batch {row.batch} ({1 / row.times.speedup:.2f}x)"
            if row.faster != "PyTorch float32":
                text = f"{row.name} at batch {row.batch}"
            found.setdefault(row.faster, []).append(text)
    return [f"{name} would be faster for {', '.join(rows)}" for name, rows in found.items()]


def _all_times(report: BenchReport) -> Sequence[Times]:
    return [*(row.times for row in report.layers), *(times for _, times in report.networks)]


def _time_cells(times: Times, with_bfloat16: bool) -> tuple[str, ...]:
    packed = times.packed * 1000
    bfloat16 = "" if times.bfloat16 is None else f"{1000 * times.bfloat16.median:.3f}"
    return (
        f"{packed.median:.3f}",
        f"{packed.low:.3f} .. {packed.high:.3f}",
        f"{1000 * times.float32.median:.3f}",
        *((bfloat16,) if with_bfloat16 else ()),
        f"{times.speedup:.2f}x",
    )


def _caption(report: BenchReport) -> str:
    lines = [
        f"{report.tier or 'no C++ core'}, {report.threads} threads, {report.precision} "
        "activations; medians, all in turn; faster: than PyTorch float32"
    ]
    if report.roofs is not None:
        reading = report.roofs.read_gb_s
        lines.append(
            f"roofs: {report.roofs.int8_gops:.0f} GOP/s in int8, "
            f"{report.roofs.float32_gflops:.0f} GFLOP/s in float32, reading "
            f"{report.roofs.memory_gb_s:.0f} GB/s from memory, {reading[1][1]:.0f} from caches; "
            "of roof: the time of the nearer roof over the layer's"
        )
    if not any(times.bfloat16 for times in _all_times(report)):
        lines.append("bfloat16 is not timed: this CPU has no products of that type")
    lines += _faster(report)
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.fallbacks.items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"decodes, because {why}: {', '.join(names)}" for why, names in by_reason.items()]
    return "\n".join(lines)
