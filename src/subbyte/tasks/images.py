"""How images may be varied: flips, shifts, blends, and mosaics of pieces of them.

A mosaic is more to see for a layer that sees one vector per image. A classifier behind a pooling
layer gets fewer vectors than it has inputs, so that the gram of its
inputs is singular, and every image shows one class. A mosaic of pieces of four images, enlarged,
is a vector of its own kind: what codes are solved for holds better for images not seen
(docs/lab/cora-imagenet.md). The idea of training on such pictures is YOLOv4's (Bochkovskiy et al.,
arXiv:2004.10934); to take statistics of them, ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from subbyte.data import random_crop, random_flip
from subbyte.tasks.batches import Batch, Examples

_LEAST, _MOST = 0.2, 0.5  # side of a piece, in sides of its image
_CROP = 8  # a shift of at most 1/8 of the image's side


def are_images(x: Examples) -> TypeGuard[Tensor]:
    """Whether these are images of one size, float [n, c, h, w]."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()


def varied(x: Batch, generator: torch.Generator, step: int) -> Batch:
    """Images flipped and shifted, in every other step blended; anything else as it is."""
    if not are_images(x):
        return x
    x = random_crop(x, x.shape[-1] // _CROP, generator)
    x = random_flip(x, generator)
    x = _blended(x, generator) if step % 2 else x
    return x.contiguous(memory_format=torch.channels_last)


def _blended(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every image with its neighbour in the batch, each pair in a share of its own."""
    share = torch.rand(len(x), 1, 1, 1, generator=generator)
    return share * x + (1 - share) * x.roll(1, 0)


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
