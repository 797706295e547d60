# SPDX-License-Identifier: Apache-2.0
"""The journal as its receiver uses it. It stores batches, gives them to the lanes, and keeps the lanes' cursors.

A row is a batch, stored as it arrived. One transaction stores the batch and the stream's next ``seq``. So the journal
recognises a batch that is sent again after a lost acknowledgement. The receiver's threads and the lanes call it.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trackhub.delivery.journal.connections import Connections
from trackhub.delivery.journal.lock import lock_journal, make_journal_folder
from trackhub.delivery.journal.report_builder import build_report
from trackhub.delivery.journal.swap import finish_swap
from trackhub.delivery.journal.tables_and_rows import Progress, Row, RunState
from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.wire import MAX_REASONS, Batch, Final, KeepAlive, SiteCounts, StreamState
from trackhub.errors import JournalError
from trackhub.framing import decode_body, decode_head, scan_frames
from trackhub.process_lock import ProcessLock
from trackhub.records import MAX_COUNT, Gap, Kind

__all__ = ["JOURNAL_NAME", "WAIT_S", "Journal", "TooManyStreamsError"]

JOURNAL_NAME = "trackhub.db"
_FORMAT = "1"
_ENDED, _ENDED_FAILED = 1, 2  # values of sites.ended
_CONTINUES = "continues"

MAX_STREAMS_OF_SITE = 100_000
"""Most streams of one site. A writer has two or three. Without a limit, a site could fill the table of streams."""

_OTHER_REASONS = "other"
_SET_FACT = "INSERT OR REPLACE INTO meta VALUES (?, ?)"

WAIT_S = 10.0
"""How long a lane waits, in seconds, for a journal that another program has locked. A receiver's threads wait less."""


class TooManyStreamsError(Exception):
    """A site has more streams than a receiver takes."""


