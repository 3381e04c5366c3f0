"""What files of other tools weigh and how fast they run, beside the packed file and float32.

    python benchmarks/export.py [size] [onnx] [linear] [openvino]

size: the .onnx file, form small, over the packed file. onnx, openvino: networks of convolutions,
form fast, over the same network in float32 in the same engine. linear: one Linear layer in
onnxruntime, form fast, over float32. In turn, round by round, on one thread; times are those of the
processor (time.process_time), since other processes share it; a ratio is taken within its round.
Networks have first weights and inputs are random: neither changes sizes or times. Adds a line a
case to benchmarks/results/export.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import append, spread
from torch import Tensor, nn

import subbyte as sb
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor
from subbyte.export.base import Request
from subbyte.export.onnx import check
from subbyte.export.onnx.build import build
from subbyte.models import build as network

SIZES = ("cvnn2", "vit2", "mobilenetv1")
SIZE_LEVELS = (3, 4, 5, 16)
CONVS = {"resnet20": 32, "cvnn2": 32, "vgg7": 32, "mobilenetv1": 224, "squeezenet11": 224}
LEVELS = (3, 4, 9, 15, 16)
SHAPES = ((1024, 1024), (4096, 4096))
SECONDS = 0.02  # of one sample, about


def main() -> None:
    cases = {"size": size, "onnx": onnx, "linear": linear, "openvino": openvino}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="*", choices=[*cases, []])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in options.case or cases:
        cases[name](options.rounds)


def report(case: str, **found: Any) -> None:
    print(case, found, flush=True)
    append("export", {"case": case, **found})


def packed(name: str, levels: int) -> nn.Module:
    """A network that ships, on levels with a scale per channel."""
    net = network(name)
    sb.prepare(net, sb.LowRes(levels=levels, granularity="channel"))
    return sb.pack(sb.freeze(net))


def images(name: str, n: int) -> Tensor:
    net = network(name)
    side = CONVS.get(name, 32)
    size = net.preprocess.size or (side, side)
    return torch.randn(n, len(net.preprocess.mean), *size)


def size(_: int) -> None:
    for name in SIZES:
        for levels in SIZE_LEVELS:
            net, x = packed(name, levels), images(name, 2)
            with tempfile.TemporaryDirectory() as folder:
                own = sb.save(net, Path(folder) / "net.safetensors", example=x)
                path = Path(folder) / "net.onnx"
                made = sb.export(net, path, example=x, form="small", check=False)
            report("size", network=name, levels=levels, packed_bytes=own, bytes=made.n_bytes,
                   ratio=round(made.n_bytes / own, 4))  # fmt: skip


def onnx(rounds: int) -> None:
    run = lambda model: check.session(onnxruntime, model, 1)  # noqa: E731
    _convolutions("onnx", build, ".onnx", run, rounds)


def openvino(rounds: int) -> None:
    from subbyte.export import through_onnx

    def run(model: Any) -> Any:
        return through_onnx.session(model, 1)

    _convolutions("openvino", through_onnx.build, ".xml", run, rounds)


def _convolutions(
    case: str, build_: Callable[[Request], Any], suffix: str, run: Callable[[Any], Any], rounds: int
) -> None:
    """Five parameters: the engine's own three, its name, and how long."""
    for name in CONVS:
        net = packed(name, 3)
        request = Request(net.eval(), "net", "fast", images(name, 2), [images(name, 8)])
        made = build_(request)
        with tempfile.TemporaryDirectory() as folder:
            for ending, data in made.files.items():
                (Path(folder) / f"net{ending}").write_bytes(data)
            calls = {"fast": run(str(Path(folder) / f"net{suffix}")), "float32": run(made.twin())}
        for batch in (1, 8):
            found = timed(calls, images(name, batch), rounds)
            report(case, network=name, levels=3, batch=batch, engine=_engine(case), **found)


def linear(rounds: int) -> None:
    for rows, inputs in SHAPES:
        for levels in LEVELS:
            net, x = _linear(rows, inputs, levels), torch.randn(2, inputs)
            made = build(Request(net, "net", "fast", x))
            models = {"fast": made.files[".onnx"], "float32": made.twin()}
            calls = {name: check.session(onnxruntime, m, 1) for name, m in models.items()}
            for batch in (1, 8):
                found = timed(calls, torch.randn(batch, inputs), rounds)
                report("linear", shape=[rows, inputs], levels=levels, batch=batch,
                       stored=made.layers[0][1], engine=_engine("onnx"), **found)  # fmt: skip


def _linear(rows: int, inputs: int, levels: int) -> nn.Module:
    grid = sb.uniform(levels, sb.PerChannel(0))
    codes = torch.randint(levels, (rows, inputs), dtype=torch.uint8)
    layer = QuantizedLayer(QuantizedTensor(codes, torch.rand(rows) + 0.5, grid), torch.randn(rows))
    return sb.pack(sb.Quantized(nn.Sequential(nn.Linear(inputs, rows)), {"0": layer})).eval()


def _engine(case: str) -> str:
    if case == "onnx":
        return f"onnxruntime {onnxruntime.__version__}"
    from openvino import __version__

    return f"openvino {__version__.split('-')[0]}"


def timed(calls: Mapping[str, Callable[[Any], Any]], x: Tensor, rounds: int) -> dict[str, Any]:
    """Milliseconds of each, and how often the fast one goes into float32's time."""
    repeats = {name: _repeats(call, x) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in calls if i % 2 else reversed(calls):
            times[name].append(_sample(calls[name], x, repeats[name]))
    ratios = [a / b for a, b in zip(times["float32"], times["fast"], strict=True)]
    found = {f"{name}_ms": spread(own) * 1e3 for name, own in times.items()}
    return {**found, "ratio": spread(ratios)}


def _repeats(call: Callable[[Any], Any], x: Tensor) -> int:
    call((x,))
    return max(3, round(SECONDS / max(_sample(call, x, 3), 1e-6)))


def _sample(call: Callable[[Any], Any], x: Tensor, repeats: int) -> float:
    """Seconds of one call, the mean of a few."""
    call((x,))
    start = time.process_time()
    for _ in range(repeats):
        call((x,))
    return (time.process_time() - start) / repeats


if __name__ == "__main__":
    main()
