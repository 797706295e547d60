# SPDX-License-Identifier: Apache-2.0
"""Make a usable journal of a damaged one: all that can still be read, and a place for each range that cannot.

A lost range stays in the journal as a row without frames, so that positions, by which backends recognise records, stay
what they were, and every lane counts what it can no longer deliver as ``damaged``.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trackhub.delivery.journal.store import SCHEMA
from trackhub.errors import JournalError

__all__ = ["repair"]

_SMALL_TABLES = ("meta", "sites", "streams", "runs")
_log = logging.getLogger(__name__)


class _Row(NamedTuple):
    id: int
    site: int
    stream: int
    first_position: int
    records: int
    frames: bytes


class _Lost(NamedTuple):
    """Positions of a site that no readable row has, and the rows between which they were."""

    site: int
    first_position: int
    records: int
    after: int
    before: int


def repair(path: Path) -> bool:
    """Replace a journal that SQLite finds damaged by what can be read of it. Return whether that was needed.

    The damaged file is kept beside it as ``trackhub.db.damaged``. Reads all of the journal once.

    Raises:
        JournalError: it is in use by another process, or nothing in it can be read.
    """
    try:
        lock_fd = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as e:
        raise JournalError(f"cannot open the journal {path}: {e}; its folder must be writable") from e
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(lock_fd)
        raise JournalError(f"the journal {path} is in use by another process (a running job, or a replay)") from e
    try:
        if _is_sound(path):
            return False
        _rebuild(path)
        return True
    except (sqlite3.Error, OSError) as e:
        raise JournalError(f"the journal {path} is damaged, and nothing in it can be read: {e}") from e
    finally:
        os.close(lock_fd)


def _is_sound(path: Path) -> bool:
    db = sqlite3.connect(path, timeout=10.0)
    try:
        return bool(db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except sqlite3.DatabaseError:
        return False
    finally:
        db.close()


def _rebuild(path: Path) -> None:
    partial = path.with_name(f"{path.name}.new")
    partial.unlink(missing_ok=True)
    old, new = sqlite3.connect(path, timeout=10.0), sqlite3.connect(partial, isolation_level=None)
    try:
        # What it allows here is to read a file that is shorter than its header says.
        old.execute("PRAGMA writable_schema=ON")
        new.executescript(SCHEMA)
        new.execute("BEGIN")
        for table in _SMALL_TABLES:
            for row in old.execute(f"SELECT * FROM {table}"):
                new.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        sites: dict[int, tuple[str, int, int]] = {
            i: (name, first, after)
            for i, name, first, after in new.execute("SELECT id, name, first_position, next_position FROM sites")
        }
        readable: list[_Row] = []
        insert = "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)"
        for row in _rows(old, sum(after - first for _, first, after in sites.values())):
            new.execute(insert, row)
            readable.append(row._replace(frames=b""))
        for lost, i in _placed(_lost(sites, readable), {row.id for row in readable}):
            stream = new.execute("SELECT min(id) FROM streams WHERE site = ?", (lost.site,)).fetchone()[0]
            new.execute(insert, (i, lost.site, stream, lost.first_position, lost.records, b""))
            _log.warning(
                "%s: records %d to %d of site %s cannot be read (after row %d); they are counted as damaged",
                path, lost.first_position, lost.first_position + lost.records - 1, sites[lost.site][0], lost.after,
            )  # fmt: skip
        new.execute("COMMIT")
    finally:
        old.close()
        new.close()
    damaged = path.with_name(f"{path.name}.damaged")
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.replace(damaged)
    partial.replace(path)
    _log.warning("%s was damaged; what could be read is in its place, the damaged file is kept as %s", path, damaged)


def _rows(db: sqlite3.Connection, most: int) -> Iterator[_Row]:
    """Yield the rows that can be read. There are at most ``most``, since every row has a record."""
    i = 0
    while i < most:
        i += 1
        try:
            row: tuple[Any, ...] | None = db.execute(
                "SELECT id, site, stream, first_position, records, frames FROM batches WHERE id = ?", (i,)
            ).fetchone()
        except sqlite3.DatabaseError:
            continue
        if row is not None:
            yield _Row(*row)


def _lost(sites: dict[int, tuple[str, int, int]], readable: list[_Row]) -> Iterator[_Lost]:
    for site, (_, position, end) in sites.items():
        last = 0
        for row in (row for row in readable if row.site == site):
            if row.first_position > position:
                yield _Lost(site, position, row.first_position - position, last, row.id)
            position, last = row.first_position + row.records, row.id
        if position < end:
            yield _Lost(site, position, end - position, last, 1 << 62)


def _placed(ranges: Iterator[_Lost], taken: set[int]) -> Iterator[tuple[_Lost, int]]:
    """Give each range the number of a row that was lost between its neighbours."""
    for lost in sorted(ranges, key=lambda lost: (lost.before, lost.after)):
        i = lost.after + 1
        while i in taken:
            i += 1
        taken.add(i)
        yield lost, i
