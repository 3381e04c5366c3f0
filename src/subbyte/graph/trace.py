"""From a network to its program, through torch.export.

Packed layers and norms are called whole: while the network is traced each is one operation that
knows the shape of its result, so their words stay packed and a program's run is the very same code.
"""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from subbyte.errors import SubbyteError
from subbyte.graph.layers import LAYERS, WHOLE, settings_of, type_of
from subbyte.graph.operators import BY_ATEN, ITEM, NUMBERS, OPERATORS
from subbyte.graph.program import LAYER, Input, Node, Program
from subbyte.modules import PackedMultiheadAttention

Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
CONSTANTS = "_constants"  # where tensors go that a forward makes of nothing

_TRACED: ContextVar[dict[str, nn.Module]] = ContextVar("traced", default={})  # noqa: B039
_DROPPED = ("_assert_scalar.default", "_assert_tensor_metadata.default",
            "sym_constrain_range_for_size.default", "_assert_async.msg")  # fmt: skip


@torch.library.custom_op("subbyte::layer", mutates_args=())
def _layer(layer: str, x: Tensor, plus: Tensor | None) -> Tensor:
    """One call of a layer, by its name in the network that is being traced."""
    module: Any = _TRACED.get()[layer]
    result: Tensor = type(module).forward(module, *((x,) if plus is None else (x, plus)))
    return result


@_layer.register_fake
def _(layer: str, x: Tensor, plus: Tensor | None) -> Tensor:
    module = _TRACED.get()[layer]
    return LAYERS[type_of(module)].shape(module, *((x,) if plus is None else (x, plus)))


@torch.library.custom_op("subbyte::attention", mutates_args=())
def _attention(
    layer: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """One call of attention.

    Nine parameters: the layer's name and the arguments of `nn.MultiheadAttention`.
    """
    module: Any = _TRACED.get()[layer]
    out, weights = type(module).forward(
        module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
        is_causal,
    )  # fmt: skip
    return out, query.new_empty(0) if weights is None else weights


@_attention.register_fake
def _(layer, query, key, value, padding, need_weights, mask, average, is_causal):  # type: ignore[no-untyped-def]
    """Shapes of the results. Nine parameters: the operator's."""
    module: Any = _TRACED.get()[layer]
    out = query.new_empty((*query.shape[:-1], module.embed_dim))
    if not need_weights:
        return out, query.new_empty(0)
    batched = query.ndim == 3
    axis = 1 if batched and module.batch_first else 0
    size = [query.shape[axis], key.shape[axis] + (module.bias_k is not None) + module.add_zero_attn]
    size = size if average else [module.num_heads, *size]
    batch = [query.shape[0 if module.batch_first else 1]] if batched else []
    return out, query.new_empty((*batch, *size))


def trace(net: nn.Module, example: Example) -> Program:
    """The program of a packed network in eval mode, for any number of examples in a batch.

    example: inputs that forward takes, a batch of at least one: a tensor, a tuple of tensors, or a
    dict by forward's names. Raises SubbyteError for what cannot be traced, saying why: a forward
    that asks for values of tensors, an operator outside the closed list.
    """
    program, _ = traced(net, example)
    return program


def traced(net: nn.Module, example: Example) -> tuple[Program, dict[str, Tensor]]:
    """The program, and the tensors that it needs beside the network's state, by name."""
    args, kwargs = _arguments(example)
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with _whole_layers(net), torch.no_grad():
            exported = _exported(net, args, kwargs)
            found = _Reader(net, exported).program()
            _check_other_batches(net, exported, args, kwargs)
            return found
    finally:
        for module, training in modes:
            module.training = training


def _arguments(example: Example) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = {}
    if isinstance(example, Tensor):
        args = (example,)
    elif isinstance(example, Mapping):
        kwargs = dict(example)
    else:
        args = tuple(example)
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor):
            raise SubbyteError(
                f"the example holds a {type(value).__name__}; give a tensor, a tuple of tensors or "
                "a dict of tensors, as forward takes them"
            )
    return args, kwargs


