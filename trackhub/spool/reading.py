# SPDX-License-Identifier: Apache-2.0
"""The sender's end of the spool: follow all streams of a site, hand out batches, give back what is acknowledged.

Frames are passed on as they are; a frame's body is decoded only where the reader must know what is in it (a gap, a
reference to a blob, the first record after damage).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import Counter
from pathlib import Path

import msgspec

from trackhub.errors import SpoolError
from trackhub.framing import (
    DECODED_IN_TRANSIT,
    MAX_BODY_BYTES,
    CorruptFrameError,
    decode_body,
    decode_head,
    encode_frame,
    pass_metrics,
    scan_frames,
)
from trackhub.records import Artifact, Blob, Gap, Image, Payload, Record
from trackhub.spool.layout import (
    SEGMENT_HEADER,
    Ack,
    Ledger,
    blob_file,
    read_ack,
    read_spool_info,
    segment_name,
    write_ack,
)

__all__ = ["SpoolBatch", "SpoolReader", "StreamCount"]

_SEGMENT = re.compile(r"([0-9a-f]{32})-(\d{6,})\.spool")
_READ_MARGIN = MAX_BODY_BYTES + 64  # so that one read always holds at least one whole frame
_FEW_BYTES = 128 << 10
_SEGMENT_MAX_BYTES = 1 << 30
_DAMAGED = "damaged"
# Checksum; a size up to MAX_BODY_BYTES; a kind; and the body, which is a msgpack array.
_HEADER_LIKE = re.compile(rb"(?s)(?=.{4}..[\x00-\x10]\x00[^\x00][\x90-\x9f])")
_log = logging.getLogger(__name__)


class SpoolBatch(msgspec.Struct, frozen=True):
    """Consecutive frames of one stream, and where the stream goes on after them.

    Attributes:
        stream, first_seq, next_seq, records, frames: as in ``wire.Batch``.
        blobs: the blobs that the frames refer to, in order.
        lost_blobs: the blobs of records that are not in the frames, since their bytes cannot be had.
        explained: records that are not in the frames, by reason: written gaps, and damaged places.
        segment, offset: where the next batch starts.
    """

    stream: str
    first_seq: int
    next_seq: int
    records: int
    frames: bytes
    blobs: tuple[Blob, ...]
    lost_blobs: tuple[Blob, ...]
    explained: dict[str, int]
    segment: int
    offset: int


class StreamCount(msgspec.Struct, frozen=True):
    """What is known of one stream's records: how many were logged, and what became of them."""

    logged: int
    dropped: dict[str, int]
    withheld: int
    acked: int
    refused: dict[str, int]
    spooled: int


