# SPDX-License-Identifier: Apache-2.0
"""Keeps trackhub's open files apart from those of a script that closes all descriptors of its process, as daemons do.

The spool and `trackhub.process_lock` use it. After such a script, the numbers of trackhub's descriptors may
belong to files of the script. So trackhub takes high numbers, which few scripts reach. It looks whether a number still
belongs to the file that it opened, and closes no other.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import sys
from collections.abc import Callable

__all__ = ["MappedFile", "OwnDescriptor"]

_FIRST = 512  # scripts that close a fixed range close fewer; the usual limit is 1,024
_OUT_OF_REACH = 128  # a script that closes all descriptors seldom opens as many files afterwards
_SCANNED = 1024

# Mappings whose copy of the descriptor the script has closed. Freeing one would close the script's file that has the
# number now. So a fork handler refers to this list: the interpreter frees fork handlers after all modules, when the
# script's own files are closed already.
_kept: list[mmap.mmap] = []
os.register_at_fork(after_in_child=_kept.__len__)


def _file_of(fd: int, fstat: Callable[[int], os.stat_result] = os.fstat) -> tuple[int, int] | None:
    """Return the identity of the file of a descriptor. None if the descriptor is closed."""
    # No global name is used: it may be gone when the interpreter ends.
    try:
        found = fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _moved_up(fd: int) -> int:
    """Close a descriptor and return one with a high number for its file. If no high number is free, return it as is."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, min(_FIRST, limit // 2) if limit >= 0 else _FIRST)
    except OSError:
        return fd
    os.close(fd)
    return moved


_FileOf = Callable[[int], tuple[int, int] | None]


class OwnDescriptor:
    """An open file of trackhub. ``close`` closes the descriptor only if it still belongs to this file.

    Attributes:
        number: the descriptor; -1 after ``close``.
        is_out_of_reach: False if no high number was free. The script's next file may then get this number.
    """

    def __init__(self, fd: int) -> None:
        """Take over an open descriptor. It gets a high number, if one is free."""
        self.number = _moved_up(fd)
        self.is_out_of_reach = self.number >= _OUT_OF_REACH
        self._file = _file_of(self.number)

    def is_own(self) -> bool:
        """Return whether the descriptor still belongs to the file. Never raises."""
        return self.number >= 0 and _file_of(self.number) == self._file

    def close(self, file_of: _FileOf = _file_of, close: Callable[[int], None] = os.close) -> None:
        """Close the file, unless the script has closed it. Never raises. Idempotent."""
        # Forget the number first. Another thread may fork in between, and the child must not close it again: by then,
        # the number may belong to another file. No global name is used: it may be gone when the interpreter ends.
        number, self.number = self.number, -1
        if number >= 0:
            try:
                if file_of(number) == self._file:
                    close(number)
            except OSError:
                pass  # the error is one of earlier writes, whose calls returned long ago

    def __del__(self) -> None:
        self.close()


class MappedFile:
    """A file that is mapped into memory. The mapping stays whole when the script closes all descriptors.

    Attributes:
        content: the mapped bytes.
    """

    def __init__(self, fd: int, size: int, access: int = mmap.ACCESS_WRITE) -> None:
        """Map the first bytes of an open file. The caller still owns the descriptor.

        Args:
            fd: the file's descriptor.
            size: how many bytes.
            access: as ``mmap.mmap`` has it.

        Raises:
            OSError: it cannot be mapped.
            ValueError: the file is shorter.
        """
        self._copy = -1
        self._file = _file_of(fd)
        if sys.version_info >= (3, 13):
            self._map = mmap.mmap(fd, size, access=access, trackfd=False)
        else:
            # Python keeps a copy of the descriptor, does not say which, and closes it with the mapping.
            guess = os.dup(fd)
            os.close(guess)
            self._map = mmap.mmap(fd, size, access=access)
            candidates = (guess, *range(3, _SCANNED))
            self._copy = next((n for n in candidates if n != fd and _file_of(n) == self._file), -1)
        self.content = memoryview(self._map)

    def __del__(self, file_of: _FileOf = _file_of, keep: Callable[[mmap.mmap], None] = _kept.append) -> None:
        if self._copy >= 0 and file_of(self._copy) != self._file:
            keep(self._map)
