# SPDX-License-Identifier: Apache-2.0
"""Keep a spool within its limit: how many more bytes a writer may put into it. The writer's end of the spool asks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["Room"]

_RESCAN_S = 0.5


class Room:
    """How many bytes one writer may write before it must measure the spool's folder again.

    Attributes:
        left: these bytes. The writer subtracts what it writes.
    """

    def __init__(self, folder: Path, max_bytes: int, share_bytes: int, clock: Callable[[], float]) -> None:
        """Start with no room, so that the first record measures the folder.

        Args:
            folder: the spool's folder.
            max_bytes: the limit of all its files together.
            share_bytes: how much to take at a time, at least.
            clock: seconds that only grow.
        """
        self.left = 0
        self._folder = folder
        self._max_bytes = max_bytes
        self._share_bytes = share_bytes
        self._clock = clock
        self._full_until = 0.0

    def has(self, size: int) -> bool:
        """Return whether so many bytes fit. Measures the folder if need be; while it is full, twice a second at most.

        Raises:
            OSError: the folder cannot be read.
        """
        if size <= self.left:
            return True
        now = self._clock()
        if now < self._full_until:
            return False
        free = max(0, self._max_bytes - self._used_bytes())
        # Other processes may write here as well. So take a share of what is free, or what is asked for if that is more,
        # and measure again after that.
        self.left = min(free, max(self._share_bytes, free // 4, size))
        if size <= self.left:
            return True
        self._full_until = now + _RESCAN_S
        return False

    def _used_bytes(self) -> int:
        used = 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # the sender deletes acknowledged segments meanwhile
                    used += entry.stat().st_size
        return used
