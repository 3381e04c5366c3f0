"""The strict reader: what it accepts, and that each mistake names its place and a remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from subbyte.errors import SubbyteError
from subbyte.methods import METHODS
from subbyte.train.config import DataConfig, LoopConfig, ModelConfig, read_config

BASE = """
[model]
name = "digitsnet"
[data]
source = "digits"
[train]
epochs = 3
lr = 0.1
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "exam.toml"
    path.write_text(text)
    return path


def error_of(tmp_path: Path, text: str, overrides: dict[str, str] | None = None) -> str:
    with pytest.raises(SubbyteError) as caught:
        read_config(write(tmp_path, text), overrides)
    message = str(caught.value)
    assert "exam.toml" in message or overrides
    return message


def test_minimal_file_takes_every_default_from_the_dataclasses(tmp_path):
    config = read_config(write(tmp_path, BASE))
    assert config.model == ModelConfig("digitsnet")
    assert config.data == DataConfig("digits")
    assert config.train == LoopConfig(epochs=3, lr=0.1)
    assert config.recipe is None
    assert config.out == Path("runs/exam")
    assert config.compress is False


def test_every_kind_of_value_is_read(tmp_path):
    text = """
    out = "elsewhere"
    compress = true
    [model]
    name = "digitsnet"
    weights = "float.safetensors"
    arguments = { classes = 10 }
    [data]
    source = "digits"
    size = 16
    flip = true
    [train]
    epochs = 30
    lr = 1
    schedule = "step"
    milestones = [10, 20]
    optimizer = "adamw"
    limit_batches = 4
    """
    config = read_config(write(tmp_path, text))
    assert config.out == Path("elsewhere")
    assert config.compress is True
    assert config.model == ModelConfig("digitsnet", {"classes": 10}, "float.safetensors")
    assert config.data == DataConfig("digits", size=16, flip=True)
    assert config.train.milestones == (10, 20)
    assert type(config.train.lr) is float
    assert (config.train.optimizer, config.train.limit_batches) == ("adamw", 4)


def test_a_method_table_is_one_rule_for_every_layer(tmp_path):
    config = read_config(write(tmp_path, BASE + '[method]\nname = "lowres"\nlevels = 3'))
    (rule,) = config.recipe.rules
    assert (rule.names, rule.types) == ("*", "*")
    assert rule.method == METHODS["lowres"](levels=3)


def test_rules_keep_their_order_and_float_is_no_method(tmp_path):
    text = """
    [[rules]]
    names = "classifier.*"
    method = "float"
    [[rules]]
    types = "Conv*"
    method = "lowres"
    levels = 9
    beta = 2
    """
    first, second = read_config(write(tmp_path, BASE + text)).recipe.rules
    assert (first.names, first.types, first.method) == ("classifier.*", "*", None)
    assert (second.names, second.types) == ("*", "Conv*")
    assert second.method == METHODS["lowres"](levels=9, beta=2.0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_named_with_its_defaults(tmp_path, name):
    config = read_config(write(tmp_path, BASE + f'[method]\nname = "{name}"'))
    assert config.recipe.rules[0].method == METHODS[name]()


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.epochs", "7", 7),
        ("train.optimizer", '"adamw"', "adamw"),
        ("train.optimizer", "adamw", "adamw"),
        ("data.crop", "2", 2),
        ("model.arguments.classes", "12", 12),
    ],
)
def test_overrides_are_toml_values_or_bare_words(tmp_path, key, text, expected):
    value: object = read_config(write(tmp_path, BASE), {key: text})
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