class SpoolReader:
    """Follows all streams of a spool for one receiver. Used by one thread.

    Every receiver of a site has a reader with a cursor of its own; files are deleted when all cursors are past them.
    """

    def __init__(self, folder: Path, cursor: str) -> None:
        """Start where this cursor stood.

        Raises:
            SpoolError: the folder is not a spool, or its ``spool.json`` does not name the cursor.
        """
        self.folder = folder
        self.cursor = cursor
        self.info = read_spool_info(folder)
        if cursor not in self.info.cursors:
            raise SpoolError(f"{folder} is read by {', '.join(self.info.cursors)}, not by {cursor!r}")
        self._acks: dict[str, Ack] = {}
        self._last_segment: dict[str, int] = {}
        self._turn: list[str] = []
        self._turn_file = folder / f"{cursor}.turn"
        self._last_stream = self._turn_file.read_bytes().decode(errors="replace") if self._turn_file.exists() else ""
        self._named: set[tuple[str, int, int]] = set()
        self._lost_blobs: set[str] = set()

    def next_batch(self, max_records: int, max_bytes: int, *, final: bool = False) -> SpoolBatch | None:
        """Return the next unacknowledged frames of some stream, streams taking turns; None when there are none.

        The same frames are returned until ``settle`` is called.

        Args:
            max_records: most frames in the batch.
            max_bytes: most bytes of frames, but never less than one frame.
            final: no writer is alive any more, so an incomplete frame at the end is not waited for.

        Raises:
            OSError: a file cannot be read.
        """
        self._discover()
        for stream in list(self._turn):
            batch = self._read(stream, max_records, max_bytes, final)
            if batch is not None:
                self._turn.remove(stream)
                self._turn.append(stream)
                self._note_turn(stream)
                return batch
        return None

    def _note_turn(self, stream: str) -> None:
        """Store whose turn it is, so that after a crash the batch that may have arrived is sent again before others.

        A receiver that has it recognises it anyhow. But a replay from the site's side gives positions anew, and these must
        be the ones that the receiver gave.
        """
        if stream != self._last_stream:
            self._last_stream = stream
            with contextlib.suppress(OSError):  # delivery matters more, above all on a full disk
                self._turn_file.write_text(stream)

    def settle(self, batch: SpoolBatch, refused: str | None = None) -> None:
        """Store that the batch needs no further care: the receiver accepted it, or refused it for this reason.

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
            # Not before: a thread that waits for it may then ask a writer, which looks at the file.
            self._acks[batch.stream] = ack
        self._release(batch, old)

    def give_up_blob(self, name: str) -> None:
        """Say that a blob's bytes cannot be had, so that its record becomes a gap, counted as dropped(damaged)."""
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
        """Return whether so many bytes, or the rest of a segment, wait to be settled. Looks at sizes only."""
        waiting = 0
        for stream, (segment, offset) in self.ends().items():
            ack = self._acks.get(stream) or Ack()
            if segment > ack.segment:
                return True
            waiting += offset - ack.offset
        return waiting >= at_least

    def is_past(self, ends: dict[str, tuple[int, int]]) -> bool:
        """Return whether all that lies before these places is settled. May be called from any thread."""
        acks = {stream: self._acks.get(stream) or Ack() for stream in ends}
        return all((acks[stream].segment, acks[stream].offset) >= end for stream, end in ends.items())

    def counts(self) -> dict[str, StreamCount]:
        """Return what became of each stream's records. Reads what is left in the spool to count it."""
        self._discover()
        return {stream: self._count(stream) for stream in self._acks}

    def _discover(self) -> None:
        latest: dict[str, int] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if match := _SEGMENT.fullmatch(entry.name):
                    stream, segment = match[1], int(match[2])
                    latest[stream] = max(segment, latest.get(stream, 0))
                elif entry.name.endswith(".ledger"):
                    latest.setdefault(entry.name.removesuffix(".ledger"), -1)
        first = not self._acks
        for stream, segment in sorted(latest.items()):
            if stream not in self._acks:
                self._acks[stream] = read_ack(self.folder, stream, self.cursor)
                self._turn.append(stream)
            self._last_segment[stream] = segment
        if first:
            self._turn.sort(key=lambda stream: stream != self._last_stream)

    def _read(self, stream: str, max_records: int, max_bytes: int, final: bool) -> SpoolBatch | None:
        ack = self._acks[stream]
        return self._next(stream, ack.next_seq, ack.segment, ack.offset, max_records, max_bytes, final)

    def _next(
        self, stream: str, seq: int, segment: int, offset: int, max_records: int, max_bytes: int, final: bool
    ) -> SpoolBatch | None:
        """Return the first batch at or after this place, which ``seq`` is expected to follow."""
        while True:
            is_last = segment >= self._last_segment[stream]
            closed = final or not is_last
            # Little is read first: mostly it is enough. The last size is for more than a frame's length of damage.
            for limit in (_FEW_BYTES, max_bytes + _READ_MARGIN, _SEGMENT_MAX_BYTES):
                data = self._read_segment(stream, segment, offset, limit)
                is_rest = len(data) < limit
                sure = is_rest or limit > _FEW_BYTES
                batch = self._assemble(stream, seq, segment, offset, data, max_records, max_bytes, closed and sure)
                if is_rest or (batch is not None and (sure or batch.records == max_records)):
                    break
            if batch is not None:
                return batch
            if not closed:
                return None
            if data:
                self._name_damage(stream, segment, offset, offset + len(data))
            elif not is_last and offset <= len(SEGMENT_HEADER):
                self._name_missing(stream, segment)
            if is_last:
                return None
            segment, offset = segment + 1, len(SEGMENT_HEADER)

    def _read_segment(self, stream: str, segment: int, offset: int, max_bytes: int) -> bytes:
        try:
            fd = os.open(self.folder / segment_name(stream, segment), os.O_RDONLY)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(fd, max_bytes, offset)
        finally:
            os.close(fd)

    def _assemble(
        self,
        stream: str,
        seq: int,
        segment: int,
        offset: int,
        data: bytes,
        max_records: int,
        max_bytes: int,
        closed: bool,
    ) -> SpoolBatch | None:
        """Make a batch of the frames in ``data``, which stands at ``offset`` of the segment.

        None if there is no whole frame in it. Where records are missing before the first frame, a gap explains them.
        """
        found = _sound_start(data, seq, closed)
        if found is None:
            return None
        start = found
        if start:
            self._name_damage(stream, segment, offset, offset + start)
        first_seq, records, end, prefix = seq, 0, 0, b""
        blobs: list[Blob] = []
        lost_blobs: list[Blob] = []
        explained: Counter[str] = Counter()
        try:
            while frame := next(scan_frames(data, end or start), None):
                if records >= max_records or (end and frame.end - start > max_bytes):
                    break
                body = data[frame.body : frame.end]
                if not end:
                    head = decode_head(body)
                    if lost := head.seq - seq:
                        prefix = _damage_gap(seq, head.time, lost)
                        explained[_DAMAGED] += lost
                        seq = head.seq
                if frame.kind in DECODED_IN_TRANSIT:
                    payload = _payload(body)
                    if isinstance(payload, Gap):
                        explained[payload.reason] += payload.count
                        seq += payload.count
                        end = frame.end
                        continue
                    blob = payload.blob if isinstance(payload, Image | Artifact) else None
                    if blob is None or blob.name in self._lost_blobs:
                        if not end:
                            # Nothing can be made of this record: a gap in its place is a batch of its own.
                            prefix += _damage_gap(seq, head.time, 1)
                            explained[_DAMAGED] += 1
                            seq += 1
                            start = end = frame.end
                            lost_blobs = [] if blob is None else [blob]
                        break
                    blobs.append(blob)
                passed, end = pass_metrics(data, frame.end, max_records - records - 1, start + max_bytes)
                seq += 1 + passed
                records += 1 + passed
        except CorruptFrameError:
            pass  # the sound frames before it make a batch; the next one starts with the damage
        return SpoolBatch(
            stream=stream,
            first_seq=first_seq,
            next_seq=seq,
            records=records,
            frames=prefix + data[start:end],
            blobs=tuple(blobs),
            lost_blobs=tuple(lost_blobs),
            explained=dict(explained),
            segment=segment,
            offset=offset + end,
        )

    def _name_missing(self, stream: str, segment: int) -> None:
        path = self.folder / segment_name(stream, segment)
        if (stream, segment, -1) not in self._named and not path.exists():
            self._named.add((stream, segment, -1))
            _log.warning("%s is not there, though the stream goes on behind it; its records count as damaged", path)

    def _name_damage(self, stream: str, segment: int, start: int, end: int) -> None:
        if (stream, segment, start) not in self._named:
            self._named.add((stream, segment, start))
            _log.warning(
                "%s: bytes %d to %d cannot be read (damaged, or cut off when its writer died); the records in them, if "
                "any, are counted as dropped(%s)", self.folder / segment_name(stream, segment), start, end, _DAMAGED,
            )  # fmt: skip

    def _release(self, batch: SpoolBatch, old: Ack) -> None:
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
        # Before the frames are counted: what is logged meanwhile must not look as if it were missing.
        logged, dropped = Ledger.read(self.folder / f"{stream}.ledger")
        spooled, explained, seq = 0, Counter(ack.explained), ack.next_seq
        segment, offset = ack.segment, ack.offset
        while batch := self._next(stream, seq, segment, offset, 1 << 30, MAX_BODY_BYTES, final=True):
            spooled += batch.records
            explained.update(batch.explained)
            seq, segment, offset = batch.next_seq, batch.segment, batch.offset
        logged = max(logged, seq)
        withheld = explained.pop("withheld", 0)
        # The writer's own ledger counts its drops also where the gap never got into the stream. Whatever then has no
        # explanation was in a damaged place.
        dropped = {reason: max(dropped.get(reason, 0), explained[reason]) for reason in {*dropped, *explained}}
        dropped.pop(_DAMAGED, None)
        refused = ack.refused
        damaged = logged - withheld - sum(dropped.values()) - sum(refused.values()) - ack.acked - spooled
        if damaged > 0:
            dropped = {**dropped, _DAMAGED: damaged}
            if (tail := damaged - explained[_DAMAGED]) > 0 and (stream, -1, tail) not in self._named:
                self._named.add((stream, -1, tail))
                _log.warning(
                    "%s: the last %d records of stream %s, before number %d, are not there; they count as damaged",
                    self.folder, tail, stream, logged,
                )  # fmt: skip
        return StreamCount(logged, dropped, withheld, ack.acked, refused, spooled)


