"""Packed products beside other engines, and beside what the machine can do.

    make bench-peers                                   # the engines into .venv, then every case
    .venv/bin/python benchmarks/kernels.py             # every case, then docs/results/kernels.md
    .venv/bin/python benchmarks/kernels.py --only linear-4096-b8 --real-time
    .venv/bin/python benchmarks/kernels.py --page      # the page again, from the lines there are

A case is a process of its own that measures everything in turn, round by round, checks every
engine's result against float64 once, and appends a line to benchmarks/results/kernels.jsonl. hot:
one layer again and again. cold: copies with distinct weights, 160 MB of them if 192 copies do.
--real-time gives the process priority over all others (Linux, as root): for machines that are busy.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import append
from torch import Tensor, nn

import subbyte as sb
from subbyte import _native, kernels
from subbyte.bench import Spread, bench, in_turn
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor
from subbyte.kernels import Precision
from subbyte.models import build

LEVELS = (3, 5)
OURS: tuple[tuple[int, Precision], ...] = ((3, "int8"), (5, "int8"), (3, "float32"))
ZOO = {  # networks and their inputs; those left out have the same layers as one of these
    "fcnn1": (3, 32, 32), "fcnn2": (3, 32, 32), "cvnn1": (3, 32, 32), "cvnn2": (3, 32, 32),
    "vit1": (3, 32, 32), "vit2": (3, 32, 32), "lenet5": (1, 28, 28), "vgg7": (3, 32, 32),
    "resnet20": (3, 32, 32), "squeezenet11": (3, 224, 224), "mobilenetv1": (3, 224, 224),
    "digitsnet": (1, 8, 8),
}  # fmt: skip
READ_BYTES, CACHED_BYTES = 1 << 28, 1 << 22  # from memory; from caches, the size of a panel
SPIN_ROUNDS = 200_000
MOST_ERROR = 0.05  # relative to the result's root mean square; above it an engine is not computing


def main() -> None:
    options = parse()
    if options.only:
        torch.set_num_threads(options.threads)
        if options.real_time:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
        path = append("kernels", CASES[options.only](options))
        print(f"{options.only}: added to {path.name}")
        return
    for name in () if options.page else CASES:
        command = [sys.executable, __file__, "--only", name, *sys.argv[1:]]
        if subprocess.run(command, check=False).returncode:
            print(f"{name} failed; the other cases go on", file=sys.stderr)
    from kernels_page import write_page

    print(write_page())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="of measuring, a case")
    parser.add_argument("--real-time", action="store_true", help="priority over other processes")
    parser.add_argument("--page", action="store_true", help="only write the page")
    return parser.parse_args()


# ---------------------------------------------------------------- one case


def measured(
    entries: dict[str, tuple[Any, float]], options: argparse.Namespace, **what: Any
) -> dict[str, Any]:
    """Times and errors of engines, interleaved with the machine's own rates.

    entries: name -> (a Peer, bytes of packed weights that one of its copies reads).
    """
    threads = options.threads
    tier = kernels.tier()
    reading = {"read": READ_BYTES, "cached": CACHED_BYTES}
    calls: dict[str, Callable[[], object]] = {name: p.run for name, (p, _) in entries.items()}
    for name, size in reading.items():
        calls[name] = partial(_native.Stream(size).read, 1, threads)
    calls["int8"] = partial(_native.spin_int8, tier, SPIN_ROUNDS, threads)
    calls["float32"] = partial(_native.spin_float, SPIN_ROUNDS, threads)
    products = {name: calls[name]() for name in ("int8", "float32")}
    gc.collect()
    gc.freeze()
    with torch.inference_mode():
        found = in_turn(calls, options.seconds)
    roofs = {
        "read_gb_s": READ_BYTES / found["read"].median / 1e9,
        "cached_gb_s": CACHED_BYTES / found["cached"].median / 1e9,
        "int8_gops": 2 * products["int8"] / found["int8"].median / 1e9,
        "float32_gflops": 2 * products["float32"] / found["float32"].median / 1e9,
    }
    rows = {
        name: {"ms": found[name] * (1000 / p.copies), "bytes": n_bytes, "copies": p.copies}
        for name, (p, n_bytes) in entries.items()
    }
    show(rows)
    return {
        "case": options.only, "tier": tier, "real_time": options.real_time, **what,
        "roofs": roofs, "rows": rows,
    }  # fmt: skip


def show(rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        ms: Spread = row["ms"]
        print(f"  {name:36s} {ms.median:9.4f} ms ({ms.low:.4f} .. {ms.high:.4f}, n = {ms.n})")


def check(name: str, result: Any, exact: Any) -> float:
    """The engine's error; says so where it computes something else."""
    from peers import error

    found = error(np.asarray(result), exact)
    if not found <= MOST_ERROR:
        print(f"  {name} is off by {found:.3g} of the result: not the same product", flush=True)
    return found


