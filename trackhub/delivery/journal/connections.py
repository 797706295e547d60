# SPDX-License-Identifier: Apache-2.0
"""The SQLite connections of an open journal: one that writes, and some that read. Every wait for them has a limit.

`Journal` uses it for every query. Another program may have the file locked, or the disk may not answer. Then a thread
of the receiver may wait only a moment: it belongs to FLARE's pool, and FLARE's rounds need the pool.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trackhub.delivery.journal.tables_and_rows import SCHEMA
from trackhub.errors import JournalError
from trackhub.open_without_links import open_plain

__all__ = ["Connections"]

_READ_S = 0.5
_CHECKPOINT_S, _MIN_CHECKPOINT_S = 1.0, 0.1
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.001, 0.02
_log = logging.getLogger(__name__)


class Connections:
    """The connections of one journal file. Thread-safe. `transaction` and `reading` raise JournalError after `close`.

    Threads write in turns. A thread whose turn it is tries once to lock the file. If another program has the file
    locked, the thread gives its turn back before it waits, so that other threads can take theirs.
    """

    def __init__(self, path: Path, *, durability: str, wait_s: float) -> None:
        """Open the file, and create it and its tables if need be.

        Args:
            path: the journal's file.
            durability: as for `Journal.open`.
            wait_s: the longest wait while another program has the file locked, in seconds.

        Raises:
            sqlite3.Error: it cannot be opened, or is not a journal.
            OSError: it is not an ordinary file, or cannot be opened.
        """
        self.path = path
        self._turn = threading.Lock()
        self._pool_lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._borrowed: set[sqlite3.Connection] = set()
        self._closed = False
        self._waits_end = math.inf
        # Create the file here. SQLite would follow a symbolic link, and would create a file that everybody may read.
        # SQLite's other files get the mode of this one.
        os.close(open_plain(path, os.O_RDWR | os.O_CREAT))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=wait_s)
        try:
            mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            self._has_log = mode == "wal"
            if not self._has_log:
                _log.warning("%s: this file system has no write-ahead log; SQLite uses %r, which is slower", path, mode)
            # Without a write-ahead log, a loss of power under NORMAL could damage the file itself:
            # https://www.sqlite.org/pragma.html#pragma_synchronous
            full = durability == "full" or not self._has_log
            self._db.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
            self._db.executescript(SCHEMA)
            self._db.execute("PRAGMA busy_timeout=0")  # from here on, `_begin` waits
        except BaseException:
            self._db.close()
            raise

    def limit_waits(self, until: float) -> None:
        """End every wait at this moment of the monotonic clock at the latest, even a wait that has begun."""
        self._waits_end = until

    @contextmanager
    def transaction(self, wait_s: float) -> Iterator[sqlite3.Connection]:
        """Write in one transaction: everything is stored when the ``with`` block ends. If it raises, nothing is stored.

        Args:
            wait_s: the longest wait for other threads and other programs, in seconds.

        Raises:
            JournalError: the journal is closed, locked for too long, or cannot be written.
        """
        try:
            # With these statements, the transaction waits only at its beginning. A plain BEGIN starts as a reader, and
            # fails when it wants to write. Without a write-ahead log, IMMEDIATE waits for readers at the end.
            self._begin("BEGIN IMMEDIATE" if self._has_log else "BEGIN EXCLUSIVE", wait_s)
        except sqlite3.Error as e:
            raise JournalError(f"cannot write the journal {self.path}: {e}") from e
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException as e:
            self._roll_back()
            if isinstance(e, sqlite3.Error):
                raise JournalError(f"cannot write the journal {self.path}: {e}") from e
            raise
        finally:
            self._turn.release()

    @contextmanager
    def reading(self, wait_s: float = _READ_S) -> Iterator[sqlite3.Connection]:
        """Give a connection to read with.

        With a write-ahead log, readers have connections of their own and do not wait for the writer. Without such a
        log, readers would keep the writer out for ever, so all take turns with the writer's connection.

        Args:
            wait_s: the longest wait for other threads and other programs, in seconds.

        Raises:
            JournalError: the journal is closed, locked for too long, or cannot be read.
        """
        try:
            if self._has_log:
                db = self._borrow()
                try:
                    yield db
                finally:
                    self._give_back(db)
            else:
                self._begin("BEGIN", wait_s)
                try:
                    yield self._db
                finally:
                    self._roll_back()
                    self._turn.release()
        except sqlite3.Error as e:
            raise JournalError(f"cannot read the journal {self.path}: {e}") from e

    def _begin(self, statement: str, wait_s: float) -> None:
        """Take the turn, and begin a transaction on the writer's connection. The caller must give the turn back."""
        deadline, pause_s = time.monotonic() + wait_s, _FIRST_PAUSE_S
        while True:
            self._take_turn(deadline)
            try:
                self._check_open()
                self._db.execute(statement)
                if statement == "BEGIN":
                    # SQLite locks the file with this first query.
                    self._db.execute("SELECT 1 FROM meta LIMIT 1").fetchone()
                return
            except BaseException as e:
                self._roll_back()
                self._turn.release()
                left_s = self._left_s(deadline)
                if not _is_busy(e) or left_s <= 0:
                    raise
            # Wait without the turn. Otherwise all other threads would wait as well.
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _take_turn(self, deadline: float) -> None:
        # The first try needs no clock. In nearly all cases the turn is free.
        while not self._turn.acquire(blocking=False):
            left_s = self._left_s(deadline)
            if left_s <= 0:
                raise JournalError(f"cannot use the journal {self.path}: another thread has been using it for too long")
            if self._turn.acquire(timeout=min(left_s, 0.1)):  # short waits, since `limit_waits` may be called meanwhile
                return

    def _left_s(self, deadline: float) -> float:
        return min(deadline, self._waits_end) - time.monotonic()

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):  # if the disk is gone, this fails as well, and the first error says more
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _borrow(self) -> sqlite3.Connection:
        with self._pool_lock:
            self._check_open()
            db = self._idle.pop() if self._idle else None
            if db is not None:
                self._borrowed.add(db)
                return db
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=_READ_S)
        db.execute("PRAGMA query_only=1")
        with self._pool_lock:
            # A lane may return from a call after the journal is closed. It must not make new files then, since FLARE is
            # archiving the folder. SQLite opens the file with the first query, and the error below prevents that query.
            if self._closed:
                db.close()
            self._check_open()
            self._borrowed.add(db)
            return db

    def _give_back(self, db: sqlite3.Connection) -> None:
        with self._pool_lock:
            self._borrowed.discard(db)
            if self._closed:
                db.close()
            else:
                self._idle.append(db)

    def _check_open(self) -> None:
        if self._closed:
            raise JournalError(f"the journal {self.path} is closed")

    def _wait_for_readers(self) -> None:
        """Wait a moment until no thread reads any more, so that the write-ahead log can be checkpointed."""
        deadline = time.monotonic() + _MIN_CHECKPOINT_S
        while self._borrowed and time.monotonic() < deadline:
            time.sleep(_FIRST_PAUSE_S)

    def close(self) -> None:
        """Checkpoint the write-ahead log into the one file, and close it. Idempotent.

        Blocks for about a second at most, and not longer than `limit_waits` allows.
        """
        with self._pool_lock:
            if self._closed:
                return
            self._closed = True
            for db in self._idle:
                db.close()
            self._idle.clear()
            # Another thread runs a query on each of these. Closing such a connection would crash the process.
            for db in self._borrowed:
                db.interrupt()
        keep = "keep the -wal file beside it"
        self._wait_for_readers()
        wait_s = max(self._left_s(time.monotonic() + _CHECKPOINT_S), _MIN_CHECKPOINT_S)
        if not self._turn.acquire(timeout=wait_s):
            _log.warning("%s: a thread is still writing to it; %s", self.path, keep)
            return
        try:
            self._db.execute(f"PRAGMA busy_timeout={int(wait_s * 1000)}")
            if self._has_log and self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                _log.warning("%s: its write-ahead log is in use and cannot be checkpointed; %s", self.path, keep)
        except sqlite3.Error as e:
            _log.warning("%s: its write-ahead log could not be checkpointed (%s); %s", self.path, e, keep)
        finally:
            self._db.close()
            self._turn.release()


def _is_busy(error: BaseException) -> bool:
    """Return whether the error says that another connection has the file locked."""
    return (
        isinstance(error, sqlite3.OperationalError)
        and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
    )
