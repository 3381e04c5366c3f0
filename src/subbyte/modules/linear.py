"""Linear layers with packed weights; float activations.

They multiply in integers (`subbyte.kernels`) where `precision` allows and the kernels serve them.
Everything else runs on the reference: decode the weight, run the float operation, drop it again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from subbyte import kernels
from subbyte.core.tensors import QuantizedLayer
from subbyte.kernels import Activation, Epilogue, Precision
from subbyte.modules.weight import (
    PackedWeight,
    by_reference,
    decoded_weight,
    frozen_bias,
    keep_types,
    take_attributes,
)


def packed_linear(
    x: Tensor, packed: PackedWeight, precision: Precision, epilogue: Epilogue
) -> Tensor:
    """x [..., in] -> activation(x W' + bias + plus) [..., out], the adapter included."""
    if packed._buffers["up"] is not None:
        up, down = packed.factors()  # type: ignore[misc]
        epilogue = epilogue.adding(F.linear(F.linear(x, down), up))
    return kernels.linear(x, packed.matrix(), precision, epilogue)


def then(layer: Any) -> str:
    """For a layer's repr: what it does with its products."""
    return "" if layer.activation == "none" else f", then {layer.activation}"


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed weight [out, in]; x [..., in] -> [..., out] in x's dtype.

    activation, and `plus` [..., out] added before it: what `fuse` moves into the layer.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    _apply = keep_types
    precision: Precision = "float32"
    activation: Activation = "none"
    fused = False  # `fuse` has moved something into it
    window = None  # what a convolution has

    def __init__(self, like: nn.Linear, layer: QuantizedLayer) -> None:
        super().__init__()
        take_attributes(self, like)
        self.packed = PackedWeight(layer)
        self.register_parameter("bias", frozen_bias(layer.bias))

    weight = property(decoded_weight)

    def forward(self, input: Tensor, plus: Tensor | None = None) -> Tensor:
        x = input  # torch's name of the argument
        # From the dictionaries: nn.Module's look-up by attribute takes a microsecond a name.
        packed: Any = self._modules["packed"]
        y: Tensor | None = None if plus is not None else packed.answer(self, x)
        if y is not None:
            return y
        if kernels.why_not(x, packed.grid, self.in_features):
            return kernels.finish(by_reference(F.linear, x, self), plus, self.activation)
        epilogue = packed.epilogue(self._parameters["bias"], self.activation)
        y = packed_linear(x, packed, self.precision, epilogue.adding(plus))
        packed.make_ready(self, epilogue)
        return y

    def why_not(self, x: Tensor, plus: Tensor | None = None) -> str | None:
        """Why the kernels do not multiply x, in words; None if they do."""
        packed: Any = self._modules["packed"]
        return kernels.why_not(x, packed.grid, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}{then(self)}"
