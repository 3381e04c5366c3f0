"""The short way of a packed layer: all that its last call found out, as one tuple.

A call compares what the layer holds with what the tuple was made for, asks whether anything looks
on, and hands the rest to the core in one step (`csrc/ready.hpp`). The core compares the versions
and the bytes of words and scales as `panels` does. Whatever differs is left to the long way, which
computes the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from subbyte.kernels import traced
from subbyte.kernels.panels import panel_of
from subbyte.kernels.products import PLANES
from subbyte.kernels.served import MANY, _native, decodes
from subbyte.kernels.values import Epilogue, Window
from subbyte.packing import PackedMatrix


class Ready(NamedTuple):
    """What a call was made ready for, compared by identity, and the call."""

    words: Tensor
    scale: Tensor
    bias: Tensor | None
    precision: str
    activation: str
    window: Window | None
    call: Any
    low: float
    high: float
    planes: int


def make_ready(
    matrix: PackedMatrix, precision: str, bias: Any, epilogue: Epilogue, window: Window | None
) -> Ready | None:
    """After a call that took the long way; None where the next one has to take it, too.

    bias: of the layer; epilogue: its own, without a sum. window: of a convolution.
    """
    if matrix.made.get("panel") is None or bias is not epilogue.bias or decodes(precision, MANY):
        return None
    panel = panel_of(matrix, window)
    entry = matrix.made["panel"]
    kind: Any = _native.ReadyLinear if window is None else _native.ReadyConv
    call = kind(panel, entry.origin, matrix.words, matrix.scale, bias, entry.versions or ())
    low, high = epilogue.limits
    return Ready(
        matrix.words, matrix.scale, bias, precision, epilogue.activation, window, call, low, high,
        PLANES[precision],
    )  # fmt: skip


def answer(x: Tensor, ready: Ready) -> Tensor | None:
    """The product, or None where something looks on, or is not as it was."""
    if traced.looks_on(x) or (
        torch.is_grad_enabled() and (x.requires_grad or _has_gradients(ready))
    ):
        return None
    found: Tensor | None = ready.call(
        x, ready.low, ready.high, ready.planes, torch.get_num_threads()
    )
    return found


def _has_gradients(ready: Ready) -> bool:
    bias = ready.bias
    return ready.scale.requires_grad or (bias is not None and bias.requires_grad)
