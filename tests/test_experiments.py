"""Experiments: the reader's messages, every verdict, runs that resume and count once, and pages."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from subbyte.cli import app
from subbyte.commands.experiment import WORKS
from subbyte.errors import SubbyteError
from subbyte.experiments.judge import judge, judged, verdict
from subbyte.experiments.lines import append, lines_file, read_lines
from subbyte.experiments.page import page_of, pictures_of
from subbyte.experiments.run import jobs_of, lacking, lines_of, ready, run_jobs
from subbyte.experiments.settings import KEYS, Comparison, names_of, read_experiment
from subbyte.experiments.work import Found, spikes
from subbyte.models import build
from subbyte.train.progress import Silent

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENTS = REPOSITORY / "experiments"
PAPERS = sorted({name.partition("/")[0] for name in names_of(EXPERIMENTS)})

CLAIM = """
title = "Levels on digits"
claim = "3 levels are enough."
source = "here"
seeds = [0, 1]
"""
JUDGE = """
[[judge]]
figure = "top1"
of = "3-levels"
minus = "float"
at_least = -50.0
seeds = 2
"""
RUNS = """
epochs = 2
curve = "test_top1"
[model]
name = "fcnn1"
arguments = { in_channels = 1, image_size = 8 }
[data]
source = "digits"
[train]
epochs = 1
lr = 0.02
threads = 1
[variations.float]
[variations.3-levels]
method = { name = "lowres", levels = 3 }
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of experiments with one claim, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments" / "lowres").mkdir(parents=True)
    write(tmp_path / "experiments", CLAIM + RUNS + JUDGE)
    return tmp_path / "experiments"


def write(root, text, name="lowres/digits"):
    (root / f"{name}.toml").write_text(text)


def call(*arguments):
    """The output of `subbyte experiment`, which must not fail."""
    result = CliRunner().invoke(app, ["experiment", *arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


# ---------------------------------------------------------------- the reader


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('title = "Levels on digits"', "", r"needs 'title' \(a string\)"),
        ("seeds = [0, 1]", "seeds = [0, 0]", r"seeds = \[0, 0\]; give each seed once"),
        ("seeds = [0, 1]", "seeds = []", "give each seed once"),
        ('seeds = [0, 1]', 'seeds = "0"', "expected a list of integers"),
        (JUDGE, "", "needs a rule"),
        ('of = "3-levels"', 'of = "3-level"', r"\[judge.0\] names '3-level'; did you mean '3-lev"),
        ('figure = "top1"', 'figure = "top2"', "figure = 'top2'; did you mean 'top1'"),
        ("at_least = -50.0", "", "needs a bound: at_least or at_most"),
        ("at_least = -50.0", "at_least = 1\nat_most = 2", "at_least or at_most, one of them"),
        ("at_least = -50.0", "at_least = nan", "give a finite number"),
        ("at_least = -50.0", 'at_least = 1\nover = "float"', "both 'minus' and 'over'"),
        ("at_least = -50.0", 'at_least = 1\nunless = "float"', "has no key 'unless'"),
        ("seeds = 2", "seeds = 0", "seeds = 0"),
        ("seeds = 2", 'by = "interval"\nseeds = 1', "an interval needs 2 or more"),
        ("seeds = 2", 'by = "mean"', "by = 'mean': expected one of 'median', 'interval'"),
        ("[variations.float]", '[variations."Float 32"]', "a name of small letters"),
        ("[variations.float]", "[variations]\nfloat = 3", "expected a table"),
        ('curve = "test_top1"', 'shown = ["top"]', "shown: 'top'; did you mean 'top1'"),
        ('curve = "test_top1"', 'runs_of = "digits"', "no runs of its own"),
    ],
)  # fmt: skip
def test_each_mistake_names_its_place_and_a_remedy(root, old, new, says):
    text = CLAIM + RUNS + JUDGE
    assert old in text
    write(root, text.replace(old, new, 1))
    with pytest.raises(SubbyteError, match=says) as caught:
        read_experiment("lowres/digits", root)
    assert "digits.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_experiment_that_is_not_there_is_named_with_its_neighbour(root):
    with pytest.raises(SubbyteError, match="did you mean 'lowres/digits'"):
        read_experiment("lowres/digit", root)
    with pytest.raises(SubbyteError, match="run in a checkout"):
        names_of(root / "nowhere")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("lr = 0.02", "lr = -1.0", "3-levels.*lr = -1.0"),
        ("lr = 0.02", "rate = 1.0", "no key 'rate'"),
        ("levels = 3", "levels = 1", "levels=1"),
        ("[train]\nepochs = 1", "[trains]\nepochs = 1", "3-levels.*no key 'trains'"),
        ("[model]", "script = 'x.py'\n[model]", "needs one of train, script, quantize"),
    ],
)
def test_settings_of_runs_are_read_before_anything_runs(root, old, new, says):
    text = CLAIM + RUNS + JUDGE
    assert old in text
    write(
        root,
        text.replace(old, new, 1)
        .replace("[variations.float]", "")
        .replace('"float"', '"3-levels"'),
    )
    result = CliRunner().invoke(app, ["experiment", "run", "lowres/digits"])
    assert isinstance(result.exception, SubbyteError)
    assert re.search(says, str(result.exception)), result.exception
    assert not Path("runs").exists()


