"""Strict TOML: an unknown key, a wrong type or a value out of range stops before work starts.

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

import dataclasses
import difflib
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from subbyte.core.recipe import Recipe, Rule
from subbyte.errors import SubbyteError
from subbyte.methods import METHODS, Method
from subbyte.modules.absorb import BatchNormMode
from subbyte.train.settings import DataConfig, LoopConfig, ModelConfig, RunConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DataConfig", "LoopConfig", "ModelConfig", "RunConfig", "read_config"]

Table = Mapping[str, Any]
T = TypeVar("T")

_RULE_KEYS = ("names", "types", "method")
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_PLURALS = {int: "integers", float: "numbers", bool: "booleans", str: "strings", dict: "tables"}


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


@dataclass(frozen=True)
class _Place:
    """Where a table stands: for the messages. section: "" is the top level."""

    file: str
    section: str = ""

    def __str__(self) -> str:
        return f"{self.file}: " + (f"[{self.section}]" if self.section else "the top level")

    def key(self, name: str) -> str:
        return f"{self.file}: " + (f"{self.section}.{name}" if self.section else name)


def read_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """The run that the file describes.

    overrides: "section.key" to a TOML value as text, e.g. {"train.epochs": "2"}; text that is no
    TOML value is a string. Raises SubbyteError with the file, the section, the key and a remedy.
    """
    path = Path(path)
    table = _override(_parse(path), overrides or {})
    file = f"{path} (with overrides)" if overrides else str(path)
    document = _read_fields(_Document, table, _Place(file))
    return RunConfig(
        model=_read_fields(ModelConfig, document.model, _Place(file, "model")),
        data=_read_fields(DataConfig, document.data, _Place(file, "data")),
        train=_read_fields(LoopConfig, document.train, _Place(file, "train")),
        recipe=_read_recipe(document, file),
        out=Path("runs", path.stem) if document.out is None else Path(document.out),
        compress=document.compress,
        batchnorm=document.batchnorm,
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SubbyteError(f"{path}: no such file; give the path of a TOML file") from None
    except OSError as error:
        raise SubbyteError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SubbyteError(f"{path}: not UTF-8 text (byte {error.start}); TOML is") from error
    except tomllib.TOMLDecodeError as error:
        raise SubbyteError(f"{path}: not valid TOML: {error}") from error


def _override(table: Table, overrides: Mapping[str, str]) -> Table:
    for key, text in overrides.items():
        table = _set(table, key.split("."), _toml_value(text), key)
    return table


def _set(table: Table, keys: list[str], value: object, whole: str) -> Table:
    """A copy of the table with one value changed; tables on the way are made."""
    if len(keys) == 1:
        return {**table, keys[0]: value}
    inner = table.get(keys[0], {})
    if not isinstance(inner, dict):
        raise SubbyteError(f"override '{whole}': '{keys[0]}' is not a table; edit the file instead")
    return {**table, keys[0]: _set(inner, keys[1:], value, whole)}


def _toml_value(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _read_recipe(document: _Document, file: str) -> Recipe | None:
    if document.method is not None and document.rules:
        raise SubbyteError(f"{file}: has both [method] and [[rules]]; keep one of them")
    if document.method is not None:
        place = _Place(file, "method")
        return Recipe((Rule(method=_read_method("name", document.method, place, ("name",))),))
    rules = [
        _read_rule(table, _Place(file, f"rules.{i}")) for i, table in enumerate(document.rules)
    ]
    return Recipe(tuple(rules)) if rules else None


def _read_rule(table: Table, place: _Place) -> Rule:
    pattern = {key: table[key] for key in ("names", "types") if key in table}
    rule = _read_fields(Rule, pattern, place)
    return replace(rule, method=_read_method("method", table, place, _RULE_KEYS))


def _read_method(key: str, table: Table, place: _Place, own: tuple[str, ...]) -> Any:
    """The method that `table[key]` names, with the table's other keys (but `own`) as its fields.

    "float" is no method: None.
    """
    known = sorted(METHODS) + (["float"] if key == "method" else [])
    name = table.get(key)
    if name is None:
        raise SubbyteError(f"{place} needs '{key}': one of {', '.join(known)}")
    if not isinstance(name, str) or name not in known:
        hint = _nearest(str(name), known)
        raise SubbyteError(f"{place.key(key)} = {name!r}: no such method; {hint}")
    fields = {k: value for k, value in table.items() if k not in own}
    if name == "float":
        _check_keys(fields, own, place)
        return None
    return _read_fields(METHODS[name], fields, place, own)


def _read_fields(cls: type[T], table: Table, place: _Place, own: tuple[str, ...] = ()) -> T:
    """The dataclass from the table. own: further keys that are legal there (for the message)."""
    hints = get_type_hints(cls, localns={"Method": Method})  # Rule imports it for checkers only
    fields = [f for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    _check_keys(table, [*own, *(f.name for f in fields)], place)
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in table:
            raise SubbyteError(f"{place} needs '{f.name}' ({_describe(hints[f.name])})")
    values = {key: _read_value(value, hints[key], place.key(key)) for key, value in table.items()}
    try:
        return cls(**values)
    except SubbyteError as error:
        raise SubbyteError(f"{place} {error}") from error


def _check_keys(table: Table, known: Iterable[str], place: _Place) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            raise SubbyteError(f"{place} has no key '{key}'; {_nearest(key, known)}")


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def _read_value(value: object, hint: Any, where: str) -> object:
    try:
        return _convert(value, hint)
    except TypeError:
        raise SubbyteError(f"{where} = {value!r}: expected {_describe(hint)}") from None


def _convert(value: object, hint: Any) -> object:
    """The value as the type hint says; TypeError if it is another type. A bool is no integer."""
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return _convert_any(value, get_args(hint))
    if kind is Literal and any(value == a and type(value) is type(a) for a in get_args(hint)):
        return value
    if kind is tuple and isinstance(value, list):
        return tuple(_convert(item, get_args(hint)[0]) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is Mapping:
        kind = dict
    if type(value) is kind:
        return value
    raise TypeError


def _convert_any(value: object, hints: tuple[Any, ...]) -> object:
    for hint in hints:
        try:
            return _convert(value, hint)
        except TypeError:
            continue
    raise TypeError


def _describe(hint: Any) -> str:
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args if a is not type(None))
    if kind is Literal:
        return "one of " + ", ".join(map(repr, args))
    if kind is tuple:
        return f"a list of {_PLURALS.get(args[0], 'values')}"
    return _WORDS.get(kind, "a table")
