# SPDX-License-Identifier: Apache-2.0
"""The writer's end of the spool: an append-only file per writing process, at the site.

A log call becomes one ``write(2)`` to a file, and returns. What was written survives the death of the process; the
sender (`trackhub.spool.reading`) tails the files and deletes what the receiver has acknowledged. `trackhub.spool.layout`
describes the files.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from trackhub.errors import ConfigError, SpoolError
from trackhub.framing import encode_frame
from trackhub.records import Gap, Payload, Record
from trackhub.spool.layout import (
    DROP_REASONS,
    SEGMENT_HEADER,
    Ledger,
    RoundFile,
    blob_file,
    read_ack,
    read_spool_info,
    segment_name,
)

__all__ = ["SPOOL_ENV", "NewBlob", "Spool", "find_spool", "set_process_spool", "spool_env"]

SPOOL_ENV = "TRACKHUB_SPOOL"
"""Environment variable by which a trainer finds its spool; its value is made by ``spool_env``."""

SEGMENT_BYTES = 8 << 20
"""A segment is closed at this size, so that acknowledged bytes can be given back while training goes on."""

_RESCAN_S = 0.5
_WARN_EVERY_S = 60.0
_log = logging.getLogger(__name__)


def spool_env(folder: Path, site: str, job: str) -> str:
    """Return the value of ``SPOOL_ENV`` that leads a trainer of this site and job to the spool."""
    return msgspec.json.encode({"dir": str(folder), "site": site, "job": job}).decode()


_process_spool: Path | None = None


def set_process_spool(folder: Path | None) -> None:
    """Register the spool for writers in this very process, but not in its children.

    The server uses it for its own run: an environment variable would leak into the simulator's clients, which inherit
    the server's environment, and they would write as the server.
    """
    global _process_spool  # the one per-process fact: whose process this is
    _process_spool = folder


def find_spool() -> Path:
    """Return the folder of the spool that belongs to this process.

    Raises:
        ConfigError: there is none: this is not a trainer of a FLARE job with tracking, or that job has ended.
    """
    if _process_spool is not None:
        return _process_spool
    value = os.environ.get(SPOOL_ENV)
    if not value:
        raise ConfigError(f"this process has no tracking (the environment variable {SPOOL_ENV} is not set)")
    try:
        claim = msgspec.json.decode(value)
        folder, site, job = Path(claim["dir"]), claim["site"], claim["job"]
    except (ValueError, TypeError, KeyError, msgspec.DecodeError) as e:
        raise ConfigError(f"{SPOOL_ENV} is not what a FLARE client with tracking sets: {value!r}") from e
    try:
        info = read_spool_info(folder)
    except SpoolError as e:
        raise ConfigError(f"{SPOOL_ENV} names a spool that is not there: {e}") from e
    if (info.site, info.job) != (site, job) or not info.open:
        raise ConfigError(
            f"{SPOOL_ENV} names the spool of site {site!r}, job {job!r}, but {folder} belongs to site {info.site!r}, "
            f"job {info.job!r}{'' if info.open else ', which has ended'}"
        )
    return folder


class NewBlob(NamedTuple):
    """The bytes of an image or artifact on their way into the spool, and the record that goes with them.

    Attributes:
        key: the record's key, for messages.
        size: how many bytes to make room for.
        write: writes the bytes to a path.
        payload: called after ``write`` with the blob's name; returns the record's payload.
    """

    key: str
    size: int
    write: Callable[[Path], None]
    payload: Callable[[str], Payload]


class Spool:
    """Appends this process's records to its stream. Thread-safe; after a fork, the child writes a stream of its own.

    Never raises for a full or failing disk, since training must go on: the record is dropped and counted, its ``seq``
    is used up, and the gap is written into the stream once there is room again.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Open a new stream in this folder. Touches the disk with the first ``append`` only.

        Raises:
            SpoolError: the folder is not a spool.
        """
        self.info = read_spool_info(folder)
        self.folder = folder
        self._clock = clock
        self._segment_limit = min(SEGMENT_BYTES, max(self.info.max_bytes // 8, 1))
        try:
            self._round = RoundFile(folder)
        except (OSError, ValueError) as e:
            raise SpoolError(f"the file with the round in {folder} cannot be used: {e}") from e
        self._warned_at = -_WARN_EVERY_S
        self._closed = False
        self._start_stream()
        _spools.add(self)

    def _start_stream(self) -> None:
        self._lock = threading.RLock()  # a signal handler that logs must not wait for the call that it interrupted
        self._busy = False
        self._deferred: list[Callable[[], object]] = []
        self.stream = uuid.uuid4().hex
        self._next_seq = 0
        self._segment = -1
        self._fd = -1
        self._offset = self._segment_limit  # as of a full segment, so that the first record opens one
        self._budget = 0
        self._full_until = 0.0
        self._dropped = [0] * len(DROP_REASONS)
        self._gaps: list[tuple[int, Gap]] = []
        self._warning: tuple[object, ...] | None = None
        self._ledger: Ledger | None = None

    def _after_fork(self) -> None:
        # The lock may be held by a thread that does not exist here, and the stream belongs to the parent.
        if self._fd >= 0:
            os.close(self._fd)
        self._start_stream()

    @property
    def next_seq(self) -> int:
        """The number of records logged to this stream so far, the dropped ones included."""
        return self._next_seq

    @property
    def last_written(self) -> int:
        """The ``seq`` up to which readers can get: where records were dropped last, the gap is not written yet."""
        with self._lock:
            return self._gaps[0][0] if self._gaps else self._next_seq

    def append(self, payload: Payload, step: int | None, log_time: float) -> None:
        """Append one record. When this returns, the record survives SIGKILL of this process, or was counted as dropped.

        One ``write(2)``: measured 2 us at the median. From a signal handler that interrupted another append of its
        own thread, the record is appended right after that one.

        Raises:
            ValueError: the record is larger than a frame may be (``MAX_BODY_BYTES``); nothing was logged.
            OverflowError: an integer in it does not fit into 64 bits; nothing was logged.
            SpoolError: the spool is closed.
        """
        with self._lock:
            if self._busy:
                encode_frame(Record(self._next_seq, log_time, step, None, payload))  # raises here what it would later
                kept = copy.deepcopy(payload)  # it may hold the caller's own dict
                self._deferred.append(lambda: self._append(kept, step, log_time))
                return
            self._busy = True
            try:
                self._append(payload, step, log_time)
            finally:
                self._busy = False
                if self._deferred:
                    self._catch_up()
        if self._warning is not None:
            self._warn()

    def append_blob(self, blob: NewBlob, step: int | None, log_time: float) -> None:
        """Append a record whose bytes go to a file of their own.

        Other threads do not wait while the bytes are written.

        Args:
            blob: what to store.
            step: the step, already checked.
            log_time: unix seconds.

        Raises:
            ValueError, OverflowError, SpoolError: as ``append``.
        """
        partial = self.folder / f"{uuid.uuid4().hex}.part"
        if not self._reserve(blob.size):
            return
        try:
            blob.write(partial)
        except OSError as e:
            partial.unlink(missing_ok=True)
            error = e
            self._in_turn(lambda: self._drop_for(error))
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        else:
            self._in_turn(lambda: self._append_with(partial, blob.payload, step, log_time))

    def _reserve(self, size: int) -> bool:
        error: OSError | None = None
        with self._lock:
            if self._closed:
                raise SpoolError("the writer is closed; records logged after close() cannot be delivered")
            try:
                if self._has_room(size):
                    self._budget -= size
                    return True
            except OSError as e:
                error = e
        self._in_turn(lambda: self._drop_for(error) if error else self._drop("spool_full", f"{size} bytes do not fit"))
        return False

    def _append_with(self, partial: Path, make: Callable[[str], Payload], step: int | None, at: float) -> None:
        name = f"{self.stream}-{self._next_seq}"
        path = blob_file(self.folder, name)
        stored = False
        try:
            partial.replace(path)
            stored = self._append(make(name), step, at)
        except OSError as e:
            self._drop_for(e)
        finally:
            if not stored:
                partial.unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def _in_turn(self, action: Callable[[], object]) -> None:
        """Act under the lock; if a signal handler of this thread interrupted another action, right after that one."""
        with self._lock:
            self._deferred.append(action)
            if not self._busy:
                self._catch_up()
        if self._warning is not None:
            self._warn()

    def _catch_up(self) -> None:
        while self._deferred:
            self._busy = True
            try:
                self._deferred[0]()
            finally:
                self._busy = False
                del self._deferred[0]

    def _append(self, payload: Payload, step: int | None, log_time: float) -> bool:
        if self._closed:
            raise SpoolError("the writer is closed; records logged after close() cannot be delivered")
        seq = self._next_seq
        now_round = self._round.get()
        frame = encode_frame(Record(seq, log_time, step, now_round, payload))
        if self._gaps:
            gaps = b"".join(encode_frame(Record(at, log_time, None, now_round, gap)) for at, gap in self._gaps)
            frame = gaps + frame
        size = len(frame)
        try:
            if size > self._budget and not self._has_room(size):
                self._drop("spool_full", f"its limit is {self.info.max_bytes} bytes")
                return False
            if self._offset + size > self._segment_limit:
                self._next_segment()
            written = os.write(self._fd, frame)
        except BaseException as e:
            if isinstance(e, OSError) and e.errno is not None:
                self._drop_for(e)
                return False
            # Else a signal handler raised it, such as KeyboardInterrupt, perhaps right after the write.
            if self._has_grown_by(size):
                self._next_seq = seq + 1
                self._offset += size
                self._gaps = []
            raise
        if written != size:
            self._cut_torn_frame()
            self._drop("disk_full", f"{written} of {size} bytes could be written")
            return False
        # No call in between: signal handlers, which may raise, run only at calls, and this must never be half done.
        self._next_seq = seq + 1
        self._offset += size
        self._budget -= size
        self._gaps = []
        if self._ledger is not None:
            self._ledger.set_logged(seq + 1)
        return True

    def _has_grown_by(self, size: int) -> bool:
        try:
            return self._fd >= 0 and os.fstat(self._fd).st_size == self._offset + size
        except OSError:
            return False

    def _next_segment(self) -> None:
        """Open the next segment. The old one keeps its descriptor until the new one exists."""
        self._open_ledger()
        while True:
            path = self.folder / segment_name(self.stream, self._segment + 1)
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
                break
            except FileExistsError:
                self._segment += 1  # left by an attempt that a signal handler broke off
        try:
            if os.write(fd, SEGMENT_HEADER) != len(SEGMENT_HEADER):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        old, self._fd = self._fd, fd
        self._segment += 1
        self._offset = len(SEGMENT_HEADER)
        if old >= 0:
            with contextlib.suppress(OSError):  # of writes long since accepted; the new segment is in use already
                os.close(old)

    def _open_ledger(self) -> None:
        if self._ledger is None:
            self._ledger = Ledger(self.folder / f"{self.stream}.ledger", create=True)

    def _cut_torn_frame(self) -> None:
        """Restore the frame boundary after a short write; failing that, go on in a new segment."""
        try:
            os.ftruncate(self._fd, self._offset)
        except OSError:
            self._offset = self._segment_limit

    def _has_room(self, size: int) -> bool:
        if size <= self._budget:
            return True
        now = self._clock()
        if now < self._full_until:
            return False
        used = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # the sender deletes acknowledged segments meanwhile
                    used += entry.stat().st_size
        left = max(0, self.info.max_bytes - used)
        # Other processes may write here as well: take a part of what is left, or what is asked for, then look again.
        self._budget = min(left, max(self._segment_limit, left // 4, size))
        if size <= self._budget:
            return True
        self._full_until = now + _RESCAN_S
        return False

    def drop(self, reason: str, detail: str) -> None:
        """Count a record that was logged but cannot be stored, for one of ``DROP_REASONS``. Never raises."""
        self._in_turn(lambda: self._drop(reason, detail))

    def _drop_for(self, error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        self._drop("disk_full" if full else "io_error", str(error))

    def _drop(self, reason: str, detail: str) -> None:
        seq = self._next_seq
        self._next_seq = seq + 1
        self._dropped[DROP_REASONS.index(reason)] += 1
        if self._gaps and self._gaps[-1][1].reason == reason:
            first, gap = self._gaps[-1]
            self._gaps[-1] = (first, Gap(gap.count + 1, reason))
        else:
            self._gaps.append((seq, Gap(1, reason)))
        with contextlib.suppress(OSError):  # on a full disk; the gap in the stream will tell
            self._open_ledger()
        if self._ledger is not None:
            self._ledger.set(self._next_seq, self._dropped)
        now = self._clock()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            self._warning = reason, detail, self.folder, sum(self._dropped)

    def _warn(self) -> None:
        """Say that a record was dropped: without the lock, since a log handler may log to the run itself.

        Else the handler's lock and this one would be taken in one order here, and in the other by whoever logs a line.
        """
        if self._busy:
            return  # in a signal handler: the call that it interrupted has the lock, and comes here after it
        warning, self._warning = self._warning, None
        if warning is not None:
            _log.warning(
                "tracking dropped a record (%s: %s) in %s; %d dropped by this process so far; training goes on",
                *warning,
            )

    def acked(self) -> int:
        """Return how many of this stream's records every reader has had acknowledged, refused or explained."""
        return min((read_ack(self.folder, self.stream, c).next_seq for c in self.info.cursors), default=self._next_seq)

    def close(self) -> None:
        """Close the files. What was appended stays for the sender. Idempotent."""
        self._in_turn(self._close)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._round.close()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None


_spools: weakref.WeakSet[Spool] = weakref.WeakSet()


def _renew_spools_after_fork() -> None:
    for spool in list(_spools):
        spool._after_fork()


os.register_at_fork(after_in_child=_renew_spools_after_fork)
