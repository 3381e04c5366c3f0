"""A packed file run by the C++ runtime, in a process of its own that has no PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import subbyte.runtime
from subbyte.errors import SubbyteError
from subbyte.runtime.library import LIBRARY, library

_PROGRAM = """
import importlib.util, sys, time
import numpy as np
folder, file, x, y = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "subbyte_runtime", folder + "/__init__.py", submodule_search_locations=[folder]
)
sys.modules["subbyte_runtime"] = runtime = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runtime)
net, x = runtime.open(file, threads=1), np.load(x)
net.run(x)
start = time.perf_counter()
np.save(y, net.run(x))
assert "torch" not in sys.modules
print(time.perf_counter() - start)
"""


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """What the other process found. seconds: of one run, after a first one, on one thread."""

    values: NDArray[np.float32]
    seconds: float


def run_without_torch(path: Path, x: NDArray[np.float32]) -> Apart:
    """The network of a file that holds a program, on x. Raises SubbyteError if it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "x.npy", Path(folder) / "y.npy"
        np.save(given, x)
        own = str(Path(subbyte.runtime.__file__).parent)
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, own, str(path), str(given), str(made)],
            capture_output=True, text=True, check=False,
            env={**os.environ, LIBRARY: str(library()._name)},
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SubbyteError(f"{path}: the runtime does not run it: {last[:300]}")
        return Apart(np.load(made), float(done.stdout))
