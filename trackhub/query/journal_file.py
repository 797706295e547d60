# SPDX-License-Identifier: Apache-2.0
"""Reads the records of one journal, in pages, so that a journal of any size takes little memory.

`trackhub.query.jobs` calls it. A journal that SQLite cannot read is rebuilt into a temporary file, and read from
there. The journal itself stays as it is.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from trackhub.delivery.journal.lock import is_delivering, is_journal_locked
from trackhub.delivery.journal.read_only import open_read_only
from trackhub.delivery.journal.rebuild import rebuild
from trackhub.delivery.journal.report_builder import build_report
from trackhub.delivery.journal.tables_and_rows import PRUNED, Row, stored_records
from trackhub.delivery.report import DeliveryReport, resolve_results
from trackhub.errors import JournalError
from trackhub.framing import decode_body, decode_metrics, metrics_bodies
from trackhub.job_and_run_info import JobInfo
from trackhub.records import Kind, Record

__all__ = ["JournalFile", "StoredSite", "StreamRecord"]

_PAGE_BYTES = 8 << 20


class StoredSite(NamedTuple):
    """A site as a journal has it.

    Attributes:
        id: its number in the journal.
        name: its name.
        created: unix seconds (UTC) of its first record.
        streams: stream -> the ``seq`` after its last record.
    """

    id: int
    name: str
    created: float
    streams: dict[str, int]


class StreamRecord(NamedTuple):
    """A record, and the stream that it belongs to."""

    stream: str
    record: Record


class JournalFile:
    """One journal, open for reading. If it is written to meanwhile, it is read as it was at the start.

    Attributes:
        path: the journal.
        meta: the facts about the job.
        job: the job's id, name, notes and tags.
        side: where the receiver is, as in `trackhub.job_and_run_info.Side`.
        sites: name -> site, for the sites that have records.
        report: what became of the records.
        pruned: how many records ``trackhub prune`` removed, by site.
        unreadable: how many records could not be read so far, by site.
        rebuilt: why it was rebuilt into a temporary file; empty if it was not.
    """

    def __init__(self, path: Path) -> None:
        """Read what the journal says of its job and sites.

        Raises:
            JournalError: the file is not a journal, or nothing in it can be read.
        """
        self.path = path
        self._file = path
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.unreadable: dict[str, int] = {}
        self.rebuilt = ""
        try:
            self._read_tables()
        except JournalError as error:
            self._rebuild(error)
            self._read_tables()

    @property
    def continues(self) -> bool:
        """True if another journal holds the first records of its sites."""
        return "continues" in self.meta

    def _read_tables(self) -> None:
        # Ask this first, as `read_journal_report` does.
        runs, delivering = is_journal_locked(self.path), is_delivering(self.path)
        with open_read_only(self._file) as db:
            db.execute("BEGIN")
            try:
                self.meta: dict[str, str] = dict(db.execute("SELECT key, value FROM meta"))
                stored = self.meta.get("job_info")
                self.job = msgspec.json.decode(stored, type=JobInfo) if stored else JobInfo(self.meta["job"])
                self.side = self.meta["side"]
                self.pruned = msgspec.json.decode(self.meta.get(PRUNED, "{}"), type=dict[str, int])
                report = build_report(db, runs=runs, delivering=delivering)
                self.report: DeliveryReport = resolve_results(report, self.path.parent)
                streams: dict[int, dict[str, int]] = {}
                for site, name, next_seq in db.execute("SELECT site, name, next_seq FROM streams"):
                    streams.setdefault(site, {})[name] = next_seq
                query = "SELECT id, name, created FROM sites WHERE next_position > first_position ORDER BY name"
                self.sites = {name: StoredSite(i, name, at, streams.get(i, {})) for i, name, at in db.execute(query)}
                self._last_row: int = db.execute("SELECT ifnull(max(id), 0) FROM batches").fetchone()[0]
            except (KeyError, msgspec.DecodeError, ValueError) as e:
                raise JournalError(f"cannot read the journal {self.path}: it does not say which job it is of") from e

    def _rebuild(self, error: JournalError) -> None:
        """Rebuild the journal after an error, and read the copy from here on.

        Raises:
            JournalError: nothing can be read, or the error is of another kind.
        """
        cause = error.__cause__
        # The subclasses of DatabaseError stand for errors that may be temporary.
        if self._temporary is not None or isinstance(cause, sqlite3.OperationalError):
            raise error
        self._temporary = tempfile.TemporaryDirectory(prefix="trackhub-")
        target = Path(self._temporary.name, self.path.name)
        try:
            rebuild(self._file, target, runs_are_whole=True)
        except (OSError, sqlite3.Error, JournalError) as e:
            self.close()
            raise JournalError(f"cannot read the journal {self.path}: {error.__cause__}; {e}") from e
        self._file = target
        self.rebuilt = str(cause)

    def records(self, site: str, kinds: Collection[Kind] | None = None) -> Iterator[StreamRecord]:
        """Yield the records of a site, in the order of each stream.

        Args:
            site: its name.
            kinds: the kinds to yield; None for all.

        Raises:
            JournalError: it cannot be read any more.
        """
        stored = self.sites.get(site)
        if stored is None:
            return
        wanted = None if kinds is None else frozenset(kinds)
        for row in self._rows(stored.id):
            records, lost = _decoded(row, wanted)
            if lost and (row.frames or site not in self.pruned):
                self.unreadable[site] = self.unreadable.get(site, 0) + lost
            for record in records:
                yield StreamRecord(row.stream, record)

    def _rows(self, site_id: int) -> Iterator[Row]:
        after = 0
        while True:
            try:
                page = self._page(site_id, after)
            except JournalError as error:
                self._rebuild(error)
                page = self._page(site_id, after)  # a rebuilt journal keeps the ids
            yield from page
            if not page:
                return
            after = page[-1].id

    def _page(self, site_id: int, after: int) -> list[Row]:
        """Return rows behind ``after``. No transaction stays open between two pages: it would hold up a running job."""
        query = (
            "SELECT b.id, s.name, b.first_position, b.records, b.frames FROM batches b LEFT JOIN streams s"
            " ON s.id = b.stream WHERE b.site = ? AND b.id > ? AND b.id <= ? ORDER BY b.id"
        )
        last = self._last_row if self._temporary is None else 1 << 62
        rows, size = [], 0
        with open_read_only(self._file) as db:
            for i, stream, position, records, frames in db.execute(query, (site_id, after, last)):
                rows.append(Row(i, stream or "", position, records, frames))
                size += len(frames)
                if size >= _PAGE_BYTES:
                    break
        return rows

    def close(self) -> None:
        """Remove the rebuilt copy, if there is one. Idempotent."""
        if self._temporary is not None:
            self._temporary.cleanup()


def _decoded(row: Row, wanted: Collection[Kind] | None) -> tuple[Sequence[Record], int]:
    """Return the wanted records of a row, and how many of all its records cannot be read."""
    # Metrics that are decoded together take a third of the time.
    bodies, end = metrics_bodies(row.frames, 0, row.records)
    if len(bodies) == row.records and end == len(row.frames):
        with suppress(msgspec.DecodeError):
            return (decode_metrics(bodies) if wanted is None or Kind.METRICS in wanted else []), 0
    records, found = [], 0
    for _, kind, body in stored_records(row):
        if wanted is not None and kind not in wanted:
            found += 1
            continue
        with suppress(msgspec.DecodeError):  # of a kind that a newer version made
            records.append(decode_body(body))
            found += 1
    return records, max(0, row.records - found)
