# SPDX-License-Identifier: Apache-2.0
"""The receiver's journal: the job's complete local record, in one SQLite file.

A row is a batch, stored as it arrived. One transaction stores the batch and the stream's next ``seq``, so that a batch
sent again after a lost acknowledgement is recognised. Lanes read the rows and store here how far each run got.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from trackhub.delivery.journal.counts import Progress, build_report
from trackhub.delivery.journal.rows import Row
from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.wire import Batch, SiteLedger
from trackhub.errors import JournalError
from trackhub.framing import decode_body, decode_head, scan_frames
from trackhub.records import Gap, Kind

__all__ = ["JOURNAL_NAME", "SCHEMA", "Journal", "Progress", "Row", "RunState"]

JOURNAL_NAME = "trackhub.db"
_FORMAT = "1"
_BYE_FAILED = 2
_CONTINUES = "continues"
_log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sites (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, created REAL NOT NULL,
    first_position INTEGER NOT NULL, next_position INTEGER NOT NULL, received INTEGER NOT NULL DEFAULT 0,
    duplicates INTEGER NOT NULL DEFAULT 0, missing INTEGER NOT NULL DEFAULT 0,
    explained BLOB, ledger BLOB, bye INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS streams (
    id INTEGER PRIMARY KEY, site INTEGER NOT NULL, name TEXT NOT NULL, next_seq INTEGER NOT NULL,
    UNIQUE (site, name));
CREATE TABLE IF NOT EXISTS batches (
    id INTEGER PRIMARY KEY, site INTEGER NOT NULL, stream INTEGER NOT NULL,
    first_position INTEGER NOT NULL, records INTEGER NOT NULL, frames BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS batches_of_site ON batches (site, id);
CREATE TABLE IF NOT EXISTS runs (
    lane TEXT NOT NULL, site INTEGER NOT NULL, written INTEGER NOT NULL DEFAULT 0,
    confirmed INTEGER NOT NULL DEFAULT 0, progress BLOB NOT NULL, PRIMARY KEY (lane, site)) WITHOUT ROWID;
"""


class RunState(NamedTuple):
    """A run's two cursors (ids of batches) and its progress."""

    written: int
    confirmed: int
    progress: Progress


