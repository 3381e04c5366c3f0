"""LSTM, GRU and RNN with packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from subbyte.core.tensors import QuantizedLayer
from subbyte.modules.weight import PackedWeight, cast_to, frozen_bias, keep_types, take_attributes

_OPTIONS = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
_NOW: ContextVar[list[Tensor]] = ContextVar("weights of the call that runs")


class _PackedRecurrent(nn.Module):
    """What the three have in common: same call and results as the layer of torch.nn.

    Each weight that is packed is a `PackedWeight` under its own name (`weight_ih_l0`); a weight
    that a recipe keeps in float stays a parameter. The weights are decoded once per call, for all
    steps of the sequence, and torch's own forward runs on them.
    """

    kind: Any  # of torch.nn
    options: tuple[str, ...] = ()  # of its constructor, beyond those that the three share
    _apply = keep_types
    # torch's forward calls these
    check_input = nn.RNNBase.check_input
    check_hidden_size = nn.RNNBase.check_hidden_size
    check_forward_args: Any = nn.RNNBase.check_forward_args
    get_expected_hidden_size = nn.RNNBase.get_expected_hidden_size
    permute_hidden: Any = nn.RNNBase.permute_hidden

    def __init__(self, like: nn.RNNBase, packed: Mapping[str, QuantizedLayer]) -> None:
        super().__init__()
        self.names = tuple(like._flat_weights_names)
        for name in self.names:
            if name in packed:
                self.add_module(name, PackedWeight(packed[name]))
            else:
                self.register_parameter(name, frozen_bias(getattr(like, name)))
        take_attributes(self, like)

    @property
    def _flat_weights(self) -> list[Tensor]:
        """Of the call that runs; each thread has its own."""
        return _NOW.get()

    def _update_flat_weights(self) -> None:
        """torch's forward asks for it; here they are never stale."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As the layer of torch.nn: a tensor or a PackedSequence, and maybe hidden states."""
        x = input if isinstance(input, Tensor) else input.data
        token = _NOW.set([cast_to(x, self._weight(name)) for name in self.names])
        try:
            found: tuple[Any, Any] = self.kind.forward(self, input, hx)
            return found
        finally:
            _NOW.reset(token)

    def _weight(self, name: str) -> Tensor:
        packed = self._modules.get(name)
        found: Tensor = self._parameters[name] if packed is None else packed()  # type: ignore
        return found

    def float_layer(self) -> nn.RNNBase:
        """The layer of torch.nn with the decoded weights."""
        names = ("input_size", "hidden_size", *_OPTIONS, *self.options)
        twin = self.kind(**{name: getattr(self, name) for name in names})
        weights = {name: self._weight(name).detach().clone() for name in self.names}
        twin.load_state_dict(weights)
        found: nn.RNNBase = twin
        return found


class PackedLSTM(_PackedRecurrent):
    """`nn.LSTM` with packed weights."""

    kind = nn.LSTM
    options = ("proj_size",)
    check_forward_args = nn.LSTM.check_forward_args
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    permute_hidden = nn.LSTM.permute_hidden


class PackedGRU(_PackedRecurrent):
    """`nn.GRU` with packed weights."""

    kind = nn.GRU


class PackedRNN(_PackedRecurrent):
    """`nn.RNN` with packed weights."""

    kind = nn.RNN
    options = ("nonlinearity",)
