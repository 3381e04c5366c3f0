"""Static scales of activations, from calibration examples (`graph/activations.py` says what of).

Two passes over the examples that teach: ranges, then a histogram of the magnitudes of each value.
Four rules make a clipping point of it; the one whose network is closest to that with float32
activations, on examples that are held out, is taken for all values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from subbyte.errors import SubbyteError
from subbyte.graph.activations import LEAST, ActivationScales, ByteScale, Flow, flow_of
from subbyte.graph.network import PROGRAM, module_of
from subbyte.graph.program import Node, Program
from subbyte.graph.trace import traced
from subbyte.ptq.calibration import gathered
from subbyte.tasks.batches import Batch, Inputs, in_batches, leaves, one_batch

BINS = 4096
TRIED = 128  # clipping points of the least squared error
BATCH = 64
HELD_OUT = 0.25

Histogram = NDArray[np.float64]


def calibrate_activations(net: nn.Module, batches: Iterable[Any]) -> ActivationScales:
    """Scales for values of a packed network's program that may stay in 8 bits between its layers.

    batches: as of `quantize`, a few hundred examples without labels; a quarter of them is held out
    to choose the rule. `save(net, path, example=x, activations=scales)` keeps the scales in the
    file; the runtime uses them, PyTorch rounds at each layer as before. The program's inputs and
    outputs stay float. Call it on what `fuse` gives: norms between layers compute in float32.
    Raises SubbyteError for a network that cannot be traced, where nothing can stay in 8 bits, and
    for values that are not finite.
    """
    examples = gathered(batches, net).examples
    parts = in_batches(examples, BATCH)
    program, constants = _program(net, one_batch(examples[: min(2, len(examples))]))
    flow = flow_of(program.nodes, program.layers, program.output)
    if not flow.scaled:
        raise SubbyteError(
            "no value of the network can stay in 8 bits between layers: it has no convolution that "
            "another layer reads; the runtime rounds activations at each layer"
        )
    held = {**net.state_dict(keep_vars=True), **constants}
    state = {name: held[name] for name in program.state_names}
    layers = {name: net.get_submodule(name) for name in program.layers}
    runner = _Runner(module_of(program, layers, state), program)
    split = max(1, round(len(parts) * (1 - HELD_OUT))) if len(parts) > 1 else 1
    with torch.no_grad():
        seen = _observed(runner, parts[:split], flow)
        return _chosen(runner, parts[split:] or parts, flow, seen)


def _program(net: nn.Module, example: Batch) -> tuple[Program, dict[str, Tensor]]:
    held = net.meta.get(PROGRAM) if isinstance(net, fx.GraphModule) else None
    if held is not None:
        return without_scales(held), {}
    if isinstance(example, Inputs):
        given = dict(example.kwargs) if example.kwargs else example.args
        return traced(net, given)
    return traced(net, example)


def without_scales(program: Program) -> Program:
    """Without the scales that it has."""
    return Program(program.inputs, program.layers, program.nodes, program.output, program.buffers)


class _Runner(fx.Interpreter):
    """Runs a program; `change` sees each operation's result, by its name, and may replace it."""

    def __init__(self, net: fx.GraphModule, program: Program) -> None:
        super().__init__(net)
        calls = ("call_function", "call_module", "call_method")
        own = [node for node in net.graph.nodes if node.op in calls]
        self.names = {node: made.out for node, made in zip(own, program.nodes, strict=True)}
        self.program = program
        self.change: Callable[[str, Any], Any] = lambda _, value: value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return self.change(self.names[n], value) if n in self.names else value

    def outputs(self, batch: Batch, change: Callable[[str, Any], Any]) -> list[Tensor]:
        self.change = change
        args = batch.args if isinstance(batch, Inputs) else (batch,)
        named = batch.kwargs if isinstance(batch, Inputs) else {}
        known = [value.name for value in self.program.inputs]
        ordered = [*args, *(named[name] for name in known[len(args) :])]
        found = leaves(self.run(*ordered))
        return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


@dataclass(slots=True, eq=False)
class _Seen:
    """Magnitudes of one value: the largest, and how many lie in each bin up to it."""

    largest: float = 0.0
    counts: Histogram = field(default_factory=lambda: np.zeros(BINS))


