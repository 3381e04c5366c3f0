"""docs/results/kernels.md and its pictures, from benchmarks/results/kernels.jsonl.

Each machine has a section of its own, made from the newest line of each case that ran on it. What a
sentence says of a machine is taken from its lines; what they do not hold, the page does not say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT

from subbyte.train.curves import COLORS, new_figure

PAGE = ROOT / "docs" / "results" / "kernels.md"
LINES = RESULTS / "kernels.jsonl"

Line = dict[str, Any]
Lines = dict[str, Line]  # the newest line of each case, of one machine

THREE, FIVE = "subbyte 3 levels", "subbyte 5 levels"
INT8 = ("ORT int8 (QDQ)", "ORT int8 (dynamic)", "OpenVINO int8 (QDQ)")
CASES = {
    "linear-4096-b1-hot": "Linear 4096², batch 1",
    "linear-4096-b1-cold": "the same, cold",
    "linear-4096-b8": "batch 8",
    "linear-4096-b64": "batch 64",
    "linear-4096-b256": "batch 256",
    "linear-1024-b1": "Linear 1024², batch 1",
    "resnet18-b1": "ResNet-18, batch 1",
    "resnet18-b16": "ResNet-18, batch 16",
}


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the fastest of some engines."""

    case: str
    ours: str
    peers: tuple[str, ...]
    floor: float
    goal: float

    def measured(self, lines: Lines) -> bool:
        rows = lines.get(self.case, {}).get("rows", {})
        return self.ours in rows and any(name in rows for name in self.peers)

    def row(self, lines: Lines) -> list[str]:
        rows = lines[self.case]["rows"]
        ours = rows[self.ours]["ms"]["median"]
        peer = min(
            (name for name in self.peers if name in rows),
            key=lambda name: rows[name]["ms"]["median"],
        )
        theirs = rows[peer]["ms"]["median"]
        what = f"{CASES_LONG[self.case]}: {self.ours.removeprefix('subbyte ')} against {peer}"
        return [what, _ms(ours), _ms(theirs), *_judged(theirs / ours, self.floor, self.goal, "x")]


@dataclass(frozen=True)
class Share:
    """How much of a rate that the machine has."""

    case: str
    ours: str
    roof: str  # "read_gb_s" or "int8_gops"
    floor: float
    goal: float

    def measured(self, lines: Lines) -> bool:
        line = lines.get(self.case, {})
        return self.ours in line.get("rows", {}) and self.roof in line.get("roofs", {})

    def row(self, lines: Lines) -> list[str]:
        reached, roof = _rate(lines[self.case], self.ours, self.roof), _best(lines, self.roof)
        unit, of = ("GB/s", "reading") if self.roof == "read_gb_s" else ("GOP/s", "int8 products")
        what = f"{CASES_LONG[self.case]}: {self.ours.removeprefix('subbyte ')}, share of {of}"
        figures = [f"{reached:.1f} {unit}", f"{roof:.1f} {unit}"]
        return [what, *figures, *_judged(100 * reached / roof, self.floor, self.goal, " %")]


