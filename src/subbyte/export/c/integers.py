"""From a program to a listing in integers alone: what `graph.integer` computes, equal to the bit.

Every value is whole numbers times 2^-fraction, with one fraction per value. A packed layer rounds
its input to `fraction` bits behind the point (half up), saturates it to `bits`, and sums code * x.
A norm that `pack` has absorbed is x * scale + shift with whole scales. What is between layers stays
exact.
Bounds of all values are known here, so that no sum can overflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subbyte.core.follow import BATCHNORMS
from subbyte.errors import SubbyteError
from subbyte.export.c import layers, moves
from subbyte.export.c.layers import Frame, Product
from subbyte.export.c.listing import Listing, View
from subbyte.export.c.lower import frame_of, inputs_of, outputs_of, probe, resolved
from subbyte.export.c.operators import FLOAT, Call
from subbyte.export.c.values import Values, names
from subbyte.graph.integer import integer_weight
from subbyte.graph.operators import ITEM
from subbyte.graph.program import LAYER, Node
from subbyte.modules import PackedConv2d, PackedLinear
from subbyte.modules.absorb import Affine

EXACT = 2**53  # float64 holds whole numbers to here, and so does integer.py
WIDEST = 62  # bits, sign included, with room for a rounding
EXCESS = "values of more than 53 bits, if there are any, are exact here and rounded in float64"
_MONOTONE = ("Relu", "MaxPool2d", "MaxPool1d", "Reshape", "ReshapeCopy", "Flatten", "Identity")
_MOVED = tuple(moves.MOVES)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A value times 2^fraction is whole, and at most bound. rounded: as layers round it."""

    fraction: int
    bound: int
    rounded: bool = False


@dataclass
class Integers:
    """Grows while a network is lowered. fraction, bits: of the layers' inputs."""

    listing: Listing
    values: Values
    fraction: int
    bits: int
    facts: dict[int, Fixed] = field(default_factory=dict)  # by buffer
    largest: int = 0
    notes: list[str] = field(default_factory=list)
    _rounded: dict[View, View] = field(default_factory=dict)

    @property
    def top(self) -> int:
        return int(2 ** (self.bits - 1))

    def fact(self, view: View) -> Fixed:
        return self.facts[view.buffer]

    def note(self, view: View, fact: Fixed, name: str) -> View:
        """Remember what a value is. Raises SubbyteError for one that 64 bits cannot hold."""
        bits = fact.bound.bit_length() + 1
        if bits > WIDEST:
            raise SubbyteError(
                f"'{name}' may come to whole numbers of {bits} bits, over {WIDEST}; use fewer bits "
                "for activations, or pack(..., batchnorm='power_of_two')"
            )
        if fact.bound >= EXACT and EXCESS not in self.notes:
            self.notes.append(EXCESS)
        self.facts[view.buffer] = fact
        self.largest = max(self.largest, fact.bound)
        return view

    def rounded(self, x: View) -> View:
        """x as a layer takes it; once per value."""
        before = self.fact(x)
        if before.rounded:
            return x
        if x not in self._rounded:
            self._rounded[x] = self._round(x, before)
        return self._rounded[x]

    def _round(self, x: View, before: Fixed) -> View:
        shift = before.fraction - self.fraction
        if not -30 <= shift <= 52:
            raise SubbyteError(
                f"a value has {before.fraction} bits behind the point, too far from {self.fraction}"
            )
        self.largest = max(
            self.largest, before.bound + 2 ** max(0, shift - 1), self.top << max(0, -shift)
        )
        y = self.listing.new(x.shape)
        self.listing.step("round_to", (x, y, str(shift), str(self.top), str(x.size)), y)
        return self.note(y, Fixed(self.fraction, self.top, rounded=True), "an input")


