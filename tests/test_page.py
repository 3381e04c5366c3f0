"""The page of `subbyte report`: figures as `inspect` has them, nothing from outside."""

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from torch import nn
from typer.testing import CliRunner

import subbyte as sb
from nets import Mixed
from subbyte import LowRes, SubbyteError
from subbyte.cli import app
from subbyte.commands.report import report
from subbyte.report import size_report
from subbyte.report.page import Subject, page
from subbyte.train.checkpoint import EpochRecord

RECORD = EpochRecord(1, 0.1, 1.5, 60.0, 61.25, 1.25, 100.0, 2.0)


@pytest.fixture
def file(tmp_path):
    net = Mixed()
    sb.prepare(net, LowRes(levels=5))
    path = tmp_path / "net.safetensors"
    sb.save(sb.pack(sb.freeze(net)), path)
    return path


class Cells(HTMLParser):
    """Rows of every table, by its id; and every address that the page asks for."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.addresses, self.at, self.cell = {}, [], None, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        if tag == "table":
            self.at = self.tables.setdefault(named["id"], [])
        elif tag == "tr":
            self.at.append([])
        elif tag in ("td", "th"):
            self.at[-1].append("")
            self.cell = True

    def handle_data(self, data):
        if self.cell:
            self.at[-1][-1] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None


def inspected(path):
    return json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).output)


def test_the_figures_are_those_of_inspect(file, tmp_path):
    out = tmp_path / "page.html"
    report([file], out)
    tables, said = Cells(out.read_text()).tables, inspected(file)
    totals = dict(row[:2] for row in tables["totals"][1:])
    assert totals["bytes of the file"] == f"{said['bytes']:,}" == f"{file.stat().st_size:,}"
    whole = said["whole"]
    assert totals["parameters of the whole network"] == f"{whole['parameters']:,}"
    assert totals["bits per parameter, the whole file"] == f"{whole['file_bits_per_weight']:.3f}"
    rows = tables["layers-net.safetensors"][1:]
    assert [row[0] for row in rows] == [layer["name"] for layer in said["layers"]]
    for row, layer in zip(rows, said["layers"], strict=True):
        assert row[5] == f"{layer['bytes']:,}"
        assert row[4] == f"{layer['bits_per_weight']['disk']:.3f}"
        shares = [float(x) for x in row[8].split()]
        assert shares == pytest.approx([100 * s for s in layer["level_shares"]], abs=0.051)
    assert {row[0] for row in tables["float-net.safetensors"][1:]} == {
        own["name"] for own in said["float"]
    }


def test_nothing_is_loaded_from_elsewhere(file):
    text = page([Subject("a", size_report(file)), Subject("run", None, (RECORD,))])
    assert all(address.startswith("#") for address in Cells(text).addresses)
    assert not re.search(r"@import|url\((?!#)|<script|<link|<img", text)
    assert text.count("<svg role=") == 2 == text.count("aria-label=")


def test_names_are_text_and_no_markup():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<b>&", nn.Linear(4, 4))

        def forward(self, x):
            return self._modules["<b>&"](x)

    net = Odd()
    sb.prepare(net, LowRes())
    with tempfile.TemporaryDirectory() as folder:
        sb.save(sb.pack(sb.freeze(net)), f"{folder}/net.safetensors")
        text = page([Subject("<i>", size_report(f"{folder}/net.safetensors"))])
    assert "<b>" not in text
    assert "<i>" not in text
    assert Cells(text).tables["layers-<i>"][1][0] == "<b>&"


def test_runs_and_files_stand_side_by_side(file, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({
        field: getattr(RECORD, field) for field in RECORD.__dataclass_fields__
    }) + "\n")  # fmt: skip
    out = tmp_path / "page.html"
    found = CliRunner().invoke(app, ["report", str(run), str(file), "--out", str(out)])
    assert found.exit_code == 0
    tables = Cells(out.read_text()).tables
    assert tables["epochs-run"][1] == ["1", "1.5000", "1.2500", "61.25", "0.1"]
    assert tables["totals"][0] == ["", "net.safetensors"]  # the run has left no file yet
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SubbyteError, match="no metrics of a run"):
        report([run], out)


def test_the_same_figures_give_the_same_bytes(file):
    size = size_report(file)
    runs = (RECORD, replace(RECORD, epoch=2, test_top1=70.0))
    assert page([Subject("a", size, runs)]) == page([Subject("a", size, runs)])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_it(file, tmp_path):
    out = tmp_path / "page.html"
    report([file], out)
    found = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'browser'}",
         f"file://{out}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    totals = dict(row[:2] for row in Cells(found.stdout).tables["totals"][1:])
    assert totals["bytes of the file"] == f"{inspected(file)['bytes']:,}"
