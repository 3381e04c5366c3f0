"""The runtime beside onnxruntime and OpenVINO in int8; its start, memory and accuracy.

    python benchmarks/runtime.py speed [NETWORK ...] --batch 1 --threads 1 --real-time
    python benchmarks/runtime.py start memory
    python benchmarks/runtime.py accuracy            # needs the weights and data of CASES

speed: whole networks at 3 levels with first weights, all engines in turn, round by round; the
runtime with the file's scales and, beside it, rounding at each layer. A ratio is a peer's median
over the runtime's. start: a process that opens ResNet-18 and has its first result. memory: the
largest resident size after many runs, less that of a process which has only read the file.
accuracy: trained networks at 4 bits, the int8 chain against float32 and against rounding at each
layer, image by image.
Adds a line a case to benchmarks/results/runtime.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import append
from numpy.typing import NDArray

import subbyte as sb
import subbyte.runtime
from subbyte import kernels
from subbyte.bench import in_turn

SHARED = Path("../shared/data")
CASES = {  # a trained network: its weights, images, the split that is scored
    "resnet20": ("resnet20_cifar10", "cifar10", "test"),
    "mobilenetv1": ("mobilenet_v1_075_imagenet", "imagenet1000", "validation"),
}
EXAMPLES, BITS, BATCH = 256, 4, 50


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.real_time:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    todo = {"speed": speed, "start": start, "memory": memory, "accuracy": accuracy}
    for what in options.what:
        todo[what](options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["speed", "start", "memory", "accuracy"])
    parser.add_argument("--network", nargs="*", default=[])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, a network")
    parser.add_argument("--real-time", action="store_true", help="priority over other processes")
    return parser.parse_args()


def report(options: argparse.Namespace, **found: Any) -> None:
    print(found, flush=True)
    settings = {"threads": options.threads, "real_time": options.real_time}
    append("runtime", {"tier": kernels.tier(), **settings, **found})


# ---------------------------------------------------------------- speed


def speed(options: argparse.Namespace) -> None:
    from runtime_networks import NETWORKS

    for name in options.network or NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            _speed(name, Path(folder) / "net.safetensors", options)


def _speed(name: str, path: Path, options: argparse.Namespace) -> None:
    import openvino as ov
    from peers import Peer, error, openvino_peer, ort_peer
    from runtime_networks import inputs, int8_onnx, make

    made = make(name, path)
    x = inputs(name, options.batch).numpy()
    with torch.no_grad():
        exact = made.twin(torch.from_numpy(x)).numpy()
    model = int8_onnx(name, made.twin, options.batch)
    peers = [
        ort_peer("ORT int8 (QDQ)", model, x, options.threads),
        openvino_peer("OpenVINO int8 (QDQ)", ov.Core().read_model(model), x, options.threads),
    ]
    for label, precision in (("subbyte runtime", "int8"), ("subbyte, dynamic", "dynamic")):
        opened = subbyte.runtime.open(path, threads=options.threads, precision=precision)

        def run(opened: Any = opened) -> Any:
            return opened.run(x)

        peers.append(Peer(label, run, run))
    errors = {}
    for peer in peers:
        peer.run()
        errors[peer.name] = error(np.asarray(peer.result()), exact)
    gc.collect()
    found = in_turn({peer.name: peer.run for peer in peers}, options.seconds)
    own = found["subbyte runtime"].median
    report(
        options, case="speed", network=name, batch=options.batch, static=made.static,
        ms={key: value * 1000 for key, value in found.items()}, errors=errors,
        ratios={key: round(value.median / own, 3) for key, value in found.items()},
    )  # fmt: skip


# ---------------------------------------------------------------- start and memory

START = """
import sys, time
begin = time.perf_counter()
import numpy as np
import importlib.util
spec = importlib.util.spec_from_file_location("subbyte_runtime", sys.argv[1] + "/__init__.py",
                                              submodule_search_locations=[sys.argv[1]])
