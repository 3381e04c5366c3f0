"""Any source of labelled images to an `ImageSet`, decoded once."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from subbyte.data import cache, digits, sources
from subbyte.data.decode import EncodedImages, check_unreadable, checked_labels, write_pixels
from subbyte.data.imageset import ImageSet
from subbyte.errors import SubbyteError


def load_images(
    source: str,
    split: str,
    *,
    size: int | None = None,
    cache_dir: Path | None = None,
    unreadable: int = 0,
) -> ImageSet:
    """One split of a data set, decoded at the first call and mapped from the cache afterwards.

    source: 'digits' (embedded), a local folder (parquet files in the hub's layout, or images as
    `train/cat/1.png`), else the id of a data set on the hub; a folder named digits is './digits'.
    split: 'test' falls back to 'validation'; the result names the one that was read. size: scale
    the shorter side to so many pixels and cut out the centre; needed if the images differ in size.
    cache_dir: else $SUBBYTE_CACHE, else ~/.cache/subbyte. unreadable: how many images that are
    missing or damaged may be left out; the result names them.

    Raises SubbyteError for a source, split, column, image or label that cannot be used.
    """
    if size is not None and size < 1:
        raise SubbyteError(f"size={size} for '{source}' is not a number of pixels; use 1 or more.")
    if source == digits.SOURCE:
        return _digits(split, size)
    folder = sources.local_folder(source)
    store = cache.cache_folder(cache_dir)
    wanted = _Wanted(split, size, unreadable)
    if folder is None:
        data = _from_hub(source, wanted, store)
    else:
        data = _from_folder(source, folder, wanted, store)
    check_unreadable(data.left_out, unreadable)  # decoded earlier, when more were allowed
    return data


@dataclass(frozen=True)
class _Wanted:
    """Of a data set: as in `load_images`."""

    split: str
    size: int | None
    unreadable: int


def _digits(split: str, size: int | None) -> ImageSet:
    if size not in (None, 8):
        raise SubbyteError(f"size={size} does not fit 'digits', which are 8x8; leave size out.")
    return digits.load_digits(split)


def _from_folder(source: str, folder: Path, wanted: _Wanted, store: Path) -> ImageSet:
    """A folder is known by its files, so that a second call need not open the data set."""
    entry = store / cache.key(cache.files_of(folder), wanted.split, wanted.size)
    data = cache.read(entry, source)
    if data is not None:
        return data
    with sources.opened(source, folder, store) as splits:
        return _decoded(splits, source, wanted, entry)


def _from_hub(source: str, wanted: _Wanted, store: Path) -> ImageSet:
    with sources.opened(source, None, store) as splits:
        found = sources.chosen_split(splits, wanted.split, source)
        entry = store / cache.key(source, splits[found]._fingerprint, found, wanted.size)
        data = cache.read(entry, source)
        return _decoded(splits, source, wanted, entry) if data is None else data


def _decoded(splits: Any, source: str, wanted: _Wanted, entry: Path) -> ImageSet:
    """Decode one split into a new cache entry, and read that."""
    found = sources.chosen_split(splits, wanted.split, source)
    cache.write(entry, _content(splits, source, found, wanted))
    data = cache.read(entry, source)
    assert data is not None
    return data


def _content(splits: Any, source: str, split: str, wanted: _Wanted) -> cache.Content:
    from datasets import Image

    rows, place = splits[split], f"split '{split}' of '{source}'"
    image = sources.image_column(rows.features, source)
    label = sources.label_column(rows.features, source)
    classes = sources.class_names(splits, label, source)
    labels = checked_labels(sources.values(rows, label), len(classes), place)
    encoded = rows.select_columns([image]).cast_column(image, Image(decode=False))
    images = EncodedImages(encoded, image, place)
    fill = partial(write_pixels, images, wanted.size, wanted.unreadable)
    return cache.Content(fill, labels, classes, split)
