"""What a call of a small packed layer costs, beside another tree of this repository.

    python benchmarks/call_overhead.py                      # this tree alone
    python benchmarks/call_overhead.py --against ../before  # both in turn: ratios, before / now

Each tree runs in processes of its own, one after the other and back, so that a change of the
machine's speed meets both. Appends a line to benchmarks/results/call_overhead.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from common import ROOT, append, spread

MEASURE = """
import sys
# An editable install answers for `subbyte` before any path is asked: its finder has to go.
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
import json, torch, subbyte as sb
from torch import nn
from subbyte.bench.timing import in_turn
torch.set_num_threads(1)
torch.manual_seed(0)

def packed(layer):
    model = nn.Sequential(layer)
    sb.prepare(model, sb.LowRes(levels=3))
    return sb.pack(model, sb.freeze(model))[0]

small, square = packed(nn.Linear(64, 10)), packed(nn.Linear(1024, 1024))
conv = packed(nn.Conv2d(64, 64, 3, padding=1))
inputs = torch.randn(1, 64), torch.randn(1, 1024), torch.randn(1, 64, 14, 14)
bare = nn.Linear(64, 10)

def quiet(layer, x):
    @torch.no_grad()
    def call():
        for _ in range(20):
            layer(x)
    return call

def loud(layer, x):
    def call():
        for _ in range(20):
            layer(x)
    return call

calls = {
    "linear 10x64": quiet(small, inputs[0]),
    "linear 10x64, gradients on": loud(small, inputs[0]),
    "linear 1024x1024": quiet(square, inputs[1]),
    "conv 3x3 64@14": quiet(conv, inputs[2]),
    "nn.Linear 10x64": quiet(bare, inputs[0]),
    "nn.Linear 10x64, gradients on": loud(bare, inputs[0]),
}
times = in_turn(calls, SECONDS)
print(json.dumps({name: time.median / 20 * 1e6 for name, time in times.items()}))
"""


def measured(tree: Path, seconds: float) -> dict[str, float]:
    """Microseconds a call, by case, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE.replace("SECONDS", str(seconds))],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another tree, with its core built")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a process")
    options = parser.parse_args()
    trees = ({"before": options.against} if options.against else {}) | {"now": ROOT}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for turn in range(options.rounds):
        for name in list(trees)[:: 1 if turn % 2 else -1]:
            found[name].append(measured(trees[name], options.seconds))
    rows = {
        case: {name: spread([run[case] for run in runs]) for name, runs in found.items()}
        for case in found["now"][0]
    }
    ratios = {
        case: spread([b[case] / n[case] for b, n in zip(*found.values(), strict=True)])
        for case in (rows if options.against else ())
    }
    append("call_overhead", {"us": rows, "before_by_now": ratios})
    for case, row in rows.items():
        shown = ", ".join(f"{name} {value.median:.2f} us" for name, value in row.items())
        print(f"{case:28} {shown}", f"ratio {ratios[case]}" if ratios else "")


if __name__ == "__main__":
    main()