CASES_LONG = {
    name: text if text[0].isupper() else f"Linear 4096², {text.replace('the same', 'batch 1')}"
    for name, text in CASES.items()
}
GOALS: tuple[Ratio | Share, ...] = (
    Ratio("linear-4096-b1-cold", THREE, ("ORT int4 (block 128)",), 3.0, 3.8),
    Ratio("linear-4096-b1-cold", THREE, ("ORT int2 (block 128)",), 1.9, 2.4),
    Ratio("linear-4096-b1-cold", FIVE, ("ORT int4 (block 128)",), 1.9, 2.3),
    Ratio("linear-4096-b1-cold", FIVE, ("ORT int2 (block 128)",), 1.2, 1.5),
    Ratio("linear-4096-b1-hot", THREE, ("torch float32",), 20, 25),
    Ratio("linear-4096-b1-hot", THREE, ("torch bfloat16",), 12, 25),
    Ratio("linear-4096-b1-cold", THREE, ("OpenVINO int4 (group 128, dynamic)",), 2.0, 4.0),
    Ratio("linear-4096-b8", THREE, INT8, 1.2, 1.6),
    Ratio("linear-4096-b64", THREE, ("OpenVINO int8 (QDQ)",), 0.95, 1.12),
    Ratio("linear-4096-b256", THREE, ("OpenVINO int8 (QDQ)",), 0.95, 1.12),
    Ratio("linear-4096-b64", THREE, INT8, 0.95, 1.12),
    Ratio("linear-4096-b256", THREE, INT8, 0.95, 1.12),
    Ratio("linear-1024-b1", THREE, ("torch float32",), 4, 5),
    *(
        Ratio(case, ours, (peer,), floor, goal)
        for case, peer, floor, goal in (
            ("resnet18-b1", "torch float32", 3, 5),
            ("resnet18-b1", "ORT int8 (QDQ)", 0.8, 1.2),
            ("resnet18-b16", "torch float32", 3.5, 5),
        )
        for ours in (THREE, f"{THREE}, fused", f"{FIVE}, fused")
    ),
    Share("linear-4096-b1-cold", THREE, "read_gb_s", 65, 80),
    Share("linear-4096-b1-cold", FIVE, "read_gb_s", 65, 80),
    Share("linear-4096-b64", THREE, "int8_gops", 75, 85),
    Share("linear-4096-b256", THREE, "int8_gops", 75, 85),
)


def write_page() -> Path:
    """The page and a picture per machine."""
    machines = by_machine(read_lines())
    for lines in machines:
        plot(lines)
    PAGE.write_text(page(machines))
    return PAGE


def read_lines() -> list[Line]:
    return [json.loads(line) for line in LINES.read_text().splitlines()]


def by_machine(every: Iterable[Line]) -> list[Lines]:
    """The newest line of each case, for each machine; lines come oldest first."""
    found: dict[tuple[Any, ...], Lines] = {}
    for line in every:
        found.setdefault(_machine(line), {})[line["case"]] = line
    return list(found.values())


def _machine(line: Line) -> tuple[Any, ...]:
    """What makes two lines comparable: CPU, cores, threads, instruction set."""
    machine = line["machine"]
    return machine["cpu"], machine["cores"], machine["threads"], line["tier"]


def page(machines: Sequence[Lines]) -> str:
    """The whole text; cases without a line are left out."""
    return "\n\n".join([INTRO, *map(_section, machines)]) + "\n"


INTRO = """# Packed products beside other engines

Made by `make bench-peers` (`python benchmarks/kernels.py`), which adds a line per case to
`benchmarks/results/kernels.jsonl`. Each machine has a section, made from its newest lines.

Goals and floors (`GOALS` in `benchmarks/kernels_page.py`) were set for a CPU with AVX-512 VNNI.
They are the same for every machine; each section names the instruction set that was used.

Cold: the layer is copied, each copy with weights of its own, up to 160 MB or 192 copies; the time
is that of one copy. Ours are modules called from Python, float32 in and out. ONNX models run with
bound inputs and outputs, all copies in one graph. Fused: after `sb.fuse`; ONNX Runtime and
OpenVINO fuse theirs too. Rows that do not say fused run module by module.

Engines of a case take turns in one process, in the opposite order each round. A sample is a pause
of 3 ms, a call that is not counted, and the mean of about 10 ms of calls, four at least. ONNX
Runtime's threads do not spin between calls, so that they leave the cores to the next engine. The
machine's own rates take turns with the engines. A share is of the highest rate of all cases.

An error is the root mean square of the difference to the same network in float64, relative to the
result; the largest of all cases. Every engine has weights that its format holds exactly (3
levels), so this is the rounding of activations. int8 weights of the other engines use 7 bits."""


def _section(lines: Lines) -> str:
    parts = (_head(lines), _goals(lines), _times(lines), _zoo(lines), _errors(lines), _rates(lines))
    return "\n\n".join(part for part in parts if part)


