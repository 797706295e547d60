# SPDX-License-Identifier: Apache-2.0
"""The lock that one process holds while it may write to a journal. A killed process releases it.

`Journal` and `repair` take it. ``trackhub status`` asks whether a process holds it. If the lock is free and the journal
does not say how the job ended, the job was killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from trackhub.delivery.report import REPORT_NAME
from trackhub.environment_trouble import is_environment_trouble
from trackhub.errors import JournalError
from trackhub.open_without_links import make_private_folder, open_plain
from trackhub.process_lock import ProcessLock

__all__ = ["is_delivering", "is_journal_locked", "lock_journal", "make_journal_folder"]

_PROBE_S = 0.2  # `lock_journal` tries this long: a process that asks whether it is locked holds it for a moment


def make_journal_folder(path: Path) -> None:
    """Make the folder of a journal. An error with another cause is reported by `lock_journal` later.

    Raises:
        JournalError: the environment, such as a full disk, keeps the folder from being made.
    """
    try:
        make_private_folder(path.parent)
    except OSError as e:
        if is_environment_trouble(e):
            raise JournalError(f"cannot create the journal {path}: {e}") from e


def lock_journal(path: Path) -> ProcessLock:
    """Lock a journal for this process, and return the lock to release. A killed process leaves no lock.

    Raises:
        JournalError: another process has it, or the file ``trackhub.lock`` beside it cannot be opened.
    """
    # The lock has a file of its own. SQLite locks the journal for one transaction only, so two receivers could write to
    # one journal in turn.
    deadline = time.monotonic() + _PROBE_S
    while True:
        try:
            return ProcessLock.open(_lock_file(path))
        except BlockingIOError as e:
            if time.monotonic() >= deadline:
                raise JournalError(
                    f"the journal {path} is in use by another process or receiver (a running job, or a replay); wait "
                    "until it ends"
                ) from e
        except OSError as e:
            what = "open" if os.path.exists(path) else "create"
            raise JournalError(
                f"cannot {what} the journal {path}: {e}; its folder must be writable and have free space"
            ) from e
        time.sleep(0.01)


def is_journal_locked(path: Path) -> bool:
    """Return whether a process has this journal open for writing. Changes nothing on the disk.

    On a file system without locks, this returns True, so that no running job is called dead.
    """
    return _is_locked(path) is not False


def is_delivering(path: Path) -> bool:
    """Return whether a receiver or a replay has this journal, so that what it holds is on its way.

    On a file system without locks, this returns True until the receiver has left its report.
    """
    is_locked = _is_locked(path)
    return not os.path.exists(path.with_name(REPORT_NAME)) if is_locked is None else is_locked


def _is_locked(path: Path) -> bool | None:
    """Return whether a process has this journal. None if the file system has no locks."""
    try:
        fd = open_plain(_lock_file(path), os.O_RDONLY)
    except OSError:
        return False
    try:
        # Ask with a shared lock. Otherwise two processes that ask at the same time would take each other for the owner.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as e:
        return True if e.errno == errno.EACCES else None
    else:
        return False
    finally:
        os.close(fd)


def _lock_file(path: Path) -> Path:
    return path.with_suffix(".lock")
