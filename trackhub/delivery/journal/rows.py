# SPDX-License-Identifier: Apache-2.0
"""Reading the frames of a journal's row, whatever became of the disk that they were on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from trackhub.framing import CorruptFrameError, Frame, scan_frames
from trackhub.records import Kind

__all__ = ["Row", "Stored", "stored_records"]

_GAP = int(Kind.GAP)


class Row(NamedTuple):
    """A batch as a lane reads it."""

    id: int
    stream: str
    first_position: int
    records: int
    frames: bytes


Stored = tuple[int, int, bytes]
"""One record of a row, not decoded yet: position, kind, body. A plain tuple, since there is one for every record."""


def stored_records(row: Row) -> Iterator[Stored]:
    """Yield the records of a row that can be read, each at the position that it always had.

    Of a damaged row come fewer than ``row.records``. Records behind the damage have their positions from the row's end.
    """
    frames, position, end = row.frames, row.first_position, 0
    with suppress(CorruptFrameError):
        for kind, _, body, end in scan_frames(frames):
            if kind != _GAP:
                yield position, kind, frames[body:end]
                position += 1
    missing = row.first_position + row.records - position
    if missing:
        rest = [frame for frame in _behind_damage(frames, end) if frame.kind != _GAP]
        position += missing - len(rest)
        for i, frame in enumerate(rest):
            yield position + i, frame.kind, frames[frame.body : frame.end]


def _behind_damage(data: bytes, offset: int) -> Iterator[Frame]:
    """Yield the sound frames at or after this place. Nothing tells where they start, so every offset is tried."""
    view = memoryview(data)
    while offset < len(view):
        end = offset
        with suppress(CorruptFrameError):
            for frame in scan_frames(view, offset):
                yield frame
                end = frame.end
        offset = max(end, offset + 1)
