"""Any source of labelled images to an `ImageSet`, decoded once."""

from functools import partial
from pathlib import Path
from typing import Any

from subbyte.data import cache, digits, sources
from subbyte.data.decode import EncodedImages, checked_labels, write_pixels
from subbyte.data.imageset import ImageSet
from subbyte.errors import SubbyteError


def load_images(
    source: str, split: str, *, size: int | None = None, cache_dir: Path | None = None
) -> ImageSet:
    """One split of a data set, decoded at the first call and mapped from the cache afterwards.

    source: 'digits' (embedded), a local folder (parquet files in the hub's layout, or images as
    `train/cat/1.png`), else the id of a data set on the hub; a folder named digits is './digits'.
    split: 'test' falls back to 'validation'; the result names the one that was read. size: scale
    the shorter side to so many pixels and cut out the centre; needed if the images differ in size.
    cache_dir: else $SUBBYTE_CACHE, else ~/.cache/subbyte.

    Raises SubbyteError for a source, split, column, image or label that cannot be used.
    """
    if size is not None and size < 1:
        raise SubbyteError(f"size={size} for '{source}' is not a number of pixels; use 1 or more.")
    if source == digits.SOURCE:
        return _digits(split, size)
    folder = sources.local_folder(source)
    store = cache.cache_folder(cache_dir)
    if folder is None:
        return _from_hub(source, split, size, store)
    return _from_folder(source, folder, split, size, store)


def _digits(split: str, size: int | None) -> ImageSet:
    if size not in (None, 8):
        raise SubbyteError(f"size={size} does not fit 'digits', which are 8x8; leave size out.")
    return digits.load_digits(split)


def _from_folder(source: str, folder: Path, split: str, size: int | None, store: Path) -> ImageSet:
    """A folder is known by its files, so that a second call need not open the data set."""
    entry = store / cache.key(cache.files_of(folder), split, size)
    data = cache.read(entry, source)
    if data is not None:
        return data
    with sources.opened(source, folder, store) as splits:
        return _decoded(splits, source, split, size, entry)


def _from_hub(source: str, split: str, size: int | None, store: Path) -> ImageSet:
    with sources.opened(source, None, store) as splits:
        found = sources.chosen_split(splits, split, source)
        entry = store / cache.key(source, splits[found]._fingerprint, found, size)
        data = cache.read(entry, source)
        return _decoded(splits, source, split, size, entry) if data is None else data


def _decoded(splits: Any, source: str, split: str, size: int | None, entry: Path) -> ImageSet:
    """Decode one split into a new cache entry, and read that."""
    found = sources.chosen_split(splits, split, source)
    cache.write(entry, _content(splits, source, found, size))
    data = cache.read(entry, source)
    assert data is not None
    return data


def _content(splits: Any, source: str, split: str, size: int | None) -> cache.Content:
    from datasets import Image

    rows, place = splits[split], f"split '{split}' of '{source}'"
    image = sources.image_column(rows.features, source)
    label = sources.label_column(rows.features, source)
    classes = sources.class_names(splits, label, source)
    labels = checked_labels(sources.values(rows, label), len(classes), place)
    encoded = rows.select_columns([image]).cast_column(image, Image(decode=False))
    images = EncodedImages(encoded, image, place)
    return cache.Content(partial(write_pixels, images, size), labels, classes, split)
