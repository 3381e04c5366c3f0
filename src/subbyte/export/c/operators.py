"""Operators of a program in float32: which kernel a node calls, with what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from subbyte.errors import SubbyteError
from subbyte.export.c import layers, pointwise
from subbyte.export.c.layers import Frame, Heads, Product, pair
from subbyte.export.c.listing import Listing, View
from subbyte.export.c.moves import MOVES, copy_into
from subbyte.graph.program import Node

Lowered = Any  # a View, or a list of them


class Call:
    """One node to lower. args: views where it depends on inputs, else tensors and numbers.

    value: what the node holds for the example.
    """

    def __init__(self, listing: Listing, node: Node, args: dict[str, Any], value: Any) -> None:
        self.listing, self.node, self.args, self.value = listing, node, args, value

    def view(self, name: str) -> View:
        """An argument as a view; a constant becomes an array."""
        found = self.args[name]
        if isinstance(found, View):
            return found
        if isinstance(found, Tensor):
            return self.listing.constant(found, self._hint(name))
        return self.listing.constant(torch.tensor(float(found)), self._hint(name))

    def tensor(self, name: str) -> Tensor | None:
        """An argument that must be known now, or None."""
        found = self.args.get(name)
        if isinstance(found, View):
            raise self.refusal(f"has a {name} that depends on the input")
        return found if found is None or isinstance(found, Tensor) else torch.tensor(found)

    def number(self, name: str, default: float) -> float:
        found = self.args.get(name)
        return default if found is None else float(found)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def refusal(self, why: str) -> SubbyteError:
        return SubbyteError(
            f"operator '{self.node.op}' ({self.node.out}) {why}, which C source does not hold"
        )

    def _hint(self, name: str) -> str:
        found = self.node.args.get(name)
        return found["state"] if isinstance(found, dict) and "state" in found else self.node.out


def _unary(call: Call) -> View:
    op = call.node.op
    if op == "Gelu" and call.args.get("approximate") == "tanh":
        op = "GeluTanh"
    names = pointwise.UNARY[op][1]
    return pointwise.unary(
        call.listing, op, call.view("x"), [pointwise.setting(call.args, n) for n in names]
    )


def _power(call: Call) -> View:
    exponent = float(call.args["exponent"])
    short = {2.0: "Square", 0.5: "Sqrt", -0.5: "ReciprocalSqrt", -1.0: "Reciprocal"}.get(exponent)
    x = call.view("x")
    if short:
        return pointwise.unary(call.listing, short, x)
    return pointwise.unary(call.listing, "Pow", x, [exponent])


def _one_number(value: Any) -> float | None:
    """The number that an argument is, if it is one."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and value.ndim == 0 else None
    return None if isinstance(value, View) else float(value)


def _binary(call: Call) -> View:
    """a op alpha * b; numbers go into the call."""
    op = call.node.op.removesuffix("Scalar")
    alpha, a, b = call.number("alpha", 1), *map(_one_number, (call.args["a"], call.args["b"]))
    listing = call.listing
    if b is not None and op in ("Add", "Sub", "Mul", "Div"):
        number = alpha * b * (-1 if op == "Sub" else 1)
        kind = {"Mul": "TimesNumber", "Div": "OverNumber"}.get(op, "PlusNumber")
        return pointwise.unary(
            listing, kind, call.view("a"), [b if op in ("Mul", "Div") else number]
        )
    if a is not None and op in ("Add", "Mul") and alpha == 1:
        kind = "PlusNumber" if op == "Add" else "TimesNumber"
        return pointwise.unary(listing, kind, call.view("b"), [a])
    right = call.view("b")
    if alpha != 1:
        right = pointwise.unary(listing, "TimesNumber", right, [alpha])
    return pointwise.binary(listing, op, call.view("a"), right, call.shape)


def _from_number(call: Call) -> View:
    """b - alpha * a."""
    number, alpha = float(call.args["b"]), call.number("alpha", 1)
    x = pointwise.unary(call.listing, "TimesNumber", call.view("a"), [-alpha])
    return pointwise.unary(call.listing, "PlusNumber", x, [number])


# ---------------------------------------------------------------- products with float weights


def _linear(call: Call) -> View:
    name = call._hint("weight").removesuffix(".weight")
    weight = _known_weight(call, "weight")
    return layers.linear(call.listing, call.view("x"), Product(name, weight, call.tensor("bias")))


def _known_weight(call: Call, name: str) -> Tensor:
    weight = call.tensor(name)
    assert weight is not None
    return weight


def _conv(call: Call) -> View:
    weight = _known_weight(call, "weight")
    frame = _frame(call, weight)
    product = Product(call._hint("weight").removesuffix(".weight"), weight, call.tensor("bias"))
    return layers.conv(call.listing, call.view("x"), product, frame, call.shape)


