"""What the weights of an LSTM, GRU or RNN are multiplied with.

torch computes a whole recurrent layer at once. To see what its weights are given, its layers are
run again one after the other: the input weights see the layer's input, the recurrent weights the
hidden state of the step before. Projections of an LSTM's hidden state (`proj_size`) see something
that torch does not return; they have no statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence


def weight_inputs(module: nn.RNNBase, x: Any, hx: Any = None) -> Iterator[tuple[str, Tensor]]:
    """Name of each weight, and what it is multiplied with in a call: [..., width].

    x: as the module takes it, a tensor or a PackedSequence. hx: hidden states, or None for zeros.
    """
    directions = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        own = None if hx is None else _states(hx, layer, directions)
        y, _ = _one_layer(module, layer)(x, own)
        for direction in range(directions):
            end = f"_l{layer}{'_reverse' if direction else ''}"
            yield f"weight_ih{end}", x if isinstance(x, Tensor) else x.data
            yield f"weight_hh{end}", _before(module, y, _first(module, own, direction), direction)
        x = y


def _states(hx: Any, layer: int, directions: int) -> Any:
    """The hidden states of one layer, in the form of all."""
    part = slice(layer * directions, (layer + 1) * directions)
    return hx[part] if isinstance(hx, Tensor) else tuple(state[part] for state in hx)


def _one_layer(module: nn.RNNBase, layer: int) -> nn.RNNBase:
    """The layer as a module of its own, with the same weights."""
    names = [n for n in module._flat_weights_names if _number(n) == layer]
    more: dict[str, Any] = {"proj_size": module.proj_size} if module.proj_size else {}
    if isinstance(module, nn.RNN):
        more["nonlinearity"] = module.nonlinearity
    kind: Any = next(k for k in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, k))
    width = getattr(module, f"weight_ih_l{layer}").shape[1]
    with torch.device("meta"):
        one = kind(
            width, module.hidden_size, bias=module.bias, batch_first=module.batch_first,
            bidirectional=module.bidirectional, **more,
        )  # fmt: skip
    for name in names:
        first = name.replace(f"_l{layer}", "_l0")
        setattr(one, first, nn.Parameter(getattr(module, name).detach(), requires_grad=False))
    return one.eval()


def _number(name: str) -> int:
    return int(name.rpartition("_l")[2].removesuffix("_reverse"))


def _first(module: nn.RNNBase, own: Any, direction: int) -> Tensor | None:
    """The hidden state at the start [batch, size] (unbatched: [size]); None for zeros."""
    if own is None:
        return None
    h: Tensor = own if isinstance(own, Tensor) else own[0]
    return h[direction]


def _before(module: nn.RNNBase, y: Any, first: Tensor | None, direction: int) -> Tensor:
    """The hidden state before each step, laid out as the steps of y are; of a PackedSequence the
    states of its steps alone, [steps, size]."""
    if isinstance(y, PackedSequence):
        steps, lengths = pad_packed_sequence(y)
        valid = torch.arange(len(steps))[:, None] < lengths
        return _shifted(_half(module, steps, direction), first, direction, valid)[valid]
    swap = module.batch_first and y.ndim == 3
    steps = _half(module, y.transpose(0, 1) if swap else y, direction)
    found = _shifted(steps, first, direction, torch.ones(steps.shape[:-1], dtype=torch.bool))
    return found.transpose(0, 1) if swap else found


def _half(module: nn.RNNBase, y: Tensor, direction: int) -> Tensor:
    """The outputs of one direction."""
    return y.chunk(2, dim=-1)[direction] if module.bidirectional else y


def _shifted(steps: Tensor, first: Tensor | None, direction: int, valid: Tensor) -> Tensor:
    """steps [time, ..., size], one later in the order in which the direction runs. valid [time,
    ...]: where sequences go on; behind their ends the backward direction has not begun."""
    start = torch.zeros_like(steps[:1]) if first is None else first.expand_as(steps[:1])
    if direction == 0:
        return torch.cat([start, steps[:-1]])
    last = valid & ~torch.cat([valid[1:], torch.zeros_like(valid[:1])])
    return torch.where(last[..., None], start, torch.cat([steps[1:], start]))