def _payload(body: bytes) -> Payload | None:
    """Return the payload of a record; None if the body makes no sense, although its checksum is right."""
    try:
        return decode_body(body).payload
    except msgspec.DecodeError:
        return None


def _damage_gap(seq: int, time: float, count: int) -> bytes:
    return encode_frame(Record(seq, time, None, None, Gap(count, _DAMAGED)))


def _sound_start(data: bytes, seq: int, closed: bool) -> int | None:
    """Return where the first intact frame with a record of ``seq`` or later starts; None if there is none.

    0 in a sound spool. After damage nothing tells where the next frame starts, so every place is tried that looks like
    a frame's header.
    """
    if _is_sound(data, 0, seq):
        return 0
    if not closed and _is_cut_off(data):
        return None  # the rest is about to be written
    places = (match.start() for match in _HEADER_LIKE.finditer(data))
    return next((place for place in places if _is_sound(data, place, seq)), None)


def _is_sound(data: bytes, start: int, seq: int) -> bool:
    try:
        frame = next(scan_frames(data, start), None)
        return frame is not None and decode_head(data[frame.body : frame.end]).seq >= seq
    except (CorruptFrameError, msgspec.DecodeError):
        return False


def _is_cut_off(data: bytes) -> bool:
    try:
        return next(scan_frames(data), None) is None
    except CorruptFrameError:
        return False
