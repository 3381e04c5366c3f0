"""ResNet-20 on CIFAR-10 from pretrained weights: SGM at 2 and 3 bits, TWN and LSQ. Page and lines.

    .venv/bin/python benchmarks/cifar10_resnet20.py [--only sgm2 lsq2 ...]

Trains (or resumes, or, if a run is complete, only scores) examples/cifar10-resnet20-*.toml, appends
a line each to benchmarks/results/cifar10-resnet20.jsonl and writes docs/results/cifar10-resnet20.md
with the picture of the weights gathering.
"""

import argparse
import json
import shutil
from pathlib import Path

from common import RESULTS, ROOT, append

from subbyte.report import size_report
from subbyte.train import run
from subbyte.train.config import read_config

RUNS = {
    "sgm2": "SGM, 2 bits (3 levels)",
    "sgm3": "SGM, 3 bits (7 levels)",
    "sgm2-long": "SGM, 2 bits, later gathering",
    "sgm3-long": "SGM, 3 bits, later gathering",
    "sgm2-reach": "SGM, 2 bits, reach 0.05",
    "sgm3-reach": "SGM, 3 bits, reach 0.05",
    "sgm2-even": "SGM, 2 bits, reach 0.05, even pulls",
    "sgm2-again": "SGM, 2 bits, reach 0.05, gathered again",
    "lsq2": "LSQ, 3 levels",
    "twn": "TWN, 3 levels",
}
SHOWN = ("sgm2-reach", "sgm3-reach")  # with their pictures
PAGE = ROOT / "docs" / "results" / "cifar10-resnet20.md"

HEAD = """# ResNet-20 on CIFAR-10 at 2 and 3 bits

All layers are quantized, first and last too. Float: 8.27 % error. One seed, scores of the packed
files, read back. Made by `python benchmarks/cifar10_resnet20.py`; raw lines in
`benchmarks/results/cifar10-resnet20.jsonl`.

| method | starts from | epochs | error % | before rounding | distance | bits | minutes |
|---|---|---|---|---|---|---|---|
"""
TAIL = """

Bits are a weight, on disk. Machine: {where}, torch {torch},
one thread a run, runs side by side on shared cores: minutes say little.
SGM learns from a float teacher (the pretrained network; 90 % of the loss), LSQ and TWN from the
labels alone, so the rows say what each run reached and not which method is better. The goals of
SGM, 8.9 % at 2 bits and 8.4 % at 3, are missed.

What was tried, in the order of the rows. The teacher and twice the epochs brought 2 bits from 12.9
% to 9.90 %. Later gathering: the float weights come to 8.43 % while still 12 % of a step from their
modes (20 epochs, epoch 15), but bringing them there at the low learning rate of the end costs 1.5
points. A short reach (`SGM(reach=0.05)`, plain exponential growth): weights gather in the first
half of the run, at a high rate, and norms learn in the other half. That is 0.25 points better at 2
bits, and 0.7 at 3 (in 6 epochs instead of 3). At 2 bits, 6 epochs of one schedule gave 10.95 % with
the papers' reach and 10.94 % with a short one (`subbyte train examples/cifar10-resnet20-sgm2.toml
--set train.epochs=6 --set method.late=2.5` with `method.start=4e-4`, and with 2e-3,
`method.end=100` and `method.reach=0.05`): so what helps is early gathering, it seems, and the short
reach lets it happen. Once weights sit on their modes hardly one changes: 0.8 % of them in epoch 5
of 14 and none from epoch 10 on, where TWN, whose forward pass sees rounded weights from the first
step, moves 5 to 7 % in the middle of its run.

Even pulls: a layer's weights are gathered when the pull passes its gradients, and those of the
first layers, in steps of the grid, are 3 to 9 times those of the last. With pulls in that
proportion (rules of their own in the configuration) all layers gather at one time, and over 8
epochs rather than 5, at rates from 0.04 to 0.027. That is no better: at the same distance to the
modes the training loss is the same (0.61 at 4.6 % after 8 epochs, 0.62 at 4.7 % after 5), and it
ends higher, at 0.42, not 0.39. So a quick gathering finds what a slow one does, and first layers
that gather last do no harm. What is missing, it seems, is the search that TWN does while the rate
falls, when 5 to 0.4 % of its weights still change in an epoch and its accuracy rises most.

Gathered again: the network of the short reach (its file), let go at a rate of 0.02 and a pull of
0.025 and gathered in 5 more epochs. At the same distance to the modes the training loss is far
lower than the first time (0.45 at 3.0 %, after 0.54 at 2.6 %), and it ends at 0.367, not 0.389;
but not one weight in 500 changes, and of the test images 9.77 % are wrong at the end (rounded, as
its log says; `subbyte train examples/cifar10-resnet20-sgm2-again.toml`), which is no better.

What SGM does at 2 bits, with a short reach: on top accuracy, the distance to the levels with the
share of weights that changed level, and the pull; below, the weights of each layer over the epochs.

![the weights of each layer over the epochs](cifar10-resnet20-sgm2-reach.png)

The same at 3 bits. The first layer, whose gradients are largest, gathers last.

![the same at 3 bits](cifar10-resnet20-sgm3-reach.png)
"""


def measure(name: str) -> dict[str, object]:
    config = read_config(ROOT / "examples" / f"cifar10-resnet20-{name}.toml")
    result = run(config, resume=(config.out / "checkpoint.pt").is_file())
    last, sizes = result.history[-1], size_report(result.file).to_dict()
    modes = config.out / "modes.png"
    if name in SHOWN and modes.is_file():
        shutil.copy(modes, PAGE.with_name(f"cifar10-resnet20-{name}.png"))
    return {
        "run": name,
        "config": f"examples/cifar10-resnet20-{name}.toml",
        "start": Path(config.model.weights or "").name,
        "epochs": len(result.history),
        "error": round(100 - result.saved.top1, 2),
        "error_before_rounding": round(100 - last.test_top1, 2),
        "distance": last.distance,
        "changed_by_epoch": [record.changed for record in result.history],
        "rounded_top1_by_epoch": [record.rounded_top1 for record in result.history],
        "top1_by_epoch": [record.test_top1 for record in result.history],
        "train_minutes": round(sum(r.seconds for r in result.history) / 60, 1),
        "file_bytes": result.n_bytes,
        "bits_per_weight": sizes["bits_per_weight"]["disk"],
    }


def page() -> str:
    """Made of the newest line of each run."""
    newest = {}
    for text in (RESULTS / "cifar10-resnet20.jsonl").read_text().splitlines():
        line = json.loads(text)
        newest[line["run"]] = line
    rows = []
    for name, title in RUNS.items():
        if name not in newest:
            continue
        line = newest[name]
        distance = line["distance"] if line["rounded_top1_by_epoch"][-1] is not None else None
        rows.append(
            f"| {title} | {line['start']} | {line['epochs']} | {line['error']:.2f} | "
            f"{line['error_before_rounding']:.2f} | "
            f"{'' if distance is None else f'{distance:.2%}'} | {line['bits_per_weight']:.3f} | "
            f"{line['train_minutes']:.0f} |"
        )
    machine = next(iter(newest.values()))["machine"]
    where = f"{machine['cores']} cores {machine['cpu']}, Python {machine['python']}"
    return HEAD + "\n".join(rows) + TAIL.format(where=where, torch=machine["torch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    for name in parser.parse_args().only:
        line = measure(name)
        append("cifar10-resnet20", line)
        print(f"{name}: {line['error']:.2f} % error", flush=True)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