def lower_integers(
    values: Values, listing: Listing, fraction: int, bits: int
) -> tuple[Integers, list[View]]:
    """Fills the listing; returns what is known, and the outputs. Raises SubbyteError, naming it."""
    if not 2 <= bits <= 32 or not -64 <= fraction <= 64:
        raise SubbyteError(
            f"bits={bits}, fraction={fraction}; use 2 to 32 bits, -64 to 64 behind the point"
        )
    state = Integers(listing, values, fraction, bits)
    views: dict[str, Any] = inputs_of(values, listing)
    for name, view in views.items():
        if not values.of[name].is_floating_point():
            raise SubbyteError(
                f"input '{name}' is whole numbers; the integer form takes fixed point"
            )
        state.note(view, Fixed(fraction, state.top, rounded=True), name)
    for node in values.source.program.nodes:
        if node.out not in values.fixed:
            views[node.out] = _node(state, node, views)
            probe(listing, node.out, views[node.out])
    outputs = outputs_of(values, listing, views)
    listing.number = "int32_t" if state.largest < 2**31 else "int64_t"
    return state, outputs


def _node(state: Integers, node: Node, views: Mapping[str, Any]) -> Any:
    args = {key: resolved(value, state.values, views) for key, value in node.args.items()}
    if node.op == ITEM:
        return args["x"][args["index"]]
    if node.op == LAYER:
        return _layer(state, node, args)
    call = Call(state.listing, node, args, state.values.of[node.out])
    if node.op in _MOVED:
        return _moved(state, call)
    if node.op not in _KNOWN:
        raise SubbyteError(
            f"operator '{node.op}' ({node.out}) has no run in integers; use form='float'"
        )
    return _KNOWN[node.op](state, call)


def _moved(state: Integers, call: Call) -> Any:
    """A view, or a copy with the same fraction."""
    fact = state.fact(call.view("x"))
    found = FLOAT[call.node.op](call)
    for view in found if isinstance(found, list) else [found]:
        state.facts.setdefault(view.buffer, fact)
    return found


# ---------------------------------------------------------------- layers


def _layer(state: Integers, node: Node, args: dict[str, Any]) -> View:
    layer = state.values.source.net.get_submodule(node.layer)
    if isinstance(layer, Affine):
        return _affine(state, node, layer, args["x"])
    if isinstance(layer, BATCHNORMS):
        raise SubbyteError(
            f"layer '{node.layer}' is a BatchNorm, which has no run in integers; pack the network "
            "with batchnorm='power_of_two' (or 'absorb')"
        )
    if not isinstance(layer, PackedLinear | PackedConv2d):
        kind = type(layer).__name__.removeprefix("Packed")
        raise SubbyteError(
            f"layer '{node.layer}' ({kind}) has no run in integers; use form='float'"
        )
    return _product(state, node, layer, args)


def _product(state: Integers, node: Node, layer: Any, args: dict[str, Any]) -> View:
    weight = fixed_weight(node.layer, layer)
    if "plus" in args or layer.activation != "none" or layer.packed.up is not None:
        raise SubbyteError(
            f"layer '{node.layer}' has an adapter or was fused; integers take it without"
        )
    x = state.rounded(args["x"])
    fraction = state.fraction - weight.exponent
    bias = whole_bias(layer.bias, fraction)
    sums = np.abs(weight.values).reshape(len(weight.values), -1).sum(1)
    bound = state.top * int(sums.max()) + (int(bias.abs().max()) if bias is not None else 0)
    product = Product(node.layer, layer.packed, bias)
    if isinstance(layer, PackedLinear):
        y = layers.linear(state.listing, x, product)
    else:
        frame = frame_of(node.layer, layer, layer.pads)
        y = layers.conv(state.listing, x, product, frame, state.values.of[node.out].shape)
    return state.note(y, Fixed(fraction, bound), node.layer)


def fixed_weight(name: str, layer: Any) -> Any:
    try:
        return integer_weight(layer.packed)
    except SubbyteError as error:
        levels = layer.packed.grid.n_levels
        raise SubbyteError(
            f"layer '{name}': {error}; the nearest grid is fixed_point({_bits_near(levels)})"
        ) from None


