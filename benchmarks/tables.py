"""Tables and figures of the documents, made from the raw lines in benchmarks/results/.

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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
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


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


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


def spread(values: Sequence[float]) -> str:
    """Mean and range over seeds: 91.70 (0.14); one value alone as it is."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ({max(values) - min(values):.2f})"


def seeds_of(found: Sequence[Line]) -> str:
    return ", ".join(str(line["seed"]) for line in found)


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


# ---------------------------------------------------------------- LowRes


@table
def lowres_digits() -> str:
    rows = []
    for line in newest(lines("digits"), "variant"):
        each = ", ".join(f"{value:.2f}" for value in line["top1"])
        rows.append([
            line["variant"], f"{line['median']:.2f} ({line['spread']:.2f})", each,
            f"{line['reduction']:.1f}x",
        ])  # fmt: skip
    head = ["weights", "top-1 %, median (spread)", "each seed", "quantized layers smaller by"]
    return grid(head, rows)


@table
def lowres_cvnn1() -> str:
    """One row per number of levels, float first."""
    found = newest(lines("lowres-cvnn1"), "levels", "seed")
    order = sorted({x["levels"] for x in found}, key=lambda n: 1000 if n == "float" else n)
    floats = {x["seed"]: x["top1"] for x in found if x["levels"] == "float"}
    rows = []
    for levels in reversed(order):
        own = sorted((x for x in found if x["levels"] == levels), key=lambda x: x["seed"])
        paired = [x["top1"] - floats[x["seed"]] for x in own if x["seed"] in floats]
        gap = "" if levels == "float" or not paired else f"{statistics.mean(paired):+.2f}"
        rows.append([
            "float32" if levels == "float" else str(levels), spread([x["top1"] for x in own]),
            seeds_of(own), gap, f"{own[-1]['file_bytes']:,}",
        ])  # fmt: skip
    return grid(["levels", "top-1 %", "seeds", "against float", "bytes of the file"], rows)


@table
def lowres_text() -> str:
    return _sequences("text", 3)


@table
def lowres_series() -> str:
    return _sequences("series", 4)


def _sequences(case: str, digits: int) -> str:
    """One row per number of levels, float first."""
    found = newest(lines("lowres-sequences", case=case), "levels", "seed")
    floats = {x["seed"]: x["score"] for x in found if x["levels"] == "float"}
    rows = []
    for levels in sorted({x["levels"] for x in found}, key=str, reverse=True):
        own = sorted((x for x in found if x["levels"] == levels), key=lambda x: x["seed"])
        scores = [x["score"] for x in own]
        gaps = [x["score"] - floats[x["seed"]] for x in own if x["seed"] in floats]
        rows.append([
            "float32" if levels == "float" else str(levels),
            f"{statistics.mean(scores):.{digits}f} ({max(scores) - min(scores):.{digits}f})",
            seeds_of(own), "" if levels == "float" else f"{statistics.mean(gaps):+.{digits}f}",
            f"{own[-1]['bytes']:,}",
        ])  # fmt: skip
    head = ["levels", f"{found[0]['measure']}, mean (range)", "seeds", "against float", "bytes"]
    return grid(head, rows)


# ---------------------------------------------------------------- SGM and its neighbours


@table
def sgm_mnist() -> str:
    found = sorted(newest(lines("mnist-lenet5"), "seed"), key=lambda x: x["seed"])
    rows = [
        [what, spread([x[key] for x in found]), ", ".join(f"{x[key]:.2f}" for x in found)]
        for what, key in (
            ("float32", "float_error"),
            ("SGM, 2 bits", "sgm2_error"),
            ("the same before rounding", "sgm2_error_before_rounding"),
        )
    ]
    return grid(["weights", "error %, mean (spread)", f"seeds {seeds_of(found)}"], rows)


@table
def sgm_resnet20() -> str:
    rows = []
    for line in newest(lines("cifar10-resnet20"), "run"):
        before = line.get("error_before_rounding")
        rows.append([
            line["run"], str(line["epochs"]), f"{line['error']:.2f}",
            "" if before is None else f"{before:.2f}",
        ])  # fmt: skip
    return grid(["run", "epochs", "error %", "before rounding"], rows)


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


# ---------------------------------------------------------------- CoRa


