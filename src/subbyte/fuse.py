"""Fewer passes over activations: what follows a packed product is done as it is stored.

A convolution's BatchNorm goes into its scales and bias. A sum with another tensor, and a ReLU or
ReLU6, are computed while a value is still in a register. On large images these passes cost as much
as the products themselves (docs/results/kernels.md).
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from subbyte.batchnorm import Affine, as_affine
from subbyte.errors import SubbyteError
from subbyte.functional import read_scale
from subbyte.grids import PerChannel, ScaleDomain
from subbyte.kernels import Activation
from subbyte.modules import PackedConv2d, PackedLinear, PackedWeight

_ACTIVATIONS: dict[Any, Activation] = {
    nn.ReLU: "relu", F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu",
    "relu_": "relu", nn.ReLU6: "relu6", F.relu6: "relu6",
}  # fmt: skip
_SUMS = (operator.add, torch.add, "add")
_SUMS_IN_PLACE = (operator.iadd, "add_")


def fuse(net: nn.Module) -> nn.Module:
    """A copy of a packed network that computes the same in fewer passes, for inference.

    Moved into a PackedConv2d: the BatchNorm2d behind it. Into a PackedConv2d or PackedLinear: a sum
    with another tensor, then a ReLU or ReLU6. Each only where nothing else reads what lies between.
    The result is a `torch.fx.GraphModule` in eval mode; `save` takes the network it was made of.
    Values differ by float32 rounding. Raises SubbyteError for a network whose forward depends on
    values or sizes, which cannot be traced.
    """
    net = copy.deepcopy(net).eval()
    tracer = _Tracer()
    try:
        graph = tracer.trace(net)
    except Exception as error:  # whatever the network's forward does with a proxy
        raise SubbyteError(
            f"cannot trace {type(net).__name__}, so it stays as it is: {error}"
        ) from error
    fused = fx.GraphModule(tracer.root, graph, type(net).__name__)
    for step in (_take_norm, _take_sum, _take_activation):  # in the order in which they compute
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        for node in list(graph.nodes):
            if node.op == "call_module" and calls[node.target] == 1 and len(node.users) == 1:
                layer = fused.get_submodule(node.target)
                if isinstance(layer, PackedConv2d | PackedLinear):
                    step(fused, node, layer)
    fused.delete_all_unused_submodules()
    graph.lint()
    fused.recompile()
    return fused


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = type(module).__module__ in (PackedWeight.__module__, Affine.__module__)
        return ours or super().is_leaf_module(module, name)


def _take_norm(net: fx.GraphModule, node: fx.Node, layer: PackedConv2d | PackedLinear) -> None:
    (user,) = node.users
    norm = _module(net, user)
    if not isinstance(layer, PackedConv2d) or not isinstance(norm, nn.BatchNorm2d | Affine):
        return
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is None:
        return
    affine = norm if isinstance(norm, Affine) else as_affine(str(user.target), norm)
    _scale_rows(layer.packed, affine.scale)
    bias = affine.shift
    layer.bias = bias if layer.bias is None else bias + layer.bias * affine.scale
    _remove(net, user, node)


def _scale_rows(packed: PackedWeight, gain: torch.Tensor) -> None:
    """Multiply each output channel of the weight, adapter included, by a number of its own."""
    factors, grid = packed.factors(), packed.grid
    scale = read_scale(packed.scale, grid.scale_domain).double() * gain.double()
    packed.scale = scale.float()
    packed.grid = replace(grid, granularity=PerChannel(0), scale_domain=ScaleDomain.FLOAT32)
    if factors is not None:
        assert packed.adapter_scale is not None
        packed.up = factors[0] * gain[:, None]
        packed.adapter_scale = torch.ones_like(packed.adapter_scale, dtype=torch.float32)


def _take_sum(net: fx.GraphModule, node: fx.Node, layer: PackedConv2d | PackedLinear) -> None:
    (user,) = node.users
    if user.op not in ("call_function", "call_method") or len(user.args) != 2 or user.kwargs:
        return
    mine = user.args[0] is node
    if user.target not in _SUMS and not (mine and user.target in _SUMS_IN_PLACE):
        return
    other = user.args[1 if mine else 0]
    if not isinstance(other, fx.Node) or other is node or len(node.args) != 1:
        return
    between = node.next
    while between is not user:  # the product moves to the sum: its input must still be the same
        if _writes(net, between):
            return
        between = between.next
    with net.graph.inserting_before(user):
        moved = net.graph.call_module(str(node.target), (node.args[0], other))
    _remove(net, user, moved)
    net.graph.erase_node(node)


def _take_activation(
    net: fx.GraphModule, node: fx.Node, layer: PackedConv2d | PackedLinear
) -> None:
    (user,) = node.users
    module = _module(net, user)
    key = user.target if module is None else type(module)
    if user.op in ("placeholder", "get_attr", "output") or key not in _ACTIVATIONS:
        return
    layer.activation = _ACTIVATIONS[key]
    _remove(net, user, node)


def _module(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def _remove(net: fx.GraphModule, node: fx.Node, instead: fx.Node) -> None:
    node.replace_all_uses_with(instead)
    net.graph.erase_node(node)


def _writes(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may change a tensor in place."""
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    if node.op == "call_module":
        return bool(getattr(_module(net, node), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    in_place = getattr(node.target, "__module__", None) == "_operator" and name[0] == "i"
    return in_place or name == "setitem" or (name.endswith("_") and not name.endswith("__"))