def _frame(call: Call, weight: Tensor) -> Frame:
    if weight.ndim > 4:
        raise call.refusal("works on three dimensions")
    kernel = pair(list(weight.shape[2:]))
    stride, dilation = (_pair(call, n) for n in ("strides", "dilations"))
    pads = call.args.get("pads", 0)
    lone = weight.ndim == 3
    if isinstance(pads, str):
        spans = [
            d * (k - 1) // 2 if pads == "same" else 0 for d, k in zip(dilation, kernel, strict=True)
        ]
        pads = spans[1:] if lone else spans
    return Frame(
        kernel,
        stride,
        dilation,
        pair(pads or [0], 0) if lone else _both(pads, 0),
        int(call.args.get("group") or 1),
    )


def _pair(call: Call, name: str) -> tuple[int, int]:
    value = call.args.get(name) or [1]
    return pair(value) if call.value.ndim == 3 else _both(value, 1)


def _both(value: Any, default: int) -> tuple[int, int]:
    """A setting of height and width, given once or twice."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    values = values or [default]
    return int(values[0]), int(values[-1])


def _conv_transpose(call: Call) -> View:
    weight = _known_weight(call, "weight")
    frame = _frame(call, weight)
    product = Product(call._hint("weight").removesuffix(".weight"), weight, call.tensor("bias"))
    return layers.conv_transpose(call.listing, call.view("x"), product, frame, call.shape)


def _gather(call: Call) -> View:
    name = call._hint("data").removesuffix(".weight")
    return layers.embedding(call.listing, call.view("indices"), name, _known_weight(call, "data"))


# ---------------------------------------------------------------- pools


def _pool_frame(call: Call) -> Frame:
    lone = call.value.ndim == 3
    one = (lambda v, d: pair(v, d)) if lone else _both
    kernel = one(call.args["kernel_shape"], 1)
    stride = one(call.args.get("strides") or call.args["kernel_shape"], 1)
    return Frame(
        kernel,
        stride,
        one(call.args.get("dilations") or [1], 1),
        one(call.args.get("pads") or [0], 0),
    )


def _max_pool(call: Call) -> View:
    x, y = call.view("x"), call.listing.new(call.shape)
    frame = layers.window(call.listing, x, y, _pool_frame(call))
    return call.listing.step("max_pool", (x, y, frame), y)


def _average_pool(call: Call) -> View:
    x, y = call.view("x"), call.listing.new(call.shape)
    frame = layers.window(call.listing, x, y, _pool_frame(call))
    padded = call.args.get("count_include_pad", True)
    divisor = call.args.get("divisor_override") or 0
    return call.listing.step("average_pool", (x, y, frame, str(int(padded)), str(divisor)), y)


def _adaptive_pool(call: Call) -> View:
    x, y = call.view("x"), call.listing.new(call.shape)
    frame = layers.window(call.listing, x, y, Frame((1, 1)))
    return call.listing.step("adaptive_average_pool", (x, y, frame), y)


# ---------------------------------------------------------------- norms


def _layer_norm(call: Call) -> View:
    n = int(torch.Size(call.args["normalized_shape"]).numel())
    x, y = call.view("x"), call.listing.new(call.shape)
    weight, bias = (_maybe(call, name) for name in ("weight", "bias"))
    epsilon = pointwise.literal(call.number("epsilon", 1e-5))
    return call.listing.step(
        "layer_norm", (x, y, weight, bias, epsilon, str(x.size // n), str(n)), y, (x,)
    )


def _rms_norm(call: Call) -> View:
    n = int(torch.Size(call.args["normalized_shape"]).numel())
    x, y = call.view("x"), call.listing.new(call.shape)
    epsilon = call.number("epsilon", float(torch.finfo(torch.float32).eps))
    args = (x, y, _maybe(call, "weight"), pointwise.literal(epsilon), str(x.size // n), str(n))
    return call.listing.step("rms_norm", args, y, (x,))


def _group_norm(call: Call) -> View:
    x, y = call.view("x"), call.listing.new(call.shape)
    weight, bias = (_maybe(call, name) for name in ("weight", "bias"))
    sizes = (x.shape[1], x.size // x.shape[1], int(call.args["num_groups"]))
    epsilon = pointwise.literal(call.number("epsilon", 1e-5))
    args = (x, y, weight, bias, epsilon, call.listing.struct("int", sizes, "sizes"))
    return call.listing.step("group_norm", args, y, (x,))


def _batch_norm(call: Call) -> View:
    mean, var = (_known_weight(call, n).double() for n in ("mean", "var"))
    scale, bias = call.tensor("scale"), call.tensor("bias")
    gain = (var + call.number("epsilon", 1e-5)).rsqrt() * (1 if scale is None else scale.double())
    shift = (0 if bias is None else bias.double()) - mean * gain
    return layers.affine_step(
        call.listing, call.view("x"), call.node.out, (gain.float(), shift.float())
    )


def _maybe(call: Call, name: str) -> str | View:
    return "0" if call.args.get(name) is None else call.view(name)


# ---------------------------------------------------------------- along axes


def _along(call: Call, x: View, axes: Sequence[int]) -> tuple[int, int, int] | None:
    """Axes that lie together, as (outer, n, inner); None if they do not."""
    found = sorted(a % len(x.shape) for a in axes)
    if found != list(range(found[0], found[-1] + 1)):
        return None
    size = torch.Size(x.shape)
    return (
        size[: found[0]].numel(),
        size[found[0] : found[-1] + 1].numel(),
        size[found[-1] + 1 :].numel(),
    )


def _softmax(call: Call) -> View:
    x, y = call.view("x"), call.listing.new(call.shape)
    sizes = _along(call, x, [int(call.args["axis"])])
    assert sizes is not None
    logarithm = str(int(call.node.op == "LogSoftmax"))
    return call.listing.step(
        "softmax", (x, y, call.listing.struct("int", sizes, "sizes"), logarithm), y, (x,)
    )


_REDUCE = {
    "ReduceMean": "reduce_mean",
    "ReduceMeanAll": "reduce_mean",
    "ReduceSum": "reduce_sum",
    "ReduceMax": "reduce_max",
}


def _reduce(call: Call) -> View:
    x, y = call.view("x"), call.listing.new(call.shape)
    axes = call.args.get("axes") or list(range(len(x.shape)))
    sizes = _along(call, x, axes)
    if sizes is None:
        raise call.refusal(f"is over axes {axes}, which do not lie together")
    return call.listing.step(
        _REDUCE[call.node.op], (x, y, call.listing.struct("int", sizes, "sizes")), y
    )


# ---------------------------------------------------------------- attention and matrices


def _attention(call: Call) -> View:
    views = [call.view(n) for n in ("Q", "K", "V")]
    (n, queries, width), (n_keys, keys, _), (_, _, value_width) = map(_matrices, views)
    steps = tuple(
        (w, m * w)
        for m, w in ((queries, width), (keys, width), (keys, value_width), (queries, value_width))
    )
    heads = Heads(
        n, n_keys, width, value_width, queries, keys, steps, bool(call.args.get("is_causal"))
    )
    mask = layers.mask_of(call.listing, call.tensor("mask"), n, (queries, keys))
    scale = pointwise.literal(call.number("scale", width**-0.5))
    return layers.attention(call.listing, views, call.shape, heads, mask, scale)


def _matrices(view: View) -> tuple[int, int, int]:
    """A view [..., m, n] as (how many, m, n)."""
    return torch.Size(view.shape[:-2]).numel(), view.shape[-2], view.shape[-1]


def _mat_mul(call: Call) -> View:
    a, b = call.view("a"), call.view("b")
    if min(len(a.shape), len(b.shape)) < 2:
        raise call.refusal("is of a vector")
    (count_a, m, k), (count_b, _, n) = _matrices(a), _matrices(b)
    count = max(count_a, count_b)
    if {count_a, count_b} - {1, count}:
        raise call.refusal(f"is of {a.shape} and {b.shape}")
    sizes = (count, m, k, n, m * k if count_a > 1 else 0, k * n if count_b > 1 else 0)
    y = call.listing.new(call.shape)
    return call.listing.step("mat_mul", (a, b, y, call.listing.struct("int", sizes, "sizes")), y)


def _concat(call: Call) -> View:
    axis = int(call.args.get("axis", 0) or 0)
    views = [
        call.listing.constant(v, call.node.out) if isinstance(v, Tensor) else v
        for v in call.args["inputs"]
    ]
    y = call.listing.new(call.shape)
    if call.node.op == "Stack":
        axis %= len(call.shape)
        views = [View(v.buffer, (*v.shape[:axis], 1, *v.shape[axis:]), v.offset) for v in views]
    at = [0] * len(call.shape)
    for view in views:
        if view.size:
            copy_into(call.listing, view, y, at)
            at[axis] += view.shape[axis]
    return y


Lower = Callable[[Call], Lowered]
FLOAT: dict[str, Lower] = {
    **{name: _unary for name in pointwise.UNARY if name not in ("Pow", "Square")},
    **dict.fromkeys((*pointwise.BINARY, "MulScalar", "AddScalar"), _binary),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv1dSame", "Conv2dSame"), _conv),
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d"), _conv_transpose),
    **dict.fromkeys(("MaxPool1d", "MaxPool2d"), _max_pool),
    **dict.fromkeys(("AveragePool1d", "AveragePool2d"), _average_pool),
    **dict.fromkeys(("AdaptiveAveragePool1d", "AdaptiveAveragePool2d"), _adaptive_pool),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("MatMul", "BatchMatMul", "MatMul2d"), _mat_mul),
    **dict.fromkeys(("Concat", "Stack"), _concat),
    **MOVES,
    "Clamp": lambda call: _clamp(call),
    "SubFrom": _from_number,
    "Pow": _power,
    "Linear": _linear,
    "Gather": _gather,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "GroupNormalization": _group_norm,
    "BatchNormalization": _batch_norm,
    "Attention": _attention,
}  # fmt: skip


def _clamp(call: Call) -> View:
    limits = [pointwise.setting(call.args, n) for n in ("min", "max")]
    return pointwise.unary(call.listing, "Clip", call.view("x"), limits)
