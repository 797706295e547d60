# SPDX-License-Identifier: Apache-2.0
"""The sender's end of the spool: follow all streams of a site, hand out batches, and delete what is acknowledged.

A sender has one reader. `trackhub.spool.batch` makes the batches, and `trackhub.spool.damage` finds the way on after
damage.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from pathlib import Path

from trackhub.errors import SpoolError
from trackhub.framing import MAX_BODY_BYTES
from trackhub.spool.batch import Place, SpoolBatch, assemble
from trackhub.spool.counts import StreamCount, count_stream
from trackhub.spool.damage import DAMAGED, DamageLog, find_sound_frame
from trackhub.spool.layout import (
    SEGMENT_HEADER,
    Ack,
    Ledger,
    blob_file,
    ledger_file,
    read_ack,
    read_spool_info,
    segment_name,
    write_ack,
)

__all__ = ["SpoolReader"]

_SEGMENT = re.compile(r"([0-9a-f]{32})-(\d{6,})\.spool")
_READ_MARGIN = MAX_BODY_BYTES + 64  # so that one read always holds at least one whole frame
_FEW_BYTES = 128 << 10
_SEGMENT_MAX_BYTES = 1 << 30


class SpoolReader:
    """Follows all streams of a spool for one receiver. One thread uses it, except where a method says otherwise.

    Each receiver of a site has a reader with a cursor of its own. Files are deleted when all cursors are past them.

    Attributes:
        folder: the spool's folder.
        cursor: the reader's name.
        info: what ``spool.json`` said when the reader was made.
    """

    def __init__(self, folder: Path, cursor: str) -> None:
        """Start where this cursor stood.

        Args:
            folder: the spool's folder.
            cursor: the reader's name.

        Raises:
            SpoolError: the folder is not a spool, or its ``spool.json`` does not name the cursor.
        """
        self.folder = folder
        self.cursor = cursor
        self.info = read_spool_info(folder)
        if cursor not in self.info.cursors:
            raise SpoolError(f"the spool in {folder} is read by {', '.join(self.info.cursors)}, not by {cursor!r}")
        self._acks: dict[str, Ack] = {}
        self._last_segment: dict[str, int] = {}
        self._turn: list[str] = []
        self._turn_file = folder / f"{cursor}.turn"
        self._last_stream = self._turn_file.read_bytes().decode(errors="replace") if self._turn_file.exists() else ""
        self._damage = DamageLog()
        self._lost_blobs: set[str] = set()

    def next_batch(self, max_records: int, max_bytes: int, *, final: bool = False) -> SpoolBatch | None:
        """Return the next unacknowledged frames of some stream, or None if there are none. Streams take turns.

        Until ``settle`` is called for a stream, that stream's next batch starts with the same frame.

        Args:
            max_records: most records in the batch.
            max_bytes: most bytes of frames, but never less than one frame.
            final: all writers have ended, so an incomplete frame at the end of a stream is damage.

        Raises:
            OSError: a file cannot be read.
        """
        self._discover()
        for stream in list(self._turn):
            ack = self._acks[stream]
            batch = self._next(stream, Place(ack.next_seq, ack.segment, ack.offset), max_records, max_bytes, final)
            if batch is not None:
                self._turn.remove(stream)
                self._turn.append(stream)
                self._note_turn(stream)
                return batch
        return None

    def _note_turn(self, stream: str) -> None:
        """Store whose turn it is. After a crash, the batch that may have arrived is then sent again before others.

        The receiver recognises that batch in any case. A replay from the site's side, however, gives its records new
        positions, and these must be the positions that the receiver gave them.
        """
        if stream != self._last_stream:
            self._last_stream = stream
            with contextlib.suppress(OSError):  # delivery matters more, above all on a full disk
                self._turn_file.write_text(stream)

    def settle(self, batch: SpoolBatch, refused: str | None = None) -> None:
        """Store that the receiver accepted the batch, or refused it for this reason. Delete what no reader needs.

        Args:
            batch: what ``next_batch`` returned last for its stream.
            refused: why the receiver refused it; None if it accepted it.

        Raises:
            OSError: the cursor cannot be stored; the batch will be sent again after a restart.
        """
        old = self._acks[batch.stream]
        explained = Counter(old.explained)
        explained.update(batch.explained)
        refusals = Counter(old.refused)
        if refused is not None:
            refusals[refused] += batch.records
        ack = Ack(
            batch.segment,
            batch.offset,
            batch.next_seq,
            old.acked + (batch.records if refused is None else 0),
            dict(refusals),
            dict(explained),
        )
        try:
            write_ack(self.folder, batch.stream, self.cursor, ack)
        finally:
            # Not earlier: a thread that waits for this may then ask a writer, which looks at the file.
            self._acks[batch.stream] = ack
        self._delete_settled(batch, old)

    def give_up_blob(self, name: str) -> None:
        """Say that a blob's bytes cannot be had. A gap takes the place of its record, counted as dropped(damaged)."""
        self._lost_blobs.add(name)

    def ends(self) -> dict[str, tuple[int, int]]:
        """Return where each stream ends now: segment and offset. May be called from any thread."""
        found: dict[str, tuple[int, int]] = {}
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if match := _SEGMENT.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # acknowledged and deleted meanwhile
                        end = int(match[2]), entry.stat().st_size
                        found[match[1]] = max(end, found.get(match[1], end))
        return found

    def has_bytes(self, at_least: int) -> bool:
        """Return whether this many bytes, or the rest of a segment, wait to be settled. Looks at file sizes only."""
        waiting = 0
        for stream, (segment, offset) in self.ends().items():
            ack = self._acks.get(stream) or Ack()
            if segment > ack.segment:
                return True
            waiting += offset - ack.offset
        return waiting >= at_least

    def is_past(self, ends: dict[str, tuple[int, int]]) -> bool:
        """Return whether everything before these places is settled. May be called from any thread.

        Args:
            ends: what ``ends`` returned.
        """
        acks = {stream: self._acks.get(stream) or Ack() for stream in ends}
        return all((acks[stream].segment, acks[stream].offset) >= end for stream, end in ends.items())

    def counts(self) -> dict[str, StreamCount]:
        """Return what became of each stream's records. Reads the unsettled part of the spool to count it.

        Raises:
            OSError: a file cannot be read.
        """
        self._discover()
        return {stream: self._count(stream) for stream in self._acks}

    def _discover(self) -> None:
        """Look for new streams and segments."""
        latest: dict[str, int] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if match := _SEGMENT.fullmatch(entry.name):
                    stream, segment = match[1], int(match[2])
                    latest[stream] = max(segment, latest.get(stream, 0))
                elif entry.name.endswith(".ledger"):  # of a stream that has dropped all its records so far
                    latest.setdefault(entry.name.removesuffix(".ledger"), -1)
        is_first = not self._acks
        for stream, segment in sorted(latest.items()):
            if stream not in self._acks:
                self._acks[stream] = read_ack(self.folder, stream, self.cursor)
                self._turn.append(stream)
            self._last_segment[stream] = segment
        if is_first:
            self._turn.sort(key=lambda stream: stream != self._last_stream)

    def _next(self, stream: str, place: Place, max_records: int, max_bytes: int, final: bool) -> SpoolBatch | None:
        """Return the first batch at or behind this place."""
        while True:
            is_last = place.segment >= self._last_segment[stream]
            closed = final or not is_last
            batch, looked_at = self._read_batch(stream, place, max_records, max_bytes, closed)
            if batch is not None:
                return batch
            if not closed:
                return None
            path = self.folder / segment_name(stream, place.segment)
            if looked_at:
                self._damage.unreadable(path, place.offset, place.offset + looked_at)
            elif not is_last and place.offset <= len(SEGMENT_HEADER):
                self._damage.missing_segment(path)
            if is_last:
                return None
            place = Place(place.seq, place.segment + 1, len(SEGMENT_HEADER))

    def _read_batch(
        self, stream: str, place: Place, max_records: int, max_bytes: int, closed: bool
    ) -> tuple[SpoolBatch | None, int]:
        """Return the first batch in the rest of this segment, if there is one, and how many bytes were looked at."""
        path = self.folder / segment_name(stream, place.segment)
        # Read a little first: that is mostly enough. The last size is for damage that is longer than a frame.
        for limit in (_FEW_BYTES, max_bytes + _READ_MARGIN, _SEGMENT_MAX_BYTES):
            data = _read(path, place.offset, limit)
            is_rest = len(data) < limit
            # A frame that does not end within a few bytes may just be a large one.
            can_tell = is_rest or limit > _FEW_BYTES
            start = find_sound_frame(data, place.seq, closed=closed and can_tell)
            if start:
                self._damage.unreadable(path, place.offset, place.offset + start)
            batch = None
            if start is not None:
                batch = assemble(stream, place, data, start, max_records, max_bytes, self._lost_blobs)
            if is_rest or (batch is not None and (can_tell or batch.records == max_records)):
                break
        return batch, len(data)

    def _delete_settled(self, batch: SpoolBatch, old: Ack) -> None:
        """Delete segments and blobs that every cursor is past."""
        others = [read_ack(self.folder, batch.stream, c) for c in self.info.cursors if c != self.cursor]
        for blob in batch.blobs + batch.lost_blobs:
            seq = int(blob.name.rpartition("-")[2])
            if all(other.next_seq > seq for other in others):
                blob_file(self.folder, blob.name).unlink(missing_ok=True)
        reached = min([batch.segment, *(other.segment for other in others)])
        for segment in range(max(0, old.segment - 1), reached):
            (self.folder / segment_name(batch.stream, segment)).unlink(missing_ok=True)

    def _count(self, stream: str) -> StreamCount:
        ack = self._acks[stream]
        # The ledger is read first: otherwise, what is logged while the frames are counted would seem to be missing.
        logged, dropped = Ledger.read(ledger_file(self.folder, stream))
        spooled, explained = 0, Counter(ack.explained)
        place = Place(ack.next_seq, ack.segment, ack.offset)
        while batch := self._next(stream, place, 1 << 30, MAX_BODY_BYTES, final=True):
            spooled += batch.records
            explained.update(batch.explained)
            place = batch.next_place
        logged = max(logged, place.seq)
        count = count_stream(ack, logged=logged, dropped=dropped, spooled=spooled, explained=explained)
        if (tail := count.dropped.get(DAMAGED, 0) - explained[DAMAGED]) > 0:
            self._damage.missing_tail(self.folder, stream, tail, logged)
        return count


def _read(path: Path, offset: int, max_bytes: int) -> bytes:
    """Return bytes of a file; none if there is no such file."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, max_bytes, offset)
    finally:
        os.close(fd)
