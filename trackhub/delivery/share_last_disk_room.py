# SPDX-License-Identifier: Apache-2.0
"""Shares the last free part of the receiver's disk among the sites. `Receiver` asks it before it stores a request.

While the disk has more room than this last part, a site may store as much as it likes. Without a rule, one site
could fill the disk, and the receiver could store nothing of the other sites any more.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

__all__ = ["DiskRoom"]

_RESERVE_BYTES = 1 << 30
_RESERVE_SHARE = 0.05
_ASK_EVERY_S = 1.0
_FILE_BYTES = 4096


class DiskRoom:
    """Says which sites may store in the last part of the disk. Thread-safe.

    The last part is 5 % of the disk's space, but 1 GiB at most, and 5 % of its inodes. In that part, a site may store
    only while it has stored at most the average of all sites. Expected sites that have stored nothing yet count, too. A
    single site may use the whole part.
    """

    def __init__(self, folder: Path, sites: Callable[[], Collection[str]]) -> None:
        """Watch the disk that this folder is on.

        Args:
            folder: the folder.
            sites: returns the sites that may still store something.
        """
        self._folder = folder
        self._sites = sites
        self._lock = threading.Lock()
        self._stored: Counter[str] = Counter()
        self._asked_at = -math.inf
        self._room_bytes = 0.0
        self._room_files = 0.0
        self._is_scarce = False

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
            stored = self._stored
            if self._is_scarce and stored[site] > 0:
                sites = len(stored.keys() | self._sites())
                if stored[site] * sites > stored.total():
                    return False
            stored[site] += size
            self._room_bytes -= size
            self._room_files -= makes_file
            return True

    def _look(self) -> None:
        now = time.monotonic()
        # A site may use up a small disk within a second. So look again also when the room of the last look is stored.
        if now - self._asked_at < _ASK_EVERY_S and self._room_bytes > 0 and self._room_files > 0:
            return
        self._asked_at = now
        try:
            disk = os.statvfs(self._folder)
        except OSError:  # the next write to this disk fails as well, and its error says why
            return
        reserve = min(_RESERVE_BYTES, int(disk.f_blocks * disk.f_frsize * _RESERVE_SHARE))
        self._room_bytes = disk.f_bavail * disk.f_frsize - reserve
        # Some file systems have no fixed number of inodes, and say 0.
        self._room_files = disk.f_favail - disk.f_files * _RESERVE_SHARE if disk.f_files else math.inf
        self._is_scarce = self._room_bytes <= 0 or self._room_files <= 0
