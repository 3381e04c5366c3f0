"""LowRes by number of levels: CVNN1 on CIFAR-10 at equal epochs, from scratch, several seeds.

    python benchmarks/lowres_levels.py [--levels 5 float 3 4 2 9 17] [--seeds 0 1 2] [--epochs 10]

One line for each finished run in benchmarks/results/lowres-cvnn1.jsonl; what has a line is not run
again, and a run that was cut off goes on from its checkpoint. bfloat16 where the CPU has it.
"""

import argparse
from dataclasses import asdict

import torch
from common import ROOT, append, revision
from tables import lines

from subbyte.train import run
from subbyte.train.config import read_config

RESULT = "lowres-cvnn1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", nargs="+", default=["5", "float", "3", "4", "2", "9", "17"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for levels in options.levels:
            one_run(levels, seed, options.epochs)


def one_run(text: str, seed: int, epochs: int) -> None:
    levels = text if text == "float" else int(text)
    if lines(RESULT, levels=levels, seed=seed, epochs=epochs):
        return
    base = "cifar10-cvnn1-float" if levels == "float" else "cifar10-cvnn1-n5"
    changes = {
        "out": f"runs/lowres-cvnn1-n{levels}-s{seed}-e{epochs}", "train.epochs": str(epochs),
        "train.seed": str(seed), "train.precision": "bf16",
    }  # fmt: skip
    if levels != "float":
        changes["method.levels"] = str(levels)
    config = read_config(ROOT / "examples" / f"{base}.toml", changes)
    result = run(config, resume=(config.out / "checkpoint.pt").exists(), quiet=True)
    append(RESULT, {
        "levels": levels, "seed": seed, "epochs": epochs, "precision": "bf16",
        "config": f"examples/{base}.toml", "overrides": changes, "revision": revision(),
        "top1": result.saved.top1, "loss": result.saved.loss, "file_bytes": result.n_bytes,
        "history": [asdict(record) for record in result.history],
    })  # fmt: skip


if __name__ == "__main__":
    main()
