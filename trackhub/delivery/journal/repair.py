# SPDX-License-Identifier: Apache-2.0
"""Rebuilds a damaged journal from what can still be read of it. ``trackhub replay`` calls it before it opens a journal.

A range of records that cannot be read becomes a placeholder row without frames. So all other records keep their
positions, by which backends recognise them, and every lane counts the lost records as ``damaged``.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trackhub.delivery.journal.lock import lock_journal
from trackhub.delivery.journal.rows import SCHEMA
from trackhub.errors import JournalError

__all__ = ["repair"]

_SMALL_TABLES = ("meta", "sites", "streams", "runs")
_INSERT = "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)"
_BUSY_S = 10.0
_AFTER_ALL = 1 << 62
_log = logging.getLogger(__name__)


class _Site(NamedTuple):
    name: str
    first_position: int
    next_position: int


class _Batch(NamedTuple):
    """A row of the table ``batches``."""

    id: int
    site: int
    stream: int
    first_position: int
    records: int
    frames: bytes


class _Lost(NamedTuple):
    """Positions of a site that no readable row has, and the ids of the rows between which they were."""

    site: int
    first_position: int
    records: int
    after: int
    before: int


def repair(path: Path) -> bool:
    """Rebuild a journal that SQLite finds damaged, and return whether that was needed. Reads all of it once.

    The damaged file stays beside the new one, as ``trackhub.db.damaged``.

    Raises:
        JournalError: another process uses the journal, or nothing in it can be read.
    """
    lock = lock_journal(path)
    try:
        if _is_sound(path):
            return False
        _rebuild(path)
        return True
    except (sqlite3.Error, OSError) as e:
        raise JournalError(f"the journal {path} is damaged, and nothing in it can be read: {e}") from e
    finally:
        lock.release()


def _is_sound(path: Path) -> bool:
    db = sqlite3.connect(path, timeout=_BUSY_S)
    try:
        return bool(db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except sqlite3.DatabaseError:
        return False
    finally:
        db.close()


def _rebuild(path: Path) -> None:
    partial = path.with_name(f"{path.name}.new")
    partial.unlink(missing_ok=True)
    old, new = sqlite3.connect(path, timeout=_BUSY_S), sqlite3.connect(partial, isolation_level=None)
    try:
        # Without this, SQLite reads nothing of a file that is shorter than its header says.
        old.execute("PRAGMA writable_schema=ON")
        new.executescript(SCHEMA)
        new.execute("BEGIN")
        _copy(old, new, path)
        new.execute("COMMIT")
    finally:
        old.close()
        new.close()
    damaged = path.with_name(f"{path.name}.damaged")
    # What they held was read with the damaged file. Left beside the new one, SQLite would apply them to it.
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.replace(damaged)
    partial.replace(path)
    _log.warning("%s was damaged; what could be read is in its place, the damaged file is kept as %s", path, damaged)


def _copy(old: sqlite3.Connection, new: sqlite3.Connection, path: Path) -> None:
    """Copy the readable rows, and put placeholder rows where others were."""
    for table in _SMALL_TABLES:
        for row in old.execute(f"SELECT * FROM {table}"):
            new.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
    query = "SELECT id, name, first_position, next_position FROM sites"
    sites = {i: _Site(*fields) for i, *fields in new.execute(query)}
    readable: list[_Batch] = []
    for batch in _readable(old, sum(site.next_position - site.first_position for site in sites.values())):
        new.execute(_INSERT, batch)
        readable.append(batch._replace(frames=b""))
    for lost, i in _with_ids(_lost(sites, readable), {batch.id for batch in readable}):
        stream = new.execute("SELECT min(id) FROM streams WHERE site = ?", (lost.site,)).fetchone()[0]
        new.execute(_INSERT, _Batch(i, lost.site, stream, lost.first_position, lost.records, b""))
        _log.warning(
            "%s: records %d to %d of site %s cannot be read (after row %d); they are counted as damaged",
            path, lost.first_position, lost.first_position + lost.records - 1, sites[lost.site].name, lost.after,
        )  # fmt: skip


def _readable(db: sqlite3.Connection, most: int) -> Iterator[_Batch]:
    """Yield the rows that can be read. There are at most ``most``, since every row has at least one record."""
    for i in range(1, most + 1):
        try:
            row: tuple[Any, ...] | None = db.execute(
                "SELECT id, site, stream, first_position, records, frames FROM batches WHERE id = ?", (i,)
            ).fetchone()
        except sqlite3.DatabaseError:
            continue
        if row is not None:
            yield _Batch(*row)


def _lost(sites: dict[int, _Site], readable: list[_Batch]) -> Iterator[_Lost]:
    """Yield the ranges of positions that no readable row has."""
    for i, site in sites.items():
        position, last = site.first_position, 0
        for batch in (batch for batch in readable if batch.site == i):
            if batch.first_position > position:
                yield _Lost(i, position, batch.first_position - position, last, batch.id)
            position, last = batch.first_position + batch.records, batch.id
        if position < site.next_position:
            yield _Lost(i, position, site.next_position - position, last, _AFTER_ALL)


def _with_ids(ranges: Iterator[_Lost], taken: set[int]) -> Iterator[tuple[_Lost, int]]:
    """Give each lost range the id of a row that was lost between its neighbours, so that rows stay in order."""
    for lost in sorted(ranges, key=lambda lost: (lost.before, lost.after)):
        i = lost.after + 1
        while i in taken:
            i += 1
        taken.add(i)
        yield lost, i
