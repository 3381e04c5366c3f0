"""Decoded images on disk: a folder for every data set, split and size.

An entry holds `images.u8` (uint8 [n, c, h, w], nothing else), `labels.i64` (int64 [n], the
machine's byte order) and `header.json`. It is written under another name and renamed when whole,
so that an entry that exists is complete.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from subbyte.data.decode import Written
from subbyte.data.imageset import ImageSet
from subbyte.errors import SubbyteError

VERSION = 1
IMAGES, LABELS, HEADER = "images.u8", "labels.i64", "header.json"


@dataclass(frozen=True)
class Content:
    """What a new entry is made from; `write_images` fills a file and says what is in it."""

    write_images: Callable[[Path], Written]
    labels: np.ndarray
    classes: tuple[str, ...]
    split: str


def cache_folder(cache_dir: Path | None) -> Path:
    """`cache_dir`, $SUBBYTE_CACHE or ~/.cache/subbyte, made if new; SubbyteError if it cannot."""
    folder = Path(cache_dir or os.environ.get("SUBBYTE_CACHE") or "~/.cache/subbyte").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SubbyteError(
            f"cannot create the cache {folder}: {error.strerror}; set SUBBYTE_CACHE to a folder "
            "that can be written."
        ) from error
    return folder


def key(*parts: object) -> str:
    """Name of an entry: a hash of `parts` and of the cache's format version."""
    text = json.dumps([VERSION, *parts], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def files_of(folder: Path) -> list[tuple[str, int, int]]:
    """(path, bytes, modification time in ns) of every file below `folder` that is not hidden."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in files if not name.startswith("."))
        for path in filter(Path.is_file, paths):
            status = path.stat()
            found.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
    return sorted(found)


def read(entry: Path, source: str) -> ImageSet | None:
    """The entry's images, mapped from its file, or None if there is no such entry.

    Writing into the tensor changes no file. Raises SubbyteError for an entry that was damaged.
    """
    if not entry.is_dir():
        return None
    try:
        header = json.loads((entry / HEADER).read_text("utf-8"))
        shape = tuple(header["shape"])
        images = _mapped(entry / IMAGES, shape, torch.uint8)
        labels = _mapped(entry / LABELS, shape[:1], torch.int64).clone()
        classes, left_out = tuple(header["classes"]), tuple(header.get("left_out", ()))
        return ImageSet(images, labels, classes, source, header["split"], left_out)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SubbyteError(
            f"the decoded images of '{source}' in {entry} are damaged ({error}); "
            "delete that folder, and they will be decoded again."
        ) from error


def write(entry: Path, content: Content) -> None:
    """Make the entry, whole or not at all; one that another process made first is kept."""
    folder = entry.with_name(f".new-{uuid.uuid4().hex}")
    try:
        folder.mkdir()
        _fill(folder, content)
        folder.rename(entry)
    except OSError as error:
        if not entry.is_dir():
            raise SubbyteError(
                f"cannot write decoded images to {entry.parent}: {error.strerror}; free some "
                "space there, or set SUBBYTE_CACHE to another folder."
            ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fill(folder: Path, content: Content) -> None:
    written = content.write_images(folder / IMAGES)
    labels = np.delete(content.labels, [x.row for x in written.left_out])
    (folder / LABELS).write_bytes(labels.tobytes())
    header = {
        "version": VERSION,
        "shape": [len(labels), *written.shape],
        "classes": content.classes,
        "split": content.split,
        "left_out": [x.why for x in written.left_out],
    }
    (folder / HEADER).write_text(json.dumps(header), "utf-8")


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = int(np.prod(shape))
    expected, actual = size * dtype.itemsize, path.stat().st_size
    if actual != expected:
        raise ValueError(f"{path.name} has {actual} bytes instead of {expected}")
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(shape)
