# SPDX-License-Identifier: Apache-2.0
"""Writes the small files of a spool that must be written even when the disk is full.

On a full disk, writers must go on counting drops, and the sender must go on deleting acknowledged files. Both need one
small file per stream. For these files, `create_spool` reserves blocks of the disk, which are called spares. Ledgers and
cursors are written through this module.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from trackhub.open_without_links import open_plain

__all__ = ["SPARES", "make_spare", "reason_of", "write_start"]

SPARES = 16
"""Enough for the ledgers and the cursors of eight streams."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers if a disk, or a user's quota on it, has no free blocks or no free inodes."""


def reason_of(error: OSError) -> str:
    """Return the reason for a drop that this error caused."""
    return "disk_full" if error.errno in _NO_ROOM else "io_error"


def make_spare(folder: Path, number: int) -> None:
    """Reserve a block of the disk, unless that was done before.

    Raises:
        OSError: the disk has no room.
    """
    path = folder / f"{number}.spare"
    try:
        # Never write an existing spare again. It would lose its block for a moment, and another program could take the
        # block.
        with open(path, "xb", buffering=0, opener=open_plain) as file:
            file.write(bytes(1))
    except FileExistsError:
        return
    except OSError:
        path.unlink(missing_ok=True)
        raise


def write_start(path: Path, data: bytes, mode: int = 0o600) -> int:
    """Write a few bytes at the start of a file and return its descriptor. On a full disk, a spare becomes the file.

    It uses one ``pwrite``, so that a killed process leaves the old or the new bytes.

    Args:
        path: the file; created if need be.
        data: its first bytes.
        mode: who may read and write a new file.

    Raises:
        OSError: the file cannot be written, or the disk is full and there is no spare.
    """
    try:
        return _write_start(path, data, mode)
    except OSError as e:
        if e.errno not in _NO_ROOM:
            raise
        for spare in path.parent.glob("*.spare"):
            with contextlib.suppress(FileNotFoundError):  # another process took it
                spare.replace(path)
                return _write_start(path, data, mode)
        raise


def _write_start(path: Path, data: bytes, mode: int) -> int:
    fd = open_plain(path, os.O_RDWR | os.O_CREAT, mode)
    try:
        os.pwrite(fd, data, 0)
    except OSError:
        os.close(fd)
        raise
    return fd
