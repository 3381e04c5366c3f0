"""Documents say what is so: tables are the lines', the tutorial runs, links lead somewhere."""

import copy
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernels_page  # noqa: E402 - likewise
import tables  # noqa: E402 - a script, beside the lines that it reads

DOCUMENTS = tables.documents()


def test_every_table_is_what_the_raw_lines_give():
    assert tables.differing(DOCUMENTS) == []


def test_every_table_is_shown_somewhere():
    text = "".join(path.read_text() for path in DOCUMENTS)
    shown = {name for _, name, _, _ in tables.MARKED.findall(text)}
    assert shown == set(tables.TABLES)
    assert text.count("<!-- table:") == len(tables.MARKED.findall(text))


def test_a_changed_figure_is_noticed():
    text = (ROOT / "README.md").read_text()
    assert tables.rewritten(text) == text
    wrong = text.replace("91.65", "92.65")
    assert wrong != text
    assert tables.rewritten(wrong) == text


def test_the_page_of_kernels_is_what_the_raw_lines_give():
    machines = kernels_page.by_machine(kernels_page.read_lines())
    assert kernels_page.PAGE.read_text() == kernels_page.page(machines)
    assert all(kernels_page.picture_of(lines).exists() for lines in machines)


def elsewhere(line):
    """The same line as if from another machine, a tenth slower and without priority."""
    new = copy.deepcopy(line)
    new["machine"] |= {"cpu": "Other CPU", "load": 0.25}
    new |= {"tier": "avx512vbmi", "real_time": False}
    for row in new.get("rows", {}).values():
        row["ms"] = {key: 1.1 * value for key, value in row["ms"].items()}
    return new


def test_each_machine_has_its_own_section_and_keeps_it():
    every = kernels_page.read_lines()
    own = [line for line in every if line["tier"] == "avx2"]  # of one machine
    here = kernels_page.page(kernels_page.by_machine(own))
    mixed = [line for pair in zip(own, map(elsewhere, own), strict=True) for line in pair]
    both = kernels_page.page(kernels_page.by_machine(mixed))
    assert both.startswith(here.rstrip("\n"))
    other = both[len(here.rstrip("\n")) :]
    assert "## Other CPU, 2 cores, `avx512vbmi`" in other
    assert "Load before the cases: 0.25." in other
    assert "real-time" in here
    assert "real-time" not in other
    for word in ("AMD", "avx2"):
        assert word in here
        assert word not in other


def test_the_newest_line_of_a_case_counts():
    first = next(line for line in kernels_page.read_lines() if line["case"] == "linear-4096-b8")
    newer = copy.deepcopy(first)
    newer["rows"]["torch float32"]["ms"]["median"] = 123456.0
    assert "123456" in kernels_page.page(kernels_page.by_machine([first, newer]))
    assert "123456" not in kernels_page.page(kernels_page.by_machine([newer, first]))


def test_a_machine_without_an_engine_or_a_case_has_a_section_without_it():
    line = next(line for line in kernels_page.read_lines() if line["case"] == "linear-4096-b64")
    few = copy.deepcopy(line)
    few["rows"] = {n: row for n, row in few["rows"].items() if "OpenVINO" not in n}
    few["errors"] = {n: error for n, error in few["errors"].items() if "OpenVINO" not in n}
    del few["roofs"]
    text = kernels_page.page(kernels_page.by_machine([few])).partition("\n## ")[2]
    assert "ORT int8" in text
    for absent in ("OpenVINO", "share of", "own int8 products", "ResNet-18", "Our networks"):
        assert absent not in text


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_page_on_tasks_runs(capsys):
    names = {"__name__": "tasks"}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/tasks.md").read_text(), re.DOTALL):
        exec(compile(code, "tasks.md", "exec"), names)
    assert "mean error in degrees" in capsys.readouterr().out


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    from subbyte.cli import app

    monkeypatch.chdir(tmp_path)
    names = {"__name__": "tutorial"}
    for language, code in re.findall(r"```(\w*)\n(.*?)```", START.read_text(), re.DOTALL):
        if language == "python":
            exec(compile(code, "start.md", "exec"), names)
            continue
        for line in code.splitlines():
            program, *arguments = line.split()
            assert program == "subbyte"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
    scores = dict(re.findall(r"(float32|packed|five levels, from scratch): ([\d.]+)",
                             capsys.readouterr().out))  # fmt: skip
    assert set(scores) == {"float32", "packed", "five levels, from scratch"}
    assert all(float(score) > 0.85 for score in scores.values()), scores


START = ROOT / "docs" / "start.md"


def test_the_glossary_has_no_word_twice_and_names_what_exists():
    import subbyte as sb

    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) \|$",
                      (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)[2:]  # fmt: skip
    words = [word.strip() for word, _, _ in rows]
    assert len(words) == len(set(words))
    assert len(words) > 30
    for _, _, code in rows:
        for name in re.findall(r"`sb\.(\w+)`", code):
            assert name in sb.__all__, name
        for file in re.findall(r"`([\w/]+\.py)`", code):
            assert (ROOT / "src/subbyte" / file).exists(), file


def test_the_readme_needs_no_path_that_a_stranger_lacks():
    text = (ROOT / "README.md").read_text()
    assert "../" not in text
    for path in re.findall(r"(?:examples|benchmarks|docs)/[\w./-]+", text):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_every_option_of_the_command_line_says_what_it_does():
    import typer

    from subbyte.cli import app as cli

    group = typer.main.get_command(cli)
    for name, command in group.commands.items():
        assert (command.help or "").strip(), name
        for option in command.params:
            text = option.help or ""
            assert len(text.split()) >= 3, f"{name} {option.name}: {text!r}"
