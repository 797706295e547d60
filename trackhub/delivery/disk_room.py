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
from pathlib import Path

__all__ = ["DiskRoom"]

_RESERVE_BYTES = 1 << 30
_RESERVE_SHARE = 0.05
_ASK_EVERY_S = 1.0


class DiskRoom:
    """Says who may store in the last part of the disk: 5 % of it, 1 GiB at most. Thread-safe.

    In that part, a site may store only if it has not stored more than the average of all sites. A site that is alone
    may use all of it.
    """

    def __init__(self, folder: Path) -> None:
        """Watch the disk that this folder is on."""
        self._folder = folder
        self._lock = threading.Lock()
        self._stored: Counter[str] = Counter()
        self._asked_at = -math.inf
        self._is_scarce = False

    def allows(self, site: str, size: int) -> bool:
        """Return whether a site may store this many bytes now, and count them if so."""
        with self._lock:
            self._look()
            stored = self._stored
            if self._is_scarce and stored[site] * len(stored) > stored.total():
                return False
            stored[site] += size
            return True

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._asked_at < _ASK_EVERY_S:
            return
        self._asked_at = now
        try:
            disk = os.statvfs(self._folder)
        except OSError:  # the next write to this disk fails as well, and its error says why
            return
        reserve = min(_RESERVE_BYTES, int(disk.f_blocks * disk.f_frsize * _RESERVE_SHARE))
        self._is_scarce = disk.f_bavail * disk.f_frsize < reserve
