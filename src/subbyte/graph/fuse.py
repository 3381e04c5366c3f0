"""Fewer passes over activations: what follows a packed product is done as it is stored.

A convolution's BatchNorm goes into its scales and bias. A sum with another tensor, and a ReLU or
ReLU6, are computed while a value is still in a register. On large images these passes cost as much
as the products themselves (docs/results/kernels.md).
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from subbyte.core.functional import read_scale
from subbyte.core.grids import PerChannel, PerGroup, PerTensor, ScaleDomain
from subbyte.errors import SubbyteError
from subbyte.graph.network import PROGRAM
from subbyte.kernels import Activation
from subbyte.modules import (
    PACKED,
    SEVERAL,
    PackedConv2d,
    PackedLinear,
    PackedWeight,
)
from subbyte.modules.absorb import Affine, as_affine

_ACTIVATIONS: dict[Any, Activation] = {
    nn.ReLU: "relu", F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu",
    "relu_": "relu", nn.ReLU6: "relu6", F.relu6: "relu6",
}  # fmt: skip
_SUMS = (operator.add, torch.add, "add")
_SUMS_IN_PLACE = (operator.iadd, "add_")


def fuse(net: nn.Module) -> nn.Module:
    """A copy of a packed network that computes the same in fewer passes, for inference.

    Moved into a PackedConv2d: the BatchNorm2d behind it. Into a PackedConv2d or PackedLinear: a sum
    with another tensor of the same type, then a ReLU or ReLU6, also from behind a concatenation.
    Each only where nothing else reads what lies between, and no hook looks on. Values differ by
    float32 rounding.

    The result is a `torch.fx.GraphModule` in eval mode, made by tracing: optional arguments stay
    at None, and what does not depend on the inputs is computed once. `save` takes it with
    an example of its input. Raises SubbyteError for a network that cannot be traced, because its
    forward asks for values of tensors.
    """
    net = copy.deepcopy(net).eval()
    if isinstance(net, PackedConv2d | PackedLinear):
        return net
    tracer = _Tracer()
    try:
        graph = tracer.trace(net, _optional(net))
    except Exception as error:  # whatever the network's forward does with a proxy
        raise SubbyteError(
            f"cannot trace {type(net).__name__}, so it stays as it is: {error}"
        ) from error
    fused = fx.GraphModule(tracer.root, graph, type(net).__name__)
    before = {layer for layer in fused.modules() if getattr(layer, "fused", False)}
    for step in (_take_norm, _take_sum, _take_activation):  # in the order in which they compute
        for node in list(_alone(graph)):
            layer = fused.get_submodule(str(node.target))
            if isinstance(layer, PackedConv2d | PackedLinear) and layer not in before:
                layer.fused |= not _hooked(layer) and step(fused, node, layer)
    _before_concatenations(fused, before)
    fused.meta.pop(PROGRAM, None)  # of the network before
    fused.delete_all_unused_submodules()
    graph.lint()
    fused.recompile()
    return fused


_WHOLE = (*PACKED.values(), *SEVERAL.values(), Affine)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _WHOLE) or super().is_leaf_module(module, name)


def _optional(net: nn.Module) -> dict[str, None]:
    """The arguments of forward that are None unless they are given."""
    parameters = inspect.signature(net.forward).parameters.values()
    return {parameter.name: None for parameter in parameters if parameter.default is None}


def _alone(graph: fx.Graph) -> Iterator[fx.Node]:
    """Calls of modules that nothing else calls, reads from, or contains; with one reader."""
    named = [n for n in graph.nodes if n.op in ("call_module", "get_attr")]
    for node in named:
        inside = f"{node.target}."
        others = (str(other.target) for other in named if other is not node)
        if (
            node.op == "call_module"
            and len(node.users) == 1
            and not any(f"{o}.".startswith(inside) or inside.startswith(f"{o}.") for o in others)
        ):
            yield node


def _take_norm(net: fx.GraphModule, node: fx.Node, layer: PackedConv2d | PackedLinear) -> bool:
    (user,) = node.users
    norm = _module(net, user)
    if not isinstance(layer, PackedConv2d) or not isinstance(norm, nn.BatchNorm2d | Affine):
        return False
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is None:
        return False
    dtype = next(norm.buffers()).dtype
    affine = norm if isinstance(norm, Affine) else as_affine(str(user.target), norm)
    if affine.scale.numel() != layer.packed.shape[0] or _hooked(norm):
        return False
    layer.packed = _scaled(layer.packed, affine.scale)
    bias = affine.shift.float()
    if layer.bias is not None:
        bias = bias + layer.bias.float() * affine.scale
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    _remove(net, user, node)
    return True


def _scaled(packed: PackedWeight, gain: torch.Tensor) -> PackedWeight:
    """The same weight, adapter included, with every output channel times a number of its own."""
    packed = copy.deepcopy(packed)
    factors, grid = packed.factors(), packed.grid
    scale = read_scale(packed.scale, grid.scale_domain).double().reshape(-1, 1)
    if grid.granularity != PerTensor():
        scale = scale.reshape(len(gain), -1)
    packed.scale = (scale * gain.double()[:, None]).float().flatten()
    sharing = grid.granularity if isinstance(grid.granularity, PerGroup) else PerChannel(0)
    packed.grid = replace(grid, granularity=sharing, scale_domain=ScaleDomain.FLOAT32)
    if factors is not None:
        assert packed.adapter_scale is not None
        packed.up, packed.down = factors[0] * gain[:, None], factors[1]
        packed.adapter_scale = torch.ones_like(packed.adapter_scale, dtype=torch.float32)
    return packed


def _take_sum(net: fx.GraphModule, node: fx.Node, layer: PackedConv2d | PackedLinear) -> bool:
    (user,) = node.users
    if user.op not in ("call_function", "call_method") or len(user.args) != 2 or user.kwargs:
        return False
    mine = user.args[0] is node
    if user.target not in _SUMS and not (mine and user.target in _SUMS_IN_PLACE):
        return False
    other = user.args[1 if mine else 0]
    if not isinstance(other, fx.Node) or other is node or len(node.args) != 1:
        return False
    between = node.next
    while between is not user:  # the product moves to the sum: its input must still be the same
        if _may_write(net, between):
            return False
        between = between.next
    with net.graph.inserting_before(user):
        moved = net.graph.call_module(str(node.target), (node.args[0], other))
    _remove(net, user, moved)
    net.graph.erase_node(node)
    return True


def _take_activation(
    net: fx.GraphModule, node: fx.Node, layer: PackedConv2d | PackedLinear
) -> bool:
    (user,) = node.users
    module = _module(net, user)
    key = user.target if module is None else type(module)
    if user.op in ("placeholder", "get_attr", "output") or key not in _ACTIVATIONS:
        return False
    if module is not None and _hooked(module):
        return False
    layer.activation = _ACTIVATIONS[key]
    _remove(net, user, node)
    return True


def _before_concatenations(net: fx.GraphModule, before: set[nn.Module]) -> None:
    """A ReLU behind a concatenation goes into its parts, where all of them can take it."""
    called = {node: net.get_submodule(str(node.target)) for node in _alone(net.graph)}
    alone: dict[Any, Any] = {n: layer for n, layer in called.items() if layer not in before}
    for joined in [n for n in net.graph.nodes if n.target in (torch.cat, torch.concat)]:
        parts = joined.args[0] if joined.args else ()
        takes = isinstance(parts, list | tuple) and all(
            isinstance(layer := alone.get(part), PackedConv2d | PackedLinear)
            and layer.activation == "none"
            and not _hooked(layer)
            for part in parts
        )
        if not takes or len(joined.users) != 1 or len(set(parts)) != len(parts):
            continue
        (user,) = joined.users
        module = _module(net, user)
        key = user.target if module is None else type(module)
        if key in _ACTIVATIONS and not (module is not None and _hooked(module)):
            for part in parts:
                alone[part].activation, alone[part].fused = _ACTIVATIONS[key], True
            _remove(net, user, joined)


def _module(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _remove(net: fx.GraphModule, node: fx.Node, instead: fx.Node) -> None:
    node.replace_all_uses_with(instead)
    net.graph.erase_node(node)


def _may_write(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node might change a tensor in place.

    It guesses by names: yes where there is none costs a fusion, no where there is one a result.
    """
    flags = (*node.args, node.kwargs.get("inplace"))
    if any(flag is True for flag in flags) or node.kwargs.get("out") is not None:
        return True
    if node.op == "call_module":
        return bool(getattr(_module(net, node), "inplace", False))
    full = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    name = full.partition(".")[0]
    of_operator = getattr(node.target, "__module__", None) == "_operator"
    if name.startswith("__i") or (of_operator and name.startswith("i")) or name == "setitem":
        return True
    return name.endswith("_") and not name.endswith("__")
