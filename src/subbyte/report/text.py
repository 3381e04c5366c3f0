"""Tables as lines of text of a given width, in which names are whole."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

GAP = "  "
_INDENT = 4  # of figures under their name


def plain(name: str) -> str:
    """A name from a file, without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def natural_width(head: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Cells that the table takes with each row on one line."""
    widths = _widths([head, *rows])
    return sum(widths) + len(GAP) * (len(widths) - 1)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The head, a rule and the rows; names at the left, figures at the right.

    The first cell of a row is its name. Names that leave no room stand on a line of their own, with
    their figures below.
    """
    if natural_width(head, rows) <= width:
        widths = _widths([head, *rows])
        lines = [_line(cells, widths) for cells in (head, *rows)]
    else:
        widths = [_INDENT - len(GAP), *_widths([head[1:], *(row[1:] for row in rows)])]
        pairs = [(shortened(n, width), _line(("", *f), widths)) for n, *f in (head, *rows)]
        lines = [line for pair in pairs for line in pair]
    rule = "-" * min(width, max(map(cell_len, lines)))
    n_head = len(lines) // (len(rows) + 1)
    return [*lines[:n_head], rule, *lines[n_head:]]


def under_names(head: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Cells that the table takes with names on lines of their own."""
    return _INDENT + natural_width(head[1:], [row[1:] for row in rows])


def shortened(name: str, width: int) -> str:
    """A name that is wider than a whole line, without its middle."""
    if cell_len(name) <= width:
        return name
    left = (width - 3) // 2
    right = width - 3 - left
    tail = name[-right:]
    while cell_len(tail) > right:
        tail = tail[1:]
    return f"{set_cell_size(name, left)}...{tail}"


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many cells, broken between words; a longer word is cut in pieces."""
    return textwrap.wrap(text, width, break_on_hyphens=False, subsequent_indent="  ") or [""]


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(cell_len, cells)) for cells in zip(*rows, strict=True)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name = cells[0] + " " * (widths[0] - cell_len(cells[0]))
    figures = (" " * (w - cell_len(c)) + c for c, w in zip(cells[1:], widths[1:], strict=True))
    return GAP.join((name, *figures)).rstrip()
