"""Nodes and constants of an ONNX graph, written in the place of one node after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

MICROSOFT = "com.microsoft"  # operators that onnxruntime alone has


class Writer:
    """Puts nodes before `anchor`. known: values made once, by what they are."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.anchor: Any = None
        self.known: dict[Any, Any] = {}
        self.count = 0

    def op(self, kind: str, *inputs: Any, domain: str = "", **attributes: Any) -> Any:
        """One node with one result."""
        given = {name: value for name, value in attributes.items() if value is not None}
        made = ir.node(kind, list(inputs), given, domain=domain)
        self.graph.insert_before(self.anchor, made)
        return made.outputs[0]

    def constant(self, value: Tensor | NDArray[Any] | Sequence[int] | float) -> Any:
        """A constant; equal small ones are one. Whole numbers in lists are int64."""
        array = _array(value)
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 4096 else None
        if key is None or key not in self.known:
            self.count += 1
            tensor: Any = ir.tensor(array, name=f"c{self.count}")
            made = ir.Value(
                name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )  # fmt: skip
            self.graph.register_initializer(made)
            if key is None:
                return made
            self.known[key] = made
        return self.known[key]


def _array(value: Any) -> NDArray[Any]:
    """Without gaps, and of as many dimensions as the value (ascontiguousarray has at least one)."""
    if isinstance(value, Tensor):
        return np.array(value.detach().cpu().numpy(), order="C")
    if isinstance(value, float):
        return np.array(value, np.float32)
    return np.array(value, None if isinstance(value, np.ndarray) else np.int64, order="C")
