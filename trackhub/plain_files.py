# SPDX-License-Identifier: Apache-2.0
"""Opens files and makes folders for trackhub's own data: for their owner alone, and never through a symbolic link.

Spool, journal and receiver call it. Somebody else may be able to write to the same folder: a training script to its
spool, or another user to a shared folder. A symbolic link there could lead a read or write to any file. A FIFO would
block the process that opens it for ever.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["make_private_folder", "open_plain", "read_plain"]

_PRIVATE_FILE = 0o600
_PRIVATE_FOLDER = 0o700


def open_plain(path: str | Path, flags: int, mode: int = _PRIVATE_FILE) -> int:
    """Open an ordinary file and return its descriptor. Never waits, as opening a FIFO would.

    It fits ``opener=`` of ``open``.

    Args:
        path: the file. The folders before it may be links.
        flags: as for ``os.open``.
        mode: who may read and write a new file, less the umask.

    Raises:
        OSError: it cannot be opened, or it is not an ordinary file but a symbolic link, a FIFO or something else.
    """
    # O_NONBLOCK has no effect on an ordinary file. `open` calls its opener without a mode, so the default mode holds.
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, os.strerror(number) if stat.S_ISDIR(mode) else "it is not an ordinary file", str(path))
    return fd


def read_plain(path: Path) -> bytes:
    """Return the content of an ordinary file.

    Raises:
        OSError: it cannot be read, or it is not an ordinary file.
    """
    with open(path, "rb", opener=open_plain) as file:
        return file.read()


def make_private_folder(path: Path) -> None:
    """Make a folder, and its missing parents, for their owner alone. An existing folder is not changed.

    Raises:
        OSError: it cannot be made, or there is a file or a symbolic link in its place.
    """
    if path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "is a symbolic link, which is not followed; give a folder", str(path))
    if path.is_dir():
        return
    if not path.parent.exists():
        make_private_folder(path.parent)
    path.mkdir(mode=_PRIVATE_FOLDER, exist_ok=True)
