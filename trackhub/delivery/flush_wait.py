# SPDX-License-Identifier: Apache-2.0
"""Counts a sender's passes over its spool. `Sender` has one, and `Sender.flush` waits with it. Thread-safe."""

from __future__ import annotations

import threading

__all__ = ["SpoolPasses"]


class SpoolPasses:
    """Counts the sender's passes over the spool, so that `Sender.flush` knows when a later one has ended.

    Attributes:
        changed: the lock around the other attributes. It notifies when a pass has ended, or the sender has.
        done: passes that sent all that they could read.
        was_complete: whether the last of them could read everything.
        running: a pass has begun and has not sent all that it found.
        files_left: what the last pass found has files that are still on their way.
        is_slow: a flush has waited for these files in vain.
        waiting: calls of ``flush`` that wait.
        gave_up_at: `Exchange.replies` when a flush last timed out, None if none did.
    """

    def __init__(self) -> None:
        """No pass has begun."""
        self.changed = threading.Condition()
        self.done = 0
        self.was_complete = True
        self.running = False
        self.files_left = False
        self.is_slow = False
        self.waiting = 0
        self.gave_up_at: int | None = None

    def begin(self) -> None:
        """Note that a pass has begun."""
        with self.changed:
            self.running = True

    def end(self, *, complete: bool) -> None:
        """Note that a pass has ended, and whether it could read everything."""
        with self.changed:
            self.done += 1
            self.was_complete = complete
            self.running = False
            self.changed.notify_all()

    def note_files(self, *, left: bool) -> None:
        """Note whether files are still on their way."""
        with self.changed:
            self.files_left = left
            self.is_slow = self.is_slow and left
            self.changed.notify_all()
