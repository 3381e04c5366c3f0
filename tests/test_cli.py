import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import subbyte as sb
from subbyte.data import load_images
from subbyte.models import build
from subbyte.report import size_report
from subbyte.train import evaluate

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"no data in {SHARED}")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A packed, untrained digits network."""
    torch.manual_seed(0)
    model = build("digitsnet")
    sb.prepare(model, sb.LowRes(levels=5))
    path = tmp_path_factory.mktemp("cli") / "net.safetensors"
    sb.save(sb.pack(sb.freeze(model)), path)
    return path


def run(*arguments, cwd=None):
    """The command as a user types it: a process of its own."""
    command = [sys.executable, "-c", "from subbyte.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def in_process(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of `main`, without a new process."""
    from subbyte.cli import main

    monkeypatch.setattr(sys, "argv", ["subbyte", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_evaluate_scores_a_packed_file(file, monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, "evaluate", file, "--data", "digits", "--json")
    assert code == 0
    result = json.loads(out)
    test = load_images("digits", "test")
    expected = evaluate(sb.load(file), test)
    assert result["top1"] == pytest.approx(expected.top1)
    assert result["loss"] == pytest.approx(expected.loss)
    assert result["n"] == len(test)
    code, out, _ = in_process(monkeypatch, capsys, "evaluate", file, "--data", "digits",
                              "--limit", 10)  # fmt: skip
    assert code == 0
    assert "10 images" in out


def test_evaluate_scores_float_weights_of_a_zoo_network(tmp_path, monkeypatch, capsys):
    torch.manual_seed(1)
    model = build("digitsnet")
    save_file(dict(model.state_dict()), tmp_path / "w.safetensors")
    code, out, _ = in_process(monkeypatch, capsys, "evaluate", "digitsnet", "--weights",
                              tmp_path / "w.safetensors", "--data", "digits", "--json")  # fmt: skip
    assert code == 0
    assert json.loads(out)["top1"] == pytest.approx(
        evaluate(model, load_images("digits", "test")).top1
    )


def test_inspect_counts_what_is_in_the_file(file, monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, "inspect", file, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["bytes"] == file.stat().st_size
    parts = result["layer_bytes"] + result["float_bytes"] + result["overhead_bytes"]
    assert parts == result["bytes"]
    assert set(result["bits_per_weight"]) == {"information", "memory", "disk"}
    net = sb.load(file)
    for layer in result["layers"]:
        assert set(layer["bits_per_weight"]) == {"information", "memory", "disk"}
        packed = net.get_submodule(layer["name"]).packed
        held = packed.words.numel() + 4 * packed.scale.numel()
        assert layer["memory_bytes"] == held
        assert layer["bits_per_weight"]["memory"] == pytest.approx(8 * held / layer["weights"])
        shares = torch.bincount(packed.codes().flatten().int(), minlength=5).double()
        assert layer["level_shares"] == pytest.approx((shares / shares.sum()).tolist())
        assert layer["scale"]["max"] == packed.scale.item()
    assert sum(layer["weights"] for layer in result["layers"]) == result["weights"]
    assert {entry["name"] for entry in result["float"]} >= {
        "features.1.weight",
        "classifier.4.bias",
    }


def test_inspect_shows_every_layer_and_what_stayed_float(file, monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, "inspect", file, "--wide")
    assert code == 0
    for layer in size_report(file).layers:
        assert layer.name in out
    whole = next(line for line in out.splitlines() if line.startswith("whole file"))
    assert f"{file.stat().st_size:,}" in whole
    for name in ("features.1", "features.4", "features.8", "classifier.4"):
        assert name in out.split("stayed float")[1]


def test_compressed_bits_on_disk_are_not_those_in_memory(file, tmp_path, monkeypatch, capsys):
    sb.save(sb.load(file), tmp_path / "z.safetensors", compress=True)
    _, out, _ = in_process(monkeypatch, capsys, "inspect", tmp_path / "z.safetensors", "--json")
    bits = json.loads(out)["bits_per_weight"]
    assert bits["disk"] < bits["memory"]


CONFIG = """
[model]
name = "digitsnet"
[data]
source = "digits"
[train]
epochs = 1
lr = 0.05
threads = 1
limit_batches = 4
[method]
name = "lowres"
levels = 3
"""


def test_train_leaves_a_file_that_inspect_and_evaluate_read(tmp_path, monkeypatch, capsys):
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)
    code, out, _ = in_process(monkeypatch, capsys, "train", config, "--set", f"out={tmp_path}/out",
                              "--json")  # fmt: skip
    assert code == 0
    result = json.loads(out)
    assert result["bytes"] == Path(result["file"]).stat().st_size
    assert len(result["history"]) == 1
    _, out, _ = in_process(monkeypatch, capsys, "evaluate", result["file"], "--data", "digits",
                           "--precision", "float32", "--json")  # fmt: skip
    assert json.loads(out)["top1"] == result["top1"]
    assert size_report(result["file"]).layers[0].levels == 3
    again = ("--resume", "--set", f"out={tmp_path}/out", "--set", "train.epochs=2")
    code, out, err = in_process(monkeypatch, capsys, "train", config, *again)
    assert code == 0
    assert "epoch 2/2" in err
    assert "epoch 1/2" not in err
    assert "top-1" in out


# ------------------------------------------------------------ bad input: one line, exit code 2


@pytest.fixture
def bad(monkeypatch, capsys):
    def check(*arguments, says, says_first=False):
        code, out, err = in_process(monkeypatch, capsys, *arguments)
        assert code == 2
        assert out == ""
        *before, line = err.strip().splitlines()
        assert line.startswith("error: ")
        assert says in line
        assert not before or says_first, err  # only a run that had begun told something before

    return check


def test_bad_input_is_one_line_and_exit_code_2(bad, file, tmp_path):
    digits = ("--data", "digits")
    bad("evaluate", "resnt20", *digits, says="'resnt20' is neither a file nor a zoo network")
    bad("evaluate", "resnet20", *digits, says="needs its float weights: --weights FILE")
    bad("evaluate", file, *digits, "--weights", file, says="--weights goes with the name")
    bad("evaluate", file, "--data", "./nowhere", says="./nowhere")
    bad("evaluate", file, *digits, "--split", "tset", says="tset")
    bad("evaluate", file, *digits, "--size", 4, says="size=4 does not fit 'digits'")
    bad("inspect", tmp_path, says="not a file")
    bad("inspect", tmp_path / "gone.safetensors", says="gone.safetensors: no such file")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:500])
    bad("inspect", tmp_path / "cut.safetensors", says="not a whole safetensors file")
    bad("evaluate", tmp_path / "cut.safetensors", *digits, says="not a whole safetensors file")
    bad("train", tmp_path / "none.toml", says="none.toml: no such file")
    config = tmp_path / "run.toml"
    for find, replace, says in (
        ("epochs = 1", "epoch = 1", "[train] has no key 'epoch'; did you mean 'epochs'?"),
        ("epochs = 1", 'epochs = "1"', "train.epochs = '1': expected an integer"),
        ("levels = 3", "levels = 1", "levels=1; use a whole number from 2 to 256"),
        ('name = "digitsnet"', 'name = "digitnet"', "did you mean 'digitsnet'"),
        ('source = "digits"', 'source = "./gone"', "./gone"),
        ("[method]", "[method", "not valid TOML"),
        ("epochs = 1", "epochs = 1\nbatch_size = 99999999999999999999", "2 to 2**31 - 1"),
        ("threads = 1", "threads = 100000", "threads = 100000: expected at most"),
        ('source = "digits"', 'source = "digits"\ncrop = 100000000', "crop = 100000000"),
        ("[data]", "[model.arguments]\nclasses = 100000000000\n[data]", "is over 1048576"),
        ("[data]", "[model.arguments]\nimage_size = 4\n[data]", "not of the network's 4x4"),
        ("lr = 0.05", "lr = 1e12", "lower train.lr"),
    ):
        config.write_text(CONFIG.replace(find, replace))
        diverges = replace == "lr = 1e12"
        bad("train", config, "--set", f"out={tmp_path}/out", says=says, says_first=diverges)
    config.write_text(CONFIG)
    bad("train", config, "--set", "train.epochs", says="expected KEY=VALUE")
    bad("train", config, "--resume", "--set", f"out={tmp_path}/new", says="no checkpoint to resume")


