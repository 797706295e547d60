# SPDX-License-Identifier: Apache-2.0
"""Keep a spool within its limit, however many processes write to it. The writer's end of the spool asks.

No process waits for another one. A writer first says in its ledger up to where it is going to write, or in the name of
a file how large it is going to be. Then it measures the folder with all that was said there. If it is too much, the
writer takes back what it said.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path

from trackhub.framing import MAX_BODY_BYTES
from trackhub.spool.ledger import WriterState, read_ledger, writer_state

__all__ = ["Room", "new_part"]

_RESCAN_S = 0.5
_FEW_BYTES = 2 * MAX_BODY_BYTES  # more than one record with the gaps before it
_SEGMENT = re.compile(r"(.+)-(\d{6,})\.spool")
_PART = re.compile(r".+-(\d+)-[0-9a-f]{32}\.part")


class Room:
    """How much of the spool's limit is left. Each stream has one of its own."""

    def __init__(self, folder: Path, max_bytes: int, segment_bytes: int, clock: Callable[[], float]) -> None:
        """Measure nothing yet.

        Args:
            folder: the spool's folder.
            max_bytes: the limit of all its files together.
            segment_bytes: the size of a segment. A stream reserves as much as its segment has, and no more than this,
                or room for a single record.
            clock: seconds that only grow.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._clock = clock
        self._full_until = 0.0
        self._full_at = 0

    def may_ask_for(self, size: int) -> bool:
        """Return False if the spool had no room for as many bytes a moment ago. It is measured twice a second then."""
        return size < self._full_at or self._clock() >= self._full_until

    def note_full(self, size: int) -> None:
        """Note that there was no room for so many bytes."""
        self._full_at = size
        self._full_until = self._clock() + _RESCAN_S

    def fits(self, more: int = 0) -> bool:
        """Measure the folder. Return whether it is within its limit with so many bytes more.

        Raises:
            OSError: the folder cannot be read.
        """
        used, ledgers, last = 0, list[str](), dict[str, tuple[int, int]]()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    size = entry.stat().st_size
                except FileNotFoundError:
                    continue  # the sender deletes acknowledged files meanwhile
                used += size
                name = entry.name
                if name.endswith(".ledger"):
                    ledgers.append(name.removesuffix(".ledger"))
                elif match := _SEGMENT.fullmatch(name):
                    last[match[1]] = max((int(match[2]), size), last.get(match[1], (0, 0)))
                elif match := _PART.fullmatch(name):
                    used += max(0, int(match[1]) - size)
        left = self._max_bytes - used - more
        written = {stream: last.get(stream, (0, 0))[1] for stream in ledgers}
        if left >= sum(max(_FEW_BYTES, min(size, self._segment_bytes)) for size in written.values()):
            return True  # no stream reserves more, so there is no need to look what they have reserved
        return left >= sum(self._reserved(stream, size) for stream, size in written.items())

    def _reserved(self, stream: str, written: int) -> int:
        """Return how many bytes this stream is going to write that are not written yet."""
        path = self._folder / f"{stream}.ledger"
        with contextlib.suppress(OSError):
            more = read_ledger(path).reserved - written
            # A writer that was killed writes no more.
            if more > 0 and writer_state(path) is not WriterState.ENDED:
                return more
        return 0


def new_part(folder: Path, stream: str, size: int) -> Path:
    """Return the name of a new file for the bytes of a blob. Until they are written, the name reserves their room."""
    return folder / f"{stream}-{size}-{uuid.uuid4().hex}.part"
