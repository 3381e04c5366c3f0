"""Check a built wheel: `python tests/wheel.py dist/subbyte-*.whl` (make wheel runs it).

It is unpacked into a folder of its own and imported from there: with its C++ core on every
instruction set of this machine, and with the core taken out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# An editable install answers for `subbyte` before any path is asked: its finder has to go.
LOOK = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
sys.path.insert(0, sys.argv[1])
import torch
import subbyte as sb
from subbyte import kernels
assert sb.__file__.startswith(sys.argv[1]), sb.__file__
torch.manual_seed(0)
layer = torch.nn.Sequential(torch.nn.Linear(100, 40))
x = torch.randn(20, 100)
sb.prepare(layer, sb.LowRes(levels=5))
packed = sb.pack(sb.freeze(layer), precision="int16")
exact = torch.nn.functional.linear(x, packed[0].weight, packed[0].bias)
worst = x.abs().amax(1, keepdim=True) / 32512 * packed[0].weight.abs().sum(1) + 1e-5
assert ((packed(x) - exact).abs() <= worst).all()
print(kernels.tier(), *(kernels.served._native.tiers() if kernels.tier() else ()))
"""


def look(folder: Path, tier: str | None) -> list[str]:
    """The instruction set that a fresh process says it uses, then all that it has."""
    environment = {**os.environ, **({"SUBBYTE_ISA": tier} if tier else {})}
    run = subprocess.run(
        [sys.executable, "-c", LOOK, str(folder)],
        env=environment, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        sys.exit(f"the wheel fails with SUBBYTE_ISA={tier}:\n{run.stderr}")
    return run.stdout.split()


def main() -> None:
    wheel = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(folder)
        cores = [folder / n for n in names if Path(n).name.startswith("_native.")]
        sources = [n for n in names if n.endswith((".cpp", ".hpp", ".inl"))]
        if not cores or sources:
            sys.exit(f"{wheel.name}: core {[c.name for c in cores]}, sources {sources}")
        best, *tiers = look(folder, None)
        for tier in tiers:
            if look(folder, tier)[0] != tier:
                sys.exit(f"{wheel.name}: SUBBYTE_ISA={tier} was not obeyed")
        for core in cores:
            core.unlink()
        if look(folder, None) != ["None"]:
            sys.exit(f"{wheel.name}: it works with another core than its own")
        print(
            f"{wheel.name}: {wheel.stat().st_size:,} bytes; uses {best}, runs on {', '.join(tiers)}"
        )
        print("and without its core")


if __name__ == "__main__":
    main()