def test_a_figure_that_is_not_finite_is_null_in_json(capsys):
    from subbyte.commands.output import print_json

    print_json({"loss": float("nan"), "list": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "list": [None, 1.5]}


def test_names_are_not_markup(tmp_path, monkeypatch, capsys):
    model = torch.nn.ModuleDict({"a[/b]": torch.nn.Linear(4, 4)})
    sb.prepare(model, sb.LowRes(levels=3))
    path = tmp_path / "we[red]ird.safetensors"
    sb.save(sb.pack(sb.freeze(model)), path)
    code, out, _ = in_process(monkeypatch, capsys, "inspect", path)
    assert code == 0
    assert "a[/b]" in out
    assert "we[red]ird" in out.replace("\n", "")


def test_bad_input_in_a_real_process(tmp_path):
    done = run("inspect", tmp_path / "gone.safetensors")
    assert done.returncode == 2
    says = "no such file; give the path of a packed .safetensors"
    assert done.stderr == f"error: {tmp_path}/gone.safetensors: {says}\n"
    assert done.stdout == ""


def test_usage_errors_exit_with_2_and_help_with_0():
    assert run("evaluate").returncode == 2
    assert run("nonsense").returncode == 2
    done = run("--help")
    assert done.returncode == 0
    for command in ("demo", "train", "evaluate", "inspect"):
        assert command in done.stdout


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "weights", "data", "top1"),
    [
        ("resnet20", "resnet20_cifar10", "cifar10", 91.73),
        ("mobilenetv1", "mobilenet_v1_075_imagenet", "imagenet1000", 100 * 521 / 600),
        ("squeezenet11", "squeezenet11_imagenet", "imagenet1000", 100 * 381 / 600),
    ],
)
def test_float_networks_score_as_published(monkeypatch, capsys, network, weights, data, top1):
    code, out, _ = in_process(monkeypatch, capsys, "evaluate", network,
                              "--weights", SHARED / f"weights/{weights}.safetensors",
                              "--data", SHARED / data, "--json")  # fmt: skip
    assert code == 0
    assert json.loads(out)["top1"] == pytest.approx(top1, abs=1e-9)
