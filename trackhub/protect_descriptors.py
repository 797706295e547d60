# SPDX-License-Identifier: Apache-2.0
"""Protects trackhub's open files, and the script's, when a script closes all descriptors of its process as daemons do.

The spool and `trackhub.process_lock` use it. After such a close, the numbers of trackhub's descriptors may belong to
files of the script. So trackhub takes high numbers, which few scripts reach. Before it closes a number, it checks that
the number still belongs to the file that trackhub opened.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import sys
from collections.abc import Callable

__all__ = ["MappedFile", "OwnDescriptor"]

_FIRST = 512  # scripts that close a fixed range usually stop below this; the usual limit of a process is 1,024
_OUT_OF_REACH = 128  # a script that closes all descriptors seldom opens as many files afterwards
_SCANNED = 1024

# Mappings that must live until the interpreter ends. Python keeps its own copy of a mapping's descriptor, and the
# script has closed that copy. Freeing the mapping would close the script's file that now has this number. The fork
# handler below does nothing. It only keeps this list alive until the script's files are closed, since the interpreter
# frees fork handlers after all modules.
_kept: list[mmap.mmap] = []
os.register_at_fork(after_in_child=_kept.__len__)


def _file_of(fd: int, fstat: Callable[[int], os.stat_result] = os.fstat) -> tuple[int, int] | None:
    """Return the identity of the file of a descriptor. None if the descriptor is closed."""
    # No global name is used: it may be gone when the interpreter ends.
    try:
        found = fstat(fd)
    except OSError as e:
        if e.errno is None:  # a signal handler of the script raised it, such as a TimeoutError
            raise
        return None
    return found.st_dev, found.st_ino


def _moved_up(fd: int) -> int:
    """Move a descriptor to a high number, and return that number. If no high number is free, change nothing."""
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
        is_out_of_reach: True if the number is so high that the script's next files hardly get it.
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
                pass  # `close` can report the error of an earlier write, and no caller is left that could handle it

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
            # Python keeps a copy of the descriptor, and closes the copy with the mapping. It does not tell the copy's
            # number. That is usually the lowest free number, which `dup` shows here.
            guess = os.dup(fd)
            os.close(guess)
            self._map = mmap.mmap(fd, size, access=access)
            candidates = (guess, *range(3, _SCANNED))
            self._copy = next((n for n in candidates if n != fd and _file_of(n) == self._file), -1)
        self.content = memoryview(self._map)

    def __del__(self, file_of: _FileOf = _file_of, keep: Callable[[mmap.mmap], None] = _kept.append) -> None:
        if self._copy >= 0 and file_of(self._copy) != self._file:
            keep(self._map)
