"""From encoded images (PNG, JPEG, WebP, ...) to one file of uint8 pixels of one shape."""

import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from subbyte.errors import SubbyteError

CHUNK = 64  # encoded images in memory at a time
FORMATS = {b"\x89PNG": ["PNG"], b"RIFF": ["WEBP"]}  # by first bytes: PIL tries all, slowly
GREY = {"1", "L", "LA"}  # PIL's modes
TOO_DEEP = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}
DAMAGED = (OSError, SyntaxError, ValueError, IndexError, EOFError, struct.error)  # PIL's reports

T = TypeVar("T")


@dataclass(frozen=True)
class Unreadable:
    """An image that is missing or damaged. why: a sentence that names it."""

    row: int
    why: str


@dataclass(frozen=True)
class Written:
    """shape: (c, h, w) of each image in the file. left_out: those that are not in it."""

    shape: tuple[int, int, int]
    left_out: tuple[Unreadable, ...] = ()


@dataclass(frozen=True)
class EncodedImages:
    """A column of encoded images: `rows` [n] of {"bytes": ..., "path": ...}; `place` for errors."""

    rows: Any
    column: str
    place: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def each(self, function: Callable[[Any], T]) -> Iterator[T | Unreadable]:
        """`function` of every image, opened by PIL, in order; in threads, `CHUNK` images at a time.

        Raises SubbyteError with the row of an image that the function refuses.
        """
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(self), CHUNK):
                chunk = self.rows[start : start + CHUNK][self.column]
                numbers = range(start, start + len(chunk))
                yield from pool.map(lambda row, i: self._one(function, row, i), chunk, numbers)

    def _one(
        self, function: Callable[[Any], T], row: dict[str, Any] | None, i: int
    ) -> T | Unreadable:
        from PIL import Image

        where = f"image {i} of {self.place}"
        if row is None or (row["bytes"] is None and row["path"] is None):
            return Unreadable(i, f"{where} is missing")
        try:
            encoded = row["bytes"]
            data = row["path"] if encoded is None else io.BytesIO(encoded)
            with Image.open(data, formats=FORMATS.get((encoded or b"")[:4])) as image:
                return function(image)
        except SubbyteError as error:
            raise SubbyteError(f"{where} {error}") from None
        except (*DAMAGED, Image.DecompressionBombError) as error:
            name = f" ({row['path']})" if row["path"] else ""
            return Unreadable(i, f"{where}{name} cannot be decoded: {error}")


def write_pixels(images: EncodedImages, size: int | None, unreadable: int, path: Path) -> Written:
    """Decode all images into one raw file, uint8 [n, c, h, w], but for some that are unreadable.

    c is 1 if every image is grey, else 3: stored as grey, or WebP, which cannot say so, with equal
    channels. With `size`, the shorter side is scaled to it (bilinear, antialiased) and the centre
    cut out. Raises SubbyteError if the sizes differ and `size` is None, and for one image more that
    cannot be read than `unreadable`.
    """
    first: tuple[int, ...] = ()
    all_grey = True
    bad: list[Unreadable] = []
    with path.open("wb") as file:
        for i, found in enumerate(images.each(lambda image: _decode(image, size))):
            if isinstance(found, Unreadable):
                bad.append(found)
                check_unreadable([x.why for x in bad], unreadable)
                continue
            array, grey = found
            first = first or array.shape
            if array.shape != first:
                raise SubbyteError(_sizes(i, array.shape, first, images.place))
            file.write(array.tobytes())
            all_grey &= grey
    if not first:
        raise SubbyteError(f"none of the {len(images)} images of {images.place} can be read")
    _, height, width = first
    if all_grey:
        _keep_one_channel(path, (len(images) - len(bad), 3, height, width))
    return Written((1 if all_grey else 3, height, width), tuple(bad))


def check_unreadable(left_out: Sequence[str], most: int) -> None:
    """Raises SubbyteError, naming the last, for more images that cannot be read than `most`."""
    if len(left_out) > most:
        count = f" ({len(left_out)} so far)" if len(left_out) > 1 else ""
        raise SubbyteError(
            f"{left_out[-1]}{count}; replace or remove it, or let up to so many be left out by "
            "unreadable= (data.unreadable)."
        )


def checked_labels(labels: Sequence[int | None], n_classes: int, place: str) -> np.ndarray:
    """Labels as int64 [n]; SubbyteError with the row of one that is missing or no class."""
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < n_classes:
            raise SubbyteError(
                f"label {label} of image {row} of {place} is not one of the {n_classes} classes, "
                f"0 to {n_classes - 1}; use a labelled split, or correct the label."
            )
    return np.asarray(labels, dtype=np.int64)


def _decode(image: Any, size: int | None) -> tuple[np.ndarray, bool]:
    """(uint8 [3, h, w] of the image held upright, whether it is grey)."""
    from PIL import ImageOps

    if image.mode in TOO_DEEP:
        raise SubbyteError(
            f"has more than 8 bits per channel (mode {image.mode}); convert it to 8."
        )
    grey = image.mode in GREY
    ImageOps.exif_transpose(image, in_place=True)
    array = np.asarray(_resized(image.convert("L" if grey else "RGB"), size))
    if grey:
        return np.broadcast_to(array, (3, *array.shape)), True
    grey = image.format == "WEBP" and bool((array == array[:, :, :1]).all())
    return array.transpose(2, 0, 1), grey


def _sizes(i: int, shape: tuple[int, ...], first: tuple[int, ...], place: str) -> str:
    return (
        f"image {i} of {place} is {shape[1]}x{shape[2]}, image 0 is {first[1]}x{first[2]} "
        "(height x width); pass size= (data.size, --size) to bring all to one size."
    )


def _keep_one_channel(path: Path, shape: tuple[int, int, int, int]) -> None:
    """Replace a file of [n, 3, h, w] by one of its first channel."""
    grey = path.with_suffix(".grey")
    stored = np.memmap(path, dtype=np.uint8, mode="r", shape=shape)
    with grey.open("wb") as file:
        for start in range(0, len(stored), CHUNK):
            file.write(stored[start : start + CHUNK, 0].tobytes())
    grey.replace(path)


def _resized(image: Any, size: int | None) -> Any:
    from PIL import Image

    if size is None or image.size == (size, size):
        return image
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + size, top + size))
