# SPDX-License-Identifier: Apache-2.0
"""Marks a spool while a process has dropped records that no ledger counts. Its counts are not complete then.

`trackhub.spool.process_drops` sets and clears the mark of its process. The sender's end of the spool reads all marks.
The file ``uncounted`` has 64 slots of 8 bytes, and each mark takes one. Processes map the file while they can open
files. Later, they set a mark without a descriptor, an inode or a block of the disk.
"""

from __future__ import annotations

import os
from pathlib import Path

from trackhub.open_without_links import open_plain, read_plain
from trackhub.protect_descriptors import MappedFile

__all__ = ["Mark", "has_marks", "make_marks"]

_FILE = "uncounted"
_SLOTS = 64
_SIZE = 8 * _SLOTS
_FREE = 0
_FOR_GOOD = (1 << 64) - 1  # belongs to no process, so nobody clears it
_MODE = 0o644  # a sender under another user reads it


def make_marks(folder: Path) -> None:
    """Create the file without any mark, unless it is there. Its block is on the disk from the start.

    Raises:
        OSError: the disk has no room, or the folder cannot be written.
    """
    fd = open_plain(folder / _FILE, os.O_RDWR | os.O_CREAT, _MODE)
    try:
        if os.fstat(fd).st_size < _SIZE:
            os.posix_fallocate(fd, 0, _SIZE)  # unlike a write, this keeps the marks that are there
    finally:
        os.close(fd)


def has_marks(folder: Path) -> bool:
    """Return whether a process may have dropped records that no ledger counts. Never raises."""
    try:
        marks = read_plain(folder / _FILE)
    except OSError:
        return True  # nobody can tell
    return len(marks) != _SIZE or any(marks)


class Mark:
    """One process's mark in one spool. No method raises.

    While the file cannot be mapped, there is no mark. ``look_again`` tries to map it again.
    """

    def __init__(self, folder: Path) -> None:
        """Map the file, if that is possible now."""
        self._path = folder / _FILE
        self._slots: memoryview | None = None
        self._map: MappedFile | None = None
        self._begin()
        self.look_again()

    def _begin(self) -> None:
        self._token = int.from_bytes(os.urandom(7), "little") + 1  # neither `_FREE` nor `_FOR_GOOD`
        self._slot = -1

    def look_again(self) -> None:
        """Map the file if that was not possible before."""
        if self._slots is None:
            try:
                fd = open_plain(self._path, os.O_RDWR)
                try:
                    self._map = MappedFile(fd, _SIZE)
                finally:
                    os.close(fd)
            except (OSError, ValueError):
                return
            self._slots = self._map.content.cast("Q")

    def set(self) -> None:
        """Mark the spool, unless this process's mark is there."""
        self.look_again()
        slots = self._slots
        if slots is None or (self._slot >= 0 and slots[self._slot] == self._token):
            return
        # Two processes may take the same free slot at the same moment. They begin at slots that chance chose, and the
        # one whose mark is overwritten finds that out with its next drop.
        for i in range(_SLOTS):
            slot = (self._token + i) % _SLOTS
            if slots[slot] == _FREE:
                slots[slot] = self._token
                self._slot = slot
                return
        slots[self._token % _SLOTS] = _FOR_GOOD  # the owners of the marks may clear them all, but this one stays

    def clear(self) -> None:
        """Take this process's mark away, if there is one."""
        if self._slots is not None and self._slot >= 0 and self._slots[self._slot] == self._token:
            self._slots[self._slot] = _FREE
        self._slot = -1

    def in_child(self) -> Mark:
        """Return the mark of a process that was forked from this one. It uses the same mapping, and is not set."""
        mark = object.__new__(Mark)
        mark._path, mark._slots, mark._map = self._path, self._slots, self._map
        mark._begin()
        return mark
