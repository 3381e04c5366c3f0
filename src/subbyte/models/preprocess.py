"""From stored pixels to a network's input: crop, channel order, normalisation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.errors import SubbyteError


@dataclass(frozen=True)
class Preprocess:
    """Centre crop, channel order, then `(x / scale - mean) / std`; part of a network's definition.

    size: (height, width) in pixels, or None to keep the images' own size. crop: cut it out of the
    centre of larger images; without it they must have that size. mean, std: one value a
    channel, in the order the network sees (after the swap if `bgr`), in units of `x / scale`.
    Raises SubbyteError for lengths that differ, a zero or negative std or scale, or `bgr` without
    3 channels.
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0
    bgr: bool = False
    crop: bool = True

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise SubbyteError(
                f"Preprocess has {len(self.mean)} means and {len(self.std)} stds; "
                "give one of each for every channel."
            )
        if min(*self.std, self.scale) <= 0:
            raise SubbyteError(
                f"Preprocess has std {self.std} and scale {self.scale}; all must be above 0."
            )
        if self.bgr and len(self.mean) != 3:
            raise SubbyteError(
                f"Preprocess has bgr=True with {len(self.mean)} channels; BGR needs 3."
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Network input for stored images: uint8 [n, c, h, w] -> float32 [n, c, H, W].

        Raises SubbyteError if `images` is not uint8, not 4-dimensional, has another channel count
        than `mean`, or is smaller than `size`.
        """
        self._check(images)
        x = self._cropped(images)
        x = (x.flip(1) if self.bgr else x).float()
        return (x / self.scale - _per_channel(self.mean, x)) / _per_channel(self.std, x)

    def _check(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise SubbyteError(
                f"Preprocess got {images.dtype} of shape {tuple(images.shape)}; "
                "give uint8 images [n, c, h, w] with values 0 to 255."
            )
        if images.shape[1] != len(self.mean):
            raise SubbyteError(
                f"Preprocess got images with {images.shape[1]} channels, but the network takes "
                f"{len(self.mean)}; convert the images, or build the network for "
                f"{images.shape[1]} channels."
            )

    def _cropped(self, images: Tensor) -> Tensor:
        if self.size is None:
            return images
        height, width = self.size
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        if top < 0 or left < 0 or (not self.crop and tuple(images.shape[2:]) != self.size):
            what = "smaller than" if self.crop else "not of"
            raise SubbyteError(
                f"Preprocess got images of {images.shape[2]}x{images.shape[3]}, {what} the "
                f"network's {height}x{width}; load them with size={max(height, width)} (data.size, "
                "--size) or build the network for that size."
            )
        return images[:, :, top : top + height, left : left + width]


def centred(channels: int, size: int) -> Preprocess:
    """Preprocessing of our own networks: pixels to -1..1, any channel count, `size` x `size`."""
    return Preprocess((size, size), mean=(0.5,) * channels, std=(0.5,) * channels, crop=False)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
