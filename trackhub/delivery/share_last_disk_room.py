# SPDX-License-Identifier: Apache-2.0
"""Shares the last free part of a disk among the sites.

`Receiver` asks it before it stores a request. `RunDiskRoom` asks it before a lane writes to a backend.
While the disk has more room than this last part, a site may store as much as it likes. Without a rule, one site could
fill the disk, through the receiver or through the lanes. Then nothing of the other sites could be stored any more.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

__all__ = ["DiskRoom"]

_RESERVE_BYTES = 1 << 30
_RESERVE_SHARE = 0.05
_ASK_EVERY_S = 1.0
_FILE_BYTES = 4096

_LANE_SHARE = 0.5
"""The lanes leave this share of the last part free. The receiver turns a site away earlier, when the last part begins.
So the lanes can usually deliver all that it accepted, also to servers, which need no room on this disk."""

_SMALL = 16
"""A site is too small to do harm if the disk has room for this many times what the site has stored."""


class _Free(NamedTuple):
    """What a disk has free.

    Attributes:
        space: free bytes.
        files: free inodes. Infinite if the file system has no fixed number of inodes.
        last_space: the bytes of the last part.
        last_files: the inodes of the last part.
    """

    space: int
    files: float
    last_space: int
    last_files: float


class DiskRoom:
    """Says which sites may store in the last part of the receiver's disk, and of the backends' disk. Thread-safe.

    The last part is 5 % of the disk's space, but 1 GiB at most, and 5 % of its inodes. In that part, a site may store
    only while it has stored at most the average of all sites. Expected sites that have stored nothing yet count, too. A
    single site may use the whole part.

    A lane writes for any site until half of the last part is left. In that half, the lanes write nothing of a site that
    has stored more than the average, unless the site is small.
    """

    def __init__(self, folder: Path, run_dir: Path, sites: Callable[[], Collection[str]]) -> None:
        """Watch the disks that these folders are on.

        Args:
            folder: where the receiver stores.
            run_dir: where the backends write.
            sites: returns the sites that may still store something.
        """
        self._folder = folder
        self._run_dir = run_dir
        self._sites = sites
        self._lock = threading.Lock()
        self._stored: Counter[str] = Counter()
        self._asked_at = -math.inf
        self._room_bytes = 0.0
        self._room_files = 0.0
        self._is_scarce = False
        self._held_bytes = 0  # what the lanes are writing now
        self._held_files = 0

    def allows(self, site: str, size: int, *, makes_file: bool = False) -> bool:
        """Return whether a site may store this many bytes now. If so, count them.

        Args:
            site: the site's name.
            size: how many bytes.
            makes_file: True if the bytes go to a new file. A new file counts as at least one block of the disk.
        """
        size = max(size, _FILE_BYTES) if makes_file else size
        with self._lock:
            self._look()
            if self._is_scarce and self._has_much(site):
                return False
            self._stored[site] += size
            self._room_bytes -= size
            self._room_files -= makes_file
            return True

    @contextmanager
    def hold(self, site: str, size: int, files: int) -> Iterator[bool]:
        """Hold room on the backends' disk while a lane writes records of a site. Yields whether the lane may write now.

        Args:
            site: the site's name.
            size: how many bytes of files are copied. It may be less than what is written: all else is small, and the
                disk is looked at before each write.
            files: how many files are copied.
        """
        with self._lock:
            self._held_bytes += size
            self._held_files += files
            # This may also be the receiver's disk, so count it there, too. If it is not, `allows` only measures its own
            # disk sooner.
            self._room_bytes -= size
            self._room_files -= files
            # Another lane may finish before the disk is measured. Then its files count twice. That is safe, and not
            # counting them would not be.
            held, held_files = self._held_bytes, self._held_files if files else -math.inf
        try:
            yield self._may_write(site, held, held_files)
        finally:
            with self._lock:
                self._held_bytes -= size
                self._held_files -= files

    def _may_write(self, site: str, size: int, files: float) -> bool:
        """Return whether a lane may write this much of a site."""
        try:
            free = _look_at(self._run_dir)
        except OSError:  # the write fails as well, and its error says why
            return True
        has_space = free.space - size >= free.last_space * _LANE_SHARE
        has_files = free.files - files >= free.last_files * _LANE_SHARE
        if has_space and has_files:
            return True
        with self._lock:
            is_small = has_files and max(self._stored[site], size) * _SMALL <= free.space
            return is_small or not self._has_much(site)

    def _has_much(self, site: str) -> bool:
        """Return whether a site has stored more than the average of all sites."""
        stored = self._stored
        return stored[site] > 0 and stored[site] * len(stored.keys() | self._sites()) > stored.total()

    def _look(self) -> None:
        now = time.monotonic()
        # A site may use up a small disk within a second. So look again also when the room of the last look is used.
        if now - self._asked_at < _ASK_EVERY_S and self._room_bytes > 0 and self._room_files > 0:
            return
        self._asked_at = now
        try:
            free = _look_at(self._folder)
        except OSError:  # the next write to this disk fails as well, and its error says why
            return
        self._room_bytes = free.space - free.last_space
        self._room_files = free.files - free.last_files
        self._is_scarce = self._room_bytes <= 0 or self._room_files <= 0


def _look_at(folder: Path) -> _Free:
    disk = os.statvfs(folder)
    last = min(_RESERVE_BYTES, int(disk.f_blocks * disk.f_frsize * _RESERVE_SHARE))
    # Some file systems have no fixed number of inodes, and say 0.
    files = disk.f_favail if disk.f_files else math.inf
    return _Free(disk.f_bavail * disk.f_frsize, files, last, disk.f_files * _RESERVE_SHARE)