# ---------------------------------------------------------------- Linear


def linear(
    rows: int, k: int, batch: int, cold: bool, options: argparse.Namespace
) -> dict[str, Any]:
    from peers import PEERS, Problem, linear_peers

    problem = Problem.random(rows, k, batch)
    entries, errors = {}, {}
    exact = problem.exact()
    with torch.inference_mode():
        for levels, precision in OURS:
            peer, n_bytes, wanted = ours(problem, levels, cold, precision)
            entries[peer.name] = (peer, n_bytes)
            peer.run()
            errors[peer.name] = check(peer.name, peer.result(), wanted)
        for peer in linear_peers(problem, cold, options.threads):
            entries[peer.name] = (peer, rows * k * PEERS[peer.name][0] / 8)
            peer.run()
            errors[peer.name] = check(peer.name, peer.result(), exact)
    what = {"shape": [rows, k], "batch": batch, "cold": cold, "errors": errors}
    return measured(entries, options, operations=2 * rows * k * batch, **what)


def ours(problem: Any, levels: int, cold: bool, precision: Precision) -> tuple[Any, int, Any]:
    """Packed modules as users call them; bytes of a panel; the exact result."""
    from peers import Peer, copies

    codes = problem.codes + 1
    if levels != 3:
        codes = np.random.default_rng(1).integers(0, levels, codes.shape, dtype=np.uint8)
    grid = sb.uniform(levels, sb.PerChannel(0))
    scale = torch.from_numpy(problem.scale)
    weight = QuantizedTensor(torch.from_numpy(codes.astype(np.uint8)), scale, grid)
    with torch.device("meta"):
        like = nn.Linear(codes.shape[1], codes.shape[0], bias=False)
    first = sb.pack(sb.Quantized(like, {"": QuantizedLayer(weight, None)}), precision=precision)
    x = torch.from_numpy(problem.x)
    first(x)
    n_bytes = kernels.panel_bytes(first.packed.words)
    n = copies(8 * n_bytes / codes.size, problem, cold)
    layers = [first, *(copy.deepcopy(first) for _ in range(n - 1))]

    def run() -> None:
        for layer in layers:
            layer(x)

    exact = x.double() @ weight.dequantize().double().T
    return (
        Peer(called(levels, precision), run, lambda: first(x).numpy(), n),
        n_bytes,
        exact.numpy(),
    )


def called(levels: int, precision: Precision) -> str:
    return f"subbyte {levels} levels" + (", float32" if precision == "float32" else "")


# ---------------------------------------------------------------- ResNet-18