def _cora(network: str, methods: Sequence[str]) -> str:
    found = newest(lines("cora", network=network), "method", "seed")
    rows = []
    for method in methods:
        own = sorted((x for x in found if x["method"] == method), key=lambda x: x["seed"])
        if own:
            seconds = statistics.median(x["seconds"] for x in own)
            rows.append([
                method, f"{statistics.median(x['bits_per_weight'] for x in own):.3f}",
                f"{own[-1]['bytes']:,}", spread([x["top1"] for x in own]),
                f"{own[-1]['top1_float']:.2f}", seeds_of(own),
                f"{seconds:.0f}",
            ])  # fmt: skip
    head = ["budget", "bits per quantized weight", "bytes of the file", "top-1 %", "float", "seeds",
            "seconds"]  # fmt: skip
    return grid(head, rows)


BUDGETS = ("4.25 bits", "3.45 bits", "2.45 bits")
PLAIN = ("4 levels", "3 levels", "published, 4 bits", "published, 3 bits")


@table
def cora_resnet20() -> str:
    return _cora("resnet20", (*BUDGETS, *PLAIN))


@table
def cora_vit() -> str:
    return _cora("vit1", (*BUDGETS, "4 bits", "3 bits"))


@table
def cora_mobilenet() -> str:
    return _cora("mobilenetv1", (*BUDGETS, *(f"{b}, not tuned" for b in BUDGETS)))


@table
def cora_squeezenet() -> str:
    return _cora("squeezenet11", (*BUDGETS, *(f"{b}, not tuned" for b in BUDGETS)))


@table
def block_reconstruction() -> str:
    rows = []
    for x in lines("block-reconstruction"):
        whole = x["seconds_of_20000_multiplied_out"]
        times = whole if isinstance(whole, list) else [whole]
        rows.append([
            str(x["iterations"]), " and ".join(f"{t:,.0f}" for t in times),
            f"{x['cora_seconds']:,.0f}" if "cora_seconds" in x else "",
            _or_blank(x.get("top1")), _or_blank(x.get("cora_top1")),
        ])  # fmt: skip
    head = ["iterations per block that were run", "seconds of 20 000, multiplied out",
            "seconds of CoRa", "top-1 %", "top-1 % of CoRa"]  # fmt: skip
    return grid(head, rows)


def _or_blank(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


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


# ---------------------------------------------------------------- the README's


@table
def readme_accuracy() -> str:
    """One row per road: network, float, and what is left at how many bits."""
    digits = {x["variant"]: x for x in newest(lines("digits"), "variant")}
    mnist = newest(lines("mnist-lenet5"), "seed")
    cora = newest(lines("cora", network="resnet20"), "method", "seed")
    rows = [[
        "train from scratch (LowRes)", "DigitsNet, digits", f"{digits['float32']['median']:.2f}",
        f"{digits['5 levels']['median']:.2f}", "5 levels, 2.37 bits",
    ]]  # fmt: skip
    levels = newest(lines("lowres-cvnn1"), "levels", "seed")
    floats = [x["top1"] for x in levels if x["levels"] == "float"]
    for n, bits in ((5, "2.37"), (3, "1.60")):
        own = [x["top1"] for x in levels if x["levels"] == n]
        if own and floats:
            rows.append(["", "CVNN1, CIFAR-10", spread(floats), spread(own),
                         f"{n} levels, {bits} bits"])  # fmt: skip
    rows.append([
        "fine-tune to fixed point (SGM)", "LeNet5, MNIST",
        f"{100 - statistics.mean(x['float_error'] for x in mnist):.2f}",
        f"{100 - statistics.mean(x['sgm2_error'] for x in mnist):.2f}", "3 levels, 1.60 bits",
    ])  # fmt: skip
    for i, name in enumerate((*BUDGETS, "4 levels")):
        own = [x for x in cora if x["method"] == name]
        bits = statistics.median(x["bits_per_weight"] for x in own)
        rows.append([
            "convert, no labels (CoRa)" if i == 0 else "", "ResNet-20, CIFAR-10",
            f"{own[0]['top1_float']:.2f}", spread([x["top1"] for x in own]), f"{bits:.2f} bits",
        ])  # fmt: skip
    head = ["road", "network, data", "float32, top-1 %", "quantized, top-1 %",
            "per quantized weight"]  # fmt: skip
    return grid(head, rows)


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
