"""A name to a Hugging Face data set: folders in the hub's layout, image folders, hub ids."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from subbyte.errors import SubbyteError

MAX_CLASSES = 100_000
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def local_folder(source: str) -> Path | None:
    """The folder that `source` names, or None if it can only be a hub id.

    Raises SubbyteError for a file, and for a path that does not exist: it is never sent to the hub.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    if path.is_file():
        raise SubbyteError(f"'{source}' is a file; give the folder that holds it.")
    if not HUB_ID.fullmatch(source):
        raise SubbyteError(f"there is no folder '{source}'; check the path.")
    return None


@contextmanager
def opened(source: str, folder: Path | None, cache: Path) -> Iterator[Any]:
    """All splits of `source`: a `datasets.DatasetDict`, valid inside the `with`.

    A local folder's working copy lives in `cache` and goes at the end; the hub's stays in the
    cache of the `datasets` package. Raises SubbyteError for what cannot be reached or read.
    """
    if folder is None:
        yield _load(source, source, None)
        return
    with tempfile.TemporaryDirectory(
        dir=cache, prefix=".open-", ignore_cleanup_errors=True
    ) as working_copy:
        yield _load(source, str(folder), working_copy)


def chosen_split(splits: Any, split: str, source: str) -> str:
    """`split`, or 'validation' for a 'test' that is not there; SubbyteError lists the splits."""
    found = "validation" if split == "test" and "test" not in splits else split
    if found not in splits:
        raise SubbyteError(f"'{source}' has no split '{split}'; it has {', '.join(splits)}.")
    if len(splits[found]) == 0:
        raise SubbyteError(f"split '{found}' of '{source}' holds no images; choose another.")
    return found


def image_column(features: Any, source: str) -> str:
    """The one column of images; SubbyteError lists the columns if there is none or more."""
    from datasets import Image

    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    return _only(found, "image", features, source)


def label_column(features: Any, source: str) -> str:
    """The one column of class labels, else the one column of integers; SubbyteError as above."""
    from datasets import ClassLabel, Value

    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    integers = [
        name
        for name, feature in features.items()
        if isinstance(feature, Value) and re.match("u?int", feature.dtype)
    ]
    return _only(found or integers, "label", features, source)


def class_names(splits: Any, label: str, source: str) -> tuple[str, ...]:
    """The names of the classes; for a plain integer column '0' to the largest of all splits."""
    from datasets import ClassLabel

    feature = next(iter(splits.values())).features[label]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    highest = max(_highest(split, label) for split in splits.values())
    if highest >= MAX_CLASSES:
        raise SubbyteError(
            f"column '{label}' of '{source}' holds {highest}, which is no class number; give class "
            f"labels from 0 to at most {MAX_CLASSES - 1}."
        )
    return tuple(str(i) for i in range(highest + 1))


def _highest(split: Any, label: str) -> int:
    return max([0, *(value for value in values(split, label) if value is not None)])


def values(rows: Any, column: str) -> list[Any]:
    """A whole column as a list."""
    found: list[Any] = rows.select_columns([column])[:][column]
    return found


def _only(found: list[str], kind: str, features: Any, source: str) -> str:
    if len(found) == 1:
        return found[0]
    what = f"more than one {kind} column" if found else f"no {kind} column"
    columns = ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())
    raise SubbyteError(
        f"'{source}' has {what}: {columns or 'no columns'}; give data with one column of images "
        "and one of class labels."
    )


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _load(source: str, path: str, working_copy: str | None) -> Any:
    try:
        import datasets
        import PIL  # noqa: F401
    except ImportError:
        raise SubbyteError(
            f"reading '{source}' needs datasets and pillow; pip install 'subbyte[data]'"
        ) from None
    try:
        with _quiet(working_copy is not None):
            return datasets.load_dataset(path, cache_dir=working_copy)
    except ConnectionError as error:
        raise SubbyteError(
            f"cannot reach the hub for '{source}', which is no folder here either: "
            f"{_line(error)}; check the connection, or give the path of a local folder."
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SubbyteError(
            f"cannot read '{source}' as a data set: {_line(error)}; give a folder of parquet files "
            "or of images (train/cat/1.png) with no empty split, or the id of a data set on the "
            "hub."
        ) from error


def _line(error: BaseException) -> str:
    """The first line of what an error, or the one behind it, says."""
    return str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """No progress bars for a local folder, which takes a second; they stay on for a download."""
    import datasets

    switched = quiet and not datasets.are_progress_bars_disabled()
    if switched:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if switched:
            datasets.enable_progress_bars()
