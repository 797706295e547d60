# SPDX-License-Identifier: Apache-2.0
"""The current federated round, in a small mapped file. The sender sets it, and all writers of the site read it."""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

from trackhub.open_without_links import open_plain
from trackhub.protect_descriptors import MappedFile
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.spool.write_on_full_disk import write_start

__all__ = ["RoundFile"]

_FORMAT = struct.Struct("=q")
_NO_ROUND = -1
_MODE = 0o644  # a trainer may run under another user than the sender
_LOOK_EVERY_S = 0.5


class RoundFile:
    """One process's view of the file. Processes share it safely, because it is one aligned 8-byte value.

    No method raises. While the file cannot be mapped, for example on a full disk, there is no round. ``get`` tries to
    map it again, at most twice a second.
    """

    def __init__(self, folder: Path, *, sets: bool = False) -> None:
        """Map the file.

        Args:
            folder: the spool's folder.
            sets: True to set the round, and to create the file if it is missing. False only to read.
        """
        self._path = folder / "round"
        self._sets = sets
        self._wanted = _NO_ROUND
        # Every log call reads the round. A view of the mapped integer takes a third of the time of unpacking bytes.
        self._value: memoryview | _NotMapped = _NotMapped(self)
        self._map: MappedFile | None = None
        self.look_again()

    def look_again(self) -> None:
        """Map the file if that was not possible before, and then store the round that was set meanwhile."""
        if isinstance(self._value, _NotMapped):
            try:
                self._value = self._mapped()
            except (OSError, ValueError) as e:
                raise_if_from_signal_handler(e)
                return
            if self._sets and self._wanted != _NO_ROUND:
                self._value[0] = self._wanted

    def _mapped(self) -> memoryview:
        """Return a view of the file's integer.

        Raises:
            OSError: it cannot be opened or created.
            ValueError: it is not as long as it should be.
        """
        fd = self._opened()
        try:
            access = mmap.ACCESS_WRITE if self._sets else mmap.ACCESS_READ
            self._map = MappedFile(fd, _FORMAT.size, access)
            return self._map.content.cast("q")
        finally:
            os.close(fd)

    def _opened(self) -> int:
        """Return a descriptor of the file. Whoever sets the round creates the file, or gives it the right length.

        Raises:
            OSError: it cannot be opened or created.
        """
        if not self._sets:
            return open_plain(self._path, os.O_RDONLY)
        fd = open_plain(self._path, os.O_RDWR | os.O_CREAT, _MODE)
        try:
            is_whole = os.fstat(fd).st_size == _FORMAT.size
        except BaseException:
            os.close(fd)
            raise
        if is_whole:
            return fd
        os.close(fd)  # before the next line, and once: after that, the number may belong to a file of the script
        # Write the value, so that the file gets its block now. Later, the disk may be full.
        fd = write_start(self._path, _FORMAT.pack(_NO_ROUND), _MODE)
        try:
            os.ftruncate(fd, _FORMAT.size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def get(self) -> int | None:
        """Return the current round; None outside rounds."""
        value: int = self._value[0]
        return value if value >= 0 else None

    def set(self, value: int | None) -> None:
        """Set the round that writers put into their records from now on. None ends the round."""
        self._wanted = _NO_ROUND if value is None else value
        self.look_again()
        if isinstance(self._value, memoryview):
            self._value[0] = self._wanted

    def close(self) -> None:
        """Unmap the file."""
        self._value.release()


class _NotMapped:
    """Takes the place of the view while the file is not mapped, and tries now and then to map it."""

    def __init__(self, file: RoundFile) -> None:
        self._file = file
        self._look_at = 0.0

    def __getitem__(self, index: int) -> int:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_EVERY_S
            self._file.look_again()
        value = self._file._value
        return _NO_ROUND if isinstance(value, _NotMapped) else int(value[index])

    def release(self) -> None:
        """There is nothing to unmap."""
