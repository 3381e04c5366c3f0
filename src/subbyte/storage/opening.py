"""`load`: a packed file, or a packed folder of `transformers`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from subbyte.errors import SubbyteError
from subbyte.kernels import Precision
from subbyte.storage import reader
from subbyte.storage.pretrained import load_pretrained


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    precision: Precision = "auto",
    verify: bool = True,
) -> nn.Module:
    """The packed model in a file or folder, in eval mode, on the CPU.

    A zoo network rebuilds itself from the manifest, and a file that was saved with an example opens
    by its program; for any other pass `model`, the float network (its weights do not matter; it
    stays as it is). A folder is one that `subbyte quantize` made of a folder of `transformers`: its
    config says what the model is. precision: of products, see `pack`. verify: by the
    file's checksums, which find damage. Raises SubbyteError for a
    file that is missing, damaged, of a newer version, or of another network.
    """
    if not Path(path).is_dir():
        return reader.load(path, model, precision=precision, verify=verify)
    if model is not None:
        raise SubbyteError(f"{path} is a folder, whose config says what it is: leave out model")
    return load_pretrained(path, precision=precision, verify=verify)
