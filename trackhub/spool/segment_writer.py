# SPDX-License-Identifier: Apache-2.0
"""The segment file that a writer appends to, and how the next one is opened. The writer's end of the spool uses it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from trackhub.protect_descriptors import OwnDescriptor
from trackhub.spool.layout import SEGMENT_HEADER, segment_name

__all__ = ["SegmentFile"]

_SHARE_BYTES = 8 << 10


class SegmentFile:
    """The current segment of one stream.

    Attributes:
        fd: the file's descriptor; -1 before the first segment is open and after ``close``.
        offset: where the next frame starts.
        limit: the offset up to which the stream has reserved room in this file.
    """

    def __init__(self, folder: Path, stream: str, max_bytes: int) -> None:
        """Open no file yet: a stream without records has no files.

        Args:
            folder: the spool's folder.
            stream: the stream's id.
            max_bytes: the largest size of a segment. Only a segment with a single large frame may be larger.
        """
        self.fd = -1
        self._file: OwnDescriptor | None = None
        self.offset = 0
        self.limit = 0
        self._max_bytes = max_bytes
        self._path: Path | None = folder
        self._stream = stream
        self._number = -1

    def must_be_followed(self, size: int) -> bool:
        """Return whether a frame of this size needs another segment: this one is not open, or too full."""
        return self.fd < 0 or (self.offset + size > self._max_bytes and self.offset > len(SEGMENT_HEADER))

    def ends(self, size: int) -> tuple[int, int]:
        """Return two offsets up to which to reserve room for a frame of this size: the wanted one and the lowest one.

        A stream wants as much room as its segment already holds. So a process that logs little takes little room from
        the others, and a process that logs a lot does not have to reserve often.
        """
        least = self.offset + size
        return max(least, min(self._max_bytes, self.offset + max(self.offset, _SHARE_BYTES))), least

    def open_next(self) -> None:
        """Open the next segment. The current one stays open until the next one exists.

        Raises:
            OSError: it cannot be created or written; the current segment stays in use.
        """
        while True:
            if self._path is None:
                raise _not_ours()
            path = self._path / segment_name(self._stream, self._number + 1)
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
                break
            except FileExistsError:
                self._number += 1  # left over by an attempt that a signal handler interrupted
        # A signal handler may have forked in any call here, and this may be the child. The child must not write to the
        # file. `abandon` could not close it, since only this function knows it so far. If this raises, the file is
        # closed.
        file = OwnDescriptor(fd)
        if self._path is None:
            raise _not_ours()
        try:
            if os.write(file.number, SEGMENT_HEADER) != len(SEGMENT_HEADER):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            if self._path is not None:
                path.unlink(missing_ok=True)
            raise
        if self._path is None:
            raise _not_ours()
        old, self._file = self._file, file
        self.fd = file.number
        self._number += 1
        self.offset = self.limit = len(SEGMENT_HEADER)
        if old is not None:
            old.close()

    def cut_torn_frame(self) -> None:
        """Remove what a short write left over. If that fails, the next frame goes to a new segment."""
        try:
            if self.is_lost():
                raise _not_ours()
            os.ftruncate(self.fd, self.offset)
        except OSError:
            self.offset = self.limit = max(self._max_bytes, self.offset, len(SEGMENT_HEADER) + 1)

    def has_grown_by(self, size: int) -> bool:
        """Return whether the file is exactly this many bytes longer than ``offset``."""
        try:
            return self.fd >= 0 and os.fstat(self.fd).st_size == self.offset + size
        except OSError:
            return False

    def close(self) -> None:
        """Close the file. Never raises. Idempotent."""
        self.fd = -1
        if self._file is not None:
            self._file.close()

    def is_lost(self) -> bool:
        """Return whether the script has closed the file. Some scripts close all descriptors. Never raises."""
        return self.fd >= 0 and self._file is not None and not self._file.is_own()

    def is_within_reach(self) -> bool:
        """Return whether the script's next file may get this file's number, after the script has closed this file."""
        return self._file is not None and not self._file.is_out_of_reach

    def abandon(self) -> None:
        """Leave the stream to the process that this one was forked from. Close the file, and open no other one."""
        self._path = None
        self.close()


def _not_ours() -> OSError:
    """Return the error of a stream that belongs to the process that this one was forked from."""
    return OSError(errno.EBADF, os.strerror(errno.EBADF))
