"""Memory: a tensor's as bytes, and what is free, given back to the system."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's values in C order; without a copy if it lies so on the CPU already."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return plain.numpy().data


def give_back() -> None:
    """Free what only cycles hold, and have the C library return its free pages, which it keeps
    where smaller pieces lie between them. Nothing but the former where it is not glibc."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
