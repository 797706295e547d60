# SPDX-License-Identifier: Apache-2.0
"""Decides which thread makes the next attempt to start a waiting receiver, and when.

`Receiver` asks it while it waits to start: at each request, and once more when the job ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["StartRetry"]

_TRY_EVERY_S = 2.0


class StartRetry:
    """Lets one thread at a time start the receiver, and makes a pause after each attempt. Thread-safe."""

    def __init__(self) -> None:
        """The first turn is due at once."""
        self._lock = threading.RLock()  # `Receiver.abandon` holds it and calls `finish`, which takes it again
        self._not_before = 0.0

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Yield whether this thread may start the receiver now.

        It does not wait for a thread that is starting the receiver already. After a turn, no thread gets one for two
        seconds, whether the start succeeded or not.
        """
        if not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            if time.monotonic() < self._not_before:
                yield False
                return
            try:
                yield True
            finally:
                self._not_before = time.monotonic() + _TRY_EVERY_S
        finally:
            self._lock.release()

    def last_turn(self) -> AbstractContextManager[bool]:
        """Return a context manager for the last attempt.

        It waits until no other thread is starting the receiver. Until the ``with`` block ends, no other thread gets a
        turn.
        """
        return self._lock
