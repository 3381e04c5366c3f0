"""A network as data: a frozen list of operations over named tensors (docs/format.md, "Program").

    {"inputs": [{"name": "x", "shape": [null, 3, 32, 32], "dtype": "float32"}],
     "layers": {"features.0": {"type": "Conv2d", "in_channels": 3, ...}},
     "nodes": [{"op": "Layer", "out": "n1", "layer": "features.0", "args": {"x": {"value": "x"}}},
               {"op": "Relu", "out": "n2", "args": {"x": {"value": "n1"}}}],
     "output": {"value": "n2"}}

An argument is a value ({"value": name}), a tensor of the network's state ({"state": name}), a plain
number, word or list, or a type ({"dtype": "float32"}). Nothing in it is executed but the operators
of the closed list, on tensors.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from subbyte.errors import SubbyteError
from subbyte.graph.activations import ByteScale, scales_from
from subbyte.graph.layers import LAYERS
from subbyte.graph.operators import ITEM, NUMBERS, OPERATORS

LAYER = "Layer"
MAX_NODES = 100_000
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}\Z")
# Names of layers and state become a part of generated code, between double quotes where they are no
# identifiers: nothing that could end a string may pass.
_PATH = re.compile(r"[^\"'\\\x00-\x1f\x7f-\x9f\u2028\u2029{}]{0,300}\Z")
LAYOUTS = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
MAX_VALUES = 2**28  # of a tensor that an operator makes of nothing
_MAKERS = (
    "ConstantOfShape",
    "Zeros",
    "Ones",
    "NewOnes",
    "NewZeros",
    "Tile",
    "Range",
    "RangeTo",
    "RangeFrom",
)
_MAKES = ("shape", "end", "repeats")  # their arguments that say how large
_DEPTH = 5  # of lists in lists
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
              torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Input:
    """shape: None where any size goes."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: `out` = `op`(args). layer: the module's name, if op is "Layer"."""

    op: str
    out: str
    args: Mapping[str, Any]
    layer: str = ""


