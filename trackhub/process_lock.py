# SPDX-License-Identifier: Apache-2.0
"""Locks a file for this process. The kernel gives the lock back when the process ends, however it ends.

The journal, the sender's end of a spool and every stream's ledger hold such a lock. A forked child takes none of them
over: otherwise a worker that outlives its parent would keep the parent's files locked. Code that
opens a file in one step and locks it in another holds ``FORK_LOCK`` until both are done.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import weakref
from pathlib import Path

from trackhub.fork_without_signals import FORK_LOCK, do_in_child
from trackhub.protect_descriptors import OwnDescriptor

__all__ = ["ProcessLock", "is_free"]

_HELD_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class ProcessLock:
    """An exclusive ``flock`` on an open file. Another open of the same file conflicts with it, in this process as well.

    Attributes:
        is_locked: False on a file system that has no locks. The file is open even then.
    """

    def __init__(self, fd: int) -> None:
        """Lock the file of this descriptor, and own the descriptor. It is closed if that fails.

        Raises:
            BlockingIOError: another process holds the lock, or this one does through another descriptor.
        """
        self._file = OwnDescriptor(fd)
        self.is_locked = False
        _locks.add(self)  # first: from here on, a forked child closes it
        try:
            fcntl.flock(self._file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_locked = True
        except OSError as e:
            if e.errno in _HELD_BY_ANOTHER:
                self.abandon()
                raise BlockingIOError(e.errno, "another process holds the lock") from e
            # Network and user-space file systems answer ENOLCK, EOPNOTSUPP or ENOSYS, since they have no locks.

    @classmethod
    def open(cls, path: Path) -> ProcessLock:
        """Open this file, create it if need be, and lock it.

        Raises:
            BlockingIOError: another process holds the lock, or this one does already.
            OSError: the file cannot be opened.
        """
        with FORK_LOCK:
            return cls(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600))

    def is_held(self) -> bool:
        """Return False if the script has closed the file, as it may close all descriptors. The lock is gone then."""
        return self._file.is_own()

    def release(self) -> None:
        """Give the lock back and close the file. Idempotent."""
        if self._file.is_own():
            with contextlib.suppress(OSError):
                # A child that was forked a moment ago may still have the file open, so closing alone would not unlock.
                fcntl.flock(self._file.number, fcntl.LOCK_UN)
        self._file.close()

    def abandon(self) -> None:
        """Close the file, and leave the lock to the parent process. Never raises. Idempotent."""
        # Close without LOCK_UN, here and when the object is freed. In a child that was just forked, LOCK_UN would take
        # the lock from the parent.
        self._file.close()


def is_free(path: Path) -> bool:
    """Return whether this file is there and nobody holds its lock. False if that cannot be told. Never raises."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # it may be a FIFO, in a folder from elsewhere
    except OSError:
        return False
    try:
        # Ask with a shared lock, so that two processes that ask at the same time do not disturb each other. Hold it
        # only for a moment: a process that wants the lock just then is refused.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


_locks: weakref.WeakSet[ProcessLock] = weakref.WeakSet()


def _abandon_all() -> None:
    for lock in list(_locks):
        lock.abandon()


do_in_child(_abandon_all)
