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


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table under the heads of its columns. Cells are plain text: brackets in them are not markup."""
    from rich import box  # here, since rich loads slowly, and commands that print JSON or a line do not need it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    console.print(table)


def print_lines(*lines: str) -> None:
    """Print lines of text. What a terminal would obey is escaped."""
    for line in lines:
        sys.stdout.write(printable_lines(line) + "\n")


def print_error(message: str) -> None:
    """Print an error on stderr."""
    sys.stderr.write(f"trackhub: {printable_lines(message)}\n")