def _head(lines: Lines) -> str:
    cpu, cores, threads, tier = _machine(next(iter(lines.values())))
    loads = sorted(line["machine"]["load"] for line in lines.values())
    days = sorted(line["date"][:10] for line in lines.values())
    said = [
        f"Instruction set `{tier}`, {threads} threads, Python {_versions(lines, 'python')}, torch "
        f"{_versions(lines, 'torch')}, {_range(days)}.",
        f"Load before the cases: {_range([f'{load:g}' for load in loads])}.",
    ]
    n_real_time = sum(bool(line.get("real_time")) for line in lines.values())
    if n_real_time:
        said.append(f"Cases with real-time priority: {n_real_time} of {len(lines)}.")
    if any("roofs" in line for line in lines.values()):
        times = _best(lines, "int8_gops") / _best(lines, "float32_gflops")
        said.append(f"The machine's own int8 products are {times:.1f} times as many per second as "
                    "its float32 ones.")  # fmt: skip
    return f"## {cpu}, {cores} cores, `{tier}`\n\n" + " ".join(said)


def _versions(lines: Lines, name: str) -> str:
    return ", ".join(sorted({line["machine"][name] for line in lines.values()}))


def _range(ordered: Sequence[str]) -> str:
    first, last = ordered[0], ordered[-1]
    return first if first == last else f"{first} to {last}"


def _goals(lines: Lines) -> str:
    rows = [goal.row(lines) for goal in GOALS if goal.measured(lines)]
    rows += [_any_layer(lines["zoo"])] if "zoo" in lines else []
    head = ["case", "ours", "beside", "reached", "floor", "goal", ""]
    return "### Against the goals\n\n" + _table(head, rows) if rows else ""


def _any_layer(line: dict[str, Any]) -> list[str]:
    speedups = [row["speedup"] for row in line["layers"]]
    slow = sum(s < 1 for s in speedups)
    what = f"any layer of our networks ({len(speedups)}), batch 1: 3 levels against torch float32"
    figures = ["", f"{slow} are slower", f"{min(speedups):.2f}x"]
    met = "goal met" if slow == 0 else "floor met" if min(speedups) >= 0.95 else "**missed**"
    return [what, *figures, "0.95x", "1x", met]


def _judged(reached: float, floor: float, goal: float, unit: str) -> list[str]:
    word = "goal met" if reached >= goal else "floor met" if reached >= floor else "**missed**"
    return [f"{reached:.2f}{unit}", f"{floor:g}{unit}", f"{goal:g}{unit}", word]


def _times(lines: Lines) -> str:
    known = [case for case in CASES if case in lines]
    engines = list(dict.fromkeys(name for case in known for name in lines[case]["rows"]))
    engines.sort(key=lambda name: not name.startswith("subbyte"))
    rows = [[name, *(_cell(lines[case]["rows"].get(name)) for case in known)] for name in engines]
    head = ["ms: median (quartiles)", *(CASES[case] for case in known)]
    if not known:
        return ""
    caption = "operations per second over operations per byte of weights"
    picture = f"\n\n![{caption}]({picture_of(lines).name})" if _drawn(lines) else ""
    return "### Times\n\n" + _table(head, rows) + picture


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ms = row["ms"]
    return f"{_ms(ms['median'])} ({_ms(ms['low'])}..{_ms(ms['high'])})"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _zoo(lines: Lines) -> str:
    if "zoo" not in lines:
        return ""
    line, rows = lines["zoo"], []
    for network in line["networks"]:
        own = [row for row in line["layers"] if row["network"] == network["network"]]
        slow = [row for row in own if row["speedup"] < 1]
        last = min(own, key=lambda row: row["speedup"])
        why = f", {last['why_not']}" if last["why_not"] else ""
        seconds = network["seconds"]
        fused = seconds["float32"]["median"] / seconds["fused"]["median"]
        rows.append([
            network["network"], f"{network['speedup']:.2f}x", f"{fused:.2f}x", str(len(own)),
            str(len(slow)),
            f"{last['layer']} ({last['type']} {'x'.join(map(str, last['shape']))}{why}) "
            f"{last['speedup']:.2f}x",
        ])  # fmt: skip
    head = ["network, batch 1", "whole", "fused", "layers", "slower than float32", "slowest"]
    return (
        "### Our networks, 3 levels, against torch float32\n\n" + _table(head, rows) + "\n\n"
        "As `subbyte bench` measures them; both in channels_last."
    )


def _errors(lines: Lines) -> str:
    worst: dict[str, float] = {}
    for line in lines.values():
        for name, error in line.get("errors", {}).items():
            worst[name] = max(worst.get(name, 0.0), error)
    rows = [[name, f"{error:.1e}"] for name, error in worst.items()]
    return "### Errors\n\n" + _table(["engine", "error"], rows) if rows else ""


