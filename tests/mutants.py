"""Plant each bug of mutants.toml in a copy of the tree: the tests that it names must fail.

    python tests/mutants.py [NAME ...]

All of them, or only the named. The copy lies in a temporary folder; the tree itself is not touched.
Exit code 1 if a mutant survives, cannot be planted, or keeps its tests from running.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "src",
    "native",
    "tests",
    "examples",
    "experiments",
    "docs",
    "benchmarks",
    "pyproject.toml",
    "CMakeLists.txt",
    "README.md",
)
LIMIT_S = 900

# An editable install answers for `subbyte` before any path is asked: its finder has to go.
BOOTSTRAP = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
sys.path.insert(0, sys.argv[1])
import pytest, subbyte
assert subbyte.__file__.startswith(sys.argv[1]), subbyte.__file__
raise SystemExit(pytest.main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Mutant:
    """find occurs exactly once in file, a path relative to src/subbyte."""

    name: str
    file: str
    find: str
    replace: str
    tests: list[str]

    def fault(self, tree: Path) -> str | None:
        """Why it cannot be planted, in words."""
        count = (tree / "src/subbyte" / self.file).read_text().count(self.find)
        return None if count == 1 else f"{self.file} has its string {count} times, not once"


@dataclass(frozen=True)
class Outcome:
    killed: bool
    text: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to plant (all)")
    mutants = chosen(parser.parse_args().names)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_tree(Path(folder) / "tree")
        check_unmutated(tree, mutants)
        outcomes = {mutant.name: show(mutant, run(tree, mutant)) for mutant in mutants}
    alive = [name for name, outcome in outcomes.items() if not outcome.killed]
    print(f"{len(outcomes) - len(alive)} of {len(outcomes)} killed", *alive, sep="\n  not killed: ")
    return 1 if alive else 0


def chosen(names: list[str]) -> list[Mutant]:
    table = tomllib.loads((ROOT / "tests/mutants.toml").read_text())
    mutants = {entry["name"]: Mutant(**entry) for entry in table["mutant"]}
    if len(mutants) != len(table["mutant"]):
        raise SystemExit("two mutants of mutants.toml have the same name")
    unknown = [name for name in names if name not in mutants]
    if unknown:
        raise SystemExit(f"there is no mutant {unknown[0]!r}; there are: {', '.join(mutants)}")
    return [mutants[name] for name in names or mutants]


def copy_tree(tree: Path) -> Path:
    """What the tests read and a build needs, with the compiled core beside its package."""
    tree.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis", "*.so")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    spec = importlib.util.find_spec("subbyte._native")
    if spec is None or spec.origin is None:
        raise SystemExit("the C++ core (subbyte._native) is not built; run `make test` first")
    shutil.copy(spec.origin, tree / "src/subbyte")
    runtime = next(path for path in runtime_places() if path.is_file())
    shutil.copy(runtime, tree / "src/subbyte")
    return tree


def runtime_places() -> Iterator[Path]:
    """Where the runtime's library may lie."""
    from subbyte.runtime import library

    return library.places()


def check_unmutated(tree: Path, mutants: list[Mutant]) -> None:
    """A mutant proves something only if its tests pass without it."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    code, output = run_tests(tree, tests)
    if code:
        raise SystemExit(f"{output}\nthe tests fail in a copy without any mutant")


def run(tree: Path, mutant: Mutant) -> Outcome:
    fault = mutant.fault(tree)
    if fault:
        return Outcome(False, f"CANNOT BE PLANTED: {fault}")
    started = time.monotonic()
    with planted(tree, mutant):
        code, output = run_tests(tree, mutant.tests)
    seconds = f"{time.monotonic() - started:.0f} s"
    if code == 1 or code < 0:  # a failed test, or a crash
        return Outcome(True, f"killed   {seconds}  {first_failure(output)}")
    if code == 0:
        return Outcome(False, f"SURVIVED {seconds}")
    return Outcome(False, f"TESTS DID NOT RUN (pytest exit code {code}):\n{output[-2000:]}")


@contextmanager
def planted(tree: Path, mutant: Mutant) -> Iterator[None]:
    """The tree with the bug in it (a core in C++ is built anew); afterwards it is as before."""
    path = tree / "src/subbyte" / mutant.file
    before = path.read_text()
    compiled = {p: p.read_bytes() for p in (tree / "src/subbyte").glob("*.so")}
    path.write_text(before.replace(mutant.find, mutant.replace))
    try:
        if path.suffix != ".py":
            build_core(tree)
        yield
    finally:
        path.write_text(before)
        for library, content in compiled.items():
            library.write_bytes(content)


def build_core(tree: Path) -> None:
    """The tree's C++ core, compiled in the tree itself."""
    target = tree.parent / "built"
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(tree)], check=True)
    for library in (target / "subbyte").glob("*.so"):
        shutil.copy(library, tree / "src/subbyte")


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code (1: a test failed) and output; it imports the tree's own package."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    command = [sys.executable, "-c", BOOTSTRAP, str(tree / "src"), *options, *tests]
    # bytecode is told apart by whole seconds and size: a mutant could run as its original
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, timeout=LIMIT_S, **pipes)
    except subprocess.TimeoutExpired:
        return 124, f"no end after {LIMIT_S} s"
    return done.returncode, done.stdout


def first_failure(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else "the interpreter crashed"


def show(mutant: Mutant, outcome: Outcome) -> Outcome:
    print(f"{mutant.name:42} {outcome.text}", flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
