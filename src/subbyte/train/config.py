"""Strict TOML: an unknown key, a wrong type or a value out of range stops before work starts.

    base = "other.toml"             # optional: settings of another file, which these change
    out = "runs/digits"             # optional; otherwise runs/<name of this file>
    compress = false                # optional
    batchnorm = "keep"              # optional; or "absorb", "power_of_two"

    [model]
    name = "..."
    weights = "runs/float/weights.safetensors"      # optional
    [model.arguments]               # of the network's builder

    [data]                          # the fields of DataConfig
    source = "digits"

    [train]                         # the fields of LoopConfig
    epochs = 10
    lr = 0.1

    [method]                        # one method everywhere ...
    name = "lowres"
    levels = 3

    [[rules]]                       # ... or rules, first match first; neither trains in float
    names = "head"
    method = "float"

Defaults live in the dataclasses of `train.settings` and of the methods, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from subbyte.core.recipe import Recipe, Rule
from subbyte.core.toml import Place, Table, check_keys, nearest, override, parse, read_fields
from subbyte.errors import SubbyteError
from subbyte.methods import METHODS, Method
from subbyte.modules.absorb import BatchNormMode
from subbyte.train.settings import DataConfig, LoopConfig, ModelConfig, RunConfig

__all__ = ["DataConfig", "LoopConfig", "ModelConfig", "RunConfig", "config_of", "read_config"]

_RULE_KEYS = ("names", "types", "method")


@dataclass(frozen=True)
class _Document:
    """The top level of the file."""

    model: dict
    data: dict
    train: dict
    method: dict | None = None
    rules: tuple[dict, ...] = ()
    out: str | None = None
    compress: bool = RunConfig.compress
    batchnorm: BatchNormMode = RunConfig.batchnorm


def read_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """The run that the file describes.

    overrides: "section.key" to a TOML value as text, e.g. {"train.epochs": "2"}; text that is no
    TOML value is a string. Raises SubbyteError with the file, the section, the key and a remedy.
    """
    path = Path(path)
    table = override(parse(path), overrides or {})
    return config_of(table, f"{path} (with overrides)" if overrides else str(path), path.stem)


def config_of(table: Table, file: str, name: str) -> RunConfig:
    """The run that a table describes. file: where it stands; name: of the run's folder, if the
    table has no `out`. Raises SubbyteError as `read_config`."""
    document = read_fields(_Document, table, Place(file))
    return RunConfig(
        model=read_fields(ModelConfig, document.model, Place(file, "model")),
        data=read_fields(DataConfig, document.data, Place(file, "data")),
        train=read_fields(LoopConfig, document.train, Place(file, "train")),
        recipe=_read_recipe(document, file),
        out=Path("runs", name) if document.out is None else Path(document.out),
        compress=document.compress,
        batchnorm=document.batchnorm,
    )


def _read_recipe(document: _Document, file: str) -> Recipe | None:
    if document.method is not None and document.rules:
        raise SubbyteError(f"{file}: has both [method] and [[rules]]; keep one of them")
    if document.method is not None:
        place = Place(file, "method")
        return Recipe((Rule(method=_read_method("name", document.method, place, ("name",))),))
    rules = [_read_rule(table, Place(file, f"rules.{i}")) for i, table in enumerate(document.rules)]
    return Recipe(tuple(rules)) if rules else None


def _read_rule(table: Table, place: Place) -> Rule:
    pattern = {key: table[key] for key in ("names", "types") if key in table}
    rule = read_fields(Rule, pattern, place, Method=Method)
    return replace(rule, method=_read_method("method", table, place, _RULE_KEYS))


def _read_method(key: str, table: Table, place: Place, own: tuple[str, ...]) -> Any:
    """The method that `table[key]` names, with the table's other keys (but `own`) as its fields.

    "float" is no method: None.
    """
    known = sorted(METHODS) + (["float"] if key == "method" else [])
    name = table.get(key)
    if name is None:
        raise SubbyteError(f"{place} needs '{key}': one of {', '.join(known)}")
    if not isinstance(name, str) or name not in known:
        hint = nearest(str(name), known)
        raise SubbyteError(f"{place.key(key)} = {name!r}: no such method; {hint}")
    fields = {k: value for k, value in table.items() if k not in own}
    if name == "float":
        check_keys(fields, own, place)
        return None
    return read_fields(METHODS[name], fields, place, own)
