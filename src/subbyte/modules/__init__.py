"""Packed layers: uint8 words, a scale and a bias in plain buffers; float activations.

Buffers are plain tensors, so state_dict, deepcopy, `.to(device)` and safetensors work as for any
module.
"""

from subbyte.modules.attention import PackedMultiheadAttention
from subbyte.modules.build import PACKED, SEVERAL, is_fused, pack
from subbyte.modules.conv import PackedConv2d
from subbyte.modules.embedding import PackedEmbedding
from subbyte.modules.linear import PackedLinear
from subbyte.modules.weight import PackedWeight

__all__ = [
    "PACKED",
    "SEVERAL",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "PackedMultiheadAttention",
    "PackedWeight",
    "is_fused",
    "pack",
]