@dataclass(frozen=True, slots=True)
class Program:
    """Checked when it is made: every name is made once, before it is used, and every word is known.

    layers: the modules that nodes call, by name, with what they were constructed with. buffers: of
    the state, what is no parameter. output: an argument, or a dict or list of them. activations:
    scales of values that may stay in 8 bits between layers, by name.
    Raises SubbyteError, in one line, for anything else.
    """

    inputs: tuple[Input, ...]
    layers: Mapping[str, Mapping[str, Any]]
    nodes: tuple[Node, ...]
    output: Any
    buffers: frozenset[str] = field(default_factory=frozenset)
    activations: Mapping[str, ByteScale] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.nodes) > MAX_NODES:
            raise SubbyteError(f"the program has {len(self.nodes)} operations, over {MAX_NODES}")
        known: set[str] = set()
        for value in self.inputs:
            _new_name(value.name, known)
            _check_input(value)
        for name, settings in self.layers.items():
            check_path(name)
            kind = settings.get("type")
            if kind not in LAYERS:
                raise SubbyteError(f"layer '{name[:99]}' of the program is of type {kind!r:.99}")
        for node in self.nodes:
            self._check_node(node, known)
            _new_name(node.out, known)
        _check_argument(self.output, known, "the output", 0)
        for name in self.activations:
            if name not in known:
                raise SubbyteError(f"the program has a scale of {name!r:.99}, which is no value")

    def _check_node(self, node: Node, known: set[str]) -> None:
        needs: tuple[str, ...]
        if node.op == LAYER:
            if node.layer not in self.layers:
                raise SubbyteError(f"the program calls layer {node.layer!r:.99}, which it has not")
            takes = LAYERS[self.layers[node.layer]["type"]].takes
            needs = ("x",) if "x" in takes else ("query", "key", "value")
        elif node.op in OPERATORS:
            takes, needs = tuple(OPERATORS[node.op].arguments), OPERATORS[node.op].required
        elif node.op in NUMBERS:
            takes, needs = ("a", "b"), ("a",) if node.op == "IntNeg" else ("a", "b")
        elif node.op == ITEM:
            takes = needs = ("x", "index")
        else:
            raise SubbyteError(f"operator {node.op!r:.99} is unknown; upgrade subbyte")
        for name in needs:
            if name not in node.args:
                raise SubbyteError(f"operator '{node.op}' of the program lacks its '{name}'")
        for name, value in node.args.items():
            if name not in takes:
                raise SubbyteError(f"operator '{node.op}' has no argument {name!r:.99}")
            _check_argument(value, known, f"'{node.op}'", 0)
            if name in _MAKES and node.op in _MAKERS:
                _check_size(node.op, value)

    @property
    def state_names(self) -> frozenset[str]:
        """Tensors of the network's state that operations read themselves."""
        found = {name for node in self.nodes for name in _states(dict(node.args))}
        return frozenset(found | set(_states(self.output)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `Program.from_dict` gives an equal program back."""
        return {
            "inputs": [
                {"name": i.name, "shape": list(i.shape), "dtype": i.dtype} for i in self.inputs
            ],
            "layers": {name: dict(settings) for name, settings in self.layers.items()},
            "nodes": [
                {"op": n.op, "out": n.out, **({"layer": n.layer} if n.layer else {}),
                 "args": dict(n.args)}
                for n in self.nodes
            ],
            "output": self.output,
            "buffers": sorted(self.buffers),
            **({"activations": {n: asdict(s) for n, s in self.activations.items()}}
               if self.activations else {}),
        }  # fmt: skip

    @staticmethod
    def from_dict(value: Any) -> Program:
        """Raises SubbyteError for what is no program."""
        try:
            inputs = tuple(
                Input(str(i["name"]), tuple(i["shape"]), str(i["dtype"])) for i in value["inputs"]
            )
            nodes = tuple(
                Node(str(n["op"]), str(n["out"]), dict(n["args"]), str(n.get("layer", "")))
                for n in value["nodes"]
            )
            layers = {str(name): dict(settings) for name, settings in value["layers"].items()}
            buffers = frozenset(str(name) for name in value.get("buffers", ()))
            scales = scales_from(value.get("activations", {}))
            return Program(inputs, layers, nodes, value["output"], buffers, scales)
        except SubbyteError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise SubbyteError(f"the program is malformed ({str(error)[:99]!r})") from None


def _new_name(name: str, known: set[str]) -> None:
    if not _NAME.match(name) or name in known or keyword.iskeyword(name) or name == "self":
        raise SubbyteError(f"the program names a value {name!r:.99}, no word or used already")
    known.add(name)


def check_path(name: str) -> None:
    """Raises SubbyteError for the name of a layer or tensor that is more than a name."""
    parts = name.split(".")
    if not _PATH.match(name) or any(keyword.iskeyword(part) for part in parts):
        raise SubbyteError(f"the program has a layer or tensor named {name!r:.99}")


def _check_size(op: str, value: Any) -> None:
    sizes = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
    if math.prod(max(1, abs(n)) for n in sizes) > MAX_VALUES:
        raise SubbyteError(f"operator '{op}' of the program makes a tensor of {sizes!s:.80}")


def _check_input(value: Input) -> None:
    sizes = all(n is None or (type(n) is int and 0 <= n < 2**40) for n in value.shape)
    if not sizes or value.dtype not in DTYPES:
        raise SubbyteError(f"input '{value.name}' is {value.dtype:.20} {value.shape!s:.80}")


def _check_argument(value: Any, known: set[str], where: str, depth: int) -> None:
    """Plain data that refers to what is known."""
    if value is None or isinstance(value, bool | str):
        return
    if isinstance(value, int | float):
        if not (math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**63):
            raise SubbyteError(f"{where} of the program has the number {value!r:.50}")
        return
    if depth > _DEPTH:
        raise SubbyteError(f"{where} of the program has lists in lists in lists")
    if isinstance(value, list):
        for item in value:
            _check_argument(item, known, where, depth + 1)
        return
    if not isinstance(value, dict) or len(value) != 1:
        raise SubbyteError(f"{where} of the program has an argument {value!r:.80}")
    ((kind, content),) = value.items()
    if kind == "map" and isinstance(content, dict):
        for item in content.values():
            _check_argument(item, known, where, depth + 1)
    elif kind == "value" and content not in known:
        raise SubbyteError(f"{where} of the program uses {content!r:.99} before it is made")
    elif kind == "dtype" and content not in DTYPES:
        raise SubbyteError(f"{where} of the program has the type {content!r:.50}")
    elif kind == "number" and content not in ("inf", "-inf", "nan"):
        raise SubbyteError(f"{where} of the program has the number {content!r:.50}")
    elif kind == "layout" and content not in LAYOUTS:
        raise SubbyteError(f"{where} of the program has the layout {content!r:.50}")
    elif kind not in ("map", "value", "state", "dtype", "number", "layout"):
        raise SubbyteError(f"{where} of the program has an argument of kind {kind!r:.50}")
    elif not isinstance(content, dict if kind == "map" else str):
        raise SubbyteError(f"{where} of the program has an argument {value!r:.80}")
    elif kind == "state":
        check_path(str(content))


def _states(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _states(item)
    elif isinstance(value, dict):
        if set(value) == {"state"}:
            yield value["state"]
        else:
            for item in value.values():
                yield from _states(item)