module = importlib.util.module_from_spec(spec)
sys.modules["subbyte_runtime"] = module
spec.loader.exec_module(module)
x = np.zeros((1, 3, 224, 224), np.float32)
opened = time.perf_counter()
net = module.open(sys.argv[2], threads=int(sys.argv[3]))
net.run(x)
print(time.perf_counter() - opened)
"""
PEAK = """
import sys
exec(sys.argv[4])
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = resident()
for _ in range(20 if sys.argv[5] == "run" else 0):
    net.run(x)
print(resident())
"""


def _process(code: str, *arguments: str) -> float:
    own = Path(subbyte.runtime.__file__).parent
    command = [sys.executable, "-c", code, str(own), *arguments]
    library = subbyte.runtime.library.library()._name
    environment = {**os.environ, "SUBBYTE_RUNTIME": library}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout.split()[-1])


def start(options: argparse.Namespace) -> None:
    from runtime_networks import make

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        make("resnet18", path)
        times = sorted(1000 * _process(START, str(path), str(options.threads)) for _ in range(15))
    report(options, case="start", network="resnet18", ms={"median": times[7], "least": times[0],
                                                           "most": times[-1]})  # fmt: skip


READ = START.split("opened =")[0] + "data = open(sys.argv[2], 'rb').read()\n"
RUN = START.replace("print(time.perf_counter() - opened)", "")


def memory(options: argparse.Namespace) -> None:
    from runtime_networks import make

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        make("resnet18", path)
        file = path.stat().st_size
        threads = str(options.threads)
        kilobytes = {
            what: min(_process(PEAK, str(path), threads, code, what) for _ in range(3))
            for what, code in (("read", READ), ("run", RUN))
        }
    beyond = (kilobytes["run"] - kilobytes["read"]) / 1024
    report(options, case="memory", network="resnet18", file_bytes=file,
           beyond_the_file_mib=round(beyond, 2))  # fmt: skip


# ---------------------------------------------------------------- accuracy


def accuracy(options: argparse.Namespace) -> None:
    for name in options.network or CASES:
        with tempfile.TemporaryDirectory() as folder:
            _accuracy(name, Path(folder) / "net.safetensors", options)


def _accuracy(name: str, path: Path, options: argparse.Namespace) -> None:
    from subbyte.commands.networks import float_network
    from subbyte.data import load_images
    from subbyte.train.evaluate import preprocess_of

    weights, data, split = CASES[name]
    images = load_images(str(SHARED / data), split)
    net = float_network(name, SHARED / "weights" / f"{weights}.safetensors", images)
    preprocess = preprocess_of(net)
    x = preprocess(load_images(str(SHARED / data), "train").head(EXAMPLES).images)
    fused = sb.fuse(sb.pack(sb.quantize(net, sb.CoRa(bits=BITS, tune=0), calibration=[x])))
    scales = sb.calibrate_activations(fused, x.split(64))
    sb.save(fused, path, example=x[:2], activations=scales)
    labels = np.asarray(images.labels)
    right = {}
    for precision in ("int8", "dynamic", "float32"):
        opened = subbyte.runtime.open(path, threads=options.threads, precision=precision)
        parts = [
            opened.run(preprocess(part).numpy()).argmax(1) for part in images.images.split(BATCH)
        ]
        right[precision] = np.concatenate(parts) == labels
    report(
        options, case="accuracy", network=name, bits=BITS, images=len(labels), rule=scales.rule,
        top1={key: round(100 * float(value.mean()), 3) for key, value in right.items()},
        loss={other: _paired(right[other], right["int8"]) for other in ("dynamic", "float32")},
    )  # fmt: skip


def _paired(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> list[float]:
    """Net loss in points and its 95 % interval (normal, from the pairs that differ)."""
    n, lost, won = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    net, wide = lost - won, 1.96 * math.sqrt(max(0, lost + won - (lost - won) ** 2 / n))
    return [round(100 * value / n, 3) for value in (net, net - wide, net + wide)]


if __name__ == "__main__":
    main()
