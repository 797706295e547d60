# SPDX-License-Identifier: Apache-2.0
"""The lock that one process holds while it may write to a journal. It ends with the process, however that dies.

`Journal` and `repair` take it. ``trackhub status`` asks whether somebody holds it: a job without an end and without the
lock was killed.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from trackhub.errors import JournalError

__all__ = ["is_journal_locked", "lock_journal", "unlock_journal"]

_PROBE_S = 0.2  # how long `lock_journal` tries: another process may be asking whether the lock is held
_held: set[int] = set()


def lock_journal(path: Path) -> int:
    """Lock a journal for this process, and return the lock for `unlock_journal`. A killed process leaves no lock.

    Raises:
        JournalError: another process has it, or the file ``trackhub.lock`` beside it cannot be opened.
    """
    # A file of its own. SQLite locks for one transaction only, so two receivers could write to one journal in turn.
    try:
        lock = os.open(_lock_file(path), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as e:
        what = "open" if path.exists() else "create"
        raise JournalError(
            f"cannot {what} the journal {path}: {e}; its folder must be writable and have free space"
        ) from e
    deadline = time.monotonic() + _PROBE_S
    while not _try_lock(lock, fcntl.LOCK_EX):
        if time.monotonic() >= deadline:
            os.close(lock)
            raise JournalError(f"the journal {path} is in use by another process (a running job, or a replay)")
        time.sleep(0.01)
    _held.add(lock)
    return lock


def unlock_journal(lock: int) -> None:
    """Give a lock back. In a forked child this does nothing: the lock is its parent's."""
    if lock in _held:
        _held.discard(lock)
        # A child that was forked a moment ago may still have the file open, so closing alone might not unlock.
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def is_journal_locked(path: Path) -> bool:
    """Return whether a process has this journal open for writing. Changes nothing on the disk."""
    try:
        lock = os.open(_lock_file(path), os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared, so that two processes that ask at the same time do not take each other for the owner.
        return not _try_lock(lock, fcntl.LOCK_SH)
    finally:
        os.close(lock)


def _lock_file(path: Path) -> Path:
    return path.with_suffix(".lock")


def _try_lock(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _close_in_child() -> None:
    """Close the parent's locks in a forked child. A child that outlives its parent would hold them otherwise."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
