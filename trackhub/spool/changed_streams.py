# SPDX-License-Identifier: Apache-2.0
"""Keeps what a reader knows about each stream, and looks through the folder for changes.

`SpoolReader` calls `look` once per pass. So it reads the folder once for all streams, not once per batch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from trackhub.spool.acks import Ack
from trackhub.spool.writer_ledger import WriterState

__all__ = ["End", "FollowedStream", "look", "stream_ends"]

End = tuple[int, int]
"""Where a stream ends: a segment, and an offset in it."""

_NO_SEGMENT = -1
_UNKNOWN_END: End = (1 << 62, 0)
_SEGMENT = re.compile(r"([0-9a-f]{32})-(\d{6,})\.spool")
_OTHER = re.compile(r"([0-9a-f]{32})(?:\.ledger|-(?:\d+)\.blob|-\d+-[0-9a-f]{32}\.part)")


class FollowedStream:
    """One stream of a spool, as one reader sees it.

    Attributes:
        name: the stream's id.
        ack: how far the reader got. Other threads may read it.
        is_placed: False if the reader's ``.ack`` file is missing or damaged. Then only the receiver knows how far an
            earlier reader got.
        first_segment, last_segment: its lowest and highest segment number at the last look; -1 if it had no segments.
        end: where the stream ended at the last look.
        size: how many bytes its segments had at the last look, or when the stream was done.
        files: its blobs, and parts of blobs, at the last look.
        state: whether its writer lived when the reader last asked.
        problem: why it could not be read in this pass; empty if it could be read.
        is_done: True if its writer has ended and all readable records are acknowledged.
        is_held: True while its next records wait for their files. The reader does not hand them out.
        undecided_end: where the stream ended when the policy could not decide about the next record. None if the policy
            could decide.
    """

    __slots__ = (
        "ack",
        "end",
        "files",
        "first_segment",
        "is_done",
        "is_held",
        "is_placed",
        "last_segment",
        "name",
        "problem",
        "size",
        "state",
        "undecided_end",
    )

    def __init__(self, name: str, ack: Ack) -> None:
        self.name = name
        self.ack = ack
        self.is_placed = True
        self.first_segment = self.last_segment = _NO_SEGMENT
        self.end: End = (_NO_SEGMENT, 0)
        self.size = 0
        self.files: list[str] = []
        self.state = WriterState.UNKNOWN
        self.problem = ""
        self.is_done = False
        self.is_held = False
        self.undecided_end: End | None = None

    def is_behind(self) -> bool:
        """Return whether the last look has found records that are not acknowledged yet."""
        return (self.ack.segment, self.ack.offset) < self.end

    def forget_files(self) -> None:
        """Forget what the last look at the folder found, before the next look."""
        self.first_segment = self.last_segment = _NO_SEGMENT
        self.end = (_NO_SEGMENT, 0)
        self.files = []
        self.problem = ""
        if not self.is_done:
            self.size = 0


def look(folder: Path, streams: dict[str, FollowedStream], make: Callable[[str], FollowedStream | None]) -> None:
    """Look through the folder, and note in each stream which files it has.

    Args:
        folder: the spool's folder.
        streams: name -> stream, for the known streams. New streams are added, in the order of their names.
        make: called with the name of an unknown stream. Returns the stream to add, or None to ignore its files.

    Raises:
        OSError: the folder cannot be read.
    """
    for known in streams.values():
        known.forget_files()
    found: dict[str, FollowedStream | None] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _SEGMENT.fullmatch(entry.name) or _OTHER.fullmatch(entry.name)
            if match is None:
                continue
            name = match[1]
            if (stream := streams.get(name)) is None:
                if name not in found:
                    found[name] = make(name)
                stream = found[name]
            if stream is not None:
                _note(stream, entry, int(match[2]) if match.re is _SEGMENT else None)
    streams.update((name, stream) for name, stream in sorted(found.items()) if stream is not None)


def _note(stream: FollowedStream, entry: os.DirEntry[str], segment: int | None) -> None:
    if segment is None:
        if not entry.name.endswith(".ledger"):
            stream.files.append(entry.name)
        return
    size = 0
    if not stream.is_done:
        try:
            size = entry.stat().st_size
        except FileNotFoundError:
            return  # another reader has just deleted it
        except OSError as e:
            stream.problem = f"{entry.path}: {e.strerror}"
    stream.size += size
    stream.first_segment = segment if stream.first_segment == _NO_SEGMENT else min(segment, stream.first_segment)
    stream.last_segment = max(segment, stream.last_segment)
    stream.end = max(stream.end, (segment, size))


def stream_ends(folder: Path, is_passed_over: Callable[[str], bool]) -> dict[str, End]:
    """Return where each stream ends now. May be called from any thread.

    Args:
        folder: the spool's folder.
        is_passed_over: called with a stream's name. Returns True to leave the stream out.

    Raises:
        OSError: the folder cannot be read.
    """
    found: dict[str, End] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if (match := _SEGMENT.fullmatch(entry.name)) and not is_passed_over(match[1]):
                try:
                    end = int(match[2]), entry.stat().st_size
                except FileNotFoundError:
                    continue  # acknowledged and deleted meanwhile
                except OSError:
                    end = _UNKNOWN_END
                found[match[1]] = max(end, found.get(match[1], end))
    return found
