"""Tables and figures of the documents, made from the raw lines in benchmarks/results/ and beside
the files in experiments/.

    python benchmarks/tables.py            # rewrite them in place
    python benchmarks/tables.py --check    # name the documents that differ from the lines

A document holds a table between `<!-- table: NAME -->` and `<!-- end -->`. Nobody edits what lies
between by hand: tests/test_documents.py compares it with the lines.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from subbyte.experiments.page import grid, spread
from subbyte.experiments.run import lines_of
from subbyte.experiments.settings import read_experiment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXPERIMENTS = ROOT / "experiments"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Line = dict[str, Any]
TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    """Register under the function's name, with hyphens."""
    TABLES[function.__name__.replace("_", "-")] = function
    return function


def lines(name: str, **wanted: Any) -> list[Line]:
    """The lines of a file with these values, oldest first."""
    text = (RESULTS / f"{name}.jsonl").read_text()
    every = (json.loads(line) for line in text.splitlines())
    return [line for line in every if all(line.get(k) == v for k, v in wanted.items())]


def newest(found: Iterable[Line], *keys: str) -> list[Line]:
    """The last line of each combination of values of these keys, in order of first appearance."""
    last: dict[tuple[Any, ...], Line] = {}
    for line in found:
        last[tuple(line.get(key) for key in keys)] = line
    return list(last.values())


@table
def groups() -> str:
    """Times over those of a scale per channel, of the newest line of each machine."""
    rows = []
    for line in newest(lines("groups"), "tier"):
        for row in line["rows"]:
            sizes = [row["by_size"][size]["ratio"]["median"] for size in ("32", "64", "128")]
            rows.append([
                f"{line['machine']['cpu']}, `{line['tier']}`", str(row["levels"]),
                str(row["batch"]), *(f"{ratio:.2f}" for ratio in sizes),
            ])  # fmt: skip
    return grid(["machine", "levels", "batch", "group of 32", "64", "128"], rows)


@table
def language() -> str:
    """The newest run of each network and budget, beside the float network."""
    rows = []
    for network, name in (("minilm", "all-MiniLM-L6-v2"), ("smollm2", "SmolLM2-135M")):
        for line in newest(lines("language", network=network), "method", "target_bits", "tune"):
            rows.append(_language_row(name, line))
    head = ["network", "bits per weight", "bytes of the file", "measure", "score",
            "with int8 activations", "tuning", "minutes", "peak memory"]  # fmt: skip
    return grid(head, rows)


def _language_row(name: str, line: Line) -> list[str]:
    digits = 4 if line["measure"] == "Spearman" else 2
    score = f"{line['score']:.{digits}f}"
    if line["method"] == "float":
        return [name, "32", "", line["measure"], score, "", "", "", ""]
    return [
        name, f"{line['bits_per_weight']:.3f}", f"{line['bytes']:,}", line["measure"], score,
        f"{line['score_int8']:.{digits}f}",
        f"{line['tune']} iterations" if line["tune"] else "none",
        f"{line['seconds'] / 60:.0f}", f"{line['peak_bytes'] / 1e9:.1f} GB",
    ]  # fmt: skip


@table
def distributed() -> str:
    """A step of several processes over that of one, and where the time goes."""
    rows = []
    for x in newest(lines("distributed"), "network", "batch", "method", "strategy"):
        parts = ("alone", "together", "data", "arithmetic", "exchange")
        ratio = x["ratio"]
        rows.append([
            x["machine"]["cpu"], str(x["machine"]["load"]), x["network"], str(x["batch"]),
            x["method"], x["strategy"], *(f"{x[f'{part}_ms']['median']:.0f}" for part in parts),
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            f"{x['cpu_ratio']['median']:.2f}",
        ])  # fmt: skip
    head = ["machine", "load", "network", "batch", "method", "strategy", "one process, ms",
            "two, ms", "data, ms", "arithmetic, ms", "exchange, ms", "two / one",
            "of CPU time"]  # fmt: skip
    return grid(head, rows)