def _exported(net: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
    """torch.export with every first dimension free; a batch of 1 is doubled: 1 is a constant."""
    sizes = {x.shape[0] for x in (*args, *kwargs.values()) if x.ndim}
    if sizes == {1}:
        args = tuple(torch.cat([x, x]) if x.ndim else x for x in args)
        kwargs = {k: torch.cat([x, x]) if x.ndim else x for k, x in kwargs.items()}
    free = torch.export.Dim.AUTO
    shapes = tuple({0: free} if x.ndim else {} for x in args)
    named = {k: {0: free} if x.ndim else {} for k, x in kwargs.items()}
    try:
        with warnings.catch_warnings():  # torch.export of itself
            warnings.filterwarnings("ignore", ".*treespec", FutureWarning)
            found = torch.export.export(
                net, args, kwargs, dynamic_shapes=named or shapes, strict=False
            )
            found = found.run_decompositions({})
        _check_batch(net, found)
        for node in reversed(found.graph.nodes):  # checks of types and sizes compute nothing
            if str(node.target).removeprefix("aten.") in _DROPPED and not node.users:
                found.graph.erase_node(node)
        found.graph.eliminate_dead_code()
        return found
    except SubbyteError:
        raise
    except Exception as error:  # whatever the network's forward does with traced tensors
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise SubbyteError(
            f"{type(net).__name__} cannot be traced: {type(error).__name__}: {first.strip()[:300]}"
        ) from None


def _check_batch(net: nn.Module, exported: Any) -> None:
    """Any batch of two or more must do: export makes a size a constant, or bounds it, silently."""
    users = {
        s.arg.name for s in exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"
    }
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in users or not getattr(value, "ndim", 0):
            continue
        size: Any = value.shape[0]
        symbol = getattr(getattr(size, "node", None), "expr", None)
        bounds = exported.range_constraints.get(symbol)
        if symbol is None or (bounds is not None and (bounds.lower > 2 or bounds.upper < 2**31)):
            raise SubbyteError(
                f"{type(net).__name__} cannot be traced: it computes otherwise for other batch "
                f"sizes (dimension 0 of '{node.name}')"
            )


def _check_other_batches(
    net: nn.Module, exported: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> None:
    """The graph computes what the network does for one example, and for one more than was given."""
    module = exported.module()
    for resized in (lambda x: x[:1], lambda x: torch.cat([x, x[:1]])):
        given = tuple(resized(x) if x.ndim else x for x in args)
        named = {k: resized(x) if x.ndim else x for k, x in kwargs.items()}
        try:
            wanted = pytree.tree_leaves(net(*given, **named))
            found = pytree.tree_leaves(module(*given, **named))
            same = len(wanted) == len(found) and all(map(_same, wanted, found))
        except Exception:  # of the network's forward, or of torch.export's checks
            same = False
        if not same:
            raise SubbyteError(
                f"{type(net).__name__} cannot be traced: for other batch sizes than the example's "
                "its graph does not compute what its forward does"
            )


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def _whole_layers(net: nn.Module) -> Iterator[None]:
    """While it is open, each packed layer and norm is one traced operation."""
    layers: dict[str, Any] = {}
    for name, module in net.named_modules():  # parents come first; what is inside one is part of it
        parents = (name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1))
        if type(module) in WHOLE and not any(p in layers for p in (*parents, "")):
            layers[name] = module
    token = _TRACED.set(layers)
    try:
        for name, module in layers.items():
            vars(module)["forward"] = _one_call(name, module)
        yield
    finally:
        for module in layers.values():
            vars(module).pop("forward", None)
        _TRACED.reset(token)


def _one_call(name: str, module: nn.Module) -> Any:
    if isinstance(module, PackedMultiheadAttention):

        def attend(
            query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
            need_weights: bool = True, attn_mask: Tensor | None = None,
            average_attn_weights: bool = True, is_causal: bool = False,
        ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
            """Eight parameters: the arguments of `nn.MultiheadAttention`."""
            out, weights = _attention(
                name, query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
            return out, weights if need_weights else None

        return attend

    def call(input: Tensor, plus: Tensor | None = None) -> Tensor:
        found: Tensor = _layer(name, input, plus)
        return found

    return call


class _Reader:
    """Turns one exported graph into a program."""

    def __init__(self, net: nn.Module, exported: Any) -> None:
        self.net, self.exported = net, exported
        self.refs: dict[str, Any] = {}  # graph node -> argument of the program
        self.held: dict[str, str] = {}  # graph node -> the parameter or buffer that it stands for
        self.nodes: list[Node] = []
        self.layers: dict[str, dict[str, Any]] = {}
        self.constants: dict[str, Tensor] = {}
        self.numbers = itertools.count()

    def program(self) -> tuple[Program, dict[str, Tensor]]:
        inputs = self._inputs()
        output: Any = None
        for node in self.exported.graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                output = self._output([self._argument(x) for x in node.args[0]])
        own = set(dict(self.net.named_buffers(remove_duplicate=False)))
        buffers = frozenset(own | set(self.constants))
        program = Program(tuple(inputs), self.layers, tuple(self.nodes), output, buffers)
        return program, self.constants

    def _inputs(self) -> list[Input]:
        signature = self.exported.graph_signature
        found = []
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        for node in self.exported.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            kind = spec.kind.name
            if kind == "USER_INPUT":
                found.append(self._input(node))
            else:
                self.held[node.name] = spec.target
        return found

    def _input(self, node: Any) -> Input:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise SubbyteError(f"input '{node.name}' is no tensor, so the network is not traced")
        self.refs[node.name] = {"value": node.name}
        shape = tuple(int(n) if isinstance(n, int) else None for n in value.shape)
        return Input(node.name, shape, str(value.dtype).removeprefix("torch."))

    def _state_name(self, target: str) -> str:
        """State that the file keeps goes by its name; the rest becomes the program's constant."""
        if target in self.net.state_dict():
            return target
        source = self.exported.constants.get(target)
        if source is None:
            source = self.exported.state_dict.get(target)
        if not isinstance(source, Tensor):
            raise SubbyteError(f"the network reads '{target}', which is no tensor of its own")
        name = f"{CONSTANTS}.c{len(self.constants)}"
        self.constants[name] = source.detach()
        return name

    def _call(self, node: Any) -> None:
        target = node.target
        if target is operator.getitem and isinstance(self.refs.get(node.args[0].name), list):
            self.refs[node.name] = self.refs[node.args[0].name][node.args[1]]
            return
        name = str(target)
        if name.startswith("subbyte.layer"):
            layer, x, plus = (*node.args, None)[:3]
            self._layer_call(node, str(layer), {"x": x, "plus": plus})
        elif name.startswith("subbyte.attention"):
            names = LAYERS["MultiheadAttention"].takes
            layer, *rest = node.args
            self._layer_call(node, str(layer), dict(zip(names, rest, strict=False)))
        elif target is operator.getitem:
            self._emit(node, ITEM, {"x": node.args[0], "index": node.args[1]})
        else:
            self._operation(node, name)

    def _layer_call(self, node: Any, layer: str, args: dict[str, Any]) -> None:
        if layer not in self.layers:
            self.layers[layer] = settings_of(self.net.get_submodule(layer))
        given = {key: value for key, value in args.items() if value is not None}
        self._emit(node, LAYER, given, layer)

    def _operation(self, node: Any, name: str) -> None:
        for number, function in NUMBERS.items():
            if node.target is function:
                self._emit(node, number, dict(zip(("a", "b"), node.args, strict=False)))
                return
        known = BY_ATEN.get(name.removeprefix("aten."))
        if known is None:
            raise SubbyteError(
                f"{type(self.net).__name__} uses {name}, which a program has no operator for; its "
                "file opens with its class: load(path, model=net)"
            )
        op = OPERATORS[known]
        schema = [argument.name for argument in op.overload._schema.arguments]
        given = dict(zip(schema, node.args, strict=False)) | dict(node.kwargs)
        named = {ours: given[theirs] for ours, theirs in op.arguments.items() if theirs in given}
        self._emit(node, known, named)

    def _emit(self, node: Any, op: str, args: dict[str, Any], layer: str = "") -> None:
        out = f"n{next(self.numbers)}"
        self.nodes.append(Node(op, out, {k: self._argument(v) for k, v in args.items()}, layer))
        self.refs[node.name] = {"value": out}

    def _argument(self, value: Any) -> Any:
        """An argument of the graph as plain data."""
        if isinstance(value, torch.fx.Node):
            if value.name in self.held and value.name not in self.refs:
                self.refs[value.name] = {"state": self._state_name(self.held[value.name])}
            return self.refs[value.name]
        if isinstance(value, list | tuple):
            return [self._argument(item) for item in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.memory_format):
            return {"layout": str(value).removeprefix("torch.")}
        if isinstance(value, float) and not math.isfinite(value):
            return {"number": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise SubbyteError(f"{type(self.net).__name__} uses a {type(value).__name__} in its graph")

    def _output(self, flat: list[Any]) -> Any:
        """The outputs as forward returns them; an object with fields becomes a dict of them."""
        spec = self.exported.call_spec.out_spec
        return _as_plain(pytree.tree_unflatten([_Leaf(x) for x in flat], spec))


class _Leaf:
    def __init__(self, argument: Any) -> None:
        self.argument = argument


def _as_plain(value: Any) -> Any:
    if isinstance(value, _Leaf):
        return value.argument
    if isinstance(value, Mapping):
        return {"map": {str(k): _as_plain(v) for k, v in value.items() if v is not None}}
    if isinstance(value, list | tuple):
        return [_as_plain(item) for item in value]
    if value is None:
        return None
    raise SubbyteError(f"forward returns a {type(value).__name__}, which a program cannot hold")
