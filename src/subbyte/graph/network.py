"""A program as a module: what a file opens as, without the class of its network.

The module is a `torch.fx.GraphModule` whose names of layers, parameters and buffers are those of
the network that was traced. So it moves, copies, compiles, exports, fuses and is timed like others.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from subbyte.errors import SubbyteError
from subbyte.graph.layers import FUSED, build_layer
from subbyte.graph.operators import ITEM, NUMBERS, OPERATORS
from subbyte.graph.program import DTYPES, LAYER, Node, Program, check_path
from subbyte.kernels import Activation

PROGRAM = "program"  # in the module's meta: what it was made of
_ALONE = "layer"  # the name of a layer that is the whole network
_DEEP = 64  # parts of a name


def skeleton(program: Program, state: Mapping[str, Tensor], name: str) -> nn.Module:
    """The float network of a program, without memory: to be packed, then filled from a file.

    state: tensors of the file that are no packed layer's, for their shapes. Raises SubbyteError for
    a program that does not fit them.
    """
    if "" in program.layers:  # the network is one layer
        if len(program.nodes) != 1 or len(program.layers) != 1:
            raise SubbyteError("the program has a layer without a name among others")
        return build_layer("", program.layers[""])
    try:
        return _built(program, state, name)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SyntaxError) as error:
        if isinstance(error, SubbyteError):
            raise
        text = f"{type(error).__name__}: {error!s}".splitlines()[0][:200]
        raise SubbyteError(f"the program cannot be built ({text})") from None


def _built(program: Program, state: Mapping[str, Tensor], name: str) -> fx.GraphModule:
    root = nn.Module()
    for path, settings in program.layers.items():
        _place(root, path, build_layer(path, settings))
    have = dict(root.named_parameters()) | dict(root.named_buffers())
    for path, value in state.items():
        check_path(path)
        if path not in have:
            _place_tensor(root, path, value, path in program.buffers)
    missing = sorted(program.state_names - set(state))
    if missing:
        raise SubbyteError(f"the program reads '{missing[0][:99]}', which the file has not")
    net = fx.GraphModule(root, _graph(program), name)
    net.meta[PROGRAM] = program
    net.train(False)
    return net


def module_of(
    program: Program, layers: Mapping[str, nn.Module], state: Mapping[str, Tensor]
) -> fx.GraphModule:
    """A program as a module that calls these layers, in the place of the network's own.

    layers: by their names in the program, each called like the layer that it stands for. state:
    what operations read themselves (`Program.state_names`).
    """
    root = nn.Module()
    named = {path or _ALONE: layer for path, layer in layers.items()}
    for path in sorted(named, key=lambda path: path.count(".")):  # parents come first
        _place(root, path, named[path])
    have = dict(root.named_parameters()) | dict(root.named_buffers())
    for path, value in state.items():
        if path not in have:
            _place_value(root, path, value)
    net = fx.GraphModule(root, _graph(_with_names(program)), "Network")
    net.train(False)
    return net


def _with_names(program: Program) -> Program:
    """The same, if the network is one layer, with a name for it: a module has no part named ""."""
    layers = {path or _ALONE: settings for path, settings in program.layers.items()}
    nodes = tuple(
        replace(node, layer=node.layer or _ALONE) if node.op == LAYER else node
        for node in program.nodes
    )
    return replace(program, layers=layers, nodes=nodes)


def _place_value(root: nn.Module, path: str, value: Tensor) -> None:
    *parents, own = path.split(".")
    _parent(root, parents).register_buffer(own, value)


def place_unread(net: nn.Module, program: Program, state: Mapping[str, Tensor]) -> None:
    """Place, without memory, what no operation reads: a GraphModule is made without it, and the
    network was not (counters of norms, a tied tensor's other name).
    """
    own = net.state_dict()
    for path, value in state.items():
        if path not in own:
            _place_tensor(net, path, value, path in program.buffers)


def take_activations(net: nn.Module, program: Program) -> None:
    """Give packed layers what `fuse` had moved into them."""
    for path, settings in program.layers.items():
        activation: Activation = settings.get("activation", "none")
        layer = net.get_submodule(path)
        if activation not in ("none", "relu", "relu6"):
            raise SubbyteError(f"layer '{path[:99]}' has the activation {activation!r:.50}")
        if activation != "none":
            if not isinstance(layer, FUSED):
                raise SubbyteError(f"layer '{path[:99]}' cannot have an activation of its own")
            layer.activation, layer.fused = activation, True


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, own = path.split(".")
    parent = _parent(root, parents)
    if not own or own in parent._modules or own in vars(nn.Module()):
        raise SubbyteError(f"the program has a layer named {path!r:.99}")
    parent.add_module(own, module)


def _parent(root: nn.Module, names: Sequence[str]) -> nn.Module:
    """The module at a path, made where there is none."""
    parent = root
    for name in names:
        if not name or len(names) > _DEEP:
            raise SubbyteError(f"the program has a name of {len(names)} parts, or an empty one")
        if name not in parent._modules:
            parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    return parent


def _place_tensor(root: nn.Module, path: str, value: Tensor, buffer: bool) -> None:
    *parents, own = path.split(".")
    parent = _parent(root, parents)
    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
    if buffer or not value.is_floating_point():
        parent.register_buffer(own, empty)
    else:
        parent.register_parameter(own, nn.Parameter(empty, requires_grad=False))


def _graph(program: Program) -> fx.Graph:
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    for value in program.inputs:
        values[value.name] = graph.placeholder(value.name)
    states: dict[str, fx.Node] = {}
    for node in program.nodes:
        values[node.out] = _made(graph, node, values, states)
    graph.output(_argument(graph, program.output, values, states))
    graph.lint()
    return graph


def _made(
    graph: fx.Graph, node: Node, values: dict[str, fx.Node], states: dict[str, fx.Node]
) -> fx.Node:
    args = {k: _argument(graph, v, values, states) for k, v in node.args.items()}
    if node.op == LAYER:
        return _call_layer(graph, node.layer, args)
    if node.op == ITEM:
        return graph.call_function(operator.getitem, (args["x"], args["index"]))
    if node.op in NUMBERS:
        return graph.call_function(NUMBERS[node.op], tuple(args.values()))
    return _call_operator(graph, node.op, args)


def _call_layer(graph: fx.Graph, layer: str, args: dict[str, Any]) -> fx.Node:
    if "x" not in args:  # attention, by the names of its arguments
        return graph.call_module(layer, (), args)
    plus = (args["plus"],) if "plus" in args else ()
    return graph.call_module(layer, (args["x"], *plus))


def _call_operator(graph: fx.Graph, name: str, args: dict[str, Any]) -> fx.Node:
    op = OPERATORS[name]
    if op.run is not None:
        if name == "Add":
            return _sum(graph, args)
        return graph.call_function(op.run, tuple(args.values()))
    theirs = {op.arguments[key]: value for key, value in args.items()}
    positional = []
    for argument in op.overload._schema.arguments:
        if argument.name not in theirs or argument.kwarg_only:
            break
        positional.append(theirs.pop(argument.name))
    return graph.call_function(op.overload, tuple(positional), theirs)


def _sum(graph: fx.Graph, args: dict[str, Any]) -> fx.Node:
    if "alpha" in args:
        return graph.call_function(torch.add, (args["a"], args["b"]), {"alpha": args["alpha"]})
    return graph.call_function(operator.add, (args["a"], args["b"]))


def _argument(
    graph: fx.Graph, value: Any, values: dict[str, fx.Node], states: dict[str, fx.Node]
) -> Any:
    if isinstance(value, list):
        return [_argument(graph, item, values, states) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "value":
        return values[content]
    if kind == "state":
        if content not in states:
            states[content] = graph.get_attr(content)
        return states[content]
    if kind == "dtype":
        return DTYPES[content]
    if kind == "number":
        return float(content)
    if kind == "layout":
        return getattr(torch, content)
    return {key: _argument(graph, item, values, states) for key, item in content.items()}
