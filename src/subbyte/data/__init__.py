"""Data sets: labelled images from any source, batches of them, augmentation."""

from subbyte.data.augment import Augment, cutout, random_crop, random_flip
from subbyte.data.imageset import ImageSet, batches
from subbyte.data.loading import load_images

__all__ = [
    "Augment",
    "ImageSet",
    "batches",
    "cutout",
    "load_images",
    "random_crop",
    "random_flip",
]
