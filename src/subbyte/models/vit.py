"""Small vision transformers, for 32x32 colour images in 4x4 patches by default.

LowRes (arXiv:2502.08795) trains networks it calls ViT; its layer sizes are not known, these are
ours: 0.57 and 4.8 million parameters. Pre-norm blocks, learned positions, mean over the tokens.
"""

import torch
from torch import Tensor, nn

from subbyte.errors import SubbyteError
from subbyte.models.base import Network, NetworkSpec, checked_spec, glorot_
from subbyte.models.preprocess import centred


class Block(nn.Module):
    """Self-attention and a two-layer perceptron (4 times as wide), each normalised before."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, tokens, dim] of the same shape."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.mlp(self.norm2(x))
        out: Tensor = x + y
        return out


class ViT(Network):
    """Patches to tokens, `depth` blocks, the mean over the tokens, one linear layer."""

    def __init__(self, spec: NetworkSpec, dim: int, depth: int, heads: int) -> None:
        channels, side, patch = (spec.arguments[k] for k in ("in_channels", "image_size", "patch"))
        super().__init__(spec, centred(channels, side), spec.arguments["classes"])
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(1, (side // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, self.classes)
        glorot_(self)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, in_channels, image_size, image_size]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def vit1(*, in_channels: int = 3, image_size: int = 32, classes: int = 10, patch: int = 4) -> ViT:
    """Dimension 96, 5 blocks, 3 heads: 0.57 million parameters."""
    return ViT(_spec("vit1", in_channels, image_size, classes, patch), dim=96, depth=5, heads=3)


def vit2(*, in_channels: int = 3, image_size: int = 32, classes: int = 10, patch: int = 4) -> ViT:
    """Dimension 256, 6 blocks, 8 heads: 4.8 million parameters."""
    return ViT(_spec("vit2", in_channels, image_size, classes, patch), dim=256, depth=6, heads=8)


def _spec(name: str, in_channels: int, image_size: int, classes: int, patch: int) -> NetworkSpec:
    spec = checked_spec(
        name, in_channels=in_channels, image_size=image_size, classes=classes, patch=patch
    )
    if image_size % patch:
        raise SubbyteError(
            f"image_size={image_size} of network '{name}' is not a multiple of patch={patch}; "
            "choose a patch that divides it."
        )
    return spec
