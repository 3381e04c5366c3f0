"""Kernels that are one expression of C, made where a network uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from subbyte.export.c.listing import Listing, View, literal

UNARY: dict[str, tuple[str, tuple[str, ...]]] = {  # operator -> (expression of v, its settings)
    "Relu": ("v > 0 ? v : 0", ()),
    "Clip": ("v < a ? a : v > b ? b : v", ("min", "max")),
    "ClampMin": ("v < a ? a : v", ("min",)),
    "Gelu": ("0.5f * v * (1.0f + erff(v * 0.707106781f))", ()),
    "GeluTanh": ("0.5f * v * (1.0f + tanhf(0.797884561f * (v + 0.044715f * v * v * v)))", ()),
    "Sigmoid": ("1.0f / (1.0f + expf(-v))", ()),
    "Silu": ("v / (1.0f + expf(-v))", ()),
    "Tanh": ("tanhf(v)", ()),
    "Mish": ("v * tanhf(v > 20.0f ? v : logf(1.0f + expf(v)))", ()),
    "Elu": ("v > 0 ? v : a * (expf(v) - 1.0f)", ("alpha",)),
    "LeakyRelu": ("v > 0 ? v : a * v", ("alpha",)),
    "HardSigmoid": ("v < -3.0f ? 0 : v > 3.0f ? 1 : (v + 3.0f) / 6.0f", ()),
    "HardSwish": ("v < -3.0f ? 0 : v > 3.0f ? v : v * (v + 3.0f) / 6.0f", ()),
    "Softplus": ("v * a > b ? v : logf(1.0f + expf(v * a)) / a", ("beta", "threshold")),
    "Neg": ("-v", ()),
    "Abs": ("v < 0 ? -v : v", ()),
    "Exp": ("expf(v)", ()),
    "Log": ("logf(v)", ()),
    "Sqrt": ("sqrtf(v)", ()),
    "ReciprocalSqrt": ("1.0f / sqrtf(v)", ()),
    "Reciprocal": ("1.0f / v", ()),
    "Sin": ("sinf(v)", ()),
    "Cos": ("cosf(v)", ()),
    "Erf": ("erff(v)", ()),
    "Square": ("v * v", ()),
    "Pow": ("powf(v, a)", ("exponent",)),
    "PlusNumber": ("v + a", ("a",)),
    "TimesNumber": ("v * a", ("a",)),
    "OverNumber": ("v / a", ("a",)),
}
DEFAULTS: dict[str, float] = {
    "alpha": 1.0, "beta": 1.0, "threshold": 20.0, "min": -float("inf"), "max": float("inf"),
}  # fmt: skip
BINARY = {
    "Add": "a[{a}] + b[{b}]",
    "Sub": "a[{a}] - b[{b}]",
    "Mul": "a[{a}] * b[{b}]",
    "Div": "a[{a}] / b[{b}]",
    "Maximum": "a[{a}] > b[{b}] ? a[{a}] : b[{b}]",
    "Minimum": "a[{a}] < b[{b}] ? a[{a}] : b[{b}]",
}
RANK = 6  # of kernels.c


def unary(listing: Listing, op: str, x: View, settings: Sequence[float] = ()) -> View:
    """y = expression(x), in place where x is read last."""
    name = f"{_snake(op)}"
    expression, names = UNARY[op]
    listing.generated[name] = _unary_text(name, expression, len(names))
    y = listing.new(x.shape)
    return listing.step(name, (x, y, *map(literal, settings), str(x.size)), y, (x,))


def _unary_text(name: str, expression: str, n_settings: int) -> str:
    settings = "".join(f", float {letter}" for letter in "ab"[:n_settings])
    return (
        f"static void {name}(const float *x, float *y{settings}, size_t n)\n{{\n    size_t i;\n"
        f"    for (i = 0; i < n; i++) {{\n        const float v = x[i];\n"
        f"        y[i] = {expression};\n    }}\n}}\n"
    )


def binary(listing: Listing, op: str, a: View, b: View, shape: Sequence[int]) -> View:
    """y = a op b, with NumPy's broadcasting."""
    y = listing.new(shape)
    if a.size == b.size == y.size:
        name = f"{_snake(op)}"
        listing.generated[name] = _binary_text(name, BINARY[op])
        return listing.step(name, (a, b, y, str(y.size)), y, (a, b))
    name = f"{_snake(op)}_spread"
    listing.generated[name] = _spread_text(name, BINARY[op])
    places = (*padded(shape, 1), *_steps(a, shape), *_steps(b, shape))
    return listing.step(name, (a, b, y, listing.struct("int", places, "places"), str(y.size)), y)


def _binary_text(name: str, expression: str) -> str:
    value = expression.format(a="i", b="i")
    return (
        f"static void {name}(const float *a, const float *b, float *y, size_t n)\n{{\n"
        f"    size_t i;\n    for (i = 0; i < n; i++) y[i] = {value};\n}}\n"
    )


def _spread_text(name: str, expression: str) -> str:
    return (
        f"static void {name}(const float *a, const float *b, float *y, const int *places, "
        "size_t n)\n{\n    int of_a[RANK] = {0}, of_b[RANK] = {0};\n    long at_a = 0, at_b = 0;\n"
        f"    for (; n > 0; n--) {{\n        *y++ = {expression.format(a='at_a', b='at_b')};\n"
        "        walk(of_a, places, places + RANK, &at_a);\n"
        "        walk(of_b, places, places + 2 * RANK, &at_b);\n    }\n}\n"
    )


def _steps(view: View, shape: Sequence[int]) -> tuple[int, ...]:
    """Steps of a view that is spread to shape: 0 where it has one element."""
    own = (1,) * (len(shape) - len(view.shape)) + view.shape
    return padded([0 if n == 1 else s for n, s in zip(own, contiguous(own), strict=True)], 0)


def contiguous(shape: Sequence[int]) -> list[int]:
    """Steps between the elements of each dimension in C order."""
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(step)
        step *= n
    return steps[::-1]


def padded(values: Sequence[int], with_: int) -> tuple[int, ...]:
    """RANK values, those that lack in front."""
    return (with_,) * (RANK - len(values)) + tuple(values)


def _snake(op: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in op).strip("_") + "_each"


def setting(args: dict[str, Any], name: str) -> float:
    value = args.get(name)
    return DEFAULTS[name] if value is None else float(value)