BROKEN = {
    "unknown key in a section": (
        BASE.replace("epochs", "epoch"),
        ["[train] has no key 'epoch'", "did you mean 'epochs'?"],
    ),
    "unknown key unlike any other": (
        BASE + "zzzz = 1",
        ["[train] has no key 'zzzz'", "milestones"],
    ),
    "unknown section": ("[modell]\n" + BASE, ["top level has no key 'modell'", "'model'?"]),
    "missing required key": (BASE.replace("lr = 0.1", ""), ["[train] needs 'lr' (a number)"]),
    "missing section": (BASE[BASE.index("[data]") :], ["top level needs 'model' (a table)"]),
    "string for an integer": (
        BASE.replace("epochs = 3", 'epochs = "3"'),
        ["train.epochs = '3': expected an integer"],
    ),
    "float for an integer": (
        BASE.replace("epochs = 3", "epochs = 3.0"),
        ["train.epochs = 3.0: expected an integer"],
    ),
    "bool for an integer": (
        BASE.replace("epochs = 3", "epochs = true"),
        ["train.epochs = True: expected an integer"],
    ),
    "bool for a float": (
        BASE.replace("lr = 0.1", "lr = true"),
        ["train.lr = True: expected a number"],
    ),
    "integer for a bool": (
        BASE + "nesterov = 1",
        ["train.nesterov = 1: expected true or false"],
    ),
    "a list with a wrong item": (
        BASE + 'milestones = [1, "2"]',
        ["train.milestones = [1, '2']: expected a list of integers"],
    ),
    "an unknown choice": (
        BASE + 'optimizer = "adam"',
        ["train.optimizer = 'adam': expected one of 'sgd', 'adamw'"],
    ),
    "a section that is a value": (
        "model = 3\ndata = 4\ntrain = 5",
        ["model = 3: expected a table"],
    ),
    "wrong type at the top": ("compress = 1" + BASE, ["compress = 1: expected true or false"]),
    "out of range": (
        BASE.replace("epochs = 3", "epochs = 0"),
        ["[train] epochs = 0", "at least 1"],
    ),
    "no TOML": ("[model]\nname = = 3\n", ["not valid TOML", "line 2"]),
    "method and rules": (
        BASE + '[method]\nname = "lowres"\n[[rules]]\nmethod = "float"',
        ["both [method] and [[rules]]", "keep one"],
    ),
    "no such method": (
        BASE + '[method]\nname = "lowress"',
        ["method.name = 'lowress'", "did you mean 'lowres'?"],
    ),
    "float is no method of its own": (
        BASE + '[method]\nname = "float"',
        ["method.name = 'float'", "no such method", "lowres"],
    ),
    "a method without a name": (BASE + "[method]\nlevels = 3", ["[method] needs 'name'", "lowres"]),
    "a rule without a method": (
        BASE + '[[rules]]\nnames = "*"',
        ["[rules.0] needs 'method'", "float", "lowres"],
    ),
    "a method's unknown field": (
        BASE + '[method]\nname = "lowres"\nlevel = 3',
        ["[method] has no key 'level'", "did you mean 'levels'?"],
    ),
    "a misspelled pattern": (
        BASE + '[[rules]]\nname = "*"\nmethod = "lowres"',
        ["[rules.0] has no key 'name'", "did you mean 'names'?"],
    ),
    "a field beside float": (
        BASE + '[[rules]]\nmethod = "float"\nlevels = 3',
        ["[rules.0] has no key 'levels'"],
    ),
    "a method's wrong type": (
        BASE + '[method]\nname = "lowres"\nlevels = "3"',
        ["method.levels = '3': expected an integer"],
    ),
    "a method's range": (
        BASE + '[method]\nname = "lowres"\nbeta = 0',
        ["[method]", "beta", "above 0"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_mistake_names_its_place_and_a_remedy(tmp_path, case):
    text, parts = BROKEN[case]
    message = error_of(tmp_path, text)
    for part in parts:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("weight_decay", float("nan")),
        ("clip_grad_norm", -1.0),
        ("gamma", 0.0),
        ("warmup_epochs", 3),
        ("warmup_epochs", -1),
        ("label_smoothing", 1.0),
        ("ema", 1.0),
        ("ema", -0.1),
        ("seed", -1),
        ("threads", 0),
        ("limit_batches", 0),
        ("milestones", (1,)),
        ("schedule", "step"),
        ("schedule", "linear"),
        ("optimizer", "adam"),
        ("precision", "fp16"),
    ],
)
def test_the_loop_checks_its_ranges(field, value):
    named = "milestones" if value == "step" else field
    with pytest.raises(SubbyteError, match=rf"^{named} = .*: expected "):
        LoopConfig(**{"epochs": 3, "lr": 0.1, field: value})


@pytest.mark.parametrize("milestones", [(2, 1), (1, 1), (0, 1)])
def test_milestones_rise(milestones):
    with pytest.raises(SubbyteError, match=r"milestones = .*rising"):
        LoopConfig(epochs=3, lr=0.1, schedule="step", milestones=milestones)


@pytest.mark.parametrize("other", [{"momentum": 0.0}, {"optimizer": "adamw"}])
def test_nesterov_needs_sgd_with_momentum(other):
    with pytest.raises(SubbyteError, match=r"nesterov = True.*momentum > 0"):
        LoopConfig(epochs=3, lr=0.1, nesterov=True, **other)


@pytest.mark.parametrize("field", ["size", "crop", "cutout"])
def test_the_data_section_checks_its_ranges(tmp_path, field):
    message = error_of(tmp_path, BASE.replace("[data]", f"[data]\n{field} = -1"))
    assert re.search(rf"\[data\] {field} ?= ?-1", message)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"train.epoch": "3"}, "did you mean 'epochs'?"),
        ({"train.epochs": "many"}, "train.epochs = 'many': expected an integer"),
        ({"trian.epochs": "3"}, "did you mean 'train'?"),
        ({"model.name.x": "3"}, "override 'model.name.x': 'name' is not a table"),
    ],
)
def test_overrides_are_as_strict(tmp_path, overrides, part):
    assert part in error_of(tmp_path, BASE, overrides)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(SubbyteError, match=r"absent\.toml: no such file"):
        read_config(tmp_path / "absent.toml")
    with pytest.raises(SubbyteError, match="cannot be read"):
        read_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"out = '\xe9'")
    with pytest.raises(SubbyteError, match=r"latin\.toml: not UTF-8"):
        read_config(tmp_path / "latin.toml")


def test_an_override_is_one_value_and_never_two_keys(tmp_path):
    text = "1\nb = 2"
    assert read_config(write(tmp_path, BASE), {"data.source": text}).data.source == text
