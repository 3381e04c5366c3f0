"""How commands print: JSON for programs, tables for people."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

from subbyte.core.jsontext import to_json


def print_json(value: dict[str, Any]) -> None:
    """One object; figures that are not finite are null."""
    print(to_json(value))


def console(otherwise: int = 140) -> Console:
    """As wide as the terminal, or as COLUMNS says; `otherwise` columns where there is neither."""
    found = Console()
    follows = found.is_terminal or os.environ.get("COLUMNS", "").isdecimal()
    return found if follows else Console(width=otherwise)
