"""LeNet5 on MNIST: float32, then SGM at 2 bits from there, for several seeds.

    .venv/bin/python benchmarks/mnist_lenet5.py --seeds 0 1 2

Trains examples/mnist-lenet5-{float,sgm2}.toml with each seed (runs that
are complete are only scored again), and appends a line a seed to
benchmarks/results/mnist-lenet5.jsonl. Takes about 10 minutes a seed on one core.
"""

import argparse
import statistics
from dataclasses import replace

from common import ROOT, append

from subbyte.report import size_report
from subbyte.train import RunResult, run
from subbyte.train.config import read_config


def trained(name: str, seed: int, threads: int, weights: str | None = None) -> RunResult:
    """The run of an example with this seed, resumed where it stopped."""
    config = read_config(ROOT / "examples" / f"{name}.toml")
    config = replace(
        config,
        model=replace(config.model, weights=weights),
        train=replace(config.train, seed=seed, threads=threads),
        out=config.out.with_name(f"{name}-seed{seed}"),
    )
    return run(config, resume=(config.out / "checkpoint.pt").is_file())


def measure(seed: int, threads: int) -> dict[str, object]:
    base = trained("mnist-lenet5-float", seed, threads)
    sgm = trained("mnist-lenet5-sgm2", seed, threads, weights=str(base.file))
    last = sgm.history[-1]
    return {
        "seed": seed,
        "float_error": round(100 - base.saved.top1, 3),
        "sgm2_error": round(100 - sgm.saved.top1, 3),
        "sgm2_error_before_rounding": round(100 - last.test_top1, 3),
        "distance": last.distance,
        "changed_by_epoch": [record.changed for record in sgm.history],
        "rounded_error_by_epoch": [
            None if r.rounded_top1 is None else round(100 - r.rounded_top1, 3) for r in sgm.history
        ],
        "epochs": [len(base.history), len(sgm.history)],
        "minutes": round(sum(r.seconds for r in (*base.history, *sgm.history)) / 60, 1),
        "bits_per_weight": size_report(sgm.file).to_dict()["bits_per_weight"]["disk"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows = [measure(seed, options.threads) for seed in options.seeds]
    for row in rows:
        append("mnist-lenet5", row)
    for key in ("float_error", "sgm2_error"):
        values = [row[key] for row in rows]
        print(f"{key}: {values}, mean {statistics.mean(values):.3f} %, "
              f"spread {max(values) - min(values):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