@table
def streaming() -> str:
    """The newest run by block of each size and solver."""
    rows = [
        [
            f"{line['float_bytes'] / 1e9:.2f} GB", str(line["layers"]), line["codes"],
            f"{line['windows']} x {line['tokens']}", f"{line['bytes'] / 1e6:.0f} MB",
            f"{line['peak_bytes'] / 1e9:.2f} GB", f"{line['seconds'] / 60:.0f}",
        ]
        for line in newest(lines("streaming"), "layers", "codes", "windows", "tokens")
    ]  # fmt: skip
    head = ["float weights", "blocks", "codes", "calibration tokens", "packed file", "peak memory",
            "minutes"]  # fmt: skip
    return grid(head, rows)


# ---------------------------------------------------------------- files of other tools


@table
def export_size() -> str:
    """Bytes of the ONNX file over those of the packed file."""
    made = newest(lines("export", case="size"), "network", "levels")
    rows = []
    for network in dict.fromkeys(line["network"] for line in made):
        own = [line for line in made if line["network"] == network]
        cells = [f"{x['bytes']:,} ({x['ratio']:.2f})" for x in own]
        rows.append([network, *cells])
    levels = dict.fromkeys(str(line["levels"]) for line in made)
    return grid(["network", *(f"{n} levels" for n in levels)], rows)


@table
def export_convolutions() -> str:
    """Float32 time over the time of form fast, in the same engine."""
    made = [x for case in ("onnx", "openvino") for x in lines("export", case=case)]
    rows = [
        [x["machine"]["cpu"], x["engine"], x["network"], str(x["batch"]),
         f"{x['float32_ms']['median']:.2f}", f"{x['fast_ms']['median']:.2f}", _ratio(x)]
        for x in newest(made, "case", "network", "batch")
    ]  # fmt: skip
    head = ["machine", "engine", "network", "batch", "float32, ms", "fast, ms", "ratio"]
    return grid(head, rows)


@table
def export_linear() -> str:
    """One Linear layer in onnxruntime: float32 time over the time of form fast."""
    rows = [
        [f"{x['shape'][0]} x {x['shape'][1]}", str(x["levels"]), x["stored"], str(x["batch"]),
         f"{x['float32_ms']['median']:.3f}", f"{x['fast_ms']['median']:.3f}", _ratio(x)]
        for x in newest(_shaped(), "levels", "batch", "size")
    ]  # fmt: skip
    head = ["weight", "levels", "stored as", "batch", "float32, ms", "fast, ms", "ratio"]
    return grid(head, rows)


def _shaped() -> list[Line]:
    return [line | {"size": str(line["shape"])} for line in lines("export", case="linear")]


def _ratio(line: Line) -> str:
    ratio = line["ratio"]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


# ---------------------------------------------------------------- size


@table
def file_size() -> str:
    """Bits per weight on disk, by number of levels."""
    made = lines("file_size", what="cvnn1, first weights")
    rows = []
    for levels in dict.fromkeys(line["levels"] for line in made):
        plain, small = (
            next(x for x in made if x["levels"] == levels and x["compress"] is compress)
            for compress in (False, True)
        )
        rows.append([
            levels, f"{plain['information']:.3f}", f"{plain['entropy']:.3f}",
            f"{plain['disk']:.3f}", f"{small['disk']:.3f}", f"{plain['file_bytes']:,}",
        ])  # fmt: skip
    head = ["levels", "log2 N", "entropy", "bits per weight", "with `compress=True`", "whole file"]
    return grid(head, rows)


# ---------------------------------------------------------------- training


@table
def step_overhead() -> str:
    rows = []
    for line in newest(lines("train_step"), "network", "method"):
        ratio = line["ratio"]
        rows.append([
            line["network"], line.get("method", "lowres"), f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}", f"{line['machine']['cpu']}",
        ])  # fmt: skip
    head = ["network", "method", "time of a step against float32", "quartiles", "CPU"]
    return grid(head, rows)


@table
def integer_run() -> str:
    (line,) = lines("fixed-point")[-1:]
    modes = list(line["batchnorm"])
    formats = ["float32", *sorted((k for k in line["batchnorm"][modes[0]] if k != "float32"),
                                  key=lambda text: -int(text.split()[0]))]  # fmt: skip
    rows = []
    for name in formats:
        cells = []
        for mode in modes:
            found = line["batchnorm"][mode][name]
            cells.append(f"{found:.1f}" if isinstance(found, float) else
                         f"{found['error']:.1f} ({found['other_answers']}, "
                         f"{found['largest_difference']:.2g})")  # fmt: skip
        rows.append([name, *cells])
    return grid(["activations", *(f"BatchNorm {mode}" for mode in modes)], rows)


