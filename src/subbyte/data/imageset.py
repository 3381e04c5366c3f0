"""Labelled images in memory-mapped storage, and batches of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.core.group import ALONE, Group
from subbyte.errors import SubbyteError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images of one size with their labels.

    images: uint8 [n, c, h, w], c = 1 (grey) or 3 (RGB); pages of a file that are read when used.
    labels: int64 [n], each an index into `classes`. source: where they come from. split: the split
    that was read, which is not always the one asked for (`load_images`). left_out: a sentence for
    each image of the source that could not be read.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    split: str
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def subset(self, indices: Sequence[int] | Tensor) -> "ImageSet":
        """The images at `indices`, in that order, copied into memory.

        Raises SubbyteError for an index outside 0 .. n - 1.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(outside):
            raise SubbyteError(
                f"index {int(outside[0])} is outside the {len(self)} images of {self._place()}; "
                f"use 0 to {len(self) - 1}."
            )
        return self._with(self.images[chosen], self.labels[chosen])

    def head(self, n: int) -> "ImageSet":
        """The first `n` images, or all if there are fewer; a view, nothing is copied."""
        if n < 1:
            raise SubbyteError(f"head({n}) of {self._place()} holds no image; use 1 or more.")
        return self._with(self.images[:n], self.labels[:n])

    def _with(self, images: Tensor, labels: Tensor) -> "ImageSet":
        return ImageSet(images, labels, self.classes, self.source, self.split)

    def _place(self) -> str:
        return f"split '{self.split}' of '{self.source}'"


def batches(
    data: ImageSet,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
    group: Group = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over `data`: uint8 images [b, c, h, w] and int64 labels [b], fresh copies.

    In order, or shuffled by `generator` (of the CPU). The last batch is smaller if `batch_size`
    does not divide the number of images; `drop_last` leaves it out. group: each process is given
    its part of every batch, which may be empty. Raises SubbyteError, at the call, if that leaves no
    batch at all.
    """
    n = len(data)
    end = n - n % batch_size if drop_last and batch_size > 0 else n
    if batch_size < 1 or end == 0:
        raise SubbyteError(
            f"batch_size={batch_size} makes no batch of the {n} images of '{data.source}'; "
            f"use 1 to {n}."
        )
    return _batches(data, batch_size, end, generator, group)


def _batches(
    data: ImageSet, batch_size: int, end: int, generator: torch.Generator | None, group: Group
) -> Iterator[tuple[Tensor, Tensor]]:
    n = len(data)
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    for batch in order[:end].split(batch_size):
        chosen = batch[group.own(len(batch))]
        yield data.images.index_select(0, chosen), data.labels.index_select(0, chosen)
