# SPDX-License-Identifier: Apache-2.0
"""Reading the frames of a journal's row, whatever became of the disk that they were on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from trackhub.records import CorruptFrameError, Frame, Kind, scan_frames

__all__ = ["Row", "Stored", "stored_records"]


class Row(NamedTuple):
    """A batch as a lane reads it."""

    id: int
    stream: str
    first_position: int
    records: int
    frames: bytes


class Stored(NamedTuple):
    """One record of a row, not decoded yet."""

    position: int
    kind: int
    body: bytes


def stored_records(row: Row) -> Iterator[Stored]:
    """Yield the records of a row that can be read, each at the position that it always had.

    Of a damaged row come fewer than ``row.records``. Records behind the damage have their positions from the row's end.
    """
    found = [frame for frame in _before_damage(row.frames, 0) if frame.kind != Kind.GAP]
    yield from _stored(row, found, row.first_position)
    if len(found) < row.records:
        start = found[-1].end if found else 0
        rest = [frame for frame in _behind_damage(row.frames, start) if frame.kind != Kind.GAP]
        yield from _stored(row, rest, row.first_position + row.records - len(rest))


def _stored(row: Row, frames: list[Frame], position: int) -> Iterator[Stored]:
    for i, frame in enumerate(frames):
        yield Stored(position + i, frame.kind, row.frames[frame.body : frame.end])


def _before_damage(data: bytes | memoryview, offset: int) -> Iterator[Frame]:
    try:
        yield from scan_frames(data, offset)
    except CorruptFrameError:
        return


def _behind_damage(data: bytes, offset: int) -> Iterator[Frame]:
    """Yield the sound frames at or after this place. Nothing tells where they start, so every offset is tried."""
    view = memoryview(data)
    while offset < len(view):
        end = offset
        for frame in _before_damage(view, offset):
            yield frame
            end = frame.end
        offset = max(end, offset + 1)