# ---------------------------------------------------------------- C and GGUF


@table
def export_c() -> str:
    rows = [
        [x["network"], x["form"], x["target"], f"{x['weights']:,}", f"{x['text']:,}",
         f"{x['rodata']:,}", f"{x['flash']:.3f}", f"{x['arrays']:.3f}", f"{x['arena_bytes']:,}"]
        for x in newest(lines("export_c"), "network", "form", "target")
    ]  # fmt: skip
    head = ["network", "form", "target", "weights", "code", "constants", "flash / int8",
            "arrays / int8", "arena"]  # fmt: skip
    return grid(head, rows)


@table
def export_gguf() -> str:
    rows = [
        [str(x["levels"]), ", ".join(f"{n} {k}" for k, n in x["kinds"].items()),
         f"{x['n_bytes']:,}", f"{x['equal']:,} of {x['weights']:,}", f"{x['tokens']:,}"]
        for x in newest(lines("export_gguf"), "levels")
    ]  # fmt: skip
    return grid(["levels", "tensors", "bytes", "weights equal to the bit", "tokens"], rows)


# ---------------------------------------------------------------- reliability


@table
def reliability_kills() -> str:
    """Of the newest run of chaos.py: kills and runs that ended by themselves, by kind."""
    (line,) = lines("reliability", case="chaos")[-1:]
    kinds = [*line["kills"], *(kind for kind in line["ends"] if kind not in line["kills"])]
    rows = [
        [kind, str(line["kills"].get(kind, 0)), str(line["ends"].get(kind, 0))] for kind in kinds
    ]
    rows.append(["all", str(sum(line["kills"].values())), str(sum(line["ends"].values()))])
    head = ["process", "kills", "not reached by the kill"]
    return f"{grid(head, rows)}\n\n{len(line['faults'])} faults in {line['seconds']:.0f} s."


@table
def reliability_fuzz() -> str:
    """Of the newest run of fuzz.py: cases by kind of damage."""
    (line,) = lines("reliability", case="fuzz")[-1:]
    rows = [[kind, f"{n:,}"] for kind, n in line["kinds"].items()]
    rows.append(["all", f"{line['cases']:,}"])
    said = f"{line['reports']} reports in {line['seconds']:.0f} s; {line['refusals']} refusals"
    return f"{grid(['damage to', 'files'], rows)}\n\n{said} that differ."


@table
def reliability_flips() -> str:
    """Of the newest run of flips.py, by encoding."""
    (line,) = lines("reliability", case="flips")[-1:]
    rows = [[name, f"{n:,}"] for name, n in line["files"].items()]
    rows.append(["all", f"{line['flips']:,}"])
    said = f"{line['errors']:,} errors, {line['accepted']} accepted."
    return f"{grid(['file', 'flipped bits'], rows)}\n\n{said}"


# ---------------------------------------------------------------- the README's


# experiment, variation of float, road, network and data; then variations with their bits in words
ACCURACY = (
    ("lowres/options-digits", "train from scratch (LowRes)", "DigitsNet, digits",
     {"5-levels": "5 levels, 2.37 bits"}),
    ("lowres/accuracy-by-levels", "", "CVNN1, CIFAR-10",
     {"5-levels": "5 levels, 2.37 bits", "3-levels": "3 levels, 1.60 bits"}),
    ("sgm/lenet5-mnist", "fine-tune to fixed point (SGM)", "LeNet5, MNIST",
     {"2-bits": "3 levels, 1.60 bits"}),
    ("cora/budgets-resnet20", "convert, no labels (CoRa)", "ResNet-20, CIFAR-10",
     {"4.25-bits": "4.25 bits", "3.45-bits": "3.45 bits", "2.45-bits": "2.45 bits",
      "4-levels": "2.04 bits"}),
)  # fmt: skip


