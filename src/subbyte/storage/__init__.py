"""The packed file. docs/format.md is its specification.

`save` writes a packed model, `load` gives the same packed model back, bit for bit. Nothing is
pickled and nothing is inferred from names or shapes: the manifest says what each tensor is.
"""

from subbyte.storage.manifest import FORMAT, VERSION, WORDS, ZSTD, Artifact, LayerEntry
from subbyte.storage.opening import load
from subbyte.storage.pretrained import load_pretrained, save_pretrained
from subbyte.storage.reader import assemble, read
from subbyte.storage.tensorfile import write_safetensors
from subbyte.storage.writer import (
    PackedLayer,
    ProgramWarning,
    packed_layers,
    save,
)

__all__ = [
    "FORMAT",
    "VERSION",
    "WORDS",
    "ZSTD",
    "Artifact",
    "LayerEntry",
    "PackedLayer",
    "ProgramWarning",
    "assemble",
    "load",
    "load_pretrained",
    "packed_layers",
    "read",
    "save",
    "save_pretrained",
    "write_safetensors",
]