def resnet18(batch: int, options: argparse.Namespace) -> dict[str, Any]:
    import openvino as ov
    from peers import Peer, openvino_peer, ort_peer
    from resnet18 import float_onnx, folded, images, int8_onnx, packed_resnet

    x = images(batch)
    entries, errors = {}, {}

    def module(name: str, net: nn.Module, exact: Tensor) -> None:
        entries[name] = (Peer(name, lambda: net(x), lambda: net(x).numpy()), 0)
        errors[name] = check(name, net(x), exact.numpy())

    with torch.inference_mode():
        for levels in LEVELS:
            net, twin = packed_resnet(levels)
            exact = copy.deepcopy(twin).double()(x.double())
            module(f"subbyte {levels} levels", net, exact)
            module(f"subbyte {levels} levels, fused", sb.fuse(net), exact)
            if levels != LEVELS[0]:
                continue
            peer = runtime_peer(sb.fuse(net), x, options.threads)
            entries[peer.name] = (peer, 0)
            errors[peer.name] = check(peer.name, peer.result(), exact.numpy())
            single = sb.fuse(net)
            for layer in single.modules():
                if hasattr(layer, "precision"):
                    layer.precision = "float32"
            module(f"{called(levels, 'float32')}, fused", single, exact)
            wanted, plain = exact, twin.to(memory_format=torch.channels_last)
            module("torch float32", plain, exact)
            fused = folded(plain)
            module("torch float32, BatchNorm folded", fused, exact)
        model = float_onnx(fused, batch)
        narrow = int8_onnx(model, batch)
        inputs = x.contiguous().numpy()
        core = ov.Core()
        for peer in (
            ort_peer("ORT float32", model, inputs, options.threads),
            ort_peer("ORT int8 (QDQ)", narrow, inputs, options.threads),
            openvino_peer("OpenVINO float32", core.read_model(model), inputs, options.threads),
            openvino_peer("OpenVINO int8 (QDQ)", core.read_model(narrow), inputs, options.threads),
        ):
            peer.run()
            entries[peer.name] = (peer, 0)
            errors[peer.name] = check(peer.name, peer.result(), wanted.numpy())
    what = {"network": "ResNet-18", "input": [3, 224, 224], "batch": batch, "errors": errors}
    return measured(entries, options, operations=2 * 1_814_073_344 * batch, **what)


def runtime_peer(net: nn.Module, x: Tensor, threads: int) -> Any:
    """A packed network of 3 levels as the C++ runtime runs its file, int8 between layers, NumPy in
    and out."""
    from peers import Peer
    from resnet18 import images as random_images

    import subbyte.runtime

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        path = Path(folder) / "net.safetensors"
        scales = sb.calibrate_activations(net, [random_images(4, seed) for seed in (1, 2)])
        sb.save(net, path, example=torch.zeros(2, *x.shape[1:]), activations=scales)
        opened = subbyte.runtime.open(path, threads=threads)
    images = x.contiguous().numpy()
    return Peer(
        f"subbyte runtime, {LEVELS[0]} levels",
        lambda: opened.run(images),
        lambda: opened.run(images),
    )


# ---------------------------------------------------------------- every layer of the zoo


def zoo(options: argparse.Namespace) -> dict[str, Any]:
    """Each packed layer of our networks at 3 levels, one input, against PyTorch float32."""
    layers, networks = [], []
    for name, size in ZOO.items():
        torch.manual_seed(0)
        model = build(name)
        sb.prepare(model, sb.LowRes(levels=3))
        net = sb.pack(sb.freeze(model))
        report = bench(net, torch.randn(*size), seconds=2 * options.seconds / len(ZOO))
        for row in report.layers:
            layers.append({"network": name, **row.to_dict()})
        for batch, times in report.networks:
            networks.append({"network": name, "batch": batch, **times.to_dict()})
        whole = networks[-1]["speedup"]
        slowest = min(report.layers, key=lambda row: row.times.speedup)
        print(f"  {name}: {whole:.2f}x; slowest {slowest.name} {slowest.times.speedup:.2f}x")
    return {
        "case": options.only, "tier": kernels.tier(), "real_time": options.real_time,
        "layers": layers, "networks": networks,
    }  # fmt: skip


CASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "linear-4096-b1-hot": partial(linear, 4096, 4096, 1, False),
    "linear-4096-b1-cold": partial(linear, 4096, 4096, 1, True),
    "linear-4096-b8": partial(linear, 4096, 4096, 8, False),
    "linear-4096-b64": partial(linear, 4096, 4096, 64, False),
    "linear-4096-b256": partial(linear, 4096, 4096, 256, False),
    "linear-1024-b1": partial(linear, 1024, 1024, 1, False),
    "resnet18-b1": partial(resnet18, 1),
    "resnet18-b16": partial(resnet18, 16),
    "zoo": zoo,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
