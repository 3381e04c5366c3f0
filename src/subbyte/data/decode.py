"""From encoded images (PNG, JPEG, WebP, ...) to one stream of uint8 pixels of one shape."""

import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import numpy as np

from subbyte.errors import SubbyteError

CHUNK = 64  # encoded images in memory at a time
GREY = {"1", "L", "LA"}  # PIL's modes
TOO_DEEP = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    EOFError,
    struct.error,
)  # as PIL reports it
TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width
ORIENTATION = 0x0112

T = TypeVar("T")


@dataclass(frozen=True)
class EncodedImages:
    """A column of encoded images: `rows` [n] of {"bytes": ..., "path": ...}; `place` for errors."""

    rows: Any
    column: str
    place: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def each(self, function: Callable[[Any], T]) -> Iterator[T]:
        """`function` of every image, opened by PIL, in order; in threads, `CHUNK` images at a time.

        Raises SubbyteError with the row of an image that is missing or damaged.
        """
        number = count()
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(self), CHUNK):
                chunk = self.rows[start : start + CHUNK][self.column]
                yield from pool.map(lambda row, i: self._one(function, row, i), chunk, number)

    def _one(self, function: Callable[[Any], T], row: dict[str, Any] | None, i: int) -> T:
        from PIL import Image

        where = f"image {i} of {self.place}"
        if row is None or (row["bytes"] is None and row["path"] is None):
            raise SubbyteError(f"{where} is missing; remove the row.")
        try:
            data = row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"])
            with Image.open(data) as image:
                return function(image)
        except SubbyteError as error:
            raise SubbyteError(f"{where} {error}") from None
        except (*DAMAGED, Image.DecompressionBombError) as error:
            name = f" ({row['path']})" if row["path"] else ""
            raise SubbyteError(
                f"{where}{name} cannot be decoded: {error}; replace or remove it."
            ) from error


def common_shape(images: EncodedImages, size: int | None) -> tuple[int, int, int]:
    """The (channels, height, width) that `pixels` gives all images; 1 channel if all are grey.

    Reads only the images' headers. Raises SubbyteError if the sizes differ and `size` is None.
    """
    first: tuple[int, int] | None = None
    channels = 1
    for i, (shape, grey) in enumerate(images.each(_header)):
        first = first or shape
        if size is None and shape != first:
            raise SubbyteError(
                f"image {i} of {images.place} is {shape[0]}x{shape[1]}, image 0 is "
                f"{first[0]}x{first[1]} (height x width); pass size= to bring all to one size."
            )
        channels = channels if grey else 3
    height, width = (size, size) if size else first or (0, 0)
    return channels, height, width


def pixels(images: EncodedImages, channels: int, size: int | None) -> Iterator[np.ndarray]:
    """Every image as uint8 [channels, h, w], in order.

    With `size`, the shorter side is scaled to it (bilinear, antialiased) and the centre cut out.
    """
    mode = "L" if channels == 1 else "RGB"
    return images.each(lambda image: _decode(image, mode, size))


def checked_labels(labels: Sequence[int | None], n_classes: int, place: str) -> np.ndarray:
    """Labels as int64 [n]; SubbyteError with the row of one that is missing or no class."""
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < n_classes:
            raise SubbyteError(
                f"label {label} of image {row} of {place} is not one of the {n_classes} classes, "
                f"0 to {n_classes - 1}; use a labelled split, or correct the label."
            )
    return np.asarray(labels, dtype=np.int64)


def _header(image: Any) -> tuple[tuple[int, int], bool]:
    """((height, width) as seen upright, whether it is grey)."""
    if image.mode in TOO_DEEP:
        raise SubbyteError(f"has more than 8 bits a channel (mode {image.mode}); convert it to 8.")
    width, height = image.size
    turned = image.getexif().get(ORIENTATION, 1) in TRANSPOSED
    return ((width, height) if turned else (height, width)), image.mode in GREY


def _decode(image: Any, mode: str, size: int | None) -> np.ndarray:
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    array = np.asarray(_resized(image.convert(mode), size))
    return array[None] if mode == "L" else array.transpose(2, 0, 1)


def _resized(image: Any, size: int | None) -> Any:
    from PIL import Image

    if size is None or image.size == (size, size):
        return image
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + size, top + size))
