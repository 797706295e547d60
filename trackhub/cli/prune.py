# SPDX-License-Identifier: Apache-2.0
"""``trackhub prune``: remove from journals what the backends have.

`trackhub.delivery.journal.prune` does the work, for one journal at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from trackhub.cli.output import print_error, print_lines
from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.delivery.journal.prune import prune_journal
from trackhub.errors import ConfigError, JournalError

__all__ = ["prune"]


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def prune(path: Path) -> None:
    """Remove records and files that all backends have, to free the disk.

    PATH is a journal, a job's run folder, or a folder of jobs.

    The records of a site go once every backend is done with all of them. Counts stay, so `status` and `replay` work as
    before. `export` and `report` no longer show the records, and no other backend can get them: export them first.

    Example: trackhub prune runs

    The exit status is 1 if a journal cannot be pruned, for example because its job still runs.
    """
    journals = find(path).journals
    if not journals:
        raise ConfigError(f"there is no journal at or under {path}, only a spool, which deletes its own files")
    errors = []
    for journal in journals:
        try:
            result = prune_journal(journal)
        except JournalError as error:
            errors.append(error)
            continue
        removed = ", ".join(f"{n:,} of {site}" for site, n in sorted(result.records.items())) or "nothing"
        print_lines(f"{journal}: removed {removed}; {result.freed_bytes / 1e6:,.1f} MB are free")
        print_lines(*(f"  {site} stays: {reason}" for site, reason in sorted(result.kept.items())))
    for failed in errors:
        print_error(str(failed))
    if errors:
        sys.exit(1)
