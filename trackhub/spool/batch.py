# SPDX-License-Identifier: Apache-2.0
"""Makes a batch of consecutive frames in a segment. The sender's end of the spool calls it.

Frames are passed on as they are. Only three things are decoded: the ``seq`` of the first record, gaps, and records
that refer to a blob.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Set
from typing import NamedTuple

import msgspec

from trackhub.framing import (
    DECODED_IN_TRANSIT,
    CorruptFrameError,
    Frame,
    Head,
    decode_body,
    decode_head,
    pass_metrics,
    scan_frames,
)
from trackhub.records import Artifact, Blob, Gap, Image, Payload
from trackhub.spool.skip_damage import DAMAGED, damage_gap

__all__ = ["Place", "SpoolBatch", "assemble"]


class Place(NamedTuple):
    """A place in a stream.

    Attributes:
        seq: the number of the next record.
        segment: the segment that it is in.
        offset: where its frame starts in the segment.
    """

    seq: int
    segment: int
    offset: int


class SpoolBatch(msgspec.Struct, frozen=True):
    """Consecutive frames of one stream, and where the stream goes on after them.

    Attributes:
        stream: the stream's id.
        first_seq: the number of the first record. Records that a gap replaces are numbered, too.
        next_seq: the number of the record after the last one.
        records: how many records the frames hold, gaps not counted.
        frames: the frames, one after another.
        blobs: the blobs that the frames refer to, in order.
        lost_blobs: the blobs of records that a gap replaced, because the bytes cannot be read or a policy withholds
            them.
        explained: reason -> number of records that are not in the frames: dropped, damaged, or withheld by a policy.
        segment: the segment where the next batch starts.
        offset: where it starts in that segment.
        withheld: rule -> number of records that it withholds. ``explained`` has the sum.
        altered: rule -> number of values that it left out of the records in the frames or changed.
        seen: what `trackhub.policy.thinning` remembers of the stream after this batch.
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
    withheld: dict[str, int] = {}
    altered: dict[str, int] = {}
    seen: dict[str, tuple[int, float]] = {}

    @property
    def next_place(self) -> Place:
        """Where the next batch starts."""
        return Place(self.next_seq, self.segment, self.offset)


def assemble(
    stream: str, place: Place, data: bytes, start: int, max_records: int, max_bytes: int, lost_blobs: Set[str]
) -> SpoolBatch:
    """Return the batch of the frames that follow each other in ``data``. It has at least one frame.

    Args:
        stream: the stream's id.
        place: where the batch should start. If the first frame comes later, a gap replaces the records in between.
        data: bytes of the segment from ``place`` on.
        start: where the first intact frame starts in ``data``.
        max_records: most records in the batch.
        max_bytes: most bytes of frames. The first frame may be larger.
        lost_blobs: names of blobs whose bytes cannot be read. A gap takes the place of their records.
    """
    assembly = _Assembly(data, start, place.seq, lost_blobs)
    # If a frame is damaged, the batch ends before it. The next batch starts with the damage.
    with contextlib.suppress(CorruptFrameError):
        assembly.take_frames(max_records, max_bytes)
    return SpoolBatch(
        stream=stream,
        first_seq=place.seq,
        next_seq=assembly.seq,
        records=assembly.records,
        frames=assembly.gaps + data[assembly.start : assembly.end],
        blobs=tuple(assembly.blobs),
        lost_blobs=tuple(assembly.lost),
        explained=dict(assembly.explained),
        segment=place.segment,
        offset=place.offset + assembly.end,
    )


class _Assembly:
    """A batch in the making.

    Attributes:
        seq: the number of the next record.
        records: how many were taken.
        gaps: frames of gaps that go before the frames of the spool.
        start: where the taken frames start.
        end: where the taken frames end.
        blobs: the blobs of the taken records.
        lost: as ``SpoolBatch.lost_blobs``.
        explained: as ``SpoolBatch.explained``.
    """

    def __init__(self, data: bytes, start: int, seq: int, lost_blobs: Set[str]) -> None:
        self.seq = seq
        self.records = 0
        self.gaps = b""
        self.start = self.end = start
        self.blobs: list[Blob] = []
        self.lost: list[Blob] = []
        self.explained: Counter[str] = Counter()
        self._data = data
        self._lost_blobs = lost_blobs

    def take_frames(self, max_records: int, max_bytes: int) -> None:
        """Take frames until the batch is full, the data ends, records are missing, or a record's blob is lost.

        A jump in the records' numbers shows that records are missing, even if whole frames are gone. The next batch
        then starts with a gap for the missing records.

        Raises:
            CorruptFrameError: damage follows the frames that were taken.
        """
        one_by_one = False
        while frame := next(scan_frames(self._data, self.end), None):
            if self.records >= max_records or (not self._is_empty and frame.end - self.start > max_bytes):
                return
            body = self._data[frame.body : frame.end]
            head = _head(body)
            is_first = self._is_empty
            if head is not None and head.seq != self.seq:
                if not is_first:
                    return
                self._explain_missing(head)
            if frame.kind in DECODED_IN_TRANSIT:
                payload = _payload(body)
                if isinstance(payload, Gap):
                    self._take_gap(frame, payload)
                    continue
                if not self._take_blob(payload):
                    if is_first and head is not None:
                        self._replace_record(frame, head, payload)
                    return
            more = 0 if one_by_one else max_records - self.records - 1
            passed, last, self.end = pass_metrics(self._data, frame.end, more, self.start + max_bytes)
            if passed and self._seq_at(last) != self.seq + passed:
                one_by_one, passed, self.end = True, 0, frame.end
            self.seq += 1 + passed
            self.records += 1 + passed

    def _seq_at(self, start: int) -> int | None:
        frame = next(scan_frames(self._data, start))
        head = _head(self._data[frame.body : frame.end])
        return head.seq if head is not None else None

    @property
    def _is_empty(self) -> bool:
        return self.end == self.start

    def _explain_missing(self, head: Head) -> None:
        """Add a gap for the records that are missing before the first frame."""
        self._add_gap(self.seq, head.time, head.seq - self.seq)
        self.seq = head.seq

    def _take_gap(self, frame: Frame, gap: Gap) -> None:
        self.explained[gap.reason] += gap.count
        self.seq += gap.count
        self.end = frame.end

    def _take_blob(self, payload: Payload | None) -> bool:
        """Note the record's blob. Return False if the record cannot be delivered."""
        if not isinstance(payload, Image | Artifact) or payload.blob.name in self._lost_blobs:
            return False
        self.blobs.append(payload.blob)
        return True

    def _replace_record(self, frame: Frame, head: Head, payload: Payload | None) -> None:
        """Replace the first record by a gap. The batch then has gaps only."""
        self._add_gap(self.seq, head.time, 1)
        self.seq += 1
        self.start = self.end = frame.end
        if isinstance(payload, Image | Artifact):
            self.lost.append(payload.blob)

    def _add_gap(self, seq: int, time: float, count: int) -> None:
        self.gaps += damage_gap(seq, time, count)
        self.explained[DAMAGED] += count


def _head(body: bytes) -> Head | None:
    """Return a record's number and time. None if the body makes no sense, although its checksum is right."""
    try:
        return decode_head(body)
    except msgspec.DecodeError:
        return None


def _payload(body: bytes) -> Payload | None:
    """Return the payload of a record. None if the body makes no sense, although its checksum is right."""
    try:
        return decode_body(body).payload
    except msgspec.DecodeError:
        return None