class Journal:
    """One receiver's journal. Thread-safe. One process at a time may have it open for writing.

    A write blocks for one SQLite transaction: measured 0.1 ms with ``durability="normal"``. While another program has
    the file locked, a write blocks for ``wait_s`` at most, and delays no other thread. All methods raise JournalError
    when the file cannot be read or written, and when the journal is closed.
    """

    def __init__(self, path: Path, connections: Connections, lock: ProcessLock) -> None:
        """Use ``Journal.open``.

        Args:
            path: the file.
            connections: the connections to the file.
            lock: the lock that tells other processes that this one has the journal open.
        """
        self.path = path
        self._connections = connections
        self._process_lock = lock
        self._continues = False

    @property
    def continues(self) -> bool:
        """True if another journal holds the first records of the sites."""
        return self._continues

    @classmethod
    def open(cls, path: Path, *, job: str, side: str, durability: str = "normal", wait_s: float = WAIT_S) -> Journal:
        """Open or create a journal for writing. Blocks up to ``wait_s`` while another program has the file locked.

        Args:
            path: the file. Its folder is created.
            job: the job whose records it holds.
            side: where its receiver is, as in `trackhub.job_and_run_info.Side`.
            durability: ``normal`` survives a killed process, ``full`` also a loss of power (an fsync for each batch).
            wait_s: the longest wait for another program, in seconds.

        Raises:
            JournalError: it cannot be opened, is in use by another process, or belongs to another job or side.
        """
        make_journal_folder(path)
        lock = lock_journal(path)
        connections: Connections | None = None
        try:
            finish_swap(path)
            connections = Connections(path, durability=durability, wait_s=wait_s)
            journal = cls(path, connections, lock)
            journal._claim({"format": _FORMAT, "job": job, "side": side}, wait_s)
        except (sqlite3.Error, OSError, JournalError) as e:
            if connections is not None:
                connections.close()
            lock.release()
            if isinstance(e, JournalError):
                raise
            raise JournalError(f"cannot use the journal {path}: {e}") from e
        return journal

    def _claim(self, expected: dict[str, str], wait_s: float) -> None:
        with self._connections.transaction(wait_s) as db:
            found = dict(db.execute("SELECT key, value FROM meta"))
            self._continues = _CONTINUES in found
            for key, value in expected.items():
                if found.get(key, value) != value:
                    advice = "give each job and side a folder of its own"
                    if key == "format":
                        advice = "use the version of trackhub that wrote it"
                    raise JournalError(
                        f"the journal {self.path} has {key} {found[key]!r}, expected {value!r}; {advice}"
                    )
                db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))

    def limit_waits(self, until: float) -> None:
        """End every wait for the file at this moment of the monotonic clock at the latest. Any thread may call it."""
        self._connections.limit_waits(until)

    def _fetch(self, query: str, *values: object) -> list[Any]:
        with self._connections.reading() as db:
            return db.execute(query, values).fetchall()

    def add_site(self, site: str, created: float, first_position: int = 0, *, wait_s: float = WAIT_S) -> int:
        """Return the id of a site, and register it if it is new.

        Args:
            site: its name.
            created: when the receiver first heard from the site, in unix seconds. Used only if the site is new. The
                time of the site's first record replaces it later.
            first_position: the position of the site's first record in this journal. It is above 0 if another journal
                holds the earlier records. Used only if the site is new.
            wait_s: as for ``append``.
        """
        with self._connections.transaction(wait_s) as db:
            db.execute(
                "INSERT OR IGNORE INTO sites (name, created, first_position, next_position) VALUES (?, ?, ?, ?)",
                (site, created, first_position, first_position),
            )
            row = db.execute("SELECT id FROM sites WHERE name = ?", (site,)).fetchone()
            return int(row[0])

    def continue_site(self, site: str, created: float, first_position: int) -> int:
        """Return the id of a site whose records before ``first_position`` are in another journal; see ``add_site``.

        Args:
            site, created, first_position: as for ``add_site``.
        """
        # Store this fact. `first_position` may not show it: if the other journal holds only one batch and its reply was
        # lost, the position is 0.
        self.set_meta(_CONTINUES, "another journal")
        self._continues = True
        return self.add_site(site, created, first_position)

    def append(
        self,
        site: int,
        batch: Batch,
        explained: Mapping[str, int],
        *,
        refused: Sequence[tuple[int, str]] = (),
        began: float | None = None,
        facts: Mapping[str, str] | None = None,
        stored: Callable[[int, int], None] | None = None,
        wait_s: float = WAIT_S,
    ) -> int:
        """Store a batch, and return how many of its records are new.

        When this returns, the batch survives the death of the process, and a loss of power with ``durability="full"``.

        Args:
            site: its id.
            batch: what the site sent, without the records that the receiver refused.
            explained: reason -> number of records that the batch's gaps stand for.
            refused: (``seq``, reason) of each record that the receiver refused.
            began: the time of the batch's first record, in unix seconds. If the site has no record yet, this becomes
                the start of its run.
            facts: facts about the job to store with the batch, as ``set_facts`` does.
            stored: called with the id of the new row and the number of its records, after the row is stored. Not called
                if no record is new.
            wait_s: the longest wait for other threads and other programs, in seconds.

        Raises:
            JournalError: it cannot be written, for example because the disk is full. Nothing was stored.
            TooManyStreamsError: the site has `MAX_STREAMS_OF_SITE` streams, and the batch begins another one.
        """
        with self._connections.transaction(wait_s) as db:
            stream, known = self._stream(db, site, batch)
            new, frames = batch.records, batch.frames
            if batch.next_seq <= known:
                new = 0
            elif batch.first_seq < known:
                new, frames, explained = _cut_known(frames, known)
            if batch.next_seq > known:
                db.execute("UPDATE streams SET next_seq = ? WHERE id = ?", (batch.next_seq, stream))
                if explained:
                    self._add_reasons(db, site, "explained", explained)
                if new_refused := Counter(reason for seq, reason in refused if seq >= known):
                    self._add_reasons(db, site, "refused", new_refused)
            row = None
            if new:
                row = db.execute(
                    "INSERT INTO batches (site, stream, first_position, records, frames)"
                    " SELECT id, ?, next_position, ?, ? FROM sites WHERE id = ?",
                    (stream, new, frames, site),
                ).lastrowid
            # Duplicates count as received: the report's sums include what arrived again.
            db.execute(
                "UPDATE sites SET received = received + ?, duplicates = duplicates + ?, missing = min(missing + ?, ?),"
                " created = iif(next_position = first_position, coalesce(?, created), created),"
                " next_position = next_position + ? WHERE id = ?",
                (batch.records, batch.records - new, max(0, batch.first_seq - known), MAX_COUNT, began, new, site),
            )
            db.executemany(_SET_FACT, (facts or {}).items())
        if row is not None and stored is not None:
            stored(row, new)
        return new

    def _stream(self, db: sqlite3.Connection, site: int, batch: Batch) -> tuple[int, int]:
        """Return the id of the batch's stream, and the ``seq`` of the stream's next record."""
        query = "SELECT id, next_seq FROM streams WHERE site = ? AND name = ?"
        if (found := db.execute(query, (site, batch.stream)).fetchone()) is not None:
            return found[0], found[1]
        (count,) = db.execute("SELECT count(*) FROM streams WHERE site = ?", (site,)).fetchone()
        if count >= MAX_STREAMS_OF_SITE:
            raise TooManyStreamsError(f"the site has {count} streams; a receiver takes no more")
        # A stream that is new here begins at 0, except where another journal may hold its beginning.
        known = batch.first_seq if self._continues else 0
        cursor = db.execute("INSERT INTO streams (site, name, next_seq) VALUES (?, ?, ?)", (site, batch.stream, known))
        assert cursor.lastrowid is not None
        return cursor.lastrowid, known

    def _add_reasons(self, db: sqlite3.Connection, site: int, column: str, counts: Mapping[str, int]) -> None:
        """Add counts by reason. A site may send any reasons and any counts, so both have a limit."""
        stored = db.execute(f"SELECT {column} FROM sites WHERE id = ?", (site,)).fetchone()[0]
        total = msgspec.msgpack.decode(stored, type=dict[str, int]) if stored else {}
        for reason, count in counts.items():
            known = reason if reason in total or len(total) < MAX_REASONS else _OTHER_REASONS
            total[known] = min(total.get(known, 0) + count, MAX_COUNT)
        db.execute(f"UPDATE sites SET {column} = ? WHERE id = ?", (msgspec.msgpack.encode(total), site))

    def note_counts(
        self, site: int, message: KeepAlive | Final, *, keep_end: bool = False, wait_s: float = WAIT_S
    ) -> None:
        """Store the counts that a site sent in a message.

        A message that arrives after a newer one has no effect.

        Args:
            site: its id.
            message: what the site sent.
            keep_end: True if a replay sent the message. Then the message does not say how the site's training ended.
            wait_s: as for ``append``.
        """
        final = isinstance(message, Final)
        with self._connections.transaction(wait_s) as db:
            query = "SELECT counts, session, number, last, ended FROM sites WHERE id = ?"
            counts, session, number, last, ended = db.execute(query, (site,)).fetchone()
            same_sender = message.session != "" and message.session == session
            if same_sender and message.number <= number:
                return
            known = _read_counts(counts)
            # Keep these facts: only a FLARE client's first sender knows them. A replay or a restarted sender does not
            # send them.
            message.counts.at_source |= known.at_source
            message.counts.not_captured = message.counts.not_captured or known.not_captured
            message.counts.not_used = message.counts.not_used or known.not_used
            message.counts.by_message = max(message.counts.by_message, known.by_message)
            message.counts.retries = max(message.counts.retries, known.retries)
            is_older = (message.counts.logged, -message.counts.spooled) < (known.logged, -known.spooled)
            if last and not final and not same_sender and is_older:
                return  # an old message: a later sender has sent the final message
            if not keep_end:
                # A keep-alive after the end means that the site runs again.
                ended = (_ENDED_FAILED if message.failed else _ENDED) if isinstance(message, Final) else 0
            db.execute(
                "UPDATE sites SET counts = ?, counted_at = ?, session = ?, number = ?, last = ?, ended = ?"
                " WHERE id = ?",
                (
                    msgspec.msgpack.encode(message.counts),
                    time.time(),
                    message.session,
                    message.number,
                    final,
                    ended,
                    site,
                ),
            )

    def ended(self) -> dict[str, bool]:
        """Return site -> whether its training failed, for the sites that have said how their training ended."""
        rows = self._fetch("SELECT name, ended FROM sites WHERE ended > 0")
        return {name: ended == _ENDED_FAILED for name, ended in rows}

    def stream_states(self, site: str, streams: Collection[str]) -> dict[str, StreamState]:
        """Return stream -> the number of its next record, and how many of its records the journal has.

        A stream is left out if the journal does not know it, or if another journal has its beginning.
        """
        query = "SELECT s.id, s.name, s.next_seq FROM streams s JOIN sites ON sites.id = s.site WHERE sites.name = ?"
        found = {row[0]: row[1:] for row in self._fetch(query, site) if row[1] in streams}
        if not found or self._continues:
            return {}
        query = (
            "SELECT stream, total(records) FROM batches JOIN sites ON sites.id = site WHERE name = ? GROUP BY stream"
        )
        records = dict(self._fetch(query, site))
        return {name: StreamState(next_seq, int(records.get(i, 0))) for i, (name, next_seq) in found.items()}

    def set_meta(self, key: str, value: str) -> None:
        """Store a fact about the job; see ``set_facts``."""
        self.set_facts({key: value})

    def set_facts(self, facts: Mapping[str, str], *, wait_s: float = WAIT_S) -> None:
        """Store facts about the job, such as ``status``: how it ended, or empty while it runs; ``wait_s`` as above."""
        with self._connections.transaction(wait_s) as db:
            db.executemany(_SET_FACT, facts.items())

    def meta(self) -> dict[str, str]:
        """Return the facts about the job."""
        return dict(self._fetch("SELECT key, value FROM meta"))

    def sites(self) -> dict[int, tuple[str, float]]:
        """Return site's id -> (its name, when its run began in unix seconds), for the sites that have records."""
        query = "SELECT id, name, created FROM sites WHERE next_position > first_position"
        return {i: (name, created) for i, name, created in self._fetch(query)}

    def site(self, site: int) -> tuple[str, float]:
        """Return one site's name, and when its run began in unix seconds. Faster than ``sites`` if there are many."""
        ((name, created),) = self._fetch("SELECT name, created FROM sites WHERE id = ?", site)
        return name, created

    def read(self, site: int, after: int, max_bytes: int) -> list[Row]:
        """Return rows of a site in order.

        Args:
            site: its id.
            after: the id of the last row to leave out; 0 starts with the first.
            max_bytes: stop when the frames have this many bytes. The first row is returned in any case.
        """
        return [row for _, row in self._rows("b.site = ? AND b.id > ?", (site, after), max_bytes)]

    def read_all(self, after: int, max_bytes: int) -> list[tuple[int, Row]]:
        """Return rows of all sites in the order in which they were stored, each with its site's id.

        Args:
            after: the id of the last row to leave out; 0 starts with the first.
            max_bytes: as for ``read``.
        """
        return self._rows("b.id > ?", (after,), max_bytes)

    def _rows(self, where: str, values: tuple[int, ...], max_bytes: int) -> list[tuple[int, Row]]:
        rows, size = [], 0
        with self._connections.reading() as db:
            cursor = db.execute(
                "SELECT b.site, b.id, s.name, b.first_position, b.records, b.frames FROM batches b JOIN streams s"
                f" ON s.id = b.stream WHERE {where} ORDER BY b.id",
                values,
            )
            for site, *fields in cursor:
                row = Row(*fields)
                rows.append((site, row))
                size += len(row.frames)
                if size >= max_bytes:
                    break
            cursor.close()  # an open cursor keeps its snapshot, and SQLite could not checkpoint the write-ahead log
        return rows

    def position_after(self, site: int, row: int) -> int:
        """Return the position after the last record up to a row. If there is none, return the site's first position."""
        query = "SELECT first_position + records FROM batches WHERE site = ? AND id <= ? ORDER BY id DESC LIMIT 1"
        found = self._fetch(query, site, row) or self._fetch("SELECT first_position FROM sites WHERE id = ?", site)
        return int(found[0][0])

    def overlap(self, site: int) -> int:
        """Return how many of this site's first records another journal may hold as well; 0 if there is no other.

        If the reply of the other journal's receiver was lost, the site sends its last batch again to this journal.
        """
        if not self._continues:
            return 0
        found = self._fetch("SELECT records FROM batches WHERE site = ? ORDER BY id LIMIT 1", site)
        return int(found[0][0]) if found else 0

    def has_rows_after(self, site: int, after: int) -> bool:
        """Return whether this site has a row after ``after``."""
        query = "SELECT EXISTS (SELECT 1 FROM batches WHERE site = ? AND id > ?)"
        return bool(self._fetch(query, site, after)[0][0])

    def oldest_unconfirmed(self, lane: str) -> int | None:
        """Return the id of the oldest row that this lane has not confirmed. None if it has confirmed all."""
        query = (
            "SELECT min((SELECT id FROM batches WHERE site = sites.id AND id > coalesce(runs.confirmed, 0) ORDER BY id"
            " LIMIT 1)) FROM sites LEFT JOIN runs ON runs.site = sites.id AND runs.lane = ?"
        )
        ((found,),) = self._fetch(query, lane)
        return None if found is None else int(found)

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
            confirmed: the id of the last row that the backend confirmed.
            progress: the counts up to ``confirmed``.

        Raises:
            JournalError: it cannot be written. After a crash the lane then starts from an earlier row.
        """
        self.save_runs({(lane, site): RunState(written, confirmed, progress)})

    def save_runs(self, runs: Mapping[tuple[str, int], RunState], *, wait_s: float = WAIT_S) -> None:
        """Store how far lanes got with several runs, in one transaction: the states of all runs or none.

        Args:
            runs: (lane's name, site's id) -> the state of the run.
            wait_s: the longest wait for other threads and other programs, in seconds, for all runs together.

        Raises:
            JournalError: it cannot be written.
        """
        encode = msgspec.msgpack.encode
        rows = [
            (lane, site, run.written, run.confirmed, encode(run.progress.concealed()))
            for (lane, site), run in runs.items()
        ]
        with self._connections.transaction(wait_s) as db:
            db.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?)", rows)

    def rewind(self, lane: str) -> None:
        """Set a lane's confirmed cursors back to the start. Its written cursors stay."""
        with self._connections.transaction(WAIT_S) as db:
            for site, stored in db.execute("SELECT site, progress FROM runs WHERE lane = ?", (lane,)).fetchall():
                known = msgspec.msgpack.decode(stored, type=Progress)
                empty = msgspec.msgpack.encode(Progress(shifts=known.shifts))
                db.execute(
                    "UPDATE runs SET confirmed = 0, progress = ? WHERE lane = ? AND site = ?", (empty, lane, site)
                )

    def report(self, lanes: Sequence[str] = (), facts: Mapping[str, str] | None = None) -> DeliveryReport:
        """Return what has become of every record so far.

        Args:
            lanes: lanes to include even if they have delivered nothing yet.
            facts: facts about the job as for ``set_facts``, in case the journal could not store them.
        """
        with self._connections.reading() as db:
            return build_report(db, lanes, facts=facts)

    def close(self) -> None:
        """Checkpoint the write-ahead log and close the file, since FLARE archives the folder next. Idempotent."""
        self._connections.close()
        self._process_lock.release()


def _cut_known(frames: bytes, known: int) -> tuple[int, bytes, Counter[str]]:
    """Cut off the records whose ``seq`` is below ``known``, since the journal has them.

    A sender that lost its place in the spool may begin a batch in the middle of an earlier one.

    Returns:
        The number of records that are left, their frames, and reason -> records that the remaining gaps stand for.
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


def _read_counts(stored: bytes | None) -> SiteCounts:
    """Return a site's stored counts. If they are damaged, return zeros, so that the next message replaces them."""
    try:
        return msgspec.msgpack.decode(stored, type=SiteCounts) if stored else SiteCounts()
    except (msgspec.DecodeError, UnicodeDecodeError):  # the latter is msgspec's error for text that is not UTF-8
        return SiteCounts()
