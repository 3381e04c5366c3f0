"""Random crop, flip and cutout of whole batches of stored images, without a loop over images.

All take uint8 [n, c, h, w] and return a new tensor of the same shape; the draws are one per image,
from a generator on the images' device. rows, of images that are a part of a batch: how many the
batch has, and which these are; each image is varied as it would be in the whole batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from subbyte.errors import SubbyteError

Rows = tuple[int, slice]


@dataclass(frozen=True)
class Augment:
    """Random crop, then flip, then cutout; what is 0 or False is left out.

    crop: black pixels added on every side before cutting back to the old size. flip: mirror every
    second image or so. cutout: side of a black square, in pixels. CIFAR's usual: crop 4 and flip.
    Raises SubbyteError for a negative number.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        for name, value in (("crop", self.crop), ("cutout", self.cutout)):
            if value < 0:
                raise SubbyteError(f"{name}={value} of Augment is negative; use 0 to leave it out.")

    def __call__(
        self, x: Tensor, generator: Generator | None = None, rows: Rows | None = None
    ) -> Tensor:
        """Augmented copies of uint8 images [n, c, h, w] (`x` itself if nothing is switched on)."""
        if self.crop:
            x = random_crop(x, self.crop, generator, rows)
        if self.flip:
            x = random_flip(x, generator, rows)
        if self.cutout:
            x = cutout(x, self.cutout, generator, rows)
        return x


def random_crop(
    x: Tensor, padding: int, generator: Generator | None = None, rows: Rows | None = None
) -> Tensor:
    """Every image moved by up to `padding` pixels either way, black where nothing was.

    Draws two integers of 0 .. 2 padding an image: the rows, then the columns, at which the crop
    starts in the padded image.
    """
    n, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = (_draw(2 * padding + 1, x, generator, rows) for _ in range(2))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n, device=x.device), :, top, left]


def random_flip(x: Tensor, generator: Generator | None = None, rows: Rows | None = None) -> Tensor:
    """Every image mirrored left to right with probability 1/2; draws 0 or 1 (mirror) an image."""
    mirror = _draw(2, x, generator, rows).bool()
    return torch.where(mirror.view(-1, 1, 1, 1), x.flip(3), x)


def cutout(
    x: Tensor, size: int, generator: Generator | None = None, rows: Rows | None = None
) -> Tensor:
    """A black square of `size` x `size` pixels in every image, cut off at the image's edge.

    Draws the square's row, then its column, uniformly over the image: pixel `size // 2` of the
    square. DeVries and Taylor, arXiv:1708.04552.
    """
    height, width = x.shape[2:]
    high = _covered(_draw(height, x, generator, rows), height, size)
    wide = _covered(_draw(width, x, generator, rows), width, size)
    return x.masked_fill((high[:, :, None] & wide[:, None, :])[:, None], 0)


def _draw(below: int, x: Tensor, generator: Generator | None, rows: Rows | None) -> Tensor:
    n, own = rows or (len(x), slice(None))
    return torch.randint(below, (n,), generator=generator, device=x.device)[own]


def _covered(centre: Tensor, length: int, size: int) -> Tensor:
    """Which of `length` positions the `size` around each centre cover: bool [n, length]."""
    offset = torch.arange(length, device=centre.device) - (centre - size // 2)[:, None]
    return (offset >= 0) & (offset < size)