@table
def runtime_speed() -> str:
    """Peers' medians over the runtime's, of the newest line of each network and batch."""
    rows = []
    for line in newest(lines("runtime", case="speed"), "network", "batch", "threads"):
        own, ratios = line["ms"]["subbyte runtime"], line["ratios"]
        peers = [ratios[name] for name in ("OpenVINO int8 (QDQ)", "ORT int8 (QDQ)")]
        rows.append([line["network"], str(line["batch"]), str(line["threads"]),
                     "yes" if line["static"] else "no", f"{own['median']:.2f}",
                     *(f"{ratio:.2f}" for ratio in (*peers, ratios["subbyte, dynamic"])),
                     f"{min(peers):.2f}"])  # fmt: skip
    head = ["network", "batch", "threads", "static scales", "ms", "OpenVINO int8", "ORT int8",
            "rounded at each layer", "the better peer"]  # fmt: skip
    return grid(head, rows)


@table
def runtime_accuracy() -> str:
    rows = []
    for line in newest(lines("runtime", case="accuracy"), "network"):
        top1, loss = line["top1"], line["loss"]
        rows.append([line["network"], str(line["images"]), line["rule"],
                     *(f"{top1[key]:.2f}" for key in ("float32", "dynamic", "int8")),
                     *(f"{loss[key][0]:.2f} ({loss[key][1]:.2f} .. {loss[key][2]:.2f})"
                       for key in ("float32", "dynamic"))])  # fmt: skip
    head = ["network", "images", "rule", "float32 %", "rounded at each layer %", "int8 chain %",
            "loss to float32, points", "loss to rounding at each layer"]  # fmt: skip
    return grid(head, rows)


@table
def runtime_start() -> str:
    rows = []
    for line in newest(lines("runtime", case="start"), "network", "threads"):
        ms = line["ms"]
        rows.append(["open and first result, ms", f"{ms['median']:.0f}"])
    for line in newest(lines("runtime", case="memory"), "network", "threads"):
        rows.append(["memory beyond the file, MiB", f"{line['beyond_the_file_mib']:.1f}"])
    return grid(["ResNet-18, batch 1", "measured"], rows)


@table
def readme_accuracy() -> str:
    """One row per road and budget: float, and what is left; medians over the seeds."""
    rows = []
    for name, road, network, variations in ACCURACY:
        for variation, bits in variations.items():
            own = figures(name, variation, "top1")
            floats = figures(name, "float", "top1") or figures(name, variation, "top1_float")
            sizes = figures(name, variation, "bytes")
            size = f"{statistics.median(sizes):,.0f}" if sizes else ""
            rows.append([road, network, spread(floats, ".2f"), spread(own, ".2f"), bits, size])
            road = ""
    head = ["road", "network, data", "float32, top-1 %", "quantized, top-1 %",
            "per quantized weight", "bytes of the file"]  # fmt: skip
    return grid(head, rows)


def figures(name: str, variation: str, figure: str) -> list[float]:
    """A figure of an experiment's runs that count, by seed."""
    found = lines_of(read_experiment(name, EXPERIMENTS), EXPERIMENTS)
    own = [x["figures"].get(figure) for (v, _), x in sorted(found.items()) if v == variation]
    return [value for value in own if value is not None]


@table
def readme_language() -> str:
    """One row per network and budget, lowest bits last."""
    rows = []
    for network, name in (("minilm", "all-MiniLM-L6-v2, STS-B"),
                          ("smollm2", "SmolLM2-135M, WikiText-2")):  # fmt: skip
        found = newest(lines("language", network=network), "method", "target_bits", "tune")
        before = next(x["score"] for x in found if x["method"] == "float")
        own = [x for x in found if x["method"] != "float"]
        digits = 4 if own[0]["measure"] == "Spearman" else 2
        for x in sorted(own, key=lambda x: -x["bits_per_weight"]):
            rows.append([
                f"{name}, {x['measure']}", f"{before:.{digits}f}", f"{x['score']:.{digits}f}",
                f"{x['bits_per_weight']:.2f} bits",
            ])  # fmt: skip
    return grid(["network, data, measure", "float32", "quantized", "whole network"], rows)


def differing(paths: Iterable[Path]) -> list[str]:
    """Documents whose tables are not what the lines give, and markers without a table."""
    return [str(p.relative_to(ROOT)) for p in paths if rewritten(p.read_text()) != p.read_text()]


def rewritten(text: str) -> str:
    def fresh(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        return f"{start}{TABLES[name]()}\n{end}"

    return MARKED.sub(fresh, text)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, only tell")
    stale = differing(documents())
    if not parser.parse_args().check:
        for name in stale:
            (ROOT / name).write_text(rewritten((ROOT / name).read_text()))
    for name in stale:
        print(name)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
