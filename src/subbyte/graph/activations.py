"""Static scales of activations: which values of a program may stay in 8 bits between its layers.

A value with a scale s is held as whole numbers: x = s * q, q of 0..255, or of -127..127 if it is
signed. Readers that do not know scales round each layer's input by its largest value instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from subbyte.errors import SubbyteError

LEAST, MOST = 2.0**-100, 2.0**100  # of a scale: its inverse and its products are normal numbers


@dataclass(frozen=True, slots=True)
class ByteScale:
    """x = scale * q with whole q: 0..255, or -127..127 if signed. scale: a float32."""

    scale: float
    signed: bool

    def __post_init__(self) -> None:
        good = isinstance(self.scale, float | int) and not isinstance(self.scale, bool)
        if not good or not (math.isfinite(self.scale) and LEAST <= self.scale <= MOST):
            raise SubbyteError(f"an activation has the scale {self.scale!r:.50}; use a number > 0")
        if not isinstance(self.signed, bool):
            raise SubbyteError(
                f"an activation has signed={self.signed!r:.50}, neither true nor false"
            )

    @property
    def low(self) -> int:
        """The smallest q."""
        return -127 if self.signed else 0

    @property
    def high(self) -> int:
        """The largest q."""
        return 127 if self.signed else 255


@dataclass(frozen=True, slots=True, eq=False)
class ActivationScales:
    """Scales of a program's values, by name, and how they were chosen.

    rule: of all values, "largest", "99.99 %", "99.9 %" or "least error". errors: of each rule, the
    squared error of the network's output on held-out examples, relative to the output's square.
    """

    program: Any
    scales: Mapping[str, ByteScale]
    rule: str
    errors: Mapping[str, float]

    def on(self, program: Any) -> Any:
        """The program with these scales. Raises SubbyteError if they are of another one."""
        if program is None or replace(program, activations={}) != self.program:
            raise SubbyteError(
                "the scales of activations are of another program; calibrate the network that is "
                "saved, as it is, and save it with an example like the calibration's"
            )
        return replace(program, activations=dict(self.scales))


def scales_from(value: Any) -> dict[str, ByteScale]:
    """Of a manifest. Raises SubbyteError, or what a missing key raises."""
    return {str(name): ByteScale(own["scale"], own["signed"]) for name, own in value.items()}


# Results that lie in 8 bits as their input does, with its scale.
SAME = ("MaxPool2d", "Slice", "Pad", "ConstantPad", "Flatten", "Reshape", "ReshapeCopy", "Identity",
        "Contiguous", "Alias", "Dropout")  # fmt: skip
# Functions of one value: each of 256 bytes has its result.
FUNCTIONS = ("Relu", "Clip", "Clamp", "ClampMin", "Gelu", "Sigmoid", "Tanh", "Silu", "Mish", "Elu",
             "LeakyRelu", "HardSigmoid", "HardSwish", "Softplus")  # fmt: skip
FEW_CHANNELS = 8  # of a group: below, the runtime decodes the weight and multiplies in float32
_NOT_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softplus")
_LAYER = "Layer"


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """Of a program: the values that may lie in 8 bits, and what for.

    given: those that an operation can give so, or pass on; wanted: those that one reads so, or
    passes on to one that does.
    """

    given: frozenset[str]
    wanted: frozenset[str]
    unsigned: frozenset[str]  # those that are never negative
    same: frozenset[str]  # those that are passed on

    @property
    def scaled(self) -> frozenset[str]:
        """Values that need a scale of their own."""
        return (self.given & self.wanted) - self.same


def flow_of(nodes: tuple[Any, ...], layers: Mapping[str, Mapping[str, Any]], output: Any) -> Flow:
    """Of a program's operations, layers and output."""
    given: set[str] = set()
    unsigned: set[str] = set()
    same: set[str] = set()
    for node in nodes:
        read = [name in given for name in _read(node)]
        if _gives(node, layers, read):
            given.add(node.out)
            if node.op in SAME:
                same.add(node.out)
            if _not_negative(node, layers, all(n in unsigned for n in _read(node))):
                unsigned.add(node.out)
    returned = frozenset(_values(output))
    wanted: set[str] = set()
    for node in reversed(nodes):
        passes = node.out in wanted and node.out in given and node.op != _LAYER
        if passes or _reads(node, layers):
            wanted.update(_read(node))
    return Flow(
        frozenset(given) - returned, frozenset(wanted), frozenset(unsigned), frozenset(same)
    )


def _read(node: Any) -> list[str]:
    """The values that an operation computes on."""
    names = ("x", "plus", "a", "b", "inputs")
    return [name for key in names for name in _values(node.args.get(key))]


def _values(argument: Any) -> Iterator[str]:
    if isinstance(argument, list):
        for item in argument:
            yield from _values(item)
    elif isinstance(argument, dict) and set(argument) == {"value"}:
        yield argument["value"]
    elif isinstance(argument, dict) and set(argument) == {"map"}:
        yield from _values(list(argument["map"].values()))


def _gives(node: Any, layers: Mapping[str, Mapping[str, Any]], read: list[bool]) -> bool:
    """Whether an operation gives 8 bits, if these of the values that it reads lie so."""
    if node.op == _LAYER:
        settings = layers[node.layer]
        if settings["type"] != "Conv2d" or settings.get("padding_mode", "zeros") != "zeros":
            return False
        groups, channels = settings["groups"], settings["out_channels"]
        depthwise = groups == settings["in_channels"] == channels
        by_kernels = read[0] if depthwise else channels // groups >= FEW_CHANNELS
        return all(read[1:]) and by_kernels
    if node.op == "Pad" or node.op == "ConstantPad":
        zeros = node.args.get("mode", "constant") == "constant" and not node.args.get("value")
        return zeros and all(read)
    if node.op == "Add":
        return len(read) == 2 and all(read) and node.args.get("alpha", 1) == 1
    if node.op == "Concat":
        return all(read) and node.args.get("axis", 0) in (1, -3)
    return node.op in (*SAME, *FUNCTIONS, "AveragePool2d") and all(read)


def _not_negative(node: Any, layers: Mapping[str, Mapping[str, Any]], inputs: bool) -> bool:
    if node.op == _LAYER:
        return layers[node.layer].get("activation", "none") != "none"
    if node.op in ("Clip", "Clamp", "ClampMin"):
        return (node.args.get("min") if node.op != "Clip" else node.args.get("min", -1)) in (0, 0.0)
    return node.op in _NOT_NEGATIVE or (inputs and node.op not in FUNCTIONS)


def _reads(node: Any, layers: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an operation computes on values in 8 bits, whatever its own result is."""
    if node.op == _LAYER:
        return layers[node.layer]["type"] in ("Conv2d", "Linear")
    if node.op == "ReduceMean":
        return sorted(axis % 4 for axis in node.args.get("axes") or ()) == [2, 3]
    return node.op == "AdaptiveAveragePool2d" and node.args["output_size"] in (1, [1, 1])