def test_a_base_is_found_beside_its_file_and_changed_by_it(root):
    (root / "bases").mkdir()
    (root / "bases" / "far.toml").write_text("[train]\nlr = 0.5\nepochs = 9\n")
    (root / "bases" / "near.toml").write_text('base = "far.toml"\n[train]\nlr = 0.25\n')
    text = CLAIM + 'base = "../bases/near.toml"\n' + RUNS.replace("lr = 0.02\n", "") + JUDGE
    write(root, text)
    settings = read_experiment("lowres/digits", root).variations["float"]
    assert settings["train"] == {"lr": 0.25, "epochs": 2, "threads": 1}
    assert names_of(root) == ["lowres/digits"]


def test_a_circle_of_bases_is_refused(root):
    (root / "bases").mkdir()
    (root / "bases" / "a.toml").write_text('base = "b.toml"\n')
    (root / "bases" / "b.toml").write_text('base = "a.toml"\n')
    write(root, 'base = "../bases/a.toml"\n' + CLAIM + RUNS + JUDGE)
    with pytest.raises(SubbyteError, match=r"b.toml: base = 'a.toml' leads back to itself"):
        read_experiment("lowres/digits", root)
    write(root, "base = 3\n" + CLAIM + RUNS + JUDGE)
    with pytest.raises(SubbyteError, match="base = 3: expected the path"):
        read_experiment("lowres/digits", root)


# ---------------------------------------------------------------- verdicts


def lines(**variations):
    """Lines of figure top1 by variation, a seed each."""
    return {
        (name, seed): {"figures": {"top1": value}}
        for name, values in variations.items()
        for seed, value in enumerate(values)
    }


RULE = {"figure": "top1", "of": "a", "minus": "b", "at_least": -0.5}


