"""How commands print: JSON for programs, tables for people."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from subbyte.core.jsontext import to_json


class Shown(Protocol):
    """A result of a command."""

    def to_dict(self) -> dict[str, Any]: ...


def print_json(value: dict[str, Any]) -> None:
    """One object; figures that are not finite are null."""
    print(to_json(value))


def show(result: Shown, view: Callable[[Any], Table], json_: bool) -> None:
    """A result as JSON, or as the table that `view` makes of it."""
    if json_:
        print_json(result.to_dict())
    else:
        console().print(view(result))


def console(otherwise: int = 140) -> Console:
    """As wide as the terminal, or as COLUMNS says; `otherwise` columns where there is neither."""
    found = Console()
    follows = found.is_terminal or os.environ.get("COLUMNS", "").isdecimal()
    return found if follows else Console(width=otherwise)
