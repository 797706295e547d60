# SPDX-License-Identifier: Apache-2.0
"""Opens files and makes folders for trackhub's own data: for their owner alone, and never through a symbolic link.

Spool, journal and receiver call it. Backends call `open_file` and `make_folder`, since an operator may share a
backend's folder. Somebody else may be able to write to the same folder: a training script to its spool, or another user
to a shared folder. A symbolic link there could lead a read or write to any file. A FIFO would block the process that
opens it for ever.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = [
    "MAX_PLAIN_BYTES",
    "find_way_out",
    "make_folder",
    "make_private_folder",
    "open_file",
    "open_plain",
    "open_plain_inside",
    "read_plain",
]

MAX_PLAIN_BYTES = 1 << 24
"""Largest file that `read_plain` reads. Without this limit, a sparse file could fill the memory: it takes no disk."""

_PRIVATE_FILE = 0o600
_PRIVATE_FOLDER = 0o700
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


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
    return _open_plain(path, flags, mode)


def open_file(path: str | Path, flags: int) -> int:
    """Open an ordinary file as `open_plain` does. A new file is for those who may use its folder, less the umask.

    So it is for its owner alone in a backend's own folder, and for others as well in a folder that somebody shares with
    them. It fits ``opener=`` of ``open``.

    Args:
        path: the file. The folders before it may be links.
        flags: as for ``os.open``.

    Raises:
        OSError: it cannot be opened, or it is not an ordinary file but a symbolic link, a FIFO or something else.
    """
    return open_plain(path, flags, _PRIVATE_FILE | _mode(os.path.dirname(path)) & 0o666 if flags & os.O_CREAT else 0)


def open_plain_inside(folder: Path, path: Path) -> int:
    """Open an ordinary file for reading that is somewhere below a folder, and return its descriptor. Never waits.

    No part of the path below the folder may be a symbolic link. So the opened file is in the folder even if somebody
    changes the path meanwhile.

    Args:
        folder: the folder. It may be reached through links.
        path: the file, below ``folder``.

    Raises:
        OSError: it cannot be opened, is not an ordinary file, or a part of its path is a symbolic link.
        ValueError: ``path`` is not below ``folder``, or has ``..`` in it.
    """
    *parents, name = path.relative_to(folder).parts
    if ".." in (*parents, name):
        raise ValueError(f"{path} has .. in it; give the path without")
    at = os.open(folder, _FOLDER)
    try:
        for parent in parents:
            below = os.open(parent, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        return _open_plain(name, os.O_RDONLY, _PRIVATE_FILE, at)
    finally:
        os.close(at)


def _open_plain(path: str | Path, flags: int, mode: int, dir_fd: int | None = None) -> int:
    # O_NONBLOCK has no effect on an ordinary file. `open` calls its opener without a mode, so the default mode holds.
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, os.strerror(number) if stat.S_ISDIR(mode) else "it is not an ordinary file", str(path))
    return fd


def read_plain(path: Path) -> bytes:
    """Return the content of one of trackhub's own files, which are all small.

    Raises:
        OSError: it cannot be read, is not an ordinary file, or has more than ``MAX_PLAIN_BYTES``.
    """
    with open(path, "rb", opener=open_plain) as file:
        data = file.read(MAX_PLAIN_BYTES + 1)
    if len(data) > MAX_PLAIN_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_PLAIN_BYTES} bytes, so trackhub did not write it", str(path))
    return data


def find_way_out(folder: Path, around: Path) -> str:
    """Return why a program that writes below this folder could write to another place, or block. Empty if it cannot.

    One reason is a symbolic link that leads out of the folder. Another is a hard link: a file that also has a name
    elsewhere. A third is a FIFO or a device. The folder itself may be reached by a link.

    Args:
        folder: what is searched.
        around: a folder in which files below ``folder`` may have other names, such as the run folder. W&B's backend
            gives a logged file a second name in its own folder. So the disk holds it once.

    Raises:
        OSError: a folder cannot be read.
    """
    root, left = os.path.realpath(folder), [os.fspath(folder)]
    names_left: dict[tuple[int, int], int] = {}  # of each file with several names, how many were not found yet
    name_of: dict[tuple[int, int], str] = {}
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    if not Path(os.path.realpath(entry.path)).is_relative_to(root):
                        return f"{entry.path} is a symbolic link that leads out of {folder}"
                elif entry.is_dir():
                    left.append(entry.path)
                elif not entry.is_file():
                    return f"{entry.path} is neither a file nor a folder"
                elif (status := entry.stat()).st_nlink > 1:
                    file = (status.st_dev, status.st_ino)
                    names_left[file] = names_left.get(file, status.st_nlink) - 1
                    name_of[file] = entry.path
    if any(names_left.values()):
        for parent, folders, files in os.walk(os.path.realpath(around)):
            if Path(parent).is_relative_to(root):  # its names are counted, and a second time would hide one elsewhere
                folders.clear()
                continue
            for name in files:
                status = os.lstat(os.path.join(parent, name))
                if (file := (status.st_dev, status.st_ino)) in names_left:
                    names_left[file] -= 1
    for file, names in names_left.items():
        if names:
            return f"{name_of[file]} is a hard link: the same file also has a name outside of {folder} and {around}"
    return ""


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


def make_folder(path: Path) -> None:
    """Make a folder, and its missing parents. Each is for those who may use the folder around it, less the umask.

    So it is for its owner alone in a backend's own folder, and for others as well in a folder that somebody shares with
    them. An existing folder is not changed.

    Raises:
        OSError: it cannot be made, or there is a file in its place.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode=_PRIVATE_FOLDER | _mode(path.parent) & 0o777, exist_ok=True)


def _mode(folder: str | Path) -> int:
    """Return the mode of a folder; the empty path means the current one."""
    return os.stat(folder or os.curdir).st_mode
