# SPDX-License-Identifier: Apache-2.0
"""A lock on one reader's end of a spool. One sender or replay holds it, at most until its process ends.

`Sender` takes the lock before it reads, and waits while another process has it. A replay does not wait: it fails.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from trackhub.errors import SpoolError
from trackhub.process_lock import ProcessLock
from trackhub.spool.layout import create_expected, expected_spool, lock_cursor
from trackhub.spool.reading import SpoolReader

__all__ = ["SpoolHold", "hold_ended_spool"]

_TRY_EVERY_S = 0.2
_log = logging.getLogger(__name__)


class SpoolHold:
    """A sender's ownership of its end of a spool. Used by one thread at a time.

    Attributes:
        is_owner: True if this sender may send: it has the lock, or the spool cannot be locked here.
    """

    def __init__(self, folder: Path, cursor: str, lock: ProcessLock | None = None) -> None:
        """Own the spool's end if ``lock`` is given. Otherwise own nothing yet.

        Args:
            folder: the spool's folder.
            cursor: the reader's name.
            lock: the cursor's lock, if this process has taken it already.
        """
        self.is_owner = lock is not None
        self._folder = folder
        self._cursor = cursor
        self._lock = lock
        self._try_at = 0.0
        self._has_warned = False

    def take(self, *, at_once: bool = False) -> bool:
        """Return whether this sender owns its end of the spool. Take it if it is free.

        If the spool could not be created before, this tries again to create it. Never raises.

        Args:
            at_once: try now. Otherwise, this tries at most five times a second.
        """
        now = time.monotonic()
        if at_once or now >= self._try_at:
            self._try_at = now + _TRY_EVERY_S
            create_expected(self._folder)
            if self._lock is None:
                self._take_lock()
        return self.is_owner

    def is_waiting_for_room(self) -> bool:
        """Return whether the spool could not be created yet. Until it is created, its writers count what they drop."""
        return expected_spool(self._folder) is not None

    def _take_lock(self) -> None:
        try:
            self._lock = lock_cursor(self._folder, self._cursor)
            self.is_owner = True
            if not self._lock.is_locked:
                self._warn("the file system of %s has no locks: do not replay it while the job runs", self._folder)
        except BlockingIOError:
            self.is_owner = False
            self._warn(
                "another process sends the spool in %s as %r; this sender waits until it ends", self._folder,
                self._cursor,
            )  # fmt: skip
        except OSError:
            # The lock file cannot be opened: the folder is missing, or the disk is full. Send what can be sent.
            self.is_owner = True

    def _warn(self, message: str, *arguments: object) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning(message, *arguments)

    def release(self) -> None:
        """Give the ownership up. Idempotent."""
        lock, self._lock, self.is_owner = self._lock, None, False
        if lock is not None:
            lock.release()


def hold_ended_spool(folder: Path, cursor: str) -> ProcessLock:
    """Take the lock of a spool whose job has ended, and return it.

    Args:
        folder: the spool's folder.
        cursor: the reader's name.

    Raises:
        SpoolError: the job still runs, another replay has the spool, or the folder cannot be read or written.
    """
    try:
        lock = lock_cursor(folder, cursor)
    except BlockingIOError as e:
        raise SpoolError(
            f"the spool {folder} is in use by another process (the sender of a running job, or a replay); wait until "
            "it has ended"
        ) from e
    except OSError as e:
        raise SpoolError(f"cannot lock the spool {folder}: {e}; its folder must be writable") from e
    try:
        stream = SpoolReader(folder, cursor).live_stream()
    except (OSError, SpoolError) as e:
        lock.release()
        raise SpoolError(f"cannot read the spool {folder}: {e}; its files must be readable for this user") from e
    if stream is not None:
        lock.release()
        raise SpoolError(
            f"a process of the job still logs to the spool {folder} (stream {stream}); wait until it has ended, or end "
            "it"
        )
    return lock
