"""The architecture as a test: imports only point downwards, and documents do not drift."""

import ast
import functools
import re
import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mutants
import subbyte
from subbyte.cli import app

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "subbyte"

ORDER = [
    "errors", "runtime", "core", "_native", "packing", "kernels", "methods", "modules", "graph",
    "models", "storage", "bench", "export", "data", "tasks", "ptq", "train", "report",
    "experiments", "commands", "cli", "__main__",
]  # fmt: skip


def part(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            own = node.module == "subbyte"
            names = [f"subbyte.{a.name}" for a in node.names] if own else [node.module]
        else:
            continue
        yield from (n.split(".")[1] for n in names if n.startswith("subbyte."))


MODULES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downwards(path):
    here = part(path)
    assert here in ORDER, f"{here} has no place in the order of the parts"
    for other in imported_parts(path):
        assert ORDER.index(other) <= ORDER.index(here), (
            f"{here} imports {other}, which stands above it"
        )


def test_the_public_surface_is_documented():
    for name in subbyte.__all__:
        assert (getattr(subbyte, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_the_format_document_states_the_version_and_every_encoding():
    from subbyte import storage

    text = (ROOT / "docs" / "format.md").read_text()
    assert f"version {storage.VERSION}" in text
    for word in (storage.WORDS, storage.ZSTD, "float32", "float16", "power_of_two"):
        assert f"`{word}`" in text


def test_every_network_and_command_of_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^subbyte (\w+)", text, re.MULTILINE))
    assert commands
    help_text = CliRunner().invoke(app, ["--help"]).output
    for command in commands:
        assert command in help_text


def test_every_example_is_a_valid_config():
    from subbyte.train.config import read_config

    examples = sorted((ROOT / "examples").glob("*.toml"))
    assert examples
    for example in examples:
        assert read_config(example).train.epochs >= 1


MOST_PARAMETERS, MOST_LINES, MEDIAN_LINES = 6, 60, 5
REASON = re.compile(r"parameters:\s+\w")  # "Seven parameters: the operator's."


def written(path):
    """Every function of a file, methods and nested ones too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def n_parameters(function):
    """Parameters of a function: without `self` and `cls`; *args and **kwargs count as one each."""
    a = function.args
    named = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([n for n in named if n not in ("self", "cls")]) + sum(map(bool, (a.vararg, a.kwarg)))


def n_lines(function):
    """Lines of a function's body, its docstring not counted."""
    body = function.body[ast.get_docstring(function) is not None :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_no_function_takes_many_parameters_without_its_reason():
    silent = [
        f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}"
        for path in MODULES
        if part(path) not in ("commands", "cli")
        for node in written(path)
        if n_parameters(node) > MOST_PARAMETERS and not REASON.search(ast.get_docstring(node) or "")
    ]
    assert silent == []


def test_no_function_is_long():
    every = [(path, node) for path in MODULES for node in written(path)]
    whole = [f"{p}:{n.name}" for p, n in every if n.end_lineno - n.lineno >= MOST_LINES]
    assert whole == []
    assert statistics.median(n_lines(node) for _, node in every) <= MEDIAN_LINES


def test_counts_of_a_function():
    node = ast.parse(
        'def f(self, a, /, b, *c, d, **e):\n    """D."""\n    x = 1\n\n    return x'
    ).body[0]
    assert n_parameters(node) == 5
    assert n_lines(node) == 3
    assert REASON.search("Seven parameters: each is a setting.")
    assert not REASON.search("Its parameters are many.")


@functools.cache
def functions(path):
    """The names of a file's functions."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", mutants.chosen([]), ids=lambda mutant: mutant.name)
def test_every_mutant_can_be_planted(mutant):
    assert mutant.fault(ROOT) is None
    assert mutant.find != mutant.replace
    assert mutant.tests
    for test in mutant.tests:
        path, *names = test.partition("[")[0].split("::")
        assert functions(path).issuperset(names), f"there is no {test}"