@pytest.mark.parametrize(
    ("rule", "a", "b", "expected"),
    [
        ({}, [85.0, 85.2, 84.0], [85.5, 85.5, 85.5], "reproduced"),
        ({}, [84.9, 85.2, 84.0], [85.5, 85.5, 85.5], "not reproduced"),
        ({}, [85.0, 85.2], [85.5, 85.5, 85.5], "not decided"),
        ({}, [85.0, 85.2, 85.0], [85.5, 85.5], "not decided"),
        ({}, [85.0, 85.2, math.nan], [85.5, 85.5, 85.5], "not decided"),
        ({}, [85.0, 85.2, None], [85.5, 85.5, 85.5], "not decided"),
        ({}, [85.0, 85.2, math.inf], [85.5, 85.5, 85.5], "not decided"),
        ({"seeds": 2}, [85.0, 85.2, math.nan], [85.5, 85.5, 85.5], "reproduced"),
        ({}, [], [], "not decided"),
        ({"at_least": None, "at_most": -0.5}, [85.0, 85.0, 84.0], [85.5] * 3, "reproduced"),
        ({"at_least": None, "at_most": -0.5}, [85.1, 85.1, 84.0], [85.5] * 3, "not reproduced"),
        # mean -0.2, s 0.1: 95 % interval -0.2 +- 4.303 * 0.1 / sqrt(3) = -0.448 to 0.048
        ({"by": "interval"}, [85.2, 85.3, 85.4], [85.5] * 3, "reproduced"),
        ({"by": "interval", "at_least": -0.4}, [85.2, 85.3, 85.4], [85.5] * 3, "not decided"),
        ({"by": "interval", "at_least": 0.04}, [85.2, 85.3, 85.4], [85.5] * 3, "not decided"),
        ({"by": "interval", "at_least": 0.06}, [85.2, 85.3, 85.4], [85.5] * 3, "not reproduced"),
        ({"minus": None, "over": "b", "at_least": 2.0}, [4.0, 6.0, 3.0], [2.0] * 3, "reproduced"),
        ({"minus": None, "over": "b", "at_least": 2.1}, [4.0, 6.0, 3.0], [2.0] * 3,
         "not reproduced"),
        ({"minus": None, "over": "b", "at_least": 2.0}, [4.0] * 3, [2.0, 2.0, 0.0], "not decided"),
        ({"minus": None, "at_least": 85.0}, [85.0, 86.0, 84.0], [], "reproduced"),
    ],
)  # fmt: skip
def test_each_verdict_follows_from_its_rule(rule, a, b, expected):
    assert judged(Comparison(**(RULE | rule)), lines(a=a, b=b)).verdict == expected


def test_values_are_paired_by_seed():
    """The same numbers with the seeds crossed give another difference."""
    of_b = dict(reversed(lines(b=[3.0, 2.0, 1.0]).items()))
    found = {**lines(a=[1.0, 2.0, 3.0]), **of_b}
    assert judged(Comparison(**RULE), found).values == {0: -2.0, 1: 0.0, 2: 2.0}


def test_one_comparison_that_fails_decides_and_all_must_hold():
    yes, no, open_ = (
        judged(Comparison(**(RULE | rule)), lines(a=[1.0] * 3, b=[1.0] * 3))
        for rule in ({}, {"at_least": 0.5}, {"seeds": 4})
    )
    assert verdict([yes, yes]) == "reproduced"
    assert verdict([yes, open_]) == "not decided"
    assert verdict([yes, open_, no]) == "not reproduced"


def test_spikes_are_epochs_far_above_the_one_before():
    assert spikes([2.0, 1.0, 1.09, 1.3, 1.2, 1.33]) == 2
    assert spikes([1.0]) == 0


# ---------------------------------------------------------------- runs


def test_runs_are_done_once_and_each_with_its_seed(root):
    assert "4 runs to do" in call("run", "lowres/digits", "--dry-run")
    assert "no estimate" in call("run", "lowres/digits", "--dry-run")
    assert "2 runs done; not decided" in call("run", "lowres/digits", "--only", "3-levels")
    dry = call("run", "lowres/digits", "--dry-run")
    assert "2 runs to do" in dry
    assert "about 0.00 hours" in dry
    assert "2 runs done; reproduced" in call("run", "lowres/digits")
    assert "0 runs done; reproduced" in call("run", "lowres/digits")
    found = read_lines(lines_file("lowres/digits", root))
    assert [(x["variation"], x["seed"]) for x in found] == [
        ("3-levels", 0), ("3-levels", 1), ("float", 0), ("float", 1)
    ]  # fmt: skip
    for line in found:
        assert line["configuration"]["train"] == {"lr": 0.02, "epochs": 2, "seed": line["seed"]}
        assert len(line["curves"]["test_top1"]) == 2
        assert line["machine"]["torch"] == torch.__version__
        assert line["hours"] > 0
    assert found[0]["curves"]["train_loss"] != found[1]["curves"]["train_loss"]
    check_sizes(found)
    assert "| 3-levels | 0, 1 |" in call("table", "lowres/digits")
    assert re.search(r"lowres/digits +4 of +4 runs +reproduced", call("list", "--root", str(root)))
    assert json.loads(call("list", "--json"))["experiments"][0]["done"] == 4


