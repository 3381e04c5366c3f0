"""How long a packed file takes to open, with and without its checksums, and what memory that is.

    python benchmarks/opening.py 50 500

Makes networks of so many megabytes (linear layers of 5 levels), opens each several times in
processes of their own with the file in the page cache, and writes a line per size to
benchmarks/results/opening.jsonl: milliseconds of `load`, and how much more memory of its own the
process holds afterwards.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import append, revision, spread
from torch import nn

import subbyte as sb
from subbyte.core.grids import PerChannel, uniform
from subbyte.core.quantized import Quantized
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor

WIDTH, LEVELS, ROUNDS = 4096, 5, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("megabytes", type=int, nargs="+")
    for size in parser.parse_args().megabytes:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "net.safetensors"
            n_layers = made(path, size)
            found = {
                how: [opened(path, n_layers, how == "verified") for _ in range(ROUNDS)]
                for how in ("verified", "not_verified")
            }
            line = {
                f"{how}_ms": spread([1e3 * run["seconds"] for run in runs])
                for how, runs in found.items()
            }
            grown = {f"{how}_grown_bytes": runs[-1]["grown"] for how, runs in found.items()}
            append("opening", {"revision": revision(), "bytes": path.stat().st_size,
                               "layers": n_layers, **line, **grown})  # fmt: skip


def made(path: Path, megabytes: int) -> int:
    """A file of about that size; returns the number of its layers."""
    grid = uniform(LEVELS, PerChannel())
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(LEVELS, (WIDTH, WIDTH), dtype=torch.uint8, generator=generator)
    weight = QuantizedTensor(codes, torch.ones(WIDTH), grid)
    n_layers = max(1, round(megabytes * 1e6 / weight.n_bytes))
    layers = {str(i): QuantizedLayer(weight) for i in range(n_layers)}
    sb.save(sb.pack(Quantized(network(n_layers), layers)), path)
    return n_layers


def network(n_layers: int) -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n_layers)))


def opened(path: Path, n_layers: int, verify: bool) -> dict[str, float]:
    """Opens the file in a process of its own."""
    told = [sys.executable, __file__, "--child", str(path), str(n_layers), str(int(verify))]
    return json.loads(subprocess.run(told, check=True, capture_output=True, text=True).stdout)


def child(path: str, n_layers: str, verify: str) -> None:
    like = network(int(n_layers))
    before, start = _own_bytes(), time.perf_counter()
    net = sb.load(path, like, verify=bool(int(verify)))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "grown": _own_bytes() - before}))
    del net


def _own_bytes() -> int:
    """Memory of the process that is no file's: pages of a mapped file can be dropped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
