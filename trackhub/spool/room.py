# SPDX-License-Identifier: Apache-2.0
"""Keeps a spool within its limit, however many processes write to it. The writer's end of the spool calls it.

No process waits for another one. A writer first reserves room. Its ledger says up to which offset it is going to write.
The name of a blob's file says how large the blob is going to be. Then the writer measures the folder, reservations
included. If that is more than the limit, the writer takes its reservation back.

To measure means to look at every file. So a writer that measures leaves the result in the file ``usage``. While the
result is fresh and at most half of the spool is used, other writers take a small share without measuring.
"""

from __future__ import annotations

import os
import re
import struct
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trackhub.framing import MAX_BODY_BYTES
from trackhub.open_without_links import open_plain
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.spool.writer_ledger import WriterState, read_ledger, writer_state

__all__ = ["Room", "new_part"]

_RESCAN_S = 0.5
_FRESH_S = 1.0
_FEW_BYTES = 2 * MAX_BODY_BYTES  # larger than any single record together with the gaps before it
_SEGMENT = re.compile(r"(.+)-(\d{6,})\.spool")
_PART = re.compile(r".+-(\d+)-[0-9a-f]{32}\.part")
_USAGE = struct.Struct("=4Q")
_USAGE_FILE = "usage"
_NEW_WRITERS = 16  # how many writers may start while a measurement is fresh


class _Usage(NamedTuple):
    """A measurement of the spool.

    Attributes:
        at_ns: when it was made, on the monotonic clock that all processes of a machine share.
        used: bytes that were used or reserved.
        streams: how many streams there were.
    """

    at_ns: int
    used: int
    streams: int


_taken: dict[tuple[str, int], int] = {}
"""(folder, time of a measurement) -> bytes that this process took since then."""


class Room:
    """How much of the spool's limit is left. Each stream has its own `Room`."""

    def __init__(self, folder: Path, max_bytes: int, segment_bytes: int, clock: Callable[[], float]) -> None:
        """Measure nothing yet.

        Args:
            folder: the spool's folder.
            max_bytes: the limit of all files in the folder together.
            segment_bytes: the size of a segment. A stream reserves at most this, except for a single larger record.
            clock: a monotonic clock, in seconds.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._clock = clock
        self._full_until = 0.0
        self._full_at = 0

    def may_ask_for(self, size: int) -> bool:
        """Return False if, within the last half second, the spool had no room for this many bytes."""
        return size < self._full_at or self._clock() >= self._full_until

    def note_full(self, size: int) -> None:
        """Note that there was no room for this many bytes."""
        self._full_at = size
        self._full_until = self._clock() + _RESCAN_S

    def fits(self, share: int, more: int = 0) -> bool:
        """Return whether the spool is within its limit.

        Args:
            share: how many bytes this stream has just reserved.
            more: how many bytes must be free beyond what is used and reserved.

        Raises:
            OSError: the folder cannot be read.
        """
        return self._fitted_lately(share + more) or self._measure() + more <= self._max_bytes

    def _fitted_lately(self, share: int) -> bool:
        """Return whether the last measurement shows that the share fits. If so, the share counts as taken."""
        usage = _read_usage(self._folder)
        if usage is None or usage.used > self._max_bytes // 2:
            return False
        if not 0 <= time.monotonic_ns() - usage.at_ns < _FRESH_S * 1e9:
            return False
        # All writers together take no more than the other half of the spool before somebody measures again.
        most = self._max_bytes // 2 // (usage.streams + _NEW_WRITERS)
        key = str(self._folder), usage.at_ns
        if key not in _taken:
            _taken.clear()
        taken = _taken.get(key, 0) + share
        if taken > most:
            return False
        _taken[key] = taken
        return True

    def _measure(self) -> int:
        """Return how many bytes are used or reserved, and store the result for other writers."""
        at_ns = time.monotonic_ns()
        # Also count the file `usage`, even if it does not exist yet.
        used, ledgers, last = _USAGE.size, list[str](), dict[str, tuple[int, int]]()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name = entry.name
                if name == _USAGE_FILE:
                    continue
                try:
                    size = entry.stat().st_size
                except FileNotFoundError:
                    continue  # the sender deletes acknowledged files meanwhile
                used += size
                if name.endswith(".ledger"):
                    ledgers.append(name.removesuffix(".ledger"))
                elif match := _SEGMENT.fullmatch(name):
                    last[match[1]] = max((int(match[2]), size), last.get(match[1], (0, 0)))
                elif match := _PART.fullmatch(name):
                    used += max(0, int(match[1]) - size)
        written = {stream: last.get(stream, (0, 0))[1] for stream in ledgers}
        # This sum is an upper limit of what all streams have reserved, single large records included. Read the true
        # reservations only if the spool may be more than half full.
        most = sum(max(_FEW_BYTES, min(size, self._segment_bytes)) for size in written.values())
        if used + most > self._max_bytes // 2:
            most = sum(self._reserved(stream, size) for stream, size in written.items())
        _write_usage(self._folder, _Usage(at_ns, used + most, len(ledgers)))
        return used + most

    def _reserved(self, stream: str, written: int) -> int:
        """Return how many bytes this stream has reserved but not written."""
        path = self._folder / f"{stream}.ledger"
        try:
            more = read_ledger(path).reserved - written
            # A writer that was killed writes no more.
            if more > 0 and writer_state(path) is not WriterState.ENDED:
                return more
        except OSError as e:
            raise_if_from_signal_handler(e)
        return 0


def _read_usage(folder: Path) -> _Usage | None:
    """Return the last measurement; None if there is none, or it is damaged."""
    try:
        fd = open_plain(folder / _USAGE_FILE, os.O_RDONLY)
    except OSError as e:
        raise_if_from_signal_handler(e)
        return None
    try:
        data = os.pread(fd, _USAGE.size, 0)
    except OSError as e:
        raise_if_from_signal_handler(e)
        return None
    finally:
        os.close(fd)
    if len(data) != _USAGE.size:
        return None
    at_ns, used, streams, check = _USAGE.unpack(data)
    return _Usage(at_ns, used, streams) if check == at_ns ^ used ^ streams else None


def _write_usage(folder: Path, usage: _Usage) -> None:
    """Store a measurement. If that is not possible, each writer measures the folder itself."""
    try:
        fd = open_plain(folder / _USAGE_FILE, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(fd, _USAGE.pack(*usage, usage.at_ns ^ usage.used ^ usage.streams), 0)
        finally:
            os.close(fd)
    except OSError as e:
        raise_if_from_signal_handler(e)


def new_part(folder: Path, stream: str, size: int) -> Path:
    """Return the name of a new file for the bytes of a blob. Until they are written, the name reserves their room.

    Args:
        folder: the spool's folder.
        stream: the id of the stream that logs the blob.
        size: how many bytes the blob has.
    """
    return folder / f"{stream}-{size}-{uuid.uuid4().hex}.part"
