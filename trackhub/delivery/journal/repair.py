# SPDX-License-Identifier: Apache-2.0
"""Rebuilds a journal if it is damaged. ``trackhub replay`` calls it before it opens a journal.

`rebuild` makes the new journal. `swap` puts it in the place of the damaged journal, which stays beside it.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import msgspec

from trackhub.delivery.journal.lock import lock_journal
from trackhub.delivery.journal.rebuild import rebuild
from trackhub.delivery.journal.swap import finish_swap, is_journal_left, partial_file, swap
from trackhub.delivery.journal.tables_and_rows import JSON_FACTS, Progress
from trackhub.delivery.wire import SiteCounts
from trackhub.errors import JournalError

__all__ = ["repair"]

_BUSY_S = 10.0
_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)
_CONTRADICTIONS = (
    "SELECT 1 FROM batches WHERE typeof(site) || typeof(stream) || typeof(first_position) || typeof(records) ||"
    " typeof(frames) != 'integerintegerintegerintegerblob' LIMIT 1",
    "SELECT 1 FROM sites LEFT JOIN"
    " (SELECT site, sum(records) AS records, max(first_position + records) AS next FROM batches GROUP BY site)"
    " ON site = id WHERE next_position - first_position != received - duplicates OR"
    " next_position - first_position != ifnull(records, 0) OR next_position != ifnull(next, first_position) LIMIT 1",
    "SELECT 1 FROM batches LEFT JOIN streams ON streams.id = stream WHERE streams.site IS NOT batches.site LIMIT 1",
)
"""Each query returns a row if two values contradict each other. So it finds changed bits in numbers that no index
has."""

_log = logging.getLogger(__name__)


def repair(path: Path) -> bool:
    """Rebuild a journal if it is damaged, and return whether it was. Reads the whole journal once.

    It may be killed at any moment, and called again. The damaged file stays beside the new one, as
    ``trackhub.db.damaged``.

    Raises:
        JournalError: there is no journal, another process uses it, nothing in it can be read, or the repaired one
            cannot be written.
    """
    if not is_journal_left(path):
        raise JournalError(f"there is no journal {path}")
    lock = lock_journal(path)
    try:
        finish_swap(path)
        if _is_sound(path):
            return False
        try:
            rebuild(path, partial_file(path), runs_are_whole=_can_read_runs(path))
        except BaseException:
            partial_file(path).unlink(missing_ok=True)
            raise
        damaged = swap(path)
        _log.warning("%s was damaged. It now holds what could be read. The damaged file is kept as %s", path, damaged)
        return True
    except (sqlite3.Error, OSError) as e:
        raise JournalError(
            f"the journal {path} is damaged, and the repaired one cannot be written beside it: {e}; make the folder "
            "writable, and free as much space as the damaged journal takes"
        ) from e
    finally:
        lock.release()


def _is_sound(path: Path) -> bool:
    """Return whether SQLite finds no damage, and trackhub can decode what is in the small tables.

    Raises:
        JournalError: this cannot be checked now, for example because another program has the file locked.
    """
    try:
        db = _open(path)
        try:
            # This check also compares the tables with their indexes. So it finds a changed bit in a sound page.
            if db.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
                return False
            return _is_understood(db) and not any(db.execute(query).fetchone() for query in _CONTRADICTIONS)
        finally:
            db.close()
    except (sqlite3.DatabaseError, UnicodeDecodeError) as e:  # SQLite's own message may hold damaged text
        if getattr(e, "sqlite_errorcode", 0) & 0xFF in _PASSING:  # an error of Python's own module has no code
            raise JournalError(f"cannot check the journal {path}: {e}") from e
        return False


def _is_understood(db: sqlite3.Connection) -> bool:
    try:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        for key in JSON_FACTS.keys() & meta.keys():
            msgspec.json.decode(meta[key], type=JSON_FACTS[key])
        for counts, explained in db.execute("SELECT counts, explained FROM sites"):
            msgspec.msgpack.decode(counts or msgspec.msgpack.encode(SiteCounts()), type=SiteCounts)
            msgspec.msgpack.decode(explained or b"\x80", type=dict[str, int])
        for (progress,) in db.execute("SELECT progress FROM runs"):
            msgspec.msgpack.decode(progress, type=Progress)
    except msgspec.DecodeError:
        return False
    return "job" in meta and "side" in meta


def _can_read_runs(path: Path) -> bool:
    try:
        db = _open(path)
        try:
            db.execute("SELECT total(length(progress)) FROM runs").fetchone()
        finally:
            db.close()
    except (sqlite3.Error, UnicodeDecodeError):
        return False
    return True


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)
