# SPDX-License-Identifier: Apache-2.0
"""Reads a run's records from the journal, and makes them entries that one backend can store.

`RunDelivery` asks for the next entries. The reader decodes and adapts each record, and tells the run's `Cursor` about
each one that does not become an entry.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path

import msgspec

from trackhub.delivery.check_received_batch import KnownKeys, RefusedRecordError, check_blob, check_record
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.tables_and_rows import Row, stored_records
from trackhub.delivery.lane.cursor import Cursor
from trackhub.delivery.lane.describe_record import named_rejection
from trackhub.delivery.lane.fit_records_to_backend import Adaptation
from trackhub.records import Artifact, Image, Kind
from trackhub.spi import Capabilities, Entry, Rejection

__all__ = ["EntryReader"]

_READ_BYTES = 4 << 20  # read by one query: one row at a time is slow, and all rows are too much for the memory
_SHAPED_BYTES = 1 << 20  # frames that become entries at once. A hostile record needs 60 times its size in memory
_KNOWN_KINDS = frozenset(int(kind) for kind in Kind)
_log = logging.getLogger(__name__)


class EntryReader:
    """Reads one run's rows in their order. Used by one thread.

    Attributes:
        upto: the last row whose records were read. A row is read as a whole, so that the adaptation's memory always
            belongs to a place between two rows.
        skip_before: the opened run holds the records before this position already.
    """

    def __init__(self, journal: Journal, cursor: Cursor, capabilities: Capabilities, blob_dir: Path) -> None:
        """Start after the last confirmed row.

        Args:
            journal: where the records are.
            cursor: the run's cursor. It gives the place to start at, and counts what becomes of the records.
            capabilities: what the backend can store.
            blob_dir: where the site's blobs are.

        Raises:
            JournalError: the stored cursor is damaged, and the journal cannot be written.
        """
        self.skip_before = 0
        self._journal = journal
        self._cursor = cursor
        self._can = capabilities
        self._blob_dir = blob_dir
        try:
            self._adaptation = Adaptation(capabilities, cursor.progress.memory)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # The stored memory is damaged. Without it, records without a step would get steps that other records have.
            _log.warning(
                "lane %s: the journal's state of run %s is damaged; the lane delivers the run again from the start",
                cursor.lane, cursor.site,
            )  # fmt: skip
            cursor.start_over()
            self._adaptation = Adaptation(capabilities)
        self.upto = cursor.confirmed
        self._rows: deque[Row] = deque()
        self._keys = KnownKeys()

    def start_over(self) -> None:
        """Start before the run's first row, with nothing remembered. Only before the first `read`."""
        self.upto = 0
        self._adaptation = Adaptation(self._can)

    def memory(self) -> bytes:
        """Return what the adaptation must remember to go on after the row ``upto``."""
        return self._adaptation.memory()

    def has_more(self) -> bool:
        """Return whether there are rows to read.

        Raises:
            JournalError: the journal cannot be read.
        """
        return self._journal.has_rows_after(self._cursor.site_id, self.upto)

    def read(self) -> list[Entry] | None:
        """Return the entries of the next rows, enough for one write; None if there are no more rows.

        The list is empty if no record of these rows becomes an entry. It can exceed one write,
        because rows are read whole. A row is confirmed only as a whole.

        Raises:
            JournalError: the journal cannot be read.
        """
        if not self._rows:
            self._rows.extend(self._journal.read(self._cursor.site_id, self.upto, _READ_BYTES))
            if not self._rows:
                return None
        entries: list[Entry] = []
        size = 0
        while self._rows and len(entries) < self._can.max_batch and size < _SHAPED_BYTES:
            row = self._rows.popleft()
            self.upto = row.id
            size += len(row.frames)
            found, shift = 0, self._cursor.shift_of(row.id)
            for place, kind, body in stored_records(row):
                position = place + shift
                try:
                    self._adapt(row.stream, position, kind, body, entries)
                except Exception as e:
                    # A defect of trackhub. It must cost only this record.
                    _log.debug("record %d of run %s", position, self._cursor.site, exc_info=True)
                    self._cursor.reject(Rejection(position, "not_adaptable", f"{type(e).__name__}: {e}"))
                found += 1
            if found < row.records:
                self._reject_damaged(row, row.records - found)
        return entries

    def _adapt(self, stream: str, position: int, kind: int, body: bytes, entries: list[Entry]) -> None:
        """Append the record's entry. If the record cannot become an entry, count the reason."""
        if kind not in _KNOWN_KINDS:
            detail = f"a newer trackhub at the site logged it, with kind {kind}; update the receiver's trackhub"
            self._cursor.reject(Rejection(position, "unknown_kind", detail))
            return
        try:
            # The receiver has checked it already. But the journal may come from somebody else.
            record = check_record(stream, kind, body, self._keys)
            if isinstance(record.payload, Image | Artifact):
                self._check_blob(record.payload)
        except RefusedRecordError as e:
            self._cursor.reject(Rejection(position, e.reason, str(e)))
            return
        adapted, altered = self._adaptation.adapt(stream, record, position)
        if isinstance(adapted, Rejection):
            self._cursor.reject(named_rejection(record.payload, adapted))
            return
        # Adapt a record even if the run holds it already. The adaptation must remember it, so that later records become
        # the same entries as before the crash.
        if position < self.skip_before:
            self._cursor.count_held(position)
        else:
            entries.append(adapted)
        if altered:
            self._cursor.count_altered(altered)

    def _check_blob(self, payload: Image | Artifact) -> None:
        path = self._blob_dir / payload.blob.name
        if os.path.islink(path) or not os.path.isfile(path):
            return  # the backend says what is missing, and `RunInfo.blob_path` refuses links
        try:
            check_blob(payload, path)
        except OSError as e:  # the disk is in trouble. That is no reason to reject the record
            _log.debug("blob %s of run %s: %s", path, self._cursor.site, e)

    def _reject_damaged(self, row: Row, count: int) -> None:
        last = row.first_position + row.records - 1
        _log.warning(
            "%s: row %d is damaged: %d of the records %d to %d of run %s cannot be read; backend %s does not get them",
            self._journal.path, row.id, count, row.first_position, last, self._cursor.site, self._cursor.lane,
        )  # fmt: skip
        self._cursor.count_rejected("damaged", count)
