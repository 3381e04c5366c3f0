"""One flipped bit at random places of files of every encoding: python benchmarks/flips.py

--flips 10000 --seed 0. Each must be an error of `storage.read`, and so of `load`. Appends a line to
results/reliability.jsonl; exit code 1 if a file was accepted, or ended in another exception.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import specimens
from common import append, revision

from subbyte import SubbyteError, load, storage


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def accepted(path: Path) -> bool:
    """Whether the file is read and opened."""
    try:
        storage.read(path)
        load(path)
    except SubbyteError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, started = random.Random(options.seed), time.monotonic()
    files = specimens.files()
    counts, passed = dict.fromkeys(files, 0), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        for i in range(options.flips):
            name = list(files)[i % len(files)]
            place, bit = draw.randrange(len(files[name])), draw.randrange(8)
            path.write_bytes(flipped(files[name], place, bit))
            counts[name] += 1
            if accepted(path):
                passed += 1
                print(f"accepted: bit {bit} of byte {place} of '{name}'", flush=True)
    seconds = round(time.monotonic() - started, 1)
    found = {"flips": options.flips, "files": counts, "errors": options.flips - passed,
             "accepted": passed}  # fmt: skip
    head = {"case": "flips", "commit": revision(), "seed": options.seed, "seconds": seconds}
    append("reliability", {**head, **found})
    print(f"{options.flips} flips, {options.flips - passed} errors, {seconds:.0f} s")
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
