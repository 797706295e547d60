# SPDX-License-Identifier: Apache-2.0
"""The segment file that a writer appends to. The writer's end of the spool writes to it and has the next one opened."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from trackhub.spool.layout import SEGMENT_HEADER, segment_name

__all__ = ["SegmentFile"]


class SegmentFile:
    """The current segment of one stream.

    Attributes:
        fd: its descriptor; -1 before the first segment is open and after ``close``.
        offset: where its next frame starts.
        limit: open the next segment where a frame would end after this offset.
    """

    def __init__(self, folder: Path, stream: str, limit: int) -> None:
        """Open no file yet. A stream without records makes none."""
        self.fd = -1
        self.offset = limit  # as in a full segment, so that the first record opens one
        self.limit = limit
        self._folder = folder
        self._stream = stream
        self._number = -1

    def open_next(self) -> None:
        """Open the next segment. The current one stays open until the next one exists.

        Raises:
            OSError: it cannot be created or written; the current segment stays in use.
        """
        while True:
            path = self._folder / segment_name(self._stream, self._number + 1)
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
                break
            except FileExistsError:
                self._number += 1  # left behind by an attempt that a signal handler interrupted
        try:
            if os.write(fd, SEGMENT_HEADER) != len(SEGMENT_HEADER):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        old, self.fd = self.fd, fd
        self._number += 1
        self.offset = len(SEGMENT_HEADER)
        if old >= 0:
            # An error now is of earlier writes, which returned long ago; the new segment is in use already.
            with contextlib.suppress(OSError):
                os.close(old)

    def cut_torn_frame(self) -> None:
        """Remove what a short write left behind. If that fails, the next frame goes to a new segment."""
        try:
            os.ftruncate(self.fd, self.offset)
        except OSError:
            self.offset = self.limit

    def has_grown_by(self, size: int) -> bool:
        """Return whether the file has exactly so many bytes more than were counted."""
        try:
            return self.fd >= 0 and os.fstat(self.fd).st_size == self.offset + size
        except OSError:
            return False

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
