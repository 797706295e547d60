# SPDX-License-Identifier: Apache-2.0
"""Writes those parts of the pages that are made from code: the tables of backends, and the reference of the commands.

``make pages`` calls it, and ``tests/unit/test_docs.py`` compares the pages with what it would write. So a page is never
older than the code, and still reads as plain Markdown.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

DOCS = Path(__file__).resolve().parent
OWN_BACKENDS = ("tensorboard", "mlflow", "wandb", "jsonl")
_PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
_HELP_WIDTH = 100
_CONFIRMED_BY = {"write": "each write", "flush": "a flush that the store answers", "finish": "the end of the run"}


def capability_table() -> str:
    """Return what each backend can store, a column for each backend."""
    found = _own_backends()
    rows = [["", *found]]
    kinds = {kind for backend in found.values() for kind in backend["capabilities"]["kinds"]}
    every = [kind for kind in found["jsonl"]["capabilities"]["kinds"] if kind in kinds]
    rows += [[_plural(kind), *(_yes(kind in b["capabilities"]["kinds"]) for b in found.values())] for kind in every]
    for label, read in _capability_rows():
        rows.append([label, *(read(backend["capabilities"]) for backend in found.values())])
    return _table(rows)


def _capability_rows() -> Iterator[tuple[str, Callable[[Mapping[str, Any]], str]]]:
    yield "NaN and infinities", lambda can: _yes(can["nonfinite"])
    yield "steps that fall or repeat", lambda can: _yes(can["late_steps"])
    yield "metrics without a step", lambda can: "as they are" if can["optional_step"] else "get a counted step"
    yield "params that change", lambda can: "the last value" if can["changing_params"] else "keep the first value"
    yield "after a crash of the receiver", lambda can: _AFTER_A_CRASH[can["redelivery"]]
    yield "a record is confirmed by", lambda can: _CONFIRMED_BY[can["confirmed_by"]]


_AFTER_A_CRASH = {
    "resumable": "no record is stored twice",
    "idempotent": "no record is stored twice",
    "rebuild": "the run is written anew, no record twice",
    "may_duplicate": "records may be stored twice, and are counted",
}


def option_tables() -> str:
    """Return a table of the options of each backend that has some."""
    parts = []
    for name, backend in _own_backends().items():
        rows = [["option", "default", "meaning"]]
        for option, text in backend["option_help"].items():
            default = "must be given" if text["default"] is None else f"`{text['default']}`"
            marks = "".join(f" *({mark})*" for mark in backend["option_marks"][option])
            rows.append([f"`{option}`{marks}", default.replace("`not set`", "not set"), text["meaning"]])
        parts.append(f"### {name}\n\n{_table(rows) if len(rows) > 1 else 'It has no options.'}")
    return "\n".join(parts)


def command_reference() -> str:
    """Return the help of ``trackhub`` and of each of its commands."""
    from trackhub.cli import app

    group = app._trackhub
    context = click.Context(group, info_name="trackhub", terminal_width=_HELP_WIDTH, **group.context_settings)
    parts = [_help(group, context)]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        own = click.Context(command, info_name=name, parent=context, terminal_width=_HELP_WIDTH)
        parts.append(f"## trackhub {name}\n\n{_help(command, own)}")
    return "\n".join(parts)


def _help(command: click.Command, context: click.Context) -> str:
    fresh = copy.copy(command)
    fresh._help_option = None  # click keeps the first one: it lacks -h if a test ran the command without its group
    text = "\n".join(line.rstrip() for line in fresh.get_help(context).splitlines())
    return f"```text\n{text}\n```\n"


def _own_backends() -> dict[str, dict[str, Any]]:
    describe = importlib.import_module("trackhub.cli.backends").describe
    return {name: describe(name)[0] for name in OWN_BACKENDS}


def _table(rows: Iterable[Iterable[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _plural(kind: str) -> str:
    return {"summary": "final values", "text": "text"}.get(kind, kind if kind.endswith("s") else f"{kind}s")


PARTS: dict[str, Callable[[], str]] = {
    "capabilities": capability_table,
    "options": option_tables,
    "commands": command_reference,
}


def filled(text: str) -> str:
    """Return a page with its generated parts as the code has them now."""
    return _PART.sub(lambda part: f"{part[1]}\n{PARTS[part['name']]()}\n", text)


def pages() -> list[Path]:
    """Return the pages that have generated parts."""
    return [path for path in sorted(DOCS.glob("*.md")) if _PART.search(path.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        sys.stdout.write(f"{page.name}\n")
