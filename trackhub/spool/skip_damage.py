# SPDX-License-Identifier: Apache-2.0
"""Finds the next intact frame after damage, and warns once of what could not be read.

The sender's end of the spool calls it. A torn write, a bad disk or a lost file costs the records in the damaged place.
These records count as dropped, with the reason ``damaged``. A gap takes their place in the stream.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable
from pathlib import Path

import msgspec

from trackhub.framing import CorruptFrameError, decode_head, encode_frame, scan_frames
from trackhub.records import Gap, Record

__all__ = ["DAMAGED", "DamageLog", "damage_gap", "find_sound_frame"]

DAMAGED = "damaged"
"""The reason of a gap that takes the place of records that cannot be read."""

# What a header looks like: a checksum, a size up to MAX_BODY_BYTES, and a kind. The body follows, a msgpack array.
_HEADER_LIKE = re.compile(rb"(?s)(?=.{4}..[\x00-\x10]\x00[^\x00][\x90-\x9f])")
_log = logging.getLogger(__name__)


def find_sound_frame(data: bytes, seq: int, *, closed: bool) -> int | None:
    """Return the start of the first intact frame whose record has this ``seq`` or a later one; None if there is none.

    Without damage, this is 0. After damage, the start of the next frame is not known. So this tries every place that
    looks like a frame's header.

    Args:
        data: bytes of a segment, from a place where a frame should start.
        seq: the number that the frame's record should have.
        closed: True if the segment's writer has finished it. Then an incomplete frame is damage.
    """
    if _is_sound(data, 0, seq):
        return 0
    if not closed and _is_incomplete(data):
        return None  # its writer is about to write the rest
    places = (match.start() for match in _HEADER_LIKE.finditer(data))
    return next((place for place in places if _is_sound(data, place, seq)), None)


def damage_gap(seq: int, time: float, count: int) -> bytes:
    """Return the frame of a gap that takes the place of records that cannot be read.

    Args:
        seq: the number of the first such record.
        time: unix seconds for the gap's record.
        count: how many such records there are.
    """
    return encode_frame(Record(seq, time, None, None, Gap(count, DAMAGED)))


def _is_sound(data: bytes, start: int, seq: int) -> bool:
    try:
        frame = next(scan_frames(data, start), None)
        return frame is not None and decode_head(data[frame.body : frame.end]).seq >= seq
    except (CorruptFrameError, msgspec.DecodeError):
        return False


def _is_incomplete(data: bytes) -> bool:
    try:
        return next(scan_frames(data), None) is None
    except CorruptFrameError:
        return False


class DamageLog:
    """Warns of damage once for each place, since a reader may come to the same place many times."""

    def __init__(self) -> None:
        self._named: set[Hashable] = set()

    def unreadable(self, segment: Path, start: int, end: int) -> None:
        """Warn that these bytes of a segment cannot be read.

        Args:
            segment: the segment's file.
            start, end: the offsets of the bytes.
        """
        if self._is_new((segment, start)):
            _log.warning(
                "%s: bytes %d to %d cannot be read (damaged, or cut off when their writer died); the records in them, "
                "if any, count as dropped (reason: %s)",
                segment, start, end, DAMAGED,
            )  # fmt: skip

    def missing_segment(self, segment: Path) -> None:
        """Warn that a segment is missing in the middle of its stream."""
        if not segment.exists() and self._is_new(segment):
            _log.warning(
                "%s is missing, though its stream goes on; its records count as dropped (reason: %s)", segment, DAMAGED
            )

    def missing_tail(self, folder: Path, stream: str, count: int, logged: int) -> None:
        """Warn that a stream ends before the last of the records that its writer counted.

        Args:
            folder: the spool's folder.
            stream: the stream's id.
            count: how many records are missing.
            logged: how many its writer counted.
        """
        if self._is_new((stream, count)):
            _log.warning(
                "%s: the last %d of the %d records of stream %s are missing; they count as dropped (reason: %s)",
                folder, count, logged, stream, DAMAGED,
            )  # fmt: skip

    def _is_new(self, place: Hashable) -> bool:
        is_new = place not in self._named
        self._named.add(place)
        return is_new
