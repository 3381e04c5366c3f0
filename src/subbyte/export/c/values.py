"""A program run once on one example: shapes of values, and which do not depend on inputs."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subbyte.errors import SubbyteError
from subbyte.export.base import Source
from subbyte.graph.operators import ITEM, NUMBERS, OPERATORS
from subbyte.graph.program import DTYPES, LAYER, Node


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """What each name of a program holds for one example; fixed: the same for any input."""

    source: Source
    of: dict[str, Any]
    fixed: frozenset[str]

    def argument(self, value: Any) -> Any:
        """An argument of the program as tensors, numbers and lists."""
        return argument(value, self.of, self.source)

    def is_fixed(self, value: Any) -> bool:
        """Whether an argument is the same for any input."""
        return all(name in self.fixed for name in names(value))


def values_of(source: Source) -> Values:
    """Runs the program on the first example. Raises SubbyteError for an input it cannot take."""
    inputs = source.program.inputs
    of: dict[str, Any] = {i.name: x[:1] for i, x in zip(inputs, source.example, strict=True)}
    fixed: set[str] = set()
    with torch.no_grad():
        for node in source.program.nodes:
            of[node.out] = _run(node, of, source)
            if node.op == "Size" or set(names(dict(node.args))) <= fixed:
                fixed.add(node.out)
    return Values(source, of, frozenset(fixed))


def names(value: Any) -> Iterator[str]:
    """The values that an argument reads."""
    if isinstance(value, list):
        for item in value:
            yield from names(item)
    elif isinstance(value, dict):
        if set(value) == {"value"}:
            yield value["value"]
        else:
            for item in value.values():
                yield from names(item)


def argument(value: Any, of: dict[str, Any], source: Source) -> Any:
    if isinstance(value, list):
        return [argument(item, of, source) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {next(iter(value))} or not isinstance(next(iter(value.values())), str):
        return {key: argument(item, of, source) for key, item in value.items()}
    return _plain(*next(iter(value.items())), of, source)


def _plain(kind: str, content: str, of: dict[str, Any], source: Source) -> Any:
    if kind == "value":
        return of[content]
    if kind == "state":
        return source.state[content]
    if kind == "dtype":
        return DTYPES[content]
    return float(content) if kind == "number" else getattr(torch, content)


def _run(node: Node, of: dict[str, Any], source: Source) -> Any:
    args = {key: argument(value, of, source) for key, value in node.args.items()}
    try:
        return run_node(node, args, source)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise SubbyteError(f"operator '{node.op}' does not run on the example: {first}") from None


def run_node(node: Node, args: dict[str, Any], source: Source) -> Any:
    """One operation on tensors."""
    if node.op == LAYER:
        layer = source.net.get_submodule(node.layer)
        return layer(**args) if "x" not in args else layer(*args.values())
    if node.op == ITEM:
        return operator.getitem(args["x"], args["index"])
    if node.op in NUMBERS:
        return NUMBERS[node.op](*args.values())
    return run_operator(node.op, args)


def run_operator(name: str, args: dict[str, Any]) -> Any:
    """One ATen operation by its name in a program."""
    op = OPERATORS[name]
    theirs = {op.arguments[key]: value for key, value in args.items()}
    if name in ("Reshape", "ReshapeCopy"):
        return torch.reshape(*args.values())
    positional = []
    for given in op.overload._schema.arguments:
        if given.name not in theirs or given.kwarg_only:
            break
        positional.append(theirs.pop(given.name))
    return op.overload(*positional, **theirs)


def shape_of(value: Any) -> tuple[int, ...]:
    assert isinstance(value, Tensor)
    return tuple(value.shape)
