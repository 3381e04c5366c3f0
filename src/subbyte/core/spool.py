"""Tensors that lie in a temporary file and not in memory."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subbyte.core.memory import bytes_of


class Spool:
    """A file without a name, which goes with the last tensor in it, or with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as its tensors

    def on_disk(self, tensor: Tensor) -> Tensor:
        """The same tensor on the CPU, mapped from the file, which it is added to."""
        if not tensor.numel():
            return tensor
        start = self._file.seek(0, 2)
        self._file.write(bytes_of(tensor))
        self._file.flush()
        found = np.memmap(self._file, np.uint8, "c", start, (tensor.nbytes,))  # type: ignore[call-overload]
        return torch.from_numpy(found).view(tensor.dtype).reshape(tensor.shape)

    def kept(self, value: Any) -> Any:
        """A tensor as `on_disk` has it; anything else as it is."""
        return self.on_disk(value) if isinstance(value, Tensor) else value
