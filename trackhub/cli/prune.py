# SPDX-License-Identifier: Apache-2.0
"""``trackhub prune``: remove from journals what the backends have.

`trackhub.delivery.journal.prune` does the work, for one journal at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from trackhub.cli.output import print_error, print_json, print_lines
from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.delivery.journal.prune import prune_journal
from trackhub.errors import ConfigError, JournalError

__all__ = ["prune"]

JSON_VERSION = 1
"""Version of the JSON document. New keys do not raise it. No key is removed, and none changes its meaning."""


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON; its keys are stable.")
def prune(path: Path, as_json: bool) -> None:
    """Remove records and files that all backends have, to free the disk.

    PATH is a journal, a job's run folder, or a folder of jobs.

    The records of a site are removed once every backend is done with all of them. Counts stay, so `status` and `replay`
    work as before. `export` and `report` no longer show the records, and no other backend can get them: export them
    first.

    Example: trackhub prune runs

    The JSON document is {"version": 1, "journals": [...], "errors": [...]}. A journal has path, removed (records by
    site), kept (why a site's records stay, by site) and freed_bytes, or path and error. errors names the folders below
    PATH that this user may not read.

    The exit status is 1 if a journal cannot be pruned, for example because its job still runs, or a folder not read.
    """
    journals, _, unreadable = find(path)
    if not journals:
        raise ConfigError(f"there is no journal at or under {path}, only a spool, which deletes its own files")
    done: list[dict[str, Any]] = []
    for journal in journals:
        try:
            result = prune_journal(journal)
        except JournalError as error:
            done.append({"path": str(journal), "error": str(error)})
            continue
        kept, removed = dict(sorted(result.kept.items())), dict(sorted(result.records.items()))
        done.append({"path": str(journal), "removed": removed, "kept": kept, "freed_bytes": result.freed_bytes})
        if not as_json:
            print_lines(*_lines(done[-1]))
    if as_json:
        print_json({"version": JSON_VERSION, "journals": done, "errors": [*map(str, unreadable)]})
    errors = [*(one["error"] for one in done if "error" in one), *map(str, unreadable)]
    for failed in errors:
        print_error(failed)
    if errors:
        sys.exit(1)


def _lines(pruned: dict[str, Any]) -> list[str]:
    """Return what a person reads of a journal that was pruned."""
    removed = ", ".join(f"{n:,} of {site}" for site, n in pruned["removed"].items()) or "nothing"
    head = f"{pruned['path']}: removed {removed}; {pruned['freed_bytes'] / 1e6:,.1f} MB are free"
    return [head, *(f"  {site} stays: {reason}" for site, reason in pruned["kept"].items())]