def check_sizes(found):
    """Bytes and bits are of the whole file, biases and manifest included."""
    n = sum(p.numel() for p in build("fcnn1", in_channels=1, image_size=8).parameters())
    packed = found[0]
    file = Path("runs/experiments/lowres/digits/3-levels-seed0/net.safetensors")
    assert packed["figures"]["bytes"] == file.stat().st_size
    assert packed["figures"]["bits"] == pytest.approx(8 * file.stat().st_size / n)
    assert packed["figures"]["bits"] > packed["figures"]["layer_bits"] > math.log2(3)
    assert found[2]["figures"]["bits"] == 32
    assert [line["figures"]["parameters"] for line in found] == [n] * 4


def test_a_run_that_was_cut_off_goes_on_with_resume(root, monkeypatch):
    class Killed(Silent):
        def start(self, epoch, epochs, steps):
            if epoch == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["subbyte.train.run"], "console_progress", lambda **_: Killed())
        result = CliRunner().invoke(app, ["experiment", "run", "lowres/digits"])
        assert result.exit_code == 130
        assert "the same command with --resume goes on" in result.output
    again = ["experiment", "run", "lowres/digits", "--only", "float", "--seeds", "0"]
    result = CliRunner().invoke(app, again)
    assert "--resume goes on with it" in str(result.exception)
    assert not lines_file("lowres/digits", root).exists()
    assert "1 runs done" in call(*again[1:], "--resume")
    (line,) = read_lines(lines_file("lowres/digits", root))
    assert len(line["curves"]["train_loss"]) == 2


def test_a_line_of_other_settings_does_not_count(root):
    call("run", "lowres/digits", "--only", "float", "--seeds", "0")
    experiment = read_experiment("lowres/digits", root)
    assert list(lines_of(experiment, root)) == [("float", 0)]
    write(root, (CLAIM + RUNS + JUDGE).replace("lr = 0.02", "lr = 0.03"))
    changed = read_experiment("lowres/digits", root)
    assert lines_of(changed, root) == {}
    assert len(lacking(changed, jobs_of(changed), root)) == 4
    write(root, (CLAIM + RUNS + JUDGE).replace("threads = 1", "threads = 2"))
    assert list(lines_of(read_experiment("lowres/digits", root), root)) == [("float", 0)]


def test_the_same_run_adds_one_line(root):
    """Two processes that end the same run: the second one's line is left out."""
    path = lines_file("lowres/digits", root)
    call("run", "lowres/digits", "--only", "float", "--seeds", "0")
    (line,) = read_lines(path)
    path.unlink()
    assert append(path, line)
    assert not append(path, {**line, "date": "later"})
    assert append(path, {**line, "seed": 1})
    assert append(path, {**line, "configuration": {}})
    assert [x["seed"] for x in read_lines(path)] == [0, 1, 0]


def test_a_job_that_got_its_line_meanwhile_is_skipped(root):
    experiment = read_experiment("lowres/digits", root)
    jobs = jobs_of(experiment, ["float"], [0])
    done = run_jobs(experiment, jobs, WORKS, root, lambda _: None)
    assert len(done) == 1
    assert run_jobs(experiment, jobs, WORKS, root, lambda _: None) == []


def test_the_line_names_the_code_that_began_the_run(root, monkeypatch):
    """Somebody may commit while a run lasts."""
    head = ["before"]
    monkeypatch.setattr("subbyte.experiments.run.revision", lambda _: head[-1])
    experiment = read_experiment("lowres/digits", root)

    def work(quiet):
        head.append("after")
        return Found({"top1": 1.0}, 1.0)

    jobs = jobs_of(experiment, ["float"], [0])
    run_jobs(experiment, jobs, {"train": lambda _: work}, root, lambda _: None)
    (line,) = read_lines(lines_file("lowres/digits", root))
    assert line["revision"] == "before"


