# SPDX-License-Identifier: Apache-2.0
"""The writer's end of the spool: append this process's records to files of its own.

A log call becomes one ``write(2)`` and returns. What was written survives the death of the process. The sender reads
the files through `trackhub.spool.reading`. `trackhub.spool.layout` describes them.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trackhub.errors import SpoolError
from trackhub.framing import encode_frame
from trackhub.records import Payload, Record
from trackhub.spool.drops import NEVER, Drops, reason_of
from trackhub.spool.layout import RoundFile, blob_file, ledger_file, read_ack, read_spool_info
from trackhub.spool.room import Room
from trackhub.spool.segment_file import SegmentFile

__all__ = ["NewBlob", "SpoolWriter"]

SEGMENT_BYTES = 8 << 20
"""A writer closes a segment at this size, so that acknowledged bytes can be deleted while training goes on."""

_CLOSED = "the writer is closed; records logged after close() cannot be delivered"
_log = logging.getLogger(__name__)


class NewBlob(NamedTuple):
    """The bytes of an image or artifact on their way into the spool, and the record that goes with them.

    Attributes:
        key: the record's key, for messages.
        size: how many bytes to make room for.
        write: writes the bytes to a path.
        payload: returns the record's payload, given the blob's name. Called after ``write``.
    """

    key: str
    size: int
    write: Callable[[Path], None]
    payload: Callable[[str], Payload]


class SpoolWriter:
    """Appends this process's records to a stream. Thread-safe. After a fork, the child writes a stream of its own.

    It never raises for a full or failing disk, since training must go on. It drops the record, counts it and uses up
    its ``seq``. Once there is room again, it writes the gap into the stream.

    Attributes:
        folder: the spool's folder.
        info: what ``spool.json`` said when the stream was opened.
        stream: the id of this process's stream.
    """

    # Whose turn it is. The lock is re-entrant, since a signal handler that logs may interrupt a call of its own thread.
    #
    #   idle     _busy is False: nobody appends.
    #   busy     A call took the lock and set _busy. It appends, and then does what was deferred meanwhile.
    #   deferred A call takes the lock and finds _busy set: it runs in a signal handler that interrupted the busy call
    #            below it on the same stack. It puts its work into _deferred and returns.
    #
    # So no append starts in the middle of another one, and no signal handler waits for the call that it interrupted.

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Open a new stream in this folder. Files are made with the first record.

        Args:
            folder: the spool's folder.
            clock: seconds that only grow.

        Raises:
            SpoolError: the folder is not a spool.
        """
        self.info = read_spool_info(folder)
        self.folder = folder
        self._clock = clock
        try:
            self._round = RoundFile(folder)
        except (OSError, ValueError) as e:
            raise SpoolError(f"the file with the round in {folder} cannot be used: {e}") from e
        self._closed = False
        self._start_stream(NEVER)
        _open_writers.add(self)

    def _start_stream(self, warned_at: float) -> None:
        self._lock = threading.RLock()
        self._busy = False
        self._deferred: list[Callable[[], object]] = []
        self.stream = uuid.uuid4().hex
        self._next_seq = 0
        segment_bytes = min(SEGMENT_BYTES, max(self.info.max_bytes // 8, 1))
        self._segment = SegmentFile(self.folder, self.stream, segment_bytes)
        self._room = Room(self.folder, self.info.max_bytes, segment_bytes, self._clock)
        self._drops = Drops(ledger_file(self.folder, self.stream), self._clock, warned_at)

    def _after_fork(self) -> None:
        # The lock may be held by a thread that does not exist here, and the stream belongs to the parent.
        self._segment.close()
        self._start_stream(self._drops.warned_at)

    @property
    def next_seq(self) -> int:
        """How many records were logged to this stream so far, with the dropped ones."""
        return self._next_seq

    @property
    def last_written(self) -> int:
        """The ``seq`` after the last record in the stream. It is lower than ``next_seq`` while a gap is not written."""
        with self._lock:
            return self._drops.gaps[0][0] if self._drops.gaps else self._next_seq

    def append(self, payload: Payload, step: int | None, log_time: float) -> None:
        """Append one record. When this returns, the record survives SIGKILL of this process, or was counted as dropped.

        It takes one ``write(2)``, measured at 2 us in the median. A call from a signal handler that interrupted another
        call of its thread returns before its record is written; the interrupted call writes it.

        Args:
            payload: what was logged.
            step: 0 to ``MAX_STEP``, or None.
            log_time: unix seconds.

        Raises:
            ValueError: the record is larger than ``MAX_BODY_BYTES``; nothing was logged.
            OverflowError: an integer in it does not fit into 64 bits; nothing was logged.
            SpoolError: the spool is closed.
        """
        with self._lock:
            if self._busy:
                encode_frame(
                    Record(self._next_seq, log_time, step, None, payload)
                )  # so that a bad record raises in this call
                kept = copy.deepcopy(payload)  # it may hold the caller's own dict
                self._deferred.append(lambda: self._append(kept, step, log_time))
                return
            self._busy = True
            try:
                self._append(payload, step, log_time)
            finally:
                self._busy = False
                if self._deferred:
                    self._do_deferred()
        if self._drops.warning is not None:
            self._warn()

    def append_blob(self, blob: NewBlob, step: int | None, log_time: float) -> None:
        """Append a record whose bytes go to a file of their own. Other threads do not wait while they are written.

        Args:
            blob: what to store.
            step: 0 to ``MAX_STEP``, or None.
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
            self._drop_in_turn(reason_of(e), str(e))
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        else:
            self._in_turn(lambda: self._append_stored(partial, blob, step, log_time))

    def drop(self, reason: str, detail: str) -> None:
        """Count a record that was logged but cannot be stored. Never raises.

        Args:
            reason: one of ``DROP_REASONS``.
            detail: what happened, for the log.
        """
        self._drop_in_turn(reason, detail)

    def acked(self) -> int:
        """Return the ``seq`` up to which every receiver accepted or refused this stream's records, gaps included."""
        return min((read_ack(self.folder, self.stream, c).next_seq for c in self.info.cursors), default=self._next_seq)

    def close(self) -> None:
        """Close the files. The sender delivers what was appended. Idempotent."""
        self._in_turn(self._close)

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._segment.close()
            self._round.close()
            self._drops.close()

    def _in_turn(self, action: Callable[[], object]) -> None:
        """Act under the lock. In a signal handler that interrupted another action, the interrupted call acts later."""
        with self._lock:
            self._deferred.append(action)
            if not self._busy:
                self._do_deferred()
        if self._drops.warning is not None:
            self._warn()

    def _do_deferred(self) -> None:
        while self._deferred:
            self._busy = True
            try:
                self._deferred[0]()
            finally:
                self._busy = False
                del self._deferred[0]

    def _append(self, payload: Payload, step: int | None, log_time: float) -> bool:
        """Append one record, or drop it. Return whether it is in the stream."""
        if self._closed:
            raise SpoolError(_CLOSED)
        segment, room, drops = self._segment, self._room, self._drops
        seq = self._next_seq
        current_round = self._round.get()
        frame = encode_frame(Record(seq, log_time, step, current_round, payload))
        if drops.gaps:
            frame = drops.gap_frames(log_time, current_round) + frame
        size = len(frame)
        try:
            if size > room.left and not room.has(size):
                self._drop("spool_full", f"its limit is {self.info.max_bytes} bytes")
                return False
            if segment.offset + size > segment.limit:
                drops.open_ledger()
                segment.open_next()
            written = os.write(segment.fd, frame)
        except BaseException as e:
            if isinstance(e, OSError) and e.errno is not None:
                self._drop(reason_of(e), str(e))
                return False
            # Otherwise a signal handler raised it, such as KeyboardInterrupt, perhaps right after the write.
            if segment.has_grown_by(size):
                self._next_seq = seq + 1
                segment.offset += size
                drops.gaps = []
            raise
        if written != size:
            segment.cut_torn_frame()
            self._drop("disk_full", f"{written} of {size} bytes could be written")
            return False
        # These four assignments contain no call, so no signal handler, which may raise, can interrupt them.
        self._next_seq = seq + 1
        segment.offset += size
        room.left -= size
        drops.gaps = []
        if drops.ledger is not None:
            drops.ledger.set_logged(seq + 1)
        return True

    def _append_stored(self, partial: Path, blob: NewBlob, step: int | None, log_time: float) -> None:
        """Give the stored bytes their name and append their record. Delete them if the record is not in the stream."""
        name = f"{self.stream}-{self._next_seq}"
        path = blob_file(self.folder, name)
        is_appended = False
        try:
            partial.replace(path)
            is_appended = self._append(blob.payload(name), step, log_time)
        except OSError as e:
            self._drop(reason_of(e), str(e))
        finally:
            if not is_appended:
                partial.unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def _reserve(self, size: int) -> bool:
        """Make room for a blob. Without room, drop its record and return False."""
        reason, detail = "spool_full", f"{size} bytes do not fit"
        with self._lock:
            if self._closed:
                raise SpoolError(_CLOSED)
            try:
                if self._room.has(size):
                    self._room.left -= size
                    return True
            except OSError as e:
                reason, detail = reason_of(e), str(e)
        self._drop_in_turn(reason, detail)
        return False

    def _drop(self, reason: str, detail: str) -> None:
        seq = self._next_seq
        self._next_seq = seq + 1
        self._drops.add(seq, reason, detail)

    def _drop_in_turn(self, reason: str, detail: str) -> None:
        self._in_turn(lambda: self._drop(reason, detail))

    def _warn(self) -> None:
        """Say that a record was dropped. The lock is not held, since a log handler may itself log to the run.

        With the lock held, this thread would take this lock and then the handler's. Another thread that logs a line
        takes them in the other order, and the two would wait for each other for ever.
        """
        if self._busy:
            return  # in a signal handler: the call that it interrupted holds the lock, and warns afterwards
        warning, self._drops.warning = self._drops.warning, None
        if warning is not None:
            reason, detail, total = warning
            _log.warning(
                "tracking dropped a record (%s: %s) in %s; this process has dropped %d so far; training goes on",
                reason, detail, self.folder, total,
            )  # fmt: skip


_open_writers: weakref.WeakSet[SpoolWriter] = weakref.WeakSet()


def _start_streams_after_fork() -> None:
    for writer in list(_open_writers):
        writer._after_fork()


os.register_at_fork(after_in_child=_start_streams_after_fork)
