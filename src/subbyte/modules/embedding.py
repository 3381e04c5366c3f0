"""Look-up tables with packed rows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from subbyte.core.functional import decode, read_scale
from subbyte.core.grids import PerTensor
from subbyte.core.tensors import QuantizedLayer
from subbyte.modules.weight import PackedWeight, decoded_weight, take_attributes
from subbyte.packing import radix


class PackedEmbedding(nn.Module):
    """`nn.Embedding` with a packed table [entries, features]; [...] -> [..., features].

    Only the rows that are looked up are decoded.
    """

    def __init__(self, like: nn.Embedding, layer: QuantizedLayer) -> None:
        super().__init__()
        take_attributes(self, like)
        self.packed = PackedWeight(layer)

    weight = property(decoded_weight)

    def forward(self, input: Tensor) -> Tensor:
        indices, packed = input, self.packed  # torch's name of the argument
        entries, features = packed.shape
        nothing = packed.dtype_of.new_zeros(1, 1).expand(entries, 1)
        F.embedding(indices, nothing)  # raises what nn.Embedding raises for a bad index
        rows = indices.flatten().long()
        codes = radix.unpack_rows(packed.words, packed.grid.n_levels, rows, features)
        scale = packed.scale  # of the rows that are read alone
        if packed.grid.granularity != PerTensor():
            scale = scale.reshape(entries, -1)[rows].flatten()
        found = decode(codes, read_scale(scale, packed.grid.scale_domain), packed.grid)
        factors = packed.factors()
        if factors is not None:
            found = found + factors[0][rows] @ factors[1]
        return found.to(packed.dtype_of.dtype).reshape(*indices.shape, features)
