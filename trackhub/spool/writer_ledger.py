# SPDX-License-Identifier: Apache-2.0
"""A stream's ledger: what the writer counted, how much room it reserved, and whether it still lives.

The writer maps the file and holds a lock on it. The sender reads the counts, and learns from the lock that a stream has
ended. Other writers read the reserved room, to measure the spool.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import zlib
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple

from trackhub.open_without_links import open_plain, read_plain
from trackhub.process_lock import ProcessLock
from trackhub.protect_descriptors import MappedFile
from trackhub.spool.write_on_full_disk import write_start

__all__ = ["DROP_REASONS", "LEFT_OUT_REASONS", "Ledger", "LedgerCounts", "WriterState", "read_ledger", "writer_state"]

DROP_REASONS = (
    "spool_full",  # the spool's limit is reached
    "disk_full",  # the device has no space left
    "io_error",  # the file system failed in another way
    "unconvertible",  # what another library logged cannot be converted into a record
    "invalid_value",  # none of the values can be stored
    "invalid_call",  # the log call has a wrong argument
    "writer_closed",  # the log call came after ``close``
)
"""Why a writer drops a record."""

LEFT_OUT_REASONS = ("invalid_value",)
"""Why a writer leaves single values out of a record. The other values of the record are stored."""

_DROPS, _LEFT_OUT = len(DROP_REASONS), len(LEFT_OUT_REASONS)
_COUNTS = struct.Struct(f"={1 + _DROPS + _LEFT_OUT}Q")
_FORMAT = struct.Struct(f"={1 + _DROPS + _LEFT_OUT + 2}Q")
_LOGGED, _RESERVED, _MACHINE = 0, 1 + _DROPS + _LEFT_OUT, 2 + _DROPS + _LEFT_OUT  # where these fields are
_MODE = 0o644  # the counts are not secret, and a sender under another user needs them


class Ledger:
    """The writer's end of a ledger: a mapped file.

    Its block is on the disk from the start, so counting works even on a full disk.
    """

    def __init__(self, path: Path) -> None:
        """Create the file with zeros, map it, and lock it.

        Raises:
            OSError: it cannot be created.
        """
        # Write the zeros, so that the file gets its block now. Later, the disk may be full.
        fd = write_start(path, bytes(_FORMAT.size), _MODE)
        try:
            self._map: MappedFile | None = MappedFile(fd, _FORMAT.size)
            self._fields = self._map.content.cast("Q")
        except BaseException:
            os.close(fd)
            raise
        self._lock: ProcessLock | None = None
        # This fails if a signal handler interrupted a call that holds the lock. The stream is then never retired.
        with contextlib.suppress(BlockingIOError):
            self._lock = ProcessLock(fd)
            if self._lock.is_locked:
                # Set this field last. If it is set and the lock is free, a reader knows that the writer has ended.
                self._fields[_MACHINE] = this_machine()

    def set(self, logged: int, dropped: list[int], left_out: list[int]) -> None:
        """Store all counts.

        Args:
            logged: how many calls there were.
            dropped: the drops, in the order of ``DROP_REASONS``.
            left_out: the values that were left out, in the order of ``LEFT_OUT_REASONS``.
        """
        _COUNTS.pack_into(self._fields, 0, logged, *dropped, *left_out)

    def set_left_out(self, left_out: list[int]) -> None:
        """Store how many values were left out, in the order of ``LEFT_OUT_REASONS``."""
        for i, number in enumerate(left_out, 1 + _DROPS):
            self._fields[i] = number

    def set_logged(self, logged: int) -> None:
        """Store how many calls there were. The drops stay as they are."""
        self._fields[_LOGGED] = logged

    def reserve(self, end: int) -> None:
        """Reserve room in this stream's last segment up to this offset."""
        self._fields[_RESERVED] = end

    def close(self) -> None:
        """End the stream: give the reserved room back, unmap the file and unlock it. Idempotent."""
        self.reserve(0)
        self._let_go()
        if self._lock is not None:
            self._lock.release()

    def abandon(self) -> None:
        """Leave the file to the process that this one was forked from. Later counts are ignored."""
        self._let_go()
        if self._lock is not None:
            self._lock.abandon()

    def _let_go(self) -> None:
        # A signal handler may have interrupted a log call and forked. The call still counts here, so leave it memory.
        self._fields = memoryview(bytearray(_FORMAT.size)).cast("Q")
        self._map = None

    def is_lost(self) -> bool:
        """Return whether the script has closed the file. Readers then treat the stream as ended. Never raises."""
        return self._lock is not None and not self._lock.is_held()


class LedgerCounts(NamedTuple):
    """What a ledger says.

    Attributes:
        logged: log calls that returned.
        dropped: reason -> dropped records.
        left_out: reason -> values that were left out of records.
        reserved: the offset up to which room is reserved in the stream's last segment.
        is_counted: False if the file is empty, because the disk had no room for the writer's counts.
    """

    logged: int
    dropped: dict[str, int]
    left_out: dict[str, int]
    reserved: int
    is_counted: bool


def read_ledger(path: Path) -> LedgerCounts:
    """Return what a ledger says. If the file is missing or too short, all counts are zero.

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        data = read_plain(path)
    except FileNotFoundError:
        return LedgerCounts(0, {}, {}, 0, is_counted=True)
    logged, *rest = _FORMAT.unpack(data[: _FORMAT.size] if len(data) >= _FORMAT.size else bytes(_FORMAT.size))
    dropped = {reason: n for reason, n in zip(DROP_REASONS, rest[:_DROPS], strict=True) if n}
    left_out = {reason: n for reason, n in zip(LEFT_OUT_REASONS, rest[_DROPS:-2], strict=True) if n}
    return LedgerCounts(logged, dropped, left_out, rest[-2], is_counted=bool(data))


class WriterState(Enum):
    """Whether a stream may still grow."""

    ALIVE = "alive"
    """Its writer lives and has not closed it."""
    ENDED = "ended"
    """Its writer has closed it, or has died. Nothing follows."""
    UNKNOWN = "unknown"
    """Nobody can tell. The ledger is missing or damaged, or the file system has no locks. Or the writer runs or ran on
    another machine, whose locks may not be seen here."""


def writer_state(path: Path) -> WriterState:
    """Return whether the writer of this ledger still lives. Never raises."""
    try:
        fd = open_plain(path, os.O_RDONLY)
    except OSError:
        return WriterState.UNKNOWN
    try:
        data = os.pread(fd, _FORMAT.size, 0)
        machine = _FORMAT.unpack(data)[_MACHINE] if len(data) == _FORMAT.size else 0
        if machine == 0:
            # The writer may be about to lock the file. A lock taken here would make it fail.
            return WriterState.UNKNOWN
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return WriterState.ALIVE
        fcntl.flock(fd, fcntl.LOCK_UN)
        return WriterState.ENDED if machine == this_machine() else WriterState.UNKNOWN
    except OSError:
        return WriterState.UNKNOWN
    finally:
        os.close(fd)


@cache
def this_machine() -> int:
    """Return a nonzero number for this boot of the machine. All containers on the machine get the same number."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        name = os.uname().nodename.encode()
    return zlib.crc32(name) + 1
