"""The embedded data set: scikit-learn's 1797 handwritten digits of 8x8 pixels."""

import numpy as np
import torch

from subbyte.data.imageset import ImageSet
from subbyte.errors import SubbyteError

SOURCE = "digits"
SPLITS = ("train", "test")


def load_digits(split: str) -> ImageSet:
    """Digits as uint8 [n, 1, 8, 8], their values 0..16 scaled to 0..255; 80 % train, 20 % test.

    The split is fixed and stratified: every fifth image of each digit, in the order of the file, is
    a test image. Raises SubbyteError for another split, or if scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise SubbyteError(f"'{SOURCE}' has no split '{split}'; it has {', '.join(SPLITS)}.")
    try:
        from sklearn import datasets
    except ImportError:
        raise SubbyteError(f"'{SOURCE}' needs scikit-learn; pip install 'subbyte[data]'") from None
    bunch = datasets.load_digits()
    rows = np.flatnonzero(_is_test(bunch.target) == (split == "test"))
    images = np.rint(bunch.images[rows] * (255 / 16)).astype(np.uint8)[:, None]
    classes = tuple(str(name) for name in bunch.target_names)
    labels = torch.from_numpy(bunch.target[rows].astype(np.int64))
    return ImageSet(torch.from_numpy(images), labels, classes, SOURCE, split)


def _is_test(labels: np.ndarray) -> np.ndarray:
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[4::5]] = True
    return test