def test_a_run_that_fails_does_not_stop_the_others(root):
    runs = RUNS.replace("lr = 0.02", "lr = 1e30") + "train = { lr = 0.02 }\n"
    write(root, CLAIM + runs + JUDGE)
    result = CliRunner().invoke(app, ["experiment", "run", "lowres/digits", "--seeds", "0"])
    assert re.search("1 of 2 runs failed; float, seed 0: the loss is", str(result.exception))
    (line,) = read_lines(lines_file("lowres/digits", root))
    assert line["variation"] == "3-levels"


def test_a_damaged_line_is_named(root):
    for text in ('{"variation": "float"', '{"variation": "float"}', "3"):
        lines_file("lowres/digits", root).write_text(text)
        with pytest.raises(SubbyteError, match=r"digits.jsonl, line 1: no line of a run; remove"):
            read_lines(lines_file("lowres/digits", root))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "5-levels"], "no variation '5-levels'; did you mean '3-levels'"),
        (["--seeds", "one"], "--seeds one: expected integers"),
    ],
)
def test_a_wrong_choice_is_named(root, arguments, says):
    result = CliRunner().invoke(app, ["experiment", "run", "lowres/digits", *arguments])
    assert says in str(result.exception)


CONVERT = """
shown = ["top1", "lost", "bits", "layer_bits"]
[quantize]
model = "fcnn1"
weights = "runs/experiments/lowres/digits/float-seed{seed}/weights.safetensors"
calibrate = "digits"
samples = 64
[variations.4-levels]
method = { name = "cora", levels = 4, tune = 0 }
[[judge]]
figure = "lost"
of = "4-levels"
at_most = 50.0
seeds = 1
"""


def test_a_trained_network_is_converted_by_the_experiment_of_another(root):
    call("run", "lowres/digits", "--only", "float", "--seeds", "1")
    write(root, CLAIM + CONVERT, "lowres/converted")
    assert "1 runs done; reproduced" in call("run", "lowres/converted", "--seeds", "1")
    (line,) = read_lines(lines_file("lowres/converted", root))
    assert line["seed"] == 1
    assert line["configuration"]["quantize"]["weights"].endswith("float-seed1/weights.safetensors")
    figures = line["figures"]
    assert figures["lost"] == pytest.approx(figures["top1_float"] - figures["top1"])
    assert figures["bits"] > figures["layer_bits"] >= 2
    details = line["details"]
    differing = 100 * (details["right_to_wrong"] - details["wrong_to_right"]) / details["images"]
    assert figures["lost"] == pytest.approx(differing)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "cora"', 'name = "coral"', "no such method; did you mean 'cora'"),
        ("levels = 4", "levels = 1", "levels=1"),
        ("samples = 64", "sample = 64", "no key 'sample'; did you mean 'samples'"),
        ("[variations.4-levels]", "[variations.4-levels]\ndata = { source = 'x' }", "key 'data'"),
    ],
)
def test_mistakes_of_a_conversion_are_named(root, old, new, says):
    write(root, CLAIM + CONVERT.replace(old, new, 1), "lowres/converted")
    experiment = read_experiment("lowres/converted", root)
    with pytest.raises(SubbyteError, match=says):
        ready(jobs_of(experiment)[0], WORKS)


def test_a_conversion_gets_its_seed(root, monkeypatch):
    """The seed draws the examples: of two seeds each has its own."""
    seen = []
    monkeypatch.setattr(
        "subbyte.commands.converting.convert", lambda request, *_: seen.append(request.seed)
    )
    monkeypatch.setattr("subbyte.commands.converting._paired", lambda _: {})
    monkeypatch.setattr("subbyte.commands.converting._found", lambda *_: None)
    write(root, CLAIM + CONVERT, "lowres/converted")
    for job in jobs_of(read_experiment("lowres/converted", root)):
        ready(job, WORKS)(True)
    assert seen == [0, 1]


SCRIPT = """
script = "script.py 7"
shown = ["score"]
[variations.a]
[[judge]]
figure = "score"
of = "a"
at_least = 8.0
seeds = 2
"""


