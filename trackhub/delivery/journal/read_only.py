# SPDX-License-Identifier: Apache-2.0
"""Reads a journal without changing it, while its receiver runs or long after.

``trackhub status`` and ``trackhub replay`` look into a journal this way. Only its receiver writes to it, through
`trackhub.delivery.journal.journal`.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from trackhub.delivery.journal.swap import check_file_types, current_file
from trackhub.delivery.journal.tables_and_rows import EXPECTED_SITES
from trackhub.errors import JournalError

__all__ = ["has_last_counts", "is_known_site", "open_read_only", "read_journal_meta", "read_stream_positions"]


@contextmanager
def open_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a journal for reading, and close it at the end of the ``with`` block.

    Raises:
        JournalError: it is not a journal, or cannot be read. SQLite's errors within the block also become a
            JournalError.
    """
    try:
        file = current_file(path)
        check_file_types(file)
        db = sqlite3.connect(f"{file.absolute().as_uri()}?{_mode(file)}", uri=True, timeout=10.0)
        try:
            yield db
        finally:
            db.close()
    except (sqlite3.Error, UnicodeDecodeError) as e:
        # A subclass of DatabaseError means an error that may pass, such as a locked file.
        damaged = type(e) is sqlite3.DatabaseError or isinstance(e, UnicodeDecodeError)
        what_next = "; `trackhub replay` delivers what can still be read of it" if damaged else ""
        raise JournalError(f"cannot read the journal {path}: {e}{what_next}") from e


def _mode(path: Path) -> str:
    """Return the parameters with which SQLite neither changes the journal nor makes files beside it."""
    try:
        with path.open("rb") as file:
            write_ahead = file.read(20)[18:] == b"\x02\x02"  # https://www.sqlite.org/fileformat.html, 1.3.3
    except OSError:
        write_ahead = False
    # A closed journal has no log beside it. Without "immutable" SQLite would make a log and an index there, and fail
    # in a folder that it cannot write to.
    closed = write_ahead and not os.path.exists(f"{path}-wal")
    return "mode=ro&immutable=1" if closed else "mode=ro"


def read_journal_meta(path: Path) -> dict[str, str]:
    """Return the facts about a job that its journal has, such as ``job``, ``side``, ``status`` and ``backends``.

    ``status`` is empty until the receiver knows how the job ends.

    Raises:
        JournalError: it is not a journal, or cannot be read.
    """
    with open_read_only(path) as db:
        return dict(db.execute("SELECT key, value FROM meta"))


def has_last_counts(path: Path, site: str) -> bool:
    """Return whether a journal has the counts that a site sent with its final message.

    Raises:
        JournalError: it is not a journal, or cannot be read.
    """
    with open_read_only(path) as db:
        return db.execute("SELECT 1 FROM sites WHERE name = ? AND last", (site,)).fetchone() is not None


def is_known_site(path: Path, site: str) -> bool:
    """Return whether a journal knows a site: it sent something, or it was expected to.

    Raises:
        JournalError: it is not a journal, or cannot be read.
    """
    with open_read_only(path) as db:
        if db.execute("SELECT 1 FROM sites WHERE name = ?", (site,)).fetchone() is not None:
            return True
        row = db.execute("SELECT value FROM meta WHERE key = ?", (EXPECTED_SITES,)).fetchone()
    return row is not None and site in msgspec.json.decode(row[0], type=list[str])


def read_stream_positions(path: Path, site: str) -> dict[str, int]:
    """Return stream -> ``seq`` of the next record that a journal expects, for the streams of a site.

    Raises:
        JournalError: it is not a journal, or cannot be read.
    """
    query = "SELECT streams.name, next_seq FROM streams JOIN sites ON sites.id = streams.site WHERE sites.name = ?"
    with open_read_only(path) as db:
        return dict(db.execute(query, (site,)))
