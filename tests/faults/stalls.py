# SPDX-License-Identifier: Apache-2.0
"""Measures how long the machine kept this process waiting, so that a test's time limit can leave room for it.

Tests of time limits use it. On a machine with much other load, a thread may wait for seconds until it runs.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

__all__ = ["Stalls"]

_PAUSE_S = 0.005


class Stalls:
    """While it is entered, a thread wakes up every 5 ms and notes how late it is."""

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Stalls:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def took_s(self, start: float, end: float) -> float:
        """Return how long something took, without the time in which the machine let nothing of this process run.

        Args:
            start, end: when it began and ended, on the monotonic clock.
        """
        late = sum(max(0.0, min(end, until) - max(start, since)) for since, until in self._late)
        return end - start - late

    def _watch(self) -> None:
        while True:
            began = time.monotonic()
            if self._stop.wait(_PAUSE_S):
                return
            due, now = began + _PAUSE_S, time.monotonic()
            if now > due + _PAUSE_S:
                self._late.append((due, now))