class Journal:
    """One receiver's journal. Thread-safe; one process at a time may have it open for writing.

    Writing blocks for one SQLite transaction: measured 0.1 ms with ``durability="normal"``.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock_fd: int, *, readers_block: bool) -> None:
        """Use ``Journal.open``."""
        self.path = path
        self._db = connection
        self._lock = threading.RLock()
        self._lock_fd = lock_fd
        self._readers_block = readers_block
        self._readers = threading.local()
        self._open_readers: list[sqlite3.Connection] = []

    @classmethod
    def open(cls, path: Path, *, job: str, side: str, durability: str = "normal") -> Journal:
        """Open or create a journal for writing.

        Args:
            durability: ``normal`` survives a killed process, ``full`` also a power loss (an fsync for each batch).

        Raises:
            JournalError: it cannot be opened, is in use by another process, or belongs to another job or side.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock_fd = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise JournalError(f"cannot create the journal {path}: {e}; check the folder and the free space") from e
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(lock_fd)
            raise JournalError(f"the journal {path} is in use by another process (a running job, or a replay)") from e
        db: sqlite3.Connection | None = None
        try:
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
            mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                _log.warning("%s: this file system has no write-ahead log; SQLite uses %r, which is slower", path, mode)
            db.execute(f"PRAGMA synchronous={'FULL' if durability == 'full' or mode != 'wal' else 'NORMAL'}")
            db.executescript(SCHEMA)
            journal = cls(path, db, lock_fd, readers_block=mode != "wal")
            journal._claim({"format": _FORMAT, "job": job, "side": side})
        except sqlite3.Error as e:
            _close(db, lock_fd)
            raise JournalError(f"cannot use the journal {path}: {e}") from e
        except JournalError:
            _close(db, lock_fd)
            raise
        return journal

    def _claim(self, expected: dict[str, str]) -> None:
        with self._transaction() as db:
            found = dict(db.execute("SELECT key, value FROM meta"))
            for key, value in expected.items():
                if found.get(key, value) != value:
                    raise JournalError(f"the journal {self.path} has {key} {found[key]!r}, expected {value!r}")
            db.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", expected.items())

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._check_open()
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as e:
                if self._db.in_transaction:
                    with suppress(sqlite3.Error):  # of a disk that is gone; the first error says more
                        self._db.execute("ROLLBACK")
                if isinstance(e, sqlite3.Error):
                    raise JournalError(f"cannot write the journal {self.path}: {e}") from e
                raise

    def add_site(self, site: str, created: float, first_position: int = 0) -> int:
        """Return the id of this site, registering it if it is new; ``created`` is then its run's start time.

        Args:
            first_position: the position of its first record, where another journal holds what comes before.
        """
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO sites (name, created, first_position, next_position) VALUES (?, ?, ?, ?)",
                (site, created, first_position, first_position),
            )
            row = db.execute("SELECT id FROM sites WHERE name = ?", (site,)).fetchone()
            return int(row[0])

    def continue_site(self, site: str, created: float, first_position: int) -> int:
        """Return the id of a site of which another journal holds what comes before ``first_position``."""
        self.set_meta(_CONTINUES, "another journal")
        return self.add_site(site, created, first_position)

    def _continues(self) -> bool:
        # Not to be told from a position: the other journal may hold a batch whose reply was lost, and that reply alone.
        return bool(self._fetch("SELECT 1 FROM meta WHERE key = ?", _CONTINUES))

    def append(self, site: int, batch: Batch, explained: Mapping[str, int]) -> int:
        """Store a batch and return how many of its records are new. It is durable when this returns.

        Args:
            explained: the records that the batch's gaps stand for, by reason.

        Raises:
            JournalError: it cannot be written, for example since the disk is full; nothing was stored.
        """
        with self._transaction() as db:
            # A stream may begin late only where another journal holds its beginning.
            db.execute(
                "INSERT OR IGNORE INTO streams (site, name, next_seq) VALUES (?, ?, ?)",
                (site, batch.stream, batch.first_seq if self._continues() else 0),
            )
            query = "SELECT id, next_seq FROM streams WHERE site = ? AND name = ?"
            stream, known = db.execute(query, (site, batch.stream)).fetchone()
            new, frames = batch.records, batch.frames
            if batch.next_seq <= known:
                new = 0
            elif batch.first_seq < known:
                new, frames, explained = _after(frames, known)
            if batch.next_seq > known:
                db.execute("UPDATE streams SET next_seq = ? WHERE id = ?", (batch.next_seq, stream))
                if explained:
                    self._explain(db, site, explained)
            if new:
                db.execute(
                    "INSERT INTO batches (site, stream, first_position, records, frames)"
                    " SELECT id, ?, next_position, ?, ? FROM sites WHERE id = ?",
                    (stream, new, frames, site),
                )
            db.execute(
                "UPDATE sites SET received = received + ?, duplicates = duplicates + ?, missing = missing + ?,"
                " next_position = next_position + ? WHERE id = ?",
                (batch.records, batch.records - new, max(0, batch.first_seq - known), new, site),
            )
            return new

    def _explain(self, db: sqlite3.Connection, site: int, gaps: Mapping[str, int]) -> None:
        stored = db.execute("SELECT explained FROM sites WHERE id = ?", (site,)).fetchone()[0]
        total = Counter(msgspec.msgpack.decode(stored, type=dict[str, int]) if stored else {})
        total.update(gaps)
        db.execute("UPDATE sites SET explained = ? WHERE id = ?", (msgspec.msgpack.encode(dict(total)), site))

    def note_site(self, site: int, ledger: SiteLedger, *, bye: bool, failed: bool = False) -> None:
        """Store a site's own count, whether it has finished, and whether its training ended with an error.

        A report that was long on its way may arrive after the good-bye. It changes nothing then: the site's last count
        would be an old one for good.
        """
        with self._transaction() as db:
            said_bye, known = db.execute("SELECT bye, ledger FROM sites WHERE id = ?", (site,)).fetchone()
            if said_bye and not bye and known is not None:
                last = msgspec.msgpack.decode(known, type=SiteLedger)
                if (ledger.logged, -ledger.spooled) < (last.logged, -last.spooled):
                    return
            db.execute(
                "UPDATE sites SET ledger = ?, bye = max(bye, ?) WHERE id = ?",
                (msgspec.msgpack.encode(ledger), _BYE_FAILED if bye and failed else int(bye), site),
            )

    def byes(self) -> dict[str, bool]:
        """Return the sites that have finished, and whether their training ended with an error."""
        rows = self._fetch("SELECT name, bye FROM sites WHERE bye > 0")
        return {name: bye == _BYE_FAILED for name, bye in rows}

    def set_meta(self, key: str, value: str) -> None:
        """Store a fact about the job: ``status``, how it ended; ``backends``, their names and options as JSON."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def meta(self) -> dict[str, str]:
        """Return the facts about the job that are stored here."""
        return dict(self._fetch("SELECT key, value FROM meta"))

    def _fetch(self, query: str, *values: object) -> list[Any]:
        try:
            with self._reading() as db:
                return db.execute(query, values).fetchall()
        except sqlite3.Error as e:
            raise JournalError(f"cannot read the journal {self.path}: {e}") from e

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection to read with: this thread's own, since readers do not wait for the writer under WAL.

        Without WAL, readers shut the writer out, and a site would starve: all share the writer's connection in turn.
        """
        if self._readers_block:
            with self._lock:
                self._check_open()
                yield self._db
        else:
            yield self._reader()

    def _reader(self) -> sqlite3.Connection:
        db: sqlite3.Connection | None = getattr(self._readers, "db", None)
        if db is None:
            with self._lock:
                # A lane that hung beyond the end would make new files, in a folder that FLARE is archiving.
                self._check_open()
                db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10.0)
                self._open_readers.append(db)
            db.execute("PRAGMA query_only=1")
            self._readers.db = db
        return db

    def _check_open(self) -> None:
        if self._lock_fd < 0:
            raise JournalError(f"the journal {self.path} is closed")

    def sites(self) -> dict[int, tuple[str, float]]:
        """Return name and run start time of each site, by id. This and the following raise JournalError, too."""
        return {i: (name, created) for i, name, created in self._fetch("SELECT id, name, created FROM sites")}

    def site(self, site: int) -> tuple[str, float]:
        """Return one site's name and run start time; what asks about each site must not read all of them each time."""
        ((name, created),) = self._fetch("SELECT name, created FROM sites WHERE id = ?", site)
        return name, created

    def read(self, site: int, after: int, max_bytes: int) -> list[Row]:
        """Return this site's rows after the row ``after``, at least one if there is one, up to ``max_bytes``.

        Raises:
            JournalError: the file cannot be read.
        """
        rows, size = [], 0
        try:
            with self._reading() as db:
                cursor = db.execute(
                    "SELECT b.id, s.name, b.first_position, b.records, b.frames FROM batches b JOIN streams s"
                    " ON s.id = b.stream WHERE b.site = ? AND b.id > ? ORDER BY b.id",
                    (site, after),
                )
                for fields in cursor:
                    row = Row(*fields)
                    rows.append(row)
                    size += len(row.frames)
                    if size >= max_bytes:
                        break
                cursor.close()
        except sqlite3.Error as e:
            raise JournalError(f"cannot read the journal {self.path}: {e}") from e
        return rows

    def records_between(self, site: int, after: int, upto: int) -> int:
        """Return the number of records in this site's rows after ``after`` up to ``upto``."""
        query = "SELECT total(records) FROM batches WHERE site = ? AND id > ? AND id <= ?"
        return int(self._fetch(query, site, after, upto)[0][0])

    def position_after(self, site: int, row: int) -> int:
        """Return the position after the last record of this row; of the site's first record for a row before all."""
        query = "SELECT first_position + records FROM batches WHERE site = ? AND id <= ? ORDER BY id DESC LIMIT 1"
        found = self._fetch(query, site, row) or self._fetch("SELECT first_position FROM sites WHERE id = ?", site)
        return int(found[0][0])

    def overlap(self, site: int) -> int:
        """Return how many of this site's first records another journal may hold as well; 0 if this is its only one.

        The site's last batch is sent anew to this journal if the reply of the other one's receiver was lost.
        """
        if not self._continues():
            return 0
        found = self._fetch("SELECT records FROM batches WHERE site = ? ORDER BY id LIMIT 1", site)
        return int(found[0][0]) if found else 0

    def has_rows_after(self, site: int, after: int) -> bool:
        """Return whether this site has a row after ``after``."""
        query = "SELECT EXISTS (SELECT 1 FROM batches WHERE site = ? AND id > ?)"
        return bool(self._fetch(query, site, after)[0][0])

    def run_state(self, lane: str, site: int) -> RunState:
        """Return how far a lane got with a site's run."""
        query = "SELECT written, confirmed, progress FROM runs WHERE lane = ? AND site = ?"
        for written, confirmed, progress in self._fetch(query, lane, site):
            return RunState(written, confirmed, msgspec.msgpack.decode(progress, type=Progress))
        return RunState(0, 0, Progress())

    def save_run(self, lane: str, site: int, written: int, confirmed: int, progress: Progress) -> None:
        """Store how far a lane got with a site's run.

        Raises:
            JournalError: it cannot be written; after a crash the lane then starts from an earlier place.
        """
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?)",
                (lane, site, written, confirmed, msgspec.msgpack.encode(progress)),
            )

    def rewind(self, lane: str) -> None:
        """Set a lane's confirmed cursors back to the start; what it had written stays known."""
        empty = msgspec.msgpack.encode(Progress())
        with self._transaction() as db:
            db.execute("UPDATE runs SET confirmed = 0, progress = ? WHERE lane = ?", (empty, lane))

    def report(self, lanes: list[str] | None = None) -> DeliveryReport:
        """Return what became of every record so far.

        Args:
            lanes: lanes to include even if nothing was delivered by them yet.

        Raises:
            JournalError: the file cannot be read.
        """
        try:
            with self._reading() as db:
                return build_report(db, lanes or [])
        except sqlite3.Error as e:
            raise JournalError(f"cannot read the journal {self.path}: {e}") from e

    def close(self) -> None:
        """Write everything into the one file and close it, since FLARE archives the folder next. Idempotent."""
        with self._lock:
            if self._lock_fd < 0:
                return
            for reader in self._open_readers:
                reader.close()
            try:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as e:
                _log.warning("%s: its write-ahead log could not be folded in (%s): keep the -wal file", self.path, e)
            _close(self._db, self._lock_fd)
            self._lock_fd = -1


def _close(db: sqlite3.Connection | None, lock_fd: int) -> None:
    if db is not None:
        db.close()
    fcntl.flock(lock_fd, fcntl.LOCK_UN)  # closing alone does not unlock while a forked child has the file open
    os.close(lock_fd)


def _after(frames: bytes, known: int) -> tuple[int, bytes, Counter[str]]:
    """Cut off what lies before ``seq`` ``known``: a sender that lost its cursor batches anew.

    Returns:
        The number of records, the frames, and the gaps that are left.
    """
    records, start, gaps = 0, len(frames), Counter[str]()
    for frame in scan_frames(frames):
        body = frames[frame.body : frame.end]
        seq = decode_head(body).seq
        if frame.kind == Kind.GAP and isinstance(gap := decode_body(body).payload, Gap):
            if (left := seq + gap.count - max(seq, known)) > 0:
                gaps[gap.reason] += left
        elif seq >= known:
            records += 1
        if seq >= known:
            start = min(start, frame.start)
    return records, frames[start:], gaps