def test_a_script_leaves_its_figures(root, capfd):
    Path("script.py").write_text(
        "import json, sys\nfrom pathlib import Path\n"
        "n, _, name, _, seed, _, out = sys.argv[1:]\nassert name == 'a'\n"
        "found = {'figures': {'score': int(n) + int(seed)}, 'seconds': 3600}\n"
        "(Path(out) / 'result.json').write_text(json.dumps(found))\n"
    )
    write(root, CLAIM + SCRIPT, "lowres/script")
    assert "2 runs done; not reproduced" in call("run", "lowres/script")
    found = read_lines(lines_file("lowres/script", root))
    assert [x["figures"]["score"] for x in found] == [7, 8]
    assert found[0]["hours"] == 1
    Path("script.py").write_text("raise SystemExit(3)")
    result = CliRunner().invoke(app, ["experiment", "run", "lowres/script", "--seeds", "2"])
    assert "exit code 3" in str(result.exception)
    Path("script.py").unlink()
    result = CliRunner().invoke(app, ["experiment", "run", "lowres/script", "--seeds", "2"])
    assert "no such file" in str(result.exception)


# ---------------------------------------------------------------- what the repository holds


@pytest.mark.parametrize("name", names_of(EXPERIMENTS))
def test_every_experiment_can_be_run(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    experiment = read_experiment(name, EXPERIMENTS)
    for job in jobs_of(experiment):
        ready(job, WORKS)
    judge(experiment, lines_of(experiment, EXPERIMENTS))


@pytest.mark.parametrize("paper", PAPERS)
def test_every_page_is_what_the_lines_give(paper):
    own = experiments_of(paper)
    place = REPOSITORY / "docs" / "results" / f"{paper}.md"
    assert place.read_text() == page_of(paper, own), f"run: subbyte experiment page {paper}"
    for picture in pictures_of(own):
        assert (place.parent / picture).is_file(), picture


def experiments_of(paper):
    names = [name for name in names_of(EXPERIMENTS) if name.startswith(f"{paper}/")]
    found = [read_experiment(name, EXPERIMENTS) for name in names]
    return {experiment: lines_of(experiment, EXPERIMENTS) for experiment in found}


def test_a_page_follows_its_lines():
    """A figure that changes and a line that is missing change the page."""
    own = experiments_of("sgm")
    page = page_of("sgm", own)
    mnist = next(e for e in own if e.name == "sgm/lenet5-mnist")
    assert "99.39 (0.08)" in page
    found = {key: line for key, line in own[mnist].items() if key != ("2-bits", 0)}
    fewer = page_of("sgm", {**own, mnist: found})
    assert "not decided: 2 of 3 seeds" in fewer
    assert "99.39 (0.08)" not in fewer
    without = page_of("sgm", {mnist: {}})
    assert "**Verdict: not decided: not run.**" in without
    assert "subbyte experiment run sgm/lenet5-mnist --resume" in without


def test_the_document_says_what_the_reader_takes(root):
    text = (REPOSITORY / "docs" / "experiments.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    write(root, example)
    experiment = read_experiment("lowres/digits", root)
    assert list(experiment.variations) == ["float", "3-levels"]
    for job in jobs_of(experiment):
        ready(job, WORKS)
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    told = {
        word.strip("[]").partition(".")[0] for row in rows for word in re.findall("`(.*?)`", row)
    }
    assert told == KEYS | {"base"}


def test_every_line_belongs_to_an_experiment():
    for path in EXPERIMENTS.glob("*/*.jsonl"):
        name = f"{path.parent.name}/{path.stem}"
        experiment = read_experiment(name, EXPERIMENTS)
        for line in read_lines(path):
            assert line["experiment"] == name
            assert line["variation"] in experiment.variations


def test_the_command_draws_a_page(root):
    call("run", "lowres/digits", "--only", "float", "--seeds", "0")
    out = root.parent / "pages"
    assert call("page", "lowres", "--out", str(out)).strip() == str(out / "lowres.md")
    assert "![Levels on digits](lowres-digits.png)" in (out / "lowres.md").read_text()
    result = CliRunner().invoke(app, ["experiment", "page", "lowre", "--out", str(out)])
    assert "no experiments of 'lowre'; did you mean 'lowres'" in str(result.exception)
    assert (out / "lowres-digits.png").read_bytes().startswith(b"\x89PNG")