def _observed(runner: _Runner, parts: list[Batch], flow: Flow) -> dict[str, _Seen]:
    seen = {name: _Seen() for name in sorted(flow.scaled)}

    def ranges(name: str, value: Any) -> Any:
        if name in seen:
            seen[name].largest = max(seen[name].largest, _peak(name, value))
        return value

    def histograms(name: str, value: Any) -> Any:
        if name in seen and seen[name].largest > 0:
            own = value.abs().clamp_(max=seen[name].largest)
            counts = torch.histc(own, BINS, min=0.0, max=seen[name].largest)
            seen[name].counts += counts.double().numpy()
        return value

    for look in (ranges, histograms):
        for part in parts:
            runner.outputs(part, look)
    return seen


def _peak(name: str, value: Tensor) -> float:
    found = float(value.abs().max()) if value.numel() else 0.0
    if not np.isfinite(found):
        raise SubbyteError(f"value '{name}' of the program is NaN or infinite for the calibration")
    return found


# ---------------------------------------------------------------- rules


def _percentile(share: float) -> Callable[[_Seen, ByteScale], float]:
    def clip(seen: _Seen, _: ByteScale) -> float:
        counts = seen.counts.cumsum()
        return float((np.searchsorted(counts, share * counts[-1]) + 1) / BINS * seen.largest)

    return clip


def _least_error(seen: _Seen, of: ByteScale) -> float:
    """The clipping point with the least squared error of what lies in the bins' middles."""
    middle = (np.arange(BINS) + 0.5) / BINS
    clips = np.arange(1, TRIED + 1) / TRIED

    def error(clip: float) -> float:
        step = clip / of.high
        rounded = np.minimum(np.rint(middle / step), of.high) * step
        return float((seen.counts * (middle - rounded) ** 2).sum())

    return float(clips[int(np.argmin([error(clip) for clip in clips]))] * seen.largest)


RULES: Mapping[str, Callable[[_Seen, ByteScale], float]] = {
    "largest": lambda seen, _: seen.largest,
    "99.99 %": _percentile(0.9999),
    "99.9 %": _percentile(0.999),
    "least error": _least_error,
}


def _scales(
    rule: str, seen: Mapping[str, _Seen], flow: Flow, nodes: Sequence[Node]
) -> dict[str, ByteScale]:
    """Values that were always 0 have no scale."""
    found = {}
    for name, own in seen.items():
        unit = ByteScale(1.0, name not in flow.unsigned)
        scale = float(np.float32(RULES[rule](own, unit) / unit.high))
        if scale >= LEAST:
            found[name] = ByteScale(scale, unit.signed)
    return _joined(found, nodes)


def _joined(scales: dict[str, ByteScale], nodes: Sequence[Node]) -> dict[str, ByteScale]:
    """Parts of a concatenation have its scale, so that they are copied: it holds the largest."""
    for node in reversed(nodes):
        if node.op == "Concat" and node.out in scales:
            parts = {part["value"] for part in node.args["inputs"]}
            scales |= dict.fromkeys(parts & set(scales), scales[node.out])
    return scales


def rounded(value: Tensor, to: ByteScale) -> Tensor:
    """A float32 tensor as its 8 bits hold it."""
    q = (value * float(np.float32(1) / np.float32(to.scale))).clamp(to.low, to.high).round()
    return q * to.scale


def _held(scales: Mapping[str, ByteScale], name: str, value: Any) -> Any:
    return rounded(value, scales[name]) if name in scales else value


def _chosen(
    runner: _Runner, parts: list[Batch], flow: Flow, seen: Mapping[str, _Seen]
) -> ActivationScales:
    nodes = runner.program.nodes
    candidates = {rule: _scales(rule, seen, flow, nodes) for rule in RULES}
    errors = dict.fromkeys(RULES, 0.0)
    total = 0.0
    for part in parts:
        exact = runner.outputs(part, lambda _, value: value)
        total += sum(float(x.double().square().sum()) for x in exact)
        for rule, scales in candidates.items():
            found = runner.outputs(part, partial(_held, scales))
            errors[rule] += sum(
                float((a.double() - b.double()).square().sum())
                for a, b in zip(found, exact, strict=True)
            )
    errors = {rule: error / (total or 1.0) for rule, error in errors.items()}
    best = min(errors, key=lambda rule: errors[rule])
    return ActivationScales(runner.program, candidates[best], best, errors)
