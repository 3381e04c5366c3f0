"""docs/results/kernels.md and its picture, from benchmarks/results/kernels.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT

from subbyte.train.curves import COLORS, new_figure

PAGE = ROOT / "docs" / "results" / "kernels.md"
PICTURE = PAGE.with_suffix(".png")
LINES = RESULTS / "kernels.jsonl"

Lines = dict[str, dict[str, Any]]  # the newest line of each case

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

    def row(self, lines: Lines) -> list[str]:
        rows = lines[self.case]["rows"]
        ours = rows[self.ours]["ms"]["median"]
        peer = min(self.peers, key=lambda name: rows[name]["ms"]["median"])
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
    Ratio("linear-4096-b1-cold", THREE, ("ORT int4 (block 128)",), 3.0, 4.7),
    Ratio("linear-4096-b1-cold", FIVE, ("ORT int4 (block 128)",), 2.3, 3.3),
    Ratio("linear-4096-b1-hot", THREE, ("torch float32",), 25, 45),
    Ratio("linear-4096-b1-hot", THREE, ("torch bfloat16",), 12, 25),
    Ratio("linear-4096-b1-cold", THREE, ("OpenVINO int4 (group 128, dynamic)",), 2.0, 4.0),
    Ratio("linear-4096-b8", THREE, INT8, 1.2, 1.6),
    Ratio("linear-4096-b64", THREE, ("OpenVINO int8 (QDQ)",), 0.95, 1.12),
    Ratio("linear-4096-b256", THREE, ("OpenVINO int8 (QDQ)",), 0.95, 1.12),
    Ratio("linear-4096-b64", THREE, INT8, 0.95, 1.12),
    Ratio("linear-4096-b256", THREE, INT8, 0.95, 1.12),
    Ratio("linear-1024-b1", THREE, ("torch float32",), 3, 6),
    *(
        Ratio(case, ours, (peer,), floor, goal)
        for case, peer, floor, goal in (
            ("resnet18-b1", "torch float32", 3, 5),
            ("resnet18-b1", "ORT int8 (QDQ)", 0.8, 1.2),
            ("resnet18-b16", "torch float32", 3.5, 5),
        )
        for ours in (THREE, f"{THREE}, fused", f"{FIVE}, fused")
    ),
    Share("linear-4096-b1-cold", THREE, "read_gb_s", 70, 90),
    Share("linear-4096-b1-cold", FIVE, "read_gb_s", 70, 90),
    Share("linear-4096-b64", THREE, "int8_gops", 75, 90),
    Share("linear-4096-b256", THREE, "int8_gops", 75, 90),
)


def write_page() -> Path:
    """From the newest line of each case; cases without one are left out."""
    lines = read_lines()
    plot(lines)
    parts = (_intro(lines), _goals(lines), _times(lines), _zoo(lines), _errors(lines), _how(lines))
    PAGE.write_text("\n\n".join(part for part in parts if part) + "\n")
    return PAGE


def read_lines() -> Lines:
    every = (json.loads(line) for line in LINES.read_text().splitlines())
    return {line["case"]: line for line in every}


def _intro(lines: Lines) -> str:
    line = next(iter(lines.values()))
    machine, tier = line["machine"], line["tier"]
    missing = (
        "The goals were set for a CPU with AVX-512 VNNI. This one has "
        f"`{tier}` only: an int8 product takes two instructions instead of one, and the engines "
        "beside it run other code too. OpenVINO has no fast int8 Linear here and keeps the "
        "activations of its int4 in float; bfloat16 is imitated. Products in bytes are at most "
        f"{_best(lines, 'int8_gops') / _best(lines, 'float32_gflops'):.1f} times as many a second "
        "as in float32 here (the machine's own rates, below), which bounds every ratio to float32 "
        "that is not bound by reading weights."
    )
    return (
        "# Packed products beside other engines\n\n"
        "Made by `make bench-peers` (`python benchmarks/kernels.py`); a line a case in "
        f"`benchmarks/results/kernels.jsonl`. Machine: {machine['cores']} cores {machine['cpu']}, "
        f"tier `{tier}`, {machine['threads']} threads, Python {machine['python']}, torch "
        f"{machine['torch']}." + ("" if "vnni" in tier else f"\n\n{missing}")
    )


def _goals(lines: Lines) -> str:
    rows = [goal.row(lines) for goal in GOALS if goal.case in lines]
    rows += [_any_layer(lines["zoo"])] if "zoo" in lines else []
    head = ["case", "ours", "beside", "reached", "floor", "goal", ""]
    return "## Against the goals\n\n" + _table(head, rows)


def _any_layer(line: dict[str, Any]) -> list[str]:
    speedups = [row["speedup"] for row in line["layers"]]
    slow = sum(s < 1 for s in speedups)
    what = f"any layer of our networks ({len(speedups)}), batch 1: 3 levels against torch float32"
    figures = ["", f"{slow} are slower", f"{min(speedups):.2f}x"]
    return [what, *figures, "1x", "", "met" if slow == 0 else "**missed**"]


def _judged(reached: float, floor: float, goal: float, unit: str) -> list[str]:
    word = "goal met" if reached >= goal else "floor met" if reached >= floor else "**missed**"
    return [f"{reached:.2f}{unit}", f"{floor:g}{unit}", f"{goal:g}{unit}", word]


def _times(lines: Lines) -> str:
    known = [case for case in CASES if case in lines]
    engines = list(dict.fromkeys(name for case in known for name in lines[case]["rows"]))
    engines.sort(key=lambda name: not name.startswith("subbyte"))
    rows = [[name, *(_cell(lines[case]["rows"].get(name)) for case in known)] for name in engines]
    head = ["ms: median (quartiles)", *(CASES[case] for case in known)]
    return (
        "## Times\n\n" + _table(head, rows) + "\n\n"
        "Cold: enough copies of the layer, with weights of their own, to leave every cache (160 MB "
        "of weights); time of one. Ours are modules called from Python, float32 in and out; ONNX "
        "models run with bound inputs and outputs, all copies in one graph. Fused: after "
        "`sb.fuse`, as ONNX Runtime and OpenVINO do for theirs; the others are module by module."
        "\n\n"
        f"![operations a second over operations a byte of weights]({PICTURE.name})"
    )


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
        "## Our networks, 3 levels, against torch float32\n\n" + _table(head, rows) + "\n\n"
        "As `subbyte bench` measures them; both in channels_last."
    )


def _errors(lines: Lines) -> str:
    worst: dict[str, float] = {}
    for line in lines.values():
        for name, error in line.get("errors", {}).items():
            worst[name] = max(worst.get(name, 0.0), error)
    rows = [[name, f"{error:.1e}"] for name, error in worst.items()]
    return (
        "## Errors\n\n"
        "Root mean square of the difference to the same network in float64, relative to the "
        "result; the largest of all cases. Every engine has weights that its format holds exactly "
        "(3 levels), so this is the rounding of activations; int8 weights use 7 bits, because "
        "engines without VNNI saturate otherwise.\n\n" + _table(["engine", "error"], rows)
    )


def _how(lines: Lines) -> str:
    rates = [
        [CASES_LONG[case], *(f"{lines[case]['roofs'][key]:.0f}" for key in _ROOFS)]
        for case in CASES
        if case in lines
    ]
    priority = (
        " The process had real-time priority, because other work shared the machine."
        if any(line.get("real_time") for line in lines.values())
        else ""
    )
    return (
        "## How\n\n"
        "Engines of a case take turns in one process, in the opposite order each round; a sample "
        "is a pause of 3 ms, a call that is not counted, and the mean of about 10 ms of calls, "
        "four at least. ONNX Runtime's threads do not spin between calls: they would take a core "
        f"from the next engine, and at 4096² it is the faster for it.{priority} The machine's own "
        "rates take turns with the engines. They differ from process to process (reading depends "
        "on where the memory lies), and a share is of the highest of them:\n\n"
        + _table(["case", "memory, GB/s", "caches, GB/s", "int8, GOP/s", "float32, GFLOP/s"], rates)
    )


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

MARKS = {
    THREE: ("o", COLORS[1]), FIVE: ("s", COLORS[3]), "ORT int4 (block 128)": ("^", COLORS[2]),
    "ORT int8 (QDQ)": ("v", COLORS[2]), "torch float32": ("x", COLORS[0]),
}  # fmt: skip


def plot(lines: Lines) -> None:
    """Linear layers under the machine's roofs: how near each engine comes."""
    cases = [case for case in CASES if "shape" in lines.get(case, {})]
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
             xlabel="operations a byte of weights", ylabel="billion operations a second",
             title="Linear layers and what the machine can do")  # fmt: skip
    axes.grid(alpha=0.2)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(PICTURE, dpi=120)
