# SPDX-License-Identifier: Apache-2.0
"""The journal as its receiver uses it: stores what arrives, hands it to the lanes, and keeps how far each lane got.

A row is a batch, stored as it arrived. One transaction stores the batch and the stream's next ``seq``, so that a batch
that is sent again after a lost acknowledgement is recognised. The receiver's threads and the lanes call it.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from trackhub.delivery.journal.report_builder import build_report
from trackhub.delivery.journal.schema import SCHEMA, Progress, Row, RunState
from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.wire import Batch, SiteCounts
from trackhub.errors import JournalError
from trackhub.framing import decode_body, decode_head, scan_frames
from trackhub.plain_files import make_private_folder, open_plain
from trackhub.process_lock import ProcessLock
from trackhub.records import Gap, Kind

__all__ = ["JOURNAL_NAME", "Journal", "lock_journal"]

JOURNAL_NAME = "trackhub.db"
_FORMAT = "1"
_ENDED, _ENDED_FAILED = 1, 2  # values of sites.final
_CONTINUES = "continues"
_BUSY_S = 10.0
_log = logging.getLogger(__name__)


def lock_journal(path: Path) -> ProcessLock:
    """Lock a journal for this process, and return the lock to release. A killed process leaves no lock.

    Raises:
        JournalError: another process has it, or the file ``trackhub.lock`` beside it cannot be opened.
    """
    # A file of its own. SQLite locks for one transaction only, so two receivers could write to one journal in turn.
    try:
        return ProcessLock.open(path.with_suffix(".lock"))
    except BlockingIOError as e:
        raise JournalError(
            f"the journal {path} is in use by another process or receiver (a running job, or a replay); wait until it "
            "ends"
        ) from e
    except OSError as e:
        what = "open" if path.exists() else "create"
        raise JournalError(
            f"cannot {what} the journal {path}: {e}; its folder must be writable and have free space"
        ) from e


class Journal:
    """One receiver's journal. Thread-safe. One process at a time may have it open for writing.

    A write blocks for one SQLite transaction: measured 0.1 ms with ``durability="normal"``. All methods raise
    JournalError when the file cannot be read or written, and when the journal is closed.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: ProcessLock, *, readers_block: bool) -> None:
        """Use ``Journal.open``."""
        self.path = path
        self._db = connection
        self._lock = threading.RLock()  # taken again within a transaction, where readers share its connection
        self._process_lock: ProcessLock | None = lock
        self._readers_block = readers_block
        self._readers = threading.local()
        self._open_readers: list[sqlite3.Connection] = []

    @classmethod
    def open(cls, path: Path, *, job: str, side: str, durability: str = "normal") -> Journal:
        """Open or create a journal for writing.

        Args:
            path: the file. Its folder is created.
            job: the job whose records it holds.
            side: where its receiver is, as in `trackhub.run.Side`.
            durability: ``normal`` survives a killed process, ``full`` also a loss of power (an fsync for each batch).

        Raises:
            JournalError: it cannot be opened, is in use by another process, or belongs to another job or side.
        """
        with suppress(OSError):  # then the lock's file cannot be opened either, and that error names the journal
            make_private_folder(path.parent)
        lock = lock_journal(path)
        db: sqlite3.Connection | None = None
        try:
            # SQLite would follow a link, and make a file that everybody may read. Its other files get the same mode.
            os.close(open_plain(path, os.O_RDWR | os.O_CREAT))
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
            mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                _log.warning("%s: this file system has no write-ahead log; SQLite uses %r, which is slower", path, mode)
            # Without a write-ahead log, a loss of power under NORMAL could damage the file itself:
            # https://www.sqlite.org/pragma.html#pragma_synchronous
            db.execute(f"PRAGMA synchronous={'FULL' if durability == 'full' or mode != 'wal' else 'NORMAL'}")
            db.executescript(SCHEMA)
            journal = cls(path, db, lock, readers_block=mode != "wal")
            journal._claim({"format": _FORMAT, "job": job, "side": side})
        except (OSError, sqlite3.Error, JournalError) as e:
            if db is not None:
                db.close()
            lock.release()
            if isinstance(e, JournalError):
                raise
            raise JournalError(f"cannot use the journal {path}: {e}") from e
        return journal

    def _claim(self, expected: dict[str, str]) -> None:
        with self._transaction() as db:
            found = dict(db.execute("SELECT key, value FROM meta"))
            for key, value in expected.items():
                if found.get(key, value) != value:
                    advice = "give each job and side a folder of its own"
                    if key == "format":
                        advice = "use the version of trackhub that wrote it"
                    raise JournalError(
                        f"the journal {self.path} has {key} {found[key]!r}, expected {value!r}; {advice}"
                    )
            db.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", expected.items())

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._check_open()
            try:
                # Takes the write lock now. Taken later, within the transaction, SQLite would fail instead of waiting.
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as e:
                if self._db.in_transaction:
                    with suppress(sqlite3.Error):  # when the disk is gone this fails as well; the first error says more
                        self._db.execute("ROLLBACK")
                if isinstance(e, sqlite3.Error):
                    raise JournalError(f"cannot write the journal {self.path}: {e}") from e
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection to read with. Each thread has one of its own, so that readers do not wait for the writer.

        That needs a write-ahead log. Without one, readers would shut the writer out for good, so all take turns with
        the writer's connection.
        """
        try:
            if self._readers_block:
                with self._lock:
                    self._check_open()
                    yield self._db
            else:
                yield self._reader()
        except sqlite3.Error as e:
            raise JournalError(f"cannot read the journal {self.path}: {e}") from e

    def _reader(self) -> sqlite3.Connection:
        db: sqlite3.Connection | None = getattr(self._readers, "db", None)
        if db is None:
            with self._lock:
                # A lane that comes back after the end must not make new files: FLARE is archiving the folder then.
                self._check_open()
                db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
                self._open_readers.append(db)
            db.execute("PRAGMA query_only=1")
            self._readers.db = db
        return db

    def _fetch(self, query: str, *values: object) -> list[Any]:
        with self._reading() as db:
            return db.execute(query, values).fetchall()

    def _check_open(self) -> None:
        if self._process_lock is None:
            raise JournalError(f"the journal {self.path} is closed")

    def add_site(self, site: str, created: float, first_position: int = 0) -> int:
        """Return the id of a site, and register it if it is new.

        Args:
            site: its name.
            created: when its run began, in unix seconds; kept if the site is new.
            first_position: the position of the site's first record in this journal, above 0 if another journal holds
                the earlier ones. Used only if the site is new.
        """
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO sites (name, created, first_position, next_position) VALUES (?, ?, ?, ?)",
                (site, created, first_position, first_position),
            )
            row = db.execute("SELECT id FROM sites WHERE name = ?", (site,)).fetchone()
            return int(row[0])

    def continue_site(self, site: str, created: float, first_position: int) -> int:
        """Return the id of a site whose records before ``first_position`` are in another journal; see ``add_site``."""
        self.set_meta(_CONTINUES, "another journal")
        return self.add_site(site, created, first_position)

    def _continues(self) -> bool:
        # `first_position` does not show this. The other journal may hold only a batch whose reply was lost. Then this
        # journal also begins at 0.
        return bool(self._fetch("SELECT 1 FROM meta WHERE key = ?", _CONTINUES))

    def append(self, site: int, batch: Batch, explained: Mapping[str, int]) -> int:
        """Store a batch, and return how many of its records are new.

        When this returns, the batch survives the death of the process, and a loss of power with ``durability="full"``.

        Args:
            site: its id.
            batch: what the site sent.
            explained: the number of records that the batch's gaps stand for, by reason.

        Raises:
            JournalError: it cannot be written, for example because the disk is full. Nothing was stored.
        """
        with self._transaction() as db:
            stream, known = self._stream(db, site, batch)
            new, frames = batch.records, batch.frames
            if batch.next_seq <= known:
                new = 0
            elif batch.first_seq < known:
                new, frames, explained = _cut_known(frames, known)
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
            # Duplicates count as received: the report's sums include what arrived again.
            db.execute(
                "UPDATE sites SET received = received + ?, duplicates = duplicates + ?, missing = missing + ?,"
                " next_position = next_position + ? WHERE id = ?",
                (batch.records, batch.records - new, max(0, batch.first_seq - known), new, site),
            )
            return new

    def _stream(self, db: sqlite3.Connection, site: int, batch: Batch) -> tuple[int, int]:
        """Return the id of the batch's stream, and the ``seq`` that is expected next of it."""
        # A stream that is new here begins at 0, except where another journal may hold its beginning.
        db.execute(
            "INSERT OR IGNORE INTO streams (site, name, next_seq) VALUES (?, ?, ?)",
            (site, batch.stream, batch.first_seq if self._continues() else 0),
        )
        query = "SELECT id, next_seq FROM streams WHERE site = ? AND name = ?"
        stream, known = db.execute(query, (site, batch.stream)).fetchone()
        return stream, known

    def _explain(self, db: sqlite3.Connection, site: int, gaps: Mapping[str, int]) -> None:
        stored = db.execute("SELECT explained FROM sites WHERE id = ?", (site,)).fetchone()[0]
        total = Counter(msgspec.msgpack.decode(stored, type=dict[str, int]) if stored else {})
        total.update(gaps)
        db.execute("UPDATE sites SET explained = ? WHERE id = ?", (msgspec.msgpack.encode(dict(total)), site))

    def note_site(self, site: int, counts: SiteCounts, *, final: bool, failed: bool = False) -> None:
        """Store a site's own counts, and whether they came with its final message.

        A keep-alive may arrive after the final message. It is ignored if its counts are older.

        Args:
            site: its id.
            counts: what the site counted.
            final: they came with the final message.
            failed: the site's training ended with an error.
        """
        with self._transaction() as db:
            ended, known = db.execute("SELECT final, counts FROM sites WHERE id = ?", (site,)).fetchone()
            if ended and not final and known is not None:
                last = msgspec.msgpack.decode(known, type=SiteCounts)
                if (counts.logged, -counts.spooled) < (last.logged, -last.spooled):
                    return
            value = (_ENDED_FAILED if failed else _ENDED) if final else 0
            db.execute(
                "UPDATE sites SET counts = ?, final = max(final, ?) WHERE id = ?",
                (msgspec.msgpack.encode(counts), value, site),
            )

    def final(self) -> dict[str, bool]:
        """Return the sites whose final message has come, each with whether its training failed."""
        rows = self._fetch("SELECT name, final FROM sites WHERE final > 0")
        return {name: final == _ENDED_FAILED for name, final in rows}

    def set_meta(self, key: str, value: str) -> None:
        """Store a fact about the job: ``status``, ``backends``, ``job_info``, ``run_dir`` or ``continues``."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def meta(self) -> dict[str, str]:
        """Return the facts about the job."""
        return dict(self._fetch("SELECT key, value FROM meta"))

    def sites(self) -> dict[int, tuple[str, float]]:
        """Return the name of each site, and when its run began in unix seconds, by its id."""
        return {i: (name, created) for i, name, created in self._fetch("SELECT id, name, created FROM sites")}

    def site(self, site: int) -> tuple[str, float]:
        """Return one site's name, and when its run began in unix seconds. With many sites quicker than ``sites``."""
        ((name, created),) = self._fetch("SELECT name, created FROM sites WHERE id = ?", site)
        return name, created

    def read(self, site: int, after: int, max_bytes: int) -> list[Row]:
        """Return rows of a site in order.

        Args:
            site: its id.
            after: the id of the last row to leave out; 0 starts with the first.
            max_bytes: stop once the frames take as many bytes. The first row is returned in any case.
        """
        rows, size = [], 0
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
            cursor.close()  # an open one would hold its snapshot, and the write-ahead log could not be folded in
        return rows

    def position_after(self, site: int, row: int) -> int:
        """Return the position after the last record of a row. Without such a row, return that of the first record."""
        query = "SELECT first_position + records FROM batches WHERE site = ? AND id <= ? ORDER BY id DESC LIMIT 1"
        found = self._fetch(query, site, row) or self._fetch("SELECT first_position FROM sites WHERE id = ?", site)
        return int(found[0][0])

    def overlap(self, site: int) -> int:
        """Return how many of this site's first records another journal may hold as well; 0 if there is no other.

        The site sends its last batch again, to this journal, if the reply of the other one's receiver was lost.
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

        Args:
            lane: its name.
            site: the site's id.
            written: the id of the last row that was handed to the backend.
            confirmed: the id of the last row that is durable there.
            progress: the counts up to ``confirmed``.

        Raises:
            JournalError: it cannot be written. After a crash the lane then starts from an earlier row.
        """
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?)",
                (lane, site, written, confirmed, msgspec.msgpack.encode(progress.concealed())),
            )

    def rewind(self, lane: str) -> None:
        """Set a lane's confirmed cursors back to the start. Its written cursors stay."""
        empty = msgspec.msgpack.encode(Progress())
        with self._transaction() as db:
            db.execute("UPDATE runs SET confirmed = 0, progress = ? WHERE lane = ?", (empty, lane))

    def report(self, lanes: Sequence[str] = ()) -> DeliveryReport:
        """Return what has become of every record so far, including these lanes if they have delivered nothing yet."""
        with self._reading() as db:
            return build_report(db, lanes)

    def close(self) -> None:
        """Fold everything into the one file and close it, since FLARE archives the folder next. Idempotent."""
        with self._lock:
            if self._process_lock is None:
                return
            for reader in self._open_readers:
                reader.close()
            try:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as e:
                _log.warning("%s: its write-ahead log could not be folded in (%s): keep the -wal file", self.path, e)
            self._db.close()
            self._process_lock.release()
            self._process_lock = None


def _cut_known(frames: bytes, known: int) -> tuple[int, bytes, Counter[str]]:
    """Cut off the records before ``seq`` ``known``. A sender that lost its cursor makes other batches than before.

    Returns:
        The number of records left, their frames, and the gaps left by reason.
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
