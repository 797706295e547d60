# SPDX-License-Identifier: Apache-2.0
"""Tells trouble of the environment, such as a full disk, from a wrong configuration or a defect.

Receiver, lanes and `trackhub.preflight` ask it when something cannot be opened or set up. A wrong configuration stops
a job before training. Trouble of the environment never does, since somebody may free space while the job runs.
"""

from __future__ import annotations

import errno
import sqlite3

__all__ = ["is_environment_trouble"]

# EACCES, ENOTDIR, ELOOP and EROFS are not here. They mean that a configured path is wrong, and waiting does not help.
_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EMLINK,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EREMOTEIO,
    }
)

# SQLite reports a full disk also as an error of its shared memory or of its log, and too many open files as CANTOPEN.
# The journal's file is opened before SQLite opens it, so a wrong path shows as an OSError.
_SQLITE_CODES = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_BUSY}
)
_MAX_CAUSES = 10


def is_environment_trouble(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, is trouble of the environment.

    Examples are a disk without space or inodes, and a disk or network file system that fails. Others are too many open
    files, too little memory, and a database that another program has locked.
    """
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if cause is None:
            return False
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _ERRNOS):
            return True
        if isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", 0) & 0xFF in _SQLITE_CODES:
            return True
        cause = cause.__cause__ or cause.__context__ or getattr(cause, "orig", None)  # SQLAlchemy's errors have `orig`
    return False
