# SPDX-License-Identifier: Apache-2.0
"""How the commands print: tables for people, JSON for programs, and errors in one line on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from trackhub.printable import printable, printable_lines

__all__ = ["print_error", "print_json", "print_lines", "print_table"]

PIPED_WIDTH = 200
"""Width of a table in characters when the output is not a terminal, so that ``| grep`` finds whole rows."""

_ANY_WIDTH = 10_000
_NOTHING = frozenset({"", "-", "0"})


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table under the heads of its columns. Cells are plain text: brackets in them are not markup.

    On a terminal that is too narrow for the words in the table, columns that say nothing are left out. If that is not
    enough, each row becomes a few lines, one for each cell.
    """
    from rich.console import Console  # here, since rich loads slowly, and commands that print JSON do not need it
    from rich.measure import Measurement

    cells = [[printable(cell) for cell in row] for row in rows]
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    telling = [n for n in range(len(columns)) if any(row[n] not in _NOTHING for row in cells)]
    for shown in (range(len(columns)), telling):
        table = _table([columns[n] for n in shown], [[row[n] for n in shown] for row in cells])
        if Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).minimum <= console.width:
            console.print(table)
            return
    print_lines("", *(line for row in cells for line in _block(columns, row)))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _block(columns: Sequence[str], row: Sequence[str]) -> list[str]:
    """Return a row of a table as lines, without the cells that say nothing."""
    shown = [(column, cell) for column, cell in zip(columns, row, strict=True) if cell not in _NOTHING]
    width = max((len(column) for column, _ in shown), default=0)
    return [*(f"  {column.ljust(width)}  {cell}" for column, cell in shown), ""]


def print_lines(*lines: str) -> None:
    """Print lines of text. Control characters for the terminal are escaped."""
    for line in lines:
        sys.stdout.write(printable_lines(line) + "\n")


def print_error(message: str) -> None:
    """Print an error on stderr."""
    sys.stderr.write(f"trackhub: {printable_lines(message)}\n")
