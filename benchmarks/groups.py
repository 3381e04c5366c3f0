"""What scales per group of inputs cost: products beside those with a scale per channel.

    python benchmarks/groups.py [--rows 4096] [--inputs 4096]

In turn, round by round, on one thread: each group size and the scale per channel. Batch 1 goes
through copies with distinct memory, so that weights come from memory and not from a cache. Times
are those of the processor (time.process_time), since other processes share it; a ratio is taken
within its round. Adds a line to benchmarks/results/groups.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from common import append, spread
from torch import nn

import subbyte as sb
from subbyte import kernels
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor

LEVELS = (3, 4, 5, 16)
SIZES = (None, 32, 64, 128)
COLD_BYTES = 96 << 20  # of panels, for each of SIZES
CALLS = {1: 64, 64: 4}  # about, in a sample; by the batch


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    rows = [measured(levels, batch, options) for levels in LEVELS for batch in (1, 64)]
    shape = [options.rows, options.inputs]
    print(append("groups", {"tier": kernels.tier(), "shape": shape, "rows": rows}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def measured(levels: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds a product, and ratios to the scale per channel, by group size."""
    x = torch.randn(batch, options.inputs)
    layers = {size: layers_of(levels, size, batch, options) for size in SIZES}
    times: dict[int | None, list[float]] = {size: [] for size in SIZES}
    with torch.inference_mode():
        for i in range(options.rounds + 1):
            for size in SIZES if i % 2 else reversed(SIZES):
                seconds = sample(layers[size], x)
                times[size] += [seconds] if i else []  # the first round repacks
    found = {}
    for size, own in times.items():
        ratios = [a / b for a, b in zip(own, times[None], strict=True)]
        found[str(size or "channel")] = {
            "us": spread(own) * 1e6, "ratio": spread(ratios), "bits": panel_bits(layers[size][0]),
        }  # fmt: skip
    shown = ", ".join(f"{name} {row['ratio'].median:.2f}" for name, row in found.items())
    print(f"{levels} levels, batch {batch}: {shown}", flush=True)
    return {"levels": levels, "batch": batch, "copies": len(layers[None]), "by_size": found}


def layers_of(levels: int, size: int | None, batch: int, options: argparse.Namespace) -> list[Any]:
    """Copies of one packed layer with scales in float16."""
    rows, inputs = options.rows, options.inputs
    sharing = sb.PerChannel(0) if size is None else sb.PerGroup(size)
    codes = torch.randint(levels, (rows, inputs), dtype=torch.uint8)
    scale = (torch.rand(rows if size is None else rows * -(-inputs // size)) + 0.5).half().float()
    grid = sb.uniform(levels, sharing, sb.ScaleDomain.FLOAT16)
    layer = QuantizedLayer(QuantizedTensor(codes, scale, grid), None)
    first = sb.pack(sb.Quantized(nn.Linear(inputs, rows, bias=False), {"": layer}))
    first(torch.randn(1, inputs))
    n = -(-COLD_BYTES // kernels.panel_bytes(first.packed.words)) if batch == 1 else 1
    return [first, *(copy.deepcopy(first) for _ in range(n - 1))]


def sample(layers: list[Any], x: torch.Tensor) -> float:
    """Seconds of one product, the mean of a few."""
    passes = max(1, CALLS[len(x)] // len(layers))
    start = time.process_time()
    for _ in range(passes):
        for layer in layers:
            layer(x)
    return (time.process_time() - start) / (passes * len(layers))


def panel_bits(layer: Any) -> float:
    """Bits a weight in memory; scales per channel, which a panel does not count, left out."""
    return round(8 * kernels.panel_bytes(layer.packed.words) / layer.packed.n_weights, 3)


if __name__ == "__main__":
    main()
