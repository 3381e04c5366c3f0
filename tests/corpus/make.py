"""Write the files of this folder: what damaged files once did to the readers, one fault each.

python tests/corpus/make.py
"""

import sys
from pathlib import Path

import zstandard

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

import damage  # noqa: E402
import specimens  # noqa: E402


def distance(parts):  # ended in an OverflowError
    parts.manifest["distance"] = 10**400


def empty_shape(parts):  # likewise: no weights, in a size that no integer of torch holds
    parts.manifest["layers"]["0"]["shape"] = [0, 10**400]


def bias(parts):  # was quoted in whole
    parts.manifest["layers"]["0"]["bias"] = "x" * 9999


def name(parts):  # likewise, by the reader of safetensors too
    parts.tensors["x" * 9999] = ["F32", [1], bytes(4)]


def dtype(parts):  # likewise
    parts.tensors["0.scale"][0] = "x" * 9999


def stride(parts):  # ended in a ValueError: a window of two dimensions with one stride
    parts.manifest["program"]["layers"]["0"]["stride"] = [1]


def kernel(parts):  # likewise: a weight and a kernel without a height
    parts.manifest["program"]["layers"]["0"]["kernel_size"] = []
    parts.manifest["layers"]["0"]["shape"] = [6, 2]
    parts.tensors["0.codes"] = ["U8", [8], bytes(8)]


def channels(parts):  # took 1 GB for a norm that the file does not hold
    parts.manifest["program"]["layers"]["1"]["num_features"] = 2**27


def frame(parts):  # 3 kB of compressed codes took 600 MB
    size = 2**25
    own = zstandard.ZstdCompressor(level=19).compress(bytes(size))
    parts.tensors["0.codes"] = ["U8", [len(own)], own]
    parts.manifest["layers"]["0"]["shape"] = [5, size]


def depth(parts):
    parts.manifest["ties"] = damage.nested(400)


FAULTS = {
    distance: "words", empty_shape: "zstd", bias: "words", name: "words", dtype: "words",
    stride: "words", kernel: "words", channels: "absorbed", frame: "zstd", depth: "words",
}  # fmt: skip


def main():
    files = specimens.files()
    for fault, specimen in FAULTS.items():
        parts = damage.Parts.of(files[specimen])
        fault(parts)
        (HERE / f"{fault.__name__}.safetensors").write_bytes(parts.to_bytes())


if __name__ == "__main__":
    main()
