"""Operators that only move elements: views of a buffer, strided copies, and picks by a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subbyte.export.c.listing import Listing, View
from subbyte.export.c.pointwise import contiguous, padded
from subbyte.export.c.values import run_operator

_SAME = ("Identity", "Contiguous", "Alias", "Dropout", "Cast", "CastCopy", "CastLike")
_VIEWS = ("Reshape", "ReshapeCopy", "Flatten", "Unflatten", "Transpose", "SwapAxes", "MoveAxis",
          "T", "Squeeze", "SqueezeAxes", "Unsqueeze", "Expand", "Slice", "Select", "Split",
          "SplitSizes", "Chunk", "Unbind", "Unfold")  # fmt: skip
_PICKS = ("Tile", "Repeat", "Roll", "Flip", "Index", "IndexSelect", "Pad", "ResizeNearest",
          "ResizeNearest1d")  # fmt: skip


def _same(call: Any) -> View:
    x: View = call.view("x")
    if not call.value.is_floating_point():
        raise call.refusal(f"makes {call.value.dtype}")
    return x


def _view(call: Any) -> Any:
    """What the operator does to a contiguous tensor says where its result's elements lie."""
    x: View = call.view("x")
    there = torch.empty(x.shape, device="meta")
    found = run_operator(call.node.op, {**call.args, "x": there})
    if isinstance(found, Tensor):
        return strided(call.listing, x, found)
    return [strided(call.listing, x, part) for part in found]


def strided(listing: Listing, x: View, like: Tensor) -> View:
    """A part of x as `like` is of its storage: a view if it is contiguous, else a copy."""
    shape, offset = tuple(like.shape), x.offset + int(like.storage_offset())
    if like.is_contiguous():
        return View(x.buffer, shape, offset)
    y = listing.new(shape)
    steps = [0 if n == 1 else s for n, s in zip(shape, like.stride(), strict=True)]
    return copy(listing, View(x.buffer, (1,), offset), y, (shape, steps, contiguous(shape)))


def copy(listing: Listing, x: View, y: View, places: Any) -> View:
    """places: shape, steps in x, steps in y."""
    shape, of_x, of_y = places
    joined = _joined(shape, of_x, of_y)
    flat = (*padded(joined[0], 1), *padded(joined[1], 0), *padded(joined[2], 0))
    n = torch.Size(shape).numel()
    listing.step("copy", (x, y, listing.struct("int", flat, "places"), str(n)), y)
    return y


def _joined(
    shape: Sequence[int], of_x: Sequence[int], of_y: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Dimensions that follow one another in both places become one."""
    dims: list[tuple[int, int, int]] = []
    for n, a, b in zip(shape, of_x, of_y, strict=True):
        if n == 1:
            continue
        if dims and dims[-1][1] == n * a and dims[-1][2] == n * b:
            dims[-1] = (dims[-1][0] * n, a, b)
        else:
            dims.append((n, a, b))
    columns = list(zip(*dims, strict=True)) or [(), (), ()]
    return list(columns[0]), list(columns[1]), list(columns[2])


def copy_into(listing: Listing, x: View, y: View, at: Sequence[int]) -> None:
    """x to the part of y that starts at position `at`."""
    steps = contiguous(y.shape)
    offset = y.offset + sum(a * s for a, s in zip(at, steps, strict=True))
    copy(listing, x, View(y.buffer, (1,), offset), (x.shape, contiguous(x.shape), steps))


def _pick(call: Any) -> View:
    """Any other move: the operator runs on the places themselves."""
    x: View = call.view("x")
    places = torch.arange(x.size, dtype=torch.float64).reshape(x.shape)
    known = {name: call.args[name] for name in call.args if name != "x"}
    if any(isinstance(value, View) for value in _flat(list(known.values()))):
        raise call.refusal("has indices that depend on the input")
    found = run_operator(call.node.op, {"x": places, **known})
    table = found.round().to(torch.int64).numpy().astype(np.int32).reshape(-1)
    name = call.listing.array("int32_t", table, f"{call.node.out}.places")
    y = call.listing.new(tuple(found.shape))
    return call.listing.step("pick", (x, y, name, str(y.size)), y)


def _flat(values: list[Any]) -> list[Any]:
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def _resize(call: Any) -> View:
    """Nearest: by whole factors each element is repeated, without a table."""
    x: View = call.view("x")
    size, wanted = x.shape[2:], call.shape[2:]
    factors = call.args.get("scale_factors") or [w / n for n, w in zip(size, wanted, strict=True)]
    if any(w != n * f for n, w, f in zip(size, wanted, factors, strict=True)) or any(
        f % 1 for f in factors
    ):
        return _pick(call)
    there = torch.empty(x.shape, device="meta")
    for axis, (n, w) in enumerate(zip(size, wanted, strict=True)):
        there = there.unsqueeze(3 + 2 * axis)
        there = there.expand(*there.shape[: 3 + 2 * axis], w // n, *there.shape[4 + 2 * axis :])
    y = strided(call.listing, x, there)
    return View(y.buffer, call.shape, y.offset)


def _pixel_shuffle(call: Any) -> View:
    x, r = call.view("x"), int(call.args["upscale_factor"])
    _, channels, h, w = x.shape
    there = torch.empty(channels // (r * r), r, r, h, w, device="meta").permute(0, 3, 1, 4, 2)
    y = strided(call.listing, x, there)
    return View(y.buffer, call.shape, y.offset)


def _pad(call: Any) -> View:
    """Constants around x; other modes pick."""
    if call.args.get("mode", "constant") not in ("constant", None):
        return _pick(call)
    x: View = call.view("x")
    pads = list(call.args["pads"])
    if min(pads) < 0:
        raise call.refusal("crops")
    y = call.listing.new(call.shape)
    call.listing.step("fill", (y, repr(float(call.args.get("value") or 0)) + "f", str(y.size)), y)
    before = [pads[2 * k] for k in range(len(pads) // 2)][::-1]
    at = [0] * (len(call.shape) - len(before)) + before
    copy_into(call.listing, x, y, at)
    return y


MOVES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_PICKS, _pick),
    "ResizeNearest": _resize,
    "ResizeNearest1d": _resize,
    "PixelShuffle": _pixel_shuffle,
    "Pad": _pad,
    "ConstantPad": _pad,
}
