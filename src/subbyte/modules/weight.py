"""What every packed layer holds: uint8 words and a scale in plain buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
from subbyte.kernels import Activation, Epilogue
from subbyte.packing import PackedMatrix, radix


class PackedWeight(nn.Module):
    """A layer's QuantizedTensor in radix words, and its low-rank adapter if it has one.

    words: uint8 [8 * n_words]. scale: [groups] as the grid's domain stores it: float32, float16 or
    int8 exponents. up, down, adapter_scale: see `LowRank`; None without an adapter. channel_axis:
    the dimension of the weight that the rows of `up` belong to.
    """

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
            self.register_buffer(name, copied(part))
        self.register_buffer("words", radix.pack(weight.codes, weight.grid.n_levels))
        self.register_buffer("scale", store_scale(weight.scale, weight.grid.scale_domain))
        self._matrix: PackedMatrix | None = None
        self._epilogue: Epilogue | None = None

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

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own values."""
        return {**self.__dict__, "_matrix": None, "_epilogue": None}

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

    def extra_repr(self) -> str:
        rank = "" if self.up is None else f", rank={self.up.shape[1]}"
        return f"shape={self.shape}, levels={self.grid.n_levels}, scales={self.scale.numel()}{rank}"


def copied(tensor: Tensor | None) -> Tensor | None:
    """Frozen values are never written to, so a module gets its own, laid out as a file gives it."""
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


def decoded_weight(self: Any) -> Tensor:
    """The weight of a packed layer as float32, decoded at each call."""
    weight: Tensor = self.packed()
    return weight
