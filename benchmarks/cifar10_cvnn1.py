"""CVNN1 on CIFAR-10, 5 levels against float32, same epochs: table, curves and raw lines.

    .venv/bin/python benchmarks/cifar10_cvnn1.py [--fresh]

Trains (or resumes, or, if the runs are complete, only scores) the two examples, then writes
docs/results/cifar10-cvnn1.{md,png} and appends to benchmarks/results/cifar10-cvnn1.jsonl.
"""

import argparse
from pathlib import Path

from common import ROOT, append, machine

from subbyte.report import size_report
from subbyte.storage import read
from subbyte.train import RunResult, run
from subbyte.train.config import read_config
from subbyte.train.curves import save_curves

CONFIGS = {"float32": "cifar10-cvnn1-float", "5 levels": "cifar10-cvnn1-n5"}
PAGE = ROOT / "docs" / "results" / "cifar10-cvnn1.md"


def trained(name: str, fresh: bool) -> RunResult:
    config = read_config(ROOT / "examples" / f"{name}.toml")
    resume = not fresh and (config.out / "checkpoint.pt").is_file()
    return run(config, resume=resume, fresh=fresh)


def figures(name: str, result: RunResult) -> dict[str, object]:
    """One JSON line: the score of the file that was saved, its size and every epoch."""
    line: dict[str, object] = {
        "version": name,
        "config": f"examples/{CONFIGS[name]}.toml",
        "epochs": len(result.history),
        "top1": result.saved.top1,
        "top1_before_saving": result.trained.top1,
        "loss": result.saved.loss,
        "file_bytes": result.n_bytes,
        "train_minutes": round(sum(r.seconds for r in result.history) / 60, 1),
        "test_top1_by_epoch": [r.test_top1 for r in result.history],
    }
    if name != "float32":
        sizes = size_report(result.file).to_dict()
        line |= {key: sizes[key] for key in ("weights", "layer_bytes", "reduction", "entropy")}
        line["bits_per_weight"] = sizes["bits_per_weight"]
        assert read(result.file).network is not None
    return line


def page(lines: dict[str, dict[str, object]]) -> str:
    """The result as a document, made of the lines."""
    rows = []
    for name, line in lines.items():
        bits = line.get("bits_per_weight")
        disk = f"{bits['disk']:.3f}" if isinstance(bits, dict) else "32"
        rows.append(
            f"| {name} | {line['top1']:.2f} | {line['top1_before_saving']:.2f} | {disk} | "
            f"{line.get('reduction', 1.0):.1f}x | {line['file_bytes']:,} | "
            f"{line['train_minutes']} |"
        )
    gap = float(str(lines["float32"]["top1"])) - float(str(lines["5 levels"]["top1"]))
    where = machine()
    examples = " and ".join(f"`examples/{config}.toml`" for config in CONFIGS.values())
    return "\n".join([
        "# CIFAR-10, CVNN1: 5 levels against float32",
        "",
        f"`python benchmarks/cifar10_cvnn1.py`, which runs `subbyte train` on {examples}: every "
        f"layer at 5 levels, first and last too; {lines['float32']['epochs']} epochs each, one "
        "seed (0), nothing tuned "
        "for either. Top-1 on the 10 000 test images; for 5 levels of the packed file, read back.",
        "",
        f"Machine: {where['cpu']}, {where['cores']} cores shared by both runs at once and by other "
        f"work (so the minutes are no measure of speed), torch {where['torch']}.",
        "",
        "| weights | top-1 % | before saving | bits per weight on disk | quantized layers smaller "
        "by | file bytes | minutes of training |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"The gap is **{gap:.2f} points**.",
        "",
        "![loss and accuracy over the epochs](cifar10-cvnn1.png)",
        "",
        "Raw lines: `benchmarks/results/cifar10-cvnn1.jsonl`.",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="train again from the start")
    fresh = parser.parse_args().fresh
    results = {name: trained(config, fresh) for name, config in CONFIGS.items()}
    lines = {name: figures(name, result) for name, result in results.items()}
    for line in lines.values():
        append("cifar10-cvnn1", line)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    save_curves({name: r.history for name, r in results.items()}, PAGE.with_suffix(".png"))
    PAGE.write_text(page(lines))
    print(PAGE.read_text(), Path(PAGE).relative_to(ROOT))


if __name__ == "__main__":
    main()