def _bits_near(levels: int) -> int:
    """Bits of the fixed-point grid with the fewest levels that are as many."""
    return min(8, max(2, (levels + 1 - 1).bit_length()))


def whole_bias(bias: Tensor | None, fraction: int) -> Tensor | None:
    """Rounded half up to multiples of 2^-fraction, as integer.py rounds it."""
    if bias is None:
        return None
    exact = np.ldexp(bias.detach().double().numpy(), fraction)
    return torch.from_numpy(np.floor(exact + 0.5).astype(np.int64))


# ---------------------------------------------------------------- norms


def _affine(state: Integers, node: Node, layer: Affine, x: View) -> View:
    """scale = m 2^e per channel: y = x m 2^(F - q + e) + shift 2^F, with F so that both are whole.

    Where layers round the result anyway, shift is cut to F bits behind the point: the floor of the
    rounding is the same.
    """
    before = state.fact(x)
    m, e = whole_scale(layer.scale)
    fraction = max([before.fraction - int(k) for k, v in zip(e, m, strict=True) if v], default=0)
    behind = max(map(bits_behind, layer.shift.tolist()), default=0)
    if _is_rounded_next(state.values, node.out):
        fraction = max(fraction, state.fraction + 1)
    else:
        fraction = max(fraction, behind)
    scale = [
        int(v) << (fraction - before.fraction + int(k)) if v else 0
        for v, k in zip(m, e, strict=True)
    ]
    shift = [math.floor(math.ldexp(v, fraction)) for v in layer.shift.tolist()]
    bound = max(abs(s) * before.bound + abs(t) for s, t in zip(scale, shift, strict=True))
    if bound << max(0, behind - fraction) >= EXACT and EXCESS not in state.notes:
        state.notes.append(EXCESS)
    y = state.listing.new(x.shape)
    arrays = [
        state.listing.constant(torch.tensor(v), f"{node.layer}.{n}")
        for v, n in ((scale, "scale"), (shift, "shift"))
    ]
    args: tuple[str | View, ...] = (x, y, *arrays, str(x.shape[1]), str(x.size // x.shape[1]))
    state.listing.step("affine_integer", args, y, (x,))
    return state.note(y, Fixed(fraction, bound), node.layer)


def whole_scale(scale: Tensor) -> tuple[Any, Any]:
    """float32 [channels] as m * 2^e with m odd, or 0: int64 both."""
    fraction, exponent = np.frexp(scale.detach().double().numpy())
    m, e = np.ldexp(fraction, 24).astype(np.int64), exponent.astype(np.int64) - 24
    zeros = np.array([(v & -v).bit_length() - 1 if v else 0 for v in m.tolist()])
    return m >> zeros, e + zeros


def bits_behind(value: float) -> int:
    """Bits behind the point of a finite float; negative for multiples of two."""
    numerator, denominator = value.as_integer_ratio()
    if denominator > 1 or not numerator:
        return denominator.bit_length() - 1
    return 1 - (numerator & -numerator).bit_length()


def _is_rounded_next(values: Values, name: str) -> bool:
    """Whether all that reads a value keeps the order of numbers, until layers round it."""
    if name in names(values.source.program.output):
        return False
    readers = [n for n in values.source.program.nodes if name in names(dict(n.args))]
    return all(
        _rounds(values, n) or (n.op in _MONOTONE and _is_rounded_next(values, n.out))
        for n in readers
        if n.out not in values.fixed
    )


def _rounds(values: Values, node: Node) -> bool:
    layer = values.source.net.get_submodule(node.layer) if node.op == LAYER else None
    return isinstance(layer, PackedLinear | PackedConv2d)


# ---------------------------------------------------------------- between layers


def _relu(state: Integers, call: Call) -> View:
    x, y = call.view("x"), call.listing.new(call.shape)
    call.listing.step("relu_integer", (x, y, str(x.size)), y, (x,))
    return state.note(y, state.fact(x), call.node.out)


def _max_pool(state: Integers, call: Call) -> View:
    x = call.view("x")
    return state.note(FLOAT[call.node.op](call), state.fact(x), call.node.out)


def _mean(state: Integers, call: Call) -> View:
    """Of equal parts whose size is a power of two: the sum, with the point moved."""
    x = call.view("x")
    shape = call.shape if len(call.shape) == len(x.shape) else (*call.shape, 1, 1)
    frame = _equal_parts(call, x, shape)
    count = frame.kernel[0] * frame.kernel[1]
    if count & (count - 1):
        raise call.refusal(f"is a mean of {count} values, no power of two, in integers")
    y = call.listing.new(shape)
    call.listing.step("sum_pool_integer", (x, y, layers.window(call.listing, x, y, frame)), y)
    before = state.fact(x)
    fact = Fixed(before.fraction + count.bit_length() - 1, before.bound * count)
    return View(state.note(y, fact, call.node.out).buffer, call.shape)


def _equal_parts(call: Call, x: View, shape: Any) -> Frame:
    """Parts that share no element and have no border."""
    (channels, h, w), (_, rows, columns) = layers.planes(x), layers.planes(View(0, tuple(shape)))
    kernel = (h // max(1, rows), w // max(1, columns))
    given = {"kernel_shape": kernel, "strides": kernel, "pads": 0}
    asked = {
        k: layers.pair(call.args[k], kernel[0]) if k != "pads" else call.args[k]
        for k in given
        if call.args.get(k)
    }
    axes = [a % len(x.shape) for a in call.args.get("axes") or (2, 3)]
    plain = all(given[k] == v for k, v in asked.items()) and axes == [2, 3]
    if channels != shape[1] or h % max(1, rows) or w % max(1, columns) or not plain:
        raise call.refusal("has windows that overlap, or of different sizes, in integers")
    return Frame(kernel, kernel)


def _add(state: Integers, call: Call) -> View:
    a, b = call.view("a"), call.view("b")
    if (
        a.shape != b.shape
        or call.number("alpha", 1) != 1
        or not {a.buffer, b.buffer} <= set(state.facts)
    ):
        raise call.refusal("adds values of two shapes, or a constant, in integers")
    a, b = _same_fraction(state, [a, b])
    y = call.listing.new(call.shape)
    call.listing.step("sum_integer", (a, b, y, str(y.size)), y, (a, b))
    fact = Fixed(state.fact(a).fraction, state.fact(a).bound + state.fact(b).bound)
    return state.note(y, fact, call.node.out)


def _same_fraction(state: Integers, views: list[View]) -> list[View]:
    """All with the most bits behind the point that one of them has."""
    fraction = max(state.fact(v).fraction for v in views)
    return [_moved_point(state, v, fraction) for v in views]


def _moved_point(state: Integers, x: View, fraction: int) -> View:
    before = state.fact(x)
    by = 2 ** (fraction - before.fraction)
    if by == 1:
        return x
    y = state.listing.new(x.shape)
    state.listing.step("scaled_integer", (x, y, str(by), str(x.size)), y, (x,))
    return state.note(y, Fixed(fraction, before.bound * by), "a sum")


def _concat(state: Integers, call: Call) -> View:
    call.args["inputs"] = _same_fraction(state, call.args["inputs"])
    y: View = FLOAT[call.node.op](call)
    facts = [state.fact(v) for v in call.args["inputs"]]
    return state.note(y, Fixed(facts[0].fraction, max(f.bound for f in facts)), call.node.out)


_KNOWN = {
    "Relu": _relu,
    "MaxPool1d": _max_pool,
    "MaxPool2d": _max_pool,
    "AveragePool2d": _mean,
    "AdaptiveAveragePool2d": _mean,
    "ReduceMean": _mean,
    "Add": _add,
    "Concat": _concat,
}
