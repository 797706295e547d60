# SPDX-License-Identifier: Apache-2.0
"""How commands print: tables for people, JSON for programs, errors in one line on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["print_error", "print_json", "print_lines", "print_table"]

PIPED_WIDTH = 200
"""Characters in a line when the output is not a terminal, so that ``| grep`` finds whole rows."""


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table. Cells are plain text; nothing in them is taken for markup."""
    from rich import box  # lazy: commands that print JSON, or a line, need none of it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    console.print(table)


def print_lines(*lines: str) -> None:
    """Print lines as they are."""
    for line in lines:
        sys.stdout.write(line + "\n")


def print_error(message: str) -> None:
    """Print what went wrong."""
    sys.stderr.write(f"trackhub: {message}\n")
