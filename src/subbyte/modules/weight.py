"""What every packed layer holds: uint8 words and a scale in plain buffers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as is_compiling

from subbyte import kernels
from subbyte.core.functional import store_scale
from subbyte.core.grids import Grid
from subbyte.core.tensors import (
    LowRank,
    QuantizedLayer,
    QuantizedTensor,
    as_weight,
    low_rank_product,
)
from subbyte.errors import SubbyteError
from subbyte.kernels import Activation, Epilogue, Ready
from subbyte.packing import PackedMatrix, StoredTensor, radix
from subbyte.packing.stored import check_codes


def keep_types(module: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """`nn.Module._apply` for packed layers: `fn` moves what they store, and does not cast it.

    A float16 holds no scale of 1e-9 and no bias of 1e-8; what a layer returns has the type of its
    activations anyway. Only the empty `dtype_of` is cast.
    """
    stored = {**module._parameters, **module._buffers}
    kept = {name: t.detach() for name, t in stored.items() if t is not None}
    nn.Module._apply(module, fn, recurse)  # type: ignore[no-untyped-call]
    for name, before in kept.items():
        own = module._parameters if name in module._parameters else module._buffers
        if name != "dtype_of" and own[name].dtype != before.dtype:
            moved = before.to(own[name].device)
            own[name] = nn.Parameter(moved, False) if own is module._parameters else moved
    return module


class PackedWeight(nn.Module):
    """A layer's QuantizedTensor in radix words, and its low-rank adapter if it has one.

    words: uint8 [8 * n_words]. scale: [groups] as the grid's domain stores it: float32, float16 or
    int8 exponents. up, down, adapter_scale: see `LowRank`; None without an adapter. channel_axis:
    the dimension of the weight that the rows of `up` belong to.

    dtype_of: empty, of the type that the network was cast to: `next(net.parameters())` tells the
    type and device of any packed network. The state dict holds the grid and the shape as well, as
    JSON in bytes: words of another grid are refused.
    """

    dtype_of: nn.Parameter
    _apply = keep_types

    words: Tensor
    scale: Tensor
    up: Tensor | None
    down: Tensor | None
    adapter_scale: Tensor | None

    def __init__(self, layer: QuantizedLayer, channel_axis: int = 0) -> None:
        super().__init__()
        weight, adapter = layer.weight, layer.adapter
        self.grid: Grid = weight.grid
        self.shape = tuple(weight.shape)
        self.channel_axis = channel_axis
        parts = (None,) * 3 if adapter is None else (adapter.up, adapter.down, adapter.scale)
        for name, part in zip(("up", "down", "adapter_scale"), parts, strict=True):
            self.register_buffer(name, own_copy(part))
        self.dtype_of = nn.Parameter(torch.empty(0), requires_grad=False)
        if isinstance(weight, StoredTensor):  # the words stay where they are, perhaps in a file
            words, scale = weight.words, own_copy(weight.stored_scale)
        else:
            words = radix.pack(weight.codes, weight.grid.n_levels)
            scale = store_scale(weight.scale, weight.grid.scale_domain)
        self.register_buffer("words", words)
        self.register_buffer("scale", scale)
        self._unchecked = isinstance(weight, StoredTensor) and not weight.checked
        self._matrix: PackedMatrix | None = None
        self._epilogue: Epilogue | None = None
        self._ready: Ready | None = None

    def matrix(self) -> PackedMatrix:
        """The buffers as they are now, as one value: the same one as long as they are the same."""
        held, buffers = self._matrix, self._buffers
        words, scale = buffers["words"], buffers["scale"]
        if (
            held is not None
            and held.words is words
            and held.scale is scale
            and held.grid is self.grid
        ):
            return held
        if self._unchecked and not torch.compiler.is_compiling():
            check_codes(words, self.grid, self.n_weights)  # type: ignore[arg-type]
            self._unchecked = False
        made = PackedMatrix(words, scale, self.grid, self.shape)  # type: ignore[arg-type]
        if not torch.compiler.is_compiling():
            self._matrix = made
        return made

    def epilogue(self, bias: Tensor | None, activation: Activation) -> Epilogue:
        """What the layer does with its products; the same value as long as it does the same."""
        held = self._epilogue
        if held is not None and held.bias is bias and held.activation == activation:
            return held
        made = Epilogue(kernels.plain_bias(bias), None, activation)
        if not torch.compiler.is_compiling():
            self._epilogue = made
        return made

    def ready_for(self, layer: Any) -> Ready | None:
        """The short way of a layer, if that is as its last call found it."""
        held, buffers = self._ready, self._buffers
        if (
            held is not None
            and held[0] is buffers["words"]
            and held[1] is buffers["scale"]
            and held[2] is layer._parameters["bias"]
            and held[3] == layer.precision
            and held[4] == layer.activation
            and held[5] is layer.window
            and buffers["up"] is None
        ):
            return held
        return None

    def make_ready(self, layer: Any, epilogue: Epilogue) -> None:
        """After a call of a layer that took the long way."""
        matrix = self._matrix
        if torch.compiler.is_compiling() or self.ready_for(layer) is not None:
            return
        bias = layer._parameters["bias"]
        if matrix is None or self._buffers["up"] is not None:
            self._ready = None
        else:
            self._ready = kernels.make_ready(matrix, layer.precision, bias, epilogue, layer.window)

    def answer(self, layer: Any, x: Tensor) -> Tensor | None:
        """The short way of a call, or None where the long one has to go."""
        if is_compiling():
            return None
        ready = self.ready_for(layer)
        if ready is None:
            return None
        y = kernels.answer(x, ready)
        if y is None and ready.call.stale:
            self.forget()
        return y

    def forget(self) -> None:
        """Words or scales are not what they were: the next look compares all of them."""
        self._ready = None
        if self._matrix is not None:
            self._matrix.made.pop("panel", None)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own values."""
        return {**self.__dict__, "_matrix": None, "_epilogue": None, "_ready": None}

    @property
    def n_weights(self) -> int:
        return torch.Size(self.shape).numel()

    def codes(self) -> Tensor:
        """uint8, the weight's shape."""
        return self.matrix().codes()

    def quantized(self) -> QuantizedTensor:
        """Back to the value it was made of, bit for bit."""
        return QuantizedTensor(self.codes(), self.matrix().unit(), self.grid)

    def adapter(self) -> LowRank | None:
        """Back to the value it was made of."""
        if self.up is None or self.down is None or self.adapter_scale is None:
            return None
        return LowRank(self.up, self.down, self.adapter_scale)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The adapter's up [out, rank], scaled, and down [groups * rank, width], float32."""
        if self.up is None or self.down is None or self.adapter_scale is None:
            return None
        scale = self.adapter_scale.float().reshape(-1, 1, self.up.shape[1])
        up = self.up.float().reshape(scale.shape[0], -1, self.up.shape[1]) * scale
        return up.reshape(self.up.shape), self.down.float()

    def forward(self) -> Tensor:
        """The weight that the layer computes with, as float32: decoded, plus the adapter."""
        weight = self.matrix().decoded()
        if self.up is None or self.down is None or self.adapter_scale is None:
            return weight
        extra = low_rank_product(self.up, self.down, self.adapter_scale.float())
        return weight + as_weight(extra, self.shape, self.channel_axis)

    def get_extra_state(self) -> Tensor:
        """The grid and the shape, as bytes of JSON."""
        text = json.dumps({"grid": self.grid.to_dict(), "shape": list(self.shape)})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuses, by a SubbyteError, the state of a weight of another grid or shape."""
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise SubbyteError(
                f"the state dict is of a weight {bytes(state.cpu().tolist()).decode()[:200]}, this "
                f"one has {self.grid.n_levels} levels and shape {self.shape}; load the packed file "
                "with subbyte.load instead"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}dtype_of"]

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}_extra_state" in state:
            self.set_extra_state(state[f"{prefix}_extra_state"])  # before a word is written
        super()._load_from_state_dict({**state, f"{prefix}dtype_of": self.dtype_of}, prefix, *rest)

    def extra_repr(self) -> str:
        rank = "" if self.up is None else f", rank={self.up.shape[1]}"
        return f"shape={self.shape}, levels={self.grid.n_levels}, scales={self.scale.numel()}{rank}"


def own_copy(tensor: Tensor | None) -> Tensor | None:
    """Frozen values are never written to, so a module gets its own, laid out as a file gives it."""
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


def decoded_weight(self: Any) -> Tensor:
    """The weight of a packed layer as float32, decoded at each call."""
    weight: Tensor = self.packed()
    return weight


def by_reference(function: Callable[..., Tensor], x: Tensor, layer: Any) -> Tensor:
    """function(x, weight, bias) with the layer's decoded weight, in the activations' type.

    On a CPU, activations of 16 bits are widened and the result is narrowed: a float16 weight would
    overflow where the product does not.
    """
    if x.is_cpu and x.dtype in (torch.float16, torch.bfloat16):
        return by_reference(function, x.float(), layer).to(x.dtype)
    bias = layer.bias
    return function(x, cast_to(x, layer.weight), None if bias is None else bias.to(x.dtype))


def cast_to(x: Tensor, weight: Tensor) -> Tensor:
    """A decoded weight in the activations' type. Raises SubbyteError if they are no floats."""
    if not x.is_floating_point():
        raise SubbyteError(
            f"activations are {str(x.dtype).removeprefix('torch.')}; a packed layer takes floating "
            "point numbers: call x.float() first"
        )
    return weight.to(x.dtype)


def frozen_bias(bias: Tensor | None) -> nn.Parameter | None:
    """A bias of its own for a packed layer: a parameter that takes no gradient."""
    own = own_copy(bias)
    return None if own is None else nn.Parameter(own, requires_grad=False)


def take_attributes(packed: nn.Module, like: nn.Module) -> None:
    """Give a packed layer what else models read of the layer that it stands for: its plain values.

    Sizes and options such as `in_channels` or `padding_idx`; no tensors, modules or private names.
    """
    own = {"training", *vars(packed), *packed._parameters, *packed._buffers, *packed._modules}
    for name, value in vars(like).items():
        if not name.startswith("_") and name not in own:
            setattr(packed, name, value)
