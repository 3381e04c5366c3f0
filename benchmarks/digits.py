"""LowRes on the embedded digits: level counts and every option, several seeds.

    .venv/bin/python benchmarks/digits.py --seeds 0 1 2

Each run is `subbyte.train.run` on the configuration of the demo with one option changed; the score
is that of the packed file, read back. Appends JSON lines to benchmarks/results/digits.jsonl.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from common import append

from subbyte.commands.demo import BASE
from subbyte.core.recipe import Recipe, Rule
from subbyte.methods import LowRes
from subbyte.report import size_report
from subbyte.train import RunConfig, run

VARIANTS: dict[str, LowRes | None] = {
    "float32": None,
    **{f"{n} levels": LowRes(levels=n) for n in (2, 3, 4, 5, 9, 17)},
    "5 levels, gamma frozen": LowRes(levels=5, gamma="frozen"),
    "5 levels, gamma with gradient": LowRes(levels=5, gamma_grad=True),
    "5 levels, std": LowRes(levels=5, statistic="std"),
    "5 levels, per channel": LowRes(levels=5, granularity="channel"),
    "5 levels, power-of-two gamma": LowRes(levels=5, scale_domain="power_of_two"),
    "3 levels, gamma frozen": LowRes(levels=3, gamma="frozen"),
    "3 levels, gamma with gradient": LowRes(levels=3, gamma_grad=True),
    "3 levels, per channel": LowRes(levels=3, granularity="channel"),
}


def configured(method: LowRes | None, seed: int, out: Path, threads: int) -> RunConfig:
    recipe = None if method is None else Recipe((Rule(method=method),))
    return replace(
        BASE, train=replace(BASE.train, seed=seed, threads=threads), recipe=recipe, out=out
    )


def measure(name: str, method: LowRes | None, seeds: list[int], threads: int) -> dict[str, object]:
    top1, reduction = [], 1.0
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            result = run(configured(method, seed, Path(folder), threads), quiet=True)
            top1.append(result.saved.top1)
            reduction = size_report(result.file).reduction if method else 1.0
    return {
        "variant": name,
        "seeds": seeds,
        "epochs": BASE.train.epochs,
        "top1": [round(value, 2) for value in top1],
        "median": round(statistics.median(top1), 2),
        "spread": round(max(top1) - min(top1), 2),
        "reduction": round(reduction, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name, method in VARIANTS.items():
        row = measure(name, method, options.seeds, options.threads)
        append("digits", row)
        print(f"{name:32} {row['median']:6.2f} (spread {row['spread']:.2f})  {row['reduction']}x",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
