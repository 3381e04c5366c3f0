"""The file in onnxruntime, at once: its values and its time beside the packed network's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from subbyte.bench.timing import in_turn
from subbyte.export.base import Built, Check, Request, Source, in_order, is_installed
from subbyte.storage import save

_SECONDS = 1.0


def check(request: Request, built: Built, path: str) -> Check | None:
    """None without onnxruntime."""
    if not is_installed("onnxruntime"):
        return None
    import onnxruntime

    twin = None if built.twin is None else session(onnxruntime, built.twin())
    run = session(onnxruntime, path)
    return compared(request, f"onnxruntime {onnxruntime.__version__}", run, twin or run)


def session(onnxruntime: Any, model: str | bytes, threads: int | None = None) -> Any:
    """A call: tensors in the order of inputs -> arrays in the order of outputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    made = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in made.get_inputs()]
    return lambda xs: made.run(
        None, {n: x.detach().numpy() for n, x in zip(names, xs, strict=True)}
    )


def compared(request: Request, runtime: str, run: Any, twin: Any) -> Check:
    """run: the file; twin: the same in float32."""
    source = request.read()
    xs = _inputs(request, source)
    with torch.inference_mode(), float32_products(request.net):
        wanted = outputs(request.net, source, xs)
    found = run(xs)
    one = tuple(x[:1] if x.ndim and i.shape[0] is None else x
                for x, i in zip(xs, source.program.inputs, strict=True))  # fmt: skip
    with torch.inference_mode():
        calls = {
            "file": lambda: run(one),
            "packed": lambda: _call(request.net, source, one),
            "float": lambda: twin(one),
        }
        times = {name: 1e3 * spread.median for name, spread in in_turn(calls, _SECONDS).items()}
    return Check(
        runtime, packed_bytes(request, source), difference(found, wanted),
        agreement(found[0], wanted[0]), times["file"], times["packed"], times["float"],
    )  # fmt: skip


def _inputs(request: Request, source: Source) -> tuple[Tensor, ...]:
    """A calibration batch, if there is one: made-up inputs say little of agreement."""
    for batch in request.calibration or ():
        return in_order(source.program, batch)
    return source.example


def outputs(net: nn.Module, source: Source, xs: Sequence[Tensor]) -> list[NDArray[Any]]:
    """What the network gives, flat."""
    return [y.numpy() for y in leaves(_call(net, source, xs))]


def leaves(value: Any) -> list[Tensor]:
    """The tensors of an output: a tensor, a tuple, a dict, or an object with fields."""
    value = dict(value) if hasattr(value, "items") else value
    return [y for y in pytree.tree_leaves(value) if isinstance(y, Tensor)]


def _call(net: nn.Module, source: Source, xs: Sequence[Tensor]) -> Any:
    if source.named:
        names = (value.name for value in source.program.inputs)
        return net(**dict(zip(names, xs, strict=True)))
    return net(*xs)


def difference(found: Sequence[NDArray[Any]], wanted: Sequence[NDArray[Any]]) -> float:
    """The largest of an output's, over its largest value; infinite where one alone is NaN."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        x, y = a.astype(np.float64), b.astype(np.float64)
        if x.shape != y.shape or (np.isnan(x) != np.isnan(y)).any():
            return float("inf")
        apart = np.where((x == y) | np.isnan(x), 0.0, np.abs(x - y))
        finite = np.abs(y[np.isfinite(y)])
        worst = max(worst, float(apart.max(initial=0)) / (float(finite.max(initial=0)) or 1.0))
    return worst


def agreement(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Share of equal argmax over the last dimension."""
    if not found.ndim or not found.size:
        return 1.0
    return float((found.argmax(-1) == wanted.argmax(-1)).mean())


@contextmanager
def float32_products(net: nn.Module) -> Iterator[None]:
    """While it is open, packed layers do not round their activations."""
    layers: list[Any] = [m for m in net.modules() if "precision" in vars(m)]
    kept = [(layer, layer.precision) for layer in layers]
    for module in layers:
        module.precision = "float32"
    try:
        yield
    finally:
        for module, precision in kept:
            module.precision = precision


def packed_bytes(request: Request, source: Source) -> int:
    """Of the packed file, written with its program."""
    with tempfile.TemporaryDirectory() as folder:
        example = request.example if request.example is not None else source.example
        return save(request.net, Path(folder) / "net.safetensors", example=example)
