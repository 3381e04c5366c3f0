"""Strict TOML: an unknown key, a wrong type or a value out of range stops before work starts.

A table is read into a dataclass: its fields are the keys, its type hints the types, its defaults
the defaults. Every message names the file, the section, the key and a remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from subbyte.errors import SubbyteError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = Mapping[str, Any]
T = TypeVar("T")

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_PLURALS = {int: "integers", float: "numbers", bool: "booleans", str: "strings", dict: "tables"}


@dataclass(frozen=True)
class Place:
    """Where a table stands: for the messages. section: "" is the top level."""

    file: str
    section: str = ""

    def __str__(self) -> str:
        return f"{self.file}: " + (f"[{self.section}]" if self.section else "the top level")

    def key(self, name: str) -> str:
        return f"{self.file}: " + (f"{self.section}.{name}" if self.section else name)


def parse(path: Path) -> dict[str, Any]:
    """The file's table, over the table of the file that its `base` names, if it has one.

    base: relative to the file. Raises SubbyteError for what is no TOML, and for a circle of bases.
    """
    return _over_base(path, ())


def _over_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """above: the files that lead here by their bases."""
    table = _parse_alone(path)
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise SubbyteError(f"{path}: base = {base!r}: expected the path of another TOML file")
    chain = (*above, path.resolve())
    other = path.parent / base
    if other.resolve() in chain:
        raise SubbyteError(f"{path}: base = {base!r} leads back to itself; leave one 'base' out")
    return merged(_over_base(other, chain), table)


def merged(under: Table, over: Table) -> dict[str, Any]:
    """The tables as one; where both have a value, that of `over`; tables are merged in turn."""
    both = {k: v for k, v in over.items() if isinstance(v, dict) and isinstance(under.get(k), dict)}
    return {**under, **over, **{key: merged(under[key], value) for key, value in both.items()}}


def _parse_alone(path: Path) -> dict[str, Any]:
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


def override(table: Table, overrides: Mapping[str, str]) -> Table:
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


def read_fields(
    cls: type[T], table: Table, place: Place, own: tuple[str, ...] = (), **names: Any
) -> T:
    """The dataclass from the table. own: further keys that are legal there (for the message).

    names: what its type hints mention and its module imports for checkers only.
    """
    hints = get_type_hints(cls, localns=names)
    fields = [f for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    check_keys(table, [*own, *(f.name for f in fields)], place)
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in table:
            raise SubbyteError(f"{place} needs '{f.name}' ({_describe(hints[f.name])})")
    values = {key: _read_value(value, hints[key], place.key(key)) for key, value in table.items()}
    try:
        return cls(**values)
    except SubbyteError as error:
        raise SubbyteError(f"{place} {error}") from error


def check_keys(table: Table, known: Iterable[str], place: Place) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            raise SubbyteError(f"{place} has no key '{key}'; {nearest(key, known)}")


def nearest(word: str, known: list[str]) -> str:
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
