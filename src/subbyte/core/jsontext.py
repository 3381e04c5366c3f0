"""JSON for people's tools: it has no NaN, so a figure that is not finite is null."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(value: Any) -> str:
    """One line of JSON of dicts, lists, tuples and plain values."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
