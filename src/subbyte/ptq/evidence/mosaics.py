"""More to see for layers that see one vector an image: images put together from pieces of others.

A classifier behind a pooling layer gets fewer vectors than it has inputs, so that the gram of its
inputs is singular, and every image shows one class. A mosaic of pieces of four images, enlarged,
is a vector of its own kind: what codes are solved for holds better for images not seen
(docs/lab/cora-imagenet.md). The idea of training on such pictures is YOLOv4's (Bochkovskiy et al.,
arXiv:2004.10934); to take statistics of them, ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST, _MOST = 0.2, 0.5  # side of a piece, in sides of its image
_ENOUGH = 4  # vectors an input of the layer
_MOST_ROUNDS = 8


class Mosaics(Sequence[Tensor]):
    """Batches of mosaics, made when they are asked for; one index gives one batch, always the same.

    images: float [n, c, h, w], inputs of the network. rounds: n mosaics in each. The batches have
    `batch` mosaics or, the last of a round, fewer.
    """

    def __init__(self, images: Tensor, rounds: int, seed: int, batch: int = 64) -> None:
        self.images, self.seed, self.rounds = images, seed, rounds
        self.chunks = torch.arange(len(images)).split(batch)

    def __len__(self) -> int:
        return self.rounds * len(self.chunks)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        return mosaic(self.images, len(self.chunks[index % len(self.chunks)]), generator)


def rounds_needed(vectors: int, width: int) -> int:
    """How many mosaics an image, for a layer of `width` inputs that saw so many vectors.

    None for a layer that saw as many as it has inputs.
    """
    if vectors >= width:
        return 0
    return min(_MOST_ROUNDS, -(-_ENOUGH * width // vectors) - 1)


def mosaic(images: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n mosaics [n, c, h, w] of images of this shape: in each quarter a piece of one of them."""
    height, width = images.shape[2:]
    rows = (height // 2, height - height // 2)
    columns = (width // 2, width - width // 2)
    quarters = [[_pieces(images, n, (h, w), generator) for w in columns if w] for h in rows if h]
    whole = torch.cat([torch.cat(row, 3) for row in quarters], 2)
    return whole.contiguous(memory_format=torch.channels_last)


def _pieces(images: Tensor, n: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """n pieces of images drawn at random, mirrored at random, brought to one size."""
    height, width = images.shape[2:]
    drawn = torch.randint(len(images), (n,), generator=generator)
    pieces = []
    for image in images[drawn]:
        side, top, left, mirror = torch.rand(4, generator=generator).tolist()
        share = _LEAST + (_MOST - _LEAST) * side
        h, w = max(1, round(share * height)), max(1, round(share * width))
        y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
        piece = image[None, :, y : y + h, x : x + w]
        piece = F.interpolate(piece, size, mode="bilinear", antialias=True, align_corners=False)
        pieces.append(piece.flip(3) if mirror < 0.5 else piece)
    return torch.cat(pieces)
