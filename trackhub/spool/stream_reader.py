# SPDX-License-Identifier: Apache-2.0
"""Reads the next batch of a stream's segments from a given place, and skips damage. `SpoolReader` calls it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from trackhub.framing import MAX_BODY_BYTES, CorruptFrameError, decode_head, scan_frames
from trackhub.open_without_links import open_plain
from trackhub.spool.batch import Place, SpoolBatch, assemble
from trackhub.spool.layout import SEGMENT_HEADER, segment_name
from trackhub.spool.skip_damage import DamageLog, find_sound_frame

__all__ = ["Extent", "SegmentReader", "find_place"]

_READ_MARGIN = MAX_BODY_BYTES + 64  # so that one read always holds at least one whole frame
_FEW_BYTES = 128 << 10
_SEGMENT_MAX_BYTES = 1 << 30


class Extent(NamedTuple):
    """What is known of a stream that is read.

    Attributes:
        stream: the stream's id.
        last_segment: its last segment; -1 if it has none.
        has_ended: True if its writer has ended. Then an incomplete frame at the end is damage.
    """

    stream: str
    last_segment: int
    has_ended: bool


def find_place(folder: Path, stream: str, segments: Iterable[int], seq: int) -> Place:
    """Return the place of the first record with this ``seq`` or a later one.

    Args:
        folder: the spool's folder.
        stream: the stream's id.
        segments: the numbers of its segments that exist, in order.
        seq: the number of the record.

    Raises:
        OSError: a segment is there and cannot be read.
    """
    place = Place(seq, 0, len(SEGMENT_HEADER))
    for segment in segments:
        data, end = _read(folder / segment_name(stream, segment), 0, _SEGMENT_MAX_BYTES), len(SEGMENT_HEADER)
        with contextlib.suppress(CorruptFrameError, msgspec.DecodeError):  # the reader names the damage later
            for frame in scan_frames(data, end):
                if decode_head(data[frame.body : frame.end]).seq >= seq:
                    return Place(seq, segment, end)
                end = frame.end
        place = Place(seq, segment, end)
        if end < len(data):
            return place
    return place


class SegmentReader:
    """Reads the segments of one spool.

    Attributes:
        lost_blobs: names of blobs whose bytes are lost. A gap takes the place of their records.
    """

    def __init__(self, folder: Path, damage: DamageLog) -> None:
        """Read from this folder, and report damage to ``damage``."""
        self.lost_blobs: set[str] = set()
        self._folder = folder
        self._damage = damage

    def next_batch(self, extent: Extent, place: Place, max_records: int, max_bytes: int) -> SpoolBatch | None:
        """Return the first batch at or after this place. None if there is nothing that can be read now.

        Args:
            extent: the stream.
            place: where to start.
            max_records: most records in the batch.
            max_bytes: most bytes of frames. The first frame may be larger.

        Raises:
            OSError: a segment is there and cannot be read.
        """
        stream = extent.stream
        while True:
            is_last = place.segment >= extent.last_segment
            closed = extent.has_ended or not is_last
            batch, looked_at = self._read_batch(stream, place, max_records, max_bytes, closed)
            if batch is not None:
                return batch
            if not closed:
                return None
            path = self._folder / segment_name(stream, place.segment)
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
        """Return the first batch in the rest of this segment (None if there is none) and the number of bytes read."""
        path = self._folder / segment_name(stream, place.segment)
        # A small read is mostly enough. The largest read is for damage that is longer than a frame.
        for limit in (_FEW_BYTES, max_bytes + _READ_MARGIN, _SEGMENT_MAX_BYTES):
            data = _read(path, place.offset, limit)
            is_rest = len(data) < limit
            # A frame that does not end within a small read may be damaged, or only large.
            can_tell = is_rest or limit > _FEW_BYTES
            start = find_sound_frame(data, place.seq, closed=closed and can_tell)
            if start:
                self._damage.unreadable(path, place.offset, place.offset + start)
            batch = None
            if start is not None:
                batch = assemble(stream, place, data, start, max_records, max_bytes, self.lost_blobs)
            if is_rest or (batch is not None and (can_tell or batch.records == max_records)):
                break
        return batch, len(data)


def _read(path: Path, offset: int, max_bytes: int) -> bytes:
    """Return bytes of a file; none if there is no such file."""
    try:
        fd = open_plain(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, max_bytes, offset)
    except OSError as e:
        e.filename = str(path)  # the log can then name the file
        raise
    finally:
        os.close(fd)
