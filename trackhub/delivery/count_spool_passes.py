# SPDX-License-Identifier: Apache-2.0
"""Counts a sender's passes over its spool.

`Sender` has one `SpoolPasses`. `Sender.flush` waits for its condition ``changed``.
"""

from __future__ import annotations

import threading

__all__ = ["SpoolPasses"]


class SpoolPasses:
    """Counts the sender's passes over the spool, so that `Sender.flush` knows when a later pass has ended. Thread-safe.

    Attributes:
        changed: the lock around the other attributes. It notifies when a pass ends, when files are on their way or have
            arrived, and when the sender ends.
        done: how many passes have sent everything that they could read.
        was_complete: True if the last of these passes could read everything.
        running: True if a pass has begun and has not sent everything yet.
        files_left: True while files of the last pass are on their way.
        is_slow: True if a flush waited for these files and they did not arrive in time.
        waiting: how many calls of ``flush`` wait now.
        replies_at_timeout: the value of `Exchange.replies` when a flush last timed out. None if no flush did.
    """

    def __init__(self) -> None:
        """Start before the first pass."""
        self.changed = threading.Condition()
        self.done = 0
        self.was_complete = True
        self.running = False
        self.files_left = False
        self.is_slow = False
        self.waiting = 0
        self.replies_at_timeout: int | None = None

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