def _rates(lines: Lines) -> str:
    rates = [
        [CASES_LONG[case], *(f"{lines[case]['roofs'][key]:.0f}" for key in _ROOFS)]
        for case in CASES
        if "roofs" in lines.get(case, {})
    ]
    head = ["case", "memory, GB/s", "caches, GB/s", "int8, GOP/s", "float32, GFLOP/s"]
    return "### The machine's own rates\n\n" + _table(head, rates) if rates else ""


_ROOFS = ("read_gb_s", "cached_gb_s", "int8_gops", "float32_gflops")


def _best(lines: Lines, roof: str) -> float:
    """A roof is the highest rate of all cases: what the machine can do when it is let."""
    return max(line["roofs"][roof] for line in lines.values() if "roofs" in line)


def _rate(line: dict[str, Any], name: str, roof: str) -> float:
    """What a row reached, in the roof's unit."""
    row = line["rows"][name]
    amount = row["bytes"] if roof == "read_gb_s" else line["operations"]
    rate: float = amount / row["ms"]["median"] / 1e6
    return rate


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---------------------------------------------------------------- the picture


def picture_of(lines: Lines) -> Path:
    cpu, cores, threads, tier = _machine(next(iter(lines.values())))
    words = f"{cpu} {cores} cores {threads} threads {tier}".lower()
    return PAGE.with_name(f"kernels-{re.sub('[^a-z0-9]+', '-', words)}.png")


def _drawn(lines: Lines) -> list[str]:
    """Cases that the picture shows: Linear layers."""
    return [case for case in CASES if "shape" in lines.get(case, {})]


MARKS = {
    THREE: ("o", COLORS[1]), FIVE: ("s", COLORS[3]), "ORT int4 (block 128)": ("^", COLORS[2]),
    "ORT int8 (QDQ)": ("v", COLORS[2]), "torch float32": ("x", COLORS[0]),
}  # fmt: skip


def plot(lines: Lines) -> None:
    """Linear layers under the machine's roofs: how near each engine comes."""
    cases = _drawn(lines)
    if not cases:
        return
    read, cached, int8, single = (_best(lines, key) for key in _ROOFS)
    figure = new_figure(8, 5)
    axes = figure.subplots()
    ends = (0.3, 4e3)
    for peak, rate, label, style in (
        (int8, read, f"int8 products, {int8:.0f} GOP/s", "-"),
        (single, read, f"float32 products, {single:.0f} GFLOP/s", "--"),
        (int8, cached, "", ":"),
    ):
        x = (ends[0], peak / rate, ends[1])
        axes.plot(x, [min(peak, rate * v) for v in x], style, color="#999999", lw=1)
        axes.annotate(label, (ends[1], peak), ha="right", va="bottom", fontsize="small")
    for rate, where in ((read, "memory"), (cached, "caches")):
        axes.annotate(f"reading {where}, {rate:.0f} GB/s", (0.33, 0.48 * rate), rotation=36,
                      fontsize="small", color="#666666")  # fmt: skip
    for name, (mark, color) in MARKS.items():
        points = [
            (lines[c]["operations"] / lines[c]["rows"][name]["bytes"],
             _rate(lines[c], name, "int8_gops"), c)
            for c in cases
            if name in lines[c]["rows"]
        ]  # fmt: skip
        axes.plot([p[0] for p in points], [p[1] for p in points], mark, color=color, label=name,
                  ms=6, alpha=0.8)  # fmt: skip
        named = [point for point in points if name == THREE and "cold" not in point[2]]
        for x, y, case in named:
            _, side, batch, *_ = case.split("-")
            axes.annotate(f"{side}², {batch.replace('b', 'batch ')}", (x, y), ha="center",
                          textcoords="offset points", xytext=(0, 8 if side == "4096" else -14),
                          fontsize="x-small", color=color)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=(2, 2 * int8),
             xlabel="operations per byte of weights", ylabel="billion operations per second",
             title="Linear layers and what the machine can do")  # fmt: skip
    axes.grid(alpha=0.2)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(picture_of(lines), dpi=120)
