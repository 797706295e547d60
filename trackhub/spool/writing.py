# SPDX-License-Identifier: Apache-2.0
"""The writer's end of the spool: append this process's records to files of its own.

`trackhub.writer` calls it. A log call becomes one ``write(2)`` and returns. What was written survives the death of the
process. The sender reads the files through `trackhub.spool.reading`. `trackhub.spool.layout` describes them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trackhub.errors import SpoolError
from trackhub.fork_without_signals import do_in_child
from trackhub.framing import encode_frame
from trackhub.open_without_links import open_plain
from trackhub.records import Payload, Record
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.spool.acks import ack_file, read_ack, read_retired
from trackhub.spool.drops import CLOSED_FILES, DropWarnings
from trackhub.spool.layout import SpoolInfo, blob_file, ledger_file, read_spool_info, spool_info
from trackhub.spool.room import new_part
from trackhub.spool.round_file import RoundFile
from trackhub.spool.stream_writer import CLOSED, Stream

__all__ = ["NewBlob", "SpoolWriter"]

_NEXT_STEPS = {
    "disk_full": ". Free space on this disk. Records that are logged after that are stored",
    "spool_full": ". Raise the limit spool_bytes, or see why the receiver does not accept what is in the spool",
    "io_error": ". See whether this process may write to the folder, and whether its disk is sound",
}
_CLOSED_FILES = (
    "the script has closed descriptors of trackhub's files in %s, as os.closerange does; what is logged from now on "
    "goes to new files; %s; call os.closerange before the first record is logged"
)
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
    """Appends this process's records to two streams: images and artifacts to one, all others to the other. Thread-safe.

    So a large file delays only other images and artifacts. After a fork, the child writes streams of its own. So does a
    copy of the writer, in this process or, if it was pickled, in another one.

    It never raises for a full or failing disk, since training must go on. It drops the record, counts it and uses up
    its ``seq``. Once there is room again, it writes a gap into the stream, which says how many records are missing and
    why.

    Attributes:
        folder: the spool's folder.
        info: what the spool is, as known when the writer was made.
    """

    # The states of a stream's lock. The lock is re-entrant, since a signal handler that logs may interrupt a call of
    # its own thread.
    #
    #   idle      `busy` is False: nobody appends.
    #   busy      A call took the lock and set `busy`. It appends, and then does the work in `deferred`.
    #   deferred  A call takes the lock and finds `busy` set. So it runs in a signal handler, which interrupted the busy
    #             call on the same stack. It puts its work into `deferred` and returns.
    #
    # So no append starts in the middle of another one, and no signal handler waits for the call that it interrupted.
    # Lock, `busy` and `deferred` belong to the stream: a forked child gets a new stream, and with it a free lock.

    def __init__(
        self, folder: Path, *, info: SpoolInfo | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open new streams in this folder. The files of each are made with its first record.

        Args:
            folder: the spool's folder.
            info: what the spool is, if the caller knows.
            clock: a monotonic clock, in seconds.

        Raises:
            SpoolError: there is no spool in the folder, and none is expected there.
        """
        self.info = info or spool_info(folder)
        self.folder = folder
        self._clock = clock
        self._round = RoundFile(folder)
        self._drop_warnings = DropWarnings()
        self._stream = self._new_stream()
        self._files = self._new_stream()
        self._late: Stream | None = None
        _open_writers.add(self)

    def _after_fork(self) -> None:
        self._drop_warnings = DropWarnings(self._drop_warnings.warned_at)
        # The locks may be held by threads that do not exist here, and the streams belong to the parent.
        old, old_files = self._stream, self._files
        try:
            old.abandon()
            old_files.abandon()
            if self._late is not None:
                self._late.abandon()
        finally:
            self._late = None
            self._stream, self._files = self._follow(old), self._follow(old_files)

    def _new_stream(self) -> Stream:
        return Stream(self.folder, self.info, self._round, self._clock, self._drop_warnings)

    def _follow(self, old: Stream) -> Stream:
        new = self._new_stream()
        new.is_closed = old.is_closed
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.folder), self.info, self._stream.is_closed)

    @property
    def stream(self) -> str:
        """The id of this process's stream of records without files."""
        return self._stream.id

    @property
    def files_stream(self) -> str:
        """The id of this process's stream of images and artifacts."""
        return self._files.id

    @property
    def next_seq(self) -> int:
        """How many records were logged to both streams so far, dropped ones included."""
        return self._stream.next_seq + self._files.next_seq

    def last_written(self) -> tuple[int, int]:
        """Return the ``seq`` after the last record in each of the two streams.

        Gaps that are not in the stream yet do not count.
        """
        return _last_written(self._stream), _last_written(self._files)

    def append(self, payload: Payload, step: int | None, log_time: float) -> None:
        """Append one record. Afterwards, the record survives SIGKILL of this process, or was counted as dropped.

        It takes one ``write(2)``, measured at 2 us in the median. One case is different: a signal handler that
        interrupts a log call of its own thread may log as well. The handler's call returns at once, and the
        interrupted call writes the handler's record later.

        Args:
            payload: what was logged.
            step: 0 to ``MAX_STEP``, or None.
            log_time: unix seconds.

        Raises:
            RecordError: the record is larger than ``MAX_BODY_BYTES``; nothing was logged.
            SpoolError: the spool is closed.
        """
        stream = self._stream
        with stream.lock:
            if stream.busy:
                # Encode the record here, so that a bad one raises in this call.
                encode_frame(Record(stream.next_seq, log_time, step, None, payload))
                kept = copy.deepcopy(payload)  # it may hold the caller's own dict
                stream.deferred.append(lambda: stream.append(kept, step, log_time))
                return
            stream.busy = True
            try:
                stream.append(payload, step, log_time)
            finally:
                stream.busy = False
                if stream.deferred:
                    _do_deferred(stream)
        if stream.drops.warning is not None:
            self._warn(stream)

    def append_blob(self, blob: NewBlob, step: int | None, log_time: float) -> None:
        """Append a record whose bytes go to a file of their own. Other threads do not wait for these bytes.

        Args:
            blob: what to store.
            step: 0 to ``MAX_STEP``, or None.
            log_time: unix seconds.

        Raises:
            RecordError, SpoolError: as ``append``.
        """
        stream = self._files
        self._in_turn(stream, stream.begin_anew_if_files_are_lost)
        partial = new_part(self.folder, stream.id, blob.size)
        try:
            has_room = self._reserve(stream, partial, blob.size)
            if has_room:
                blob.write(partial)
        except OSError as e:
            error = e
            _remove(partial)
            raise_if_from_signal_handler(e)
            self._in_turn(stream, lambda: stream.drop_after(error))
        except BaseException:
            _remove(partial)
            raise
        else:
            if has_room:
                self._in_turn(stream, lambda: self._append_stored(stream, partial, blob, step, log_time))
            else:
                self._drop_in_turn(stream, "spool_full", f"{blob.size} bytes do not fit")

    def drop(self, reason: str, detail: str) -> None:
        """Count a record that was logged but cannot be stored. Never raises.

        Records that come after ``close`` are counted together in one more stream, as long as the job runs.

        Args:
            reason: one of ``DROP_REASONS``.
            detail: what happened, for the log; empty if the caller says it.
        """
        stream = self._late_stream() if self._stream.is_closed else self._stream
        if stream is not None:
            self._drop_in_turn(stream, reason, detail)

    def _late_stream(self) -> Stream | None:
        """Return the stream for records after ``close``. None if the job has ended or ``spool.json`` is unreadable."""
        try:
            if not read_spool_info(self.folder).open:
                return None
        except SpoolError as e:
            raise_if_from_signal_handler(e)
            return None
        if self._late is None:
            self._late = self._new_stream()
        return self._late

    def count_left_out(self, reason: str, values: int) -> None:
        """Count values that were left out of a record. Its other values are stored. Never raises.

        Args:
            reason: one of ``LEFT_OUT_REASONS``.
            values: how many.
        """
        stream = self._stream
        if not stream.is_closed:
            self._in_turn(stream, lambda: stream.drops.leave_out(reason, values))

    def acked(self) -> tuple[int, int]:
        """Return, for both streams, the ``seq`` up to which every receiver has accepted or refused all records."""
        return self._acked_by_all(self._stream), self._acked_by_all(self._files)

    def _acked_by_all(self, stream: Stream) -> int:
        return min((self._acked(stream, cursor) for cursor in self.info.cursors), default=stream.next_seq)

    def _acked(self, stream: Stream, cursor: str) -> int:
        reached = read_ack(self.folder, stream.id, cursor).next_seq
        # After ``close``, the reader may have retired the stream and deleted its ack file.
        if reached == 0 and stream.is_closed and not ack_file(self.folder, stream.id, cursor).exists():
            is_retired = not ledger_file(self.folder, stream.id).exists() and read_retired(self.folder, cursor).streams
            return stream.next_seq if is_retired else 0
        return reached

    def close(self) -> None:
        """Close the files. The sender delivers what was appended. Idempotent."""
        for stream in (self._stream, self._files):
            self._in_turn(stream, stream.close)

    def _in_turn(self, stream: Stream, action: Callable[[], object]) -> None:
        """Call ``action`` under the lock. In a signal handler, the interrupted call may run ``action`` later."""
        with stream.lock:
            stream.deferred.append(action)
            if not stream.busy:
                _do_deferred(stream)
        if stream.drops.warning is not None:
            self._warn(stream)

    def _append_stored(self, stream: Stream, partial: Path, blob: NewBlob, step: int | None, log_time: float) -> None:
        """Give the stored bytes their name and append their record. Delete the bytes if that fails."""
        if stream.is_abandoned:
            return  # the file belongs to the parent process, too
        stream.begin_anew_if_files_are_lost()  # before the blob gets its name, which contains the stream's id
        path = blob_file(self.folder, f"{stream.id}-{stream.next_seq}")
        seq = stream.next_seq
        is_appended: bool | None = None
        try:
            partial.replace(path)
            is_appended = stream.append(blob.payload(path.stem), step, log_time)
        except OSError as e:
            raise_if_from_signal_handler(e)
            is_appended = False
            stream.drop_after(e)
        finally:
            if is_appended is None:  # a signal handler has raised an error, perhaps right after the write
                is_appended = stream.next_seq > seq
            if not is_appended and not stream.is_abandoned:
                _remove(partial)
                _remove(path)

    def _reserve(self, stream: Stream, partial: Path, size: int) -> bool:
        """Make the file for a blob. The file's name reserves the room. Return whether there is room.

        Raises:
            OSError: the file cannot be made, or the folder cannot be measured.
            SpoolError: the spool is closed.
        """
        if stream.is_closed:
            raise SpoolError(CLOSED)
        # Open the ledger first. If this process is killed, the ledger shows that nobody writes the file any more.
        self._in_turn(stream, stream.open_ledger)
        # `Path.touch` would swallow an OSError that a signal handler raises.
        os.close(open_plain(partial, os.O_WRONLY | os.O_CREAT, 0o600))
        if stream.room.fits(size):
            return True
        _remove(partial)
        return False

    def _drop_in_turn(self, stream: Stream, reason: str, detail: str) -> None:
        self._in_turn(stream, lambda: stream.drop(reason, detail))

    def _warn(self, stream: Stream) -> None:
        """Log that a record was dropped. Do not hold the stream's lock: a handler of ``logging`` may log to the run.

        With the lock held, this thread would take the stream's lock first and the handler's lock second. Another thread
        that logs a line takes them in the other order. The two would wait for each other for ever.
        """
        if stream.busy or stream.is_abandoned:
            # This may be a signal handler. Then the call that it interrupted holds the lock, and warns afterwards. Or
            # this may be a child that was forked in the middle of a call. Then the parent warns.
            return
        warning, stream.drops.warning = stream.drops.warning, None
        if warning is not None:
            reason, detail, total = warning
            if reason == CLOSED_FILES:
                _log.warning(_CLOSED_FILES, self.folder, detail)
                return
            _log.warning(
                "tracking dropped a record (%s: %s) in %s; this writer has dropped %d so far; training goes on%s",
                reason, detail, self.folder, total, _NEXT_STEPS.get(reason, ""),
            )  # fmt: skip


def _last_written(stream: Stream) -> int:
    with stream.lock:
        return stream.drops.gaps[0][0] if stream.drops.gaps else stream.next_seq


def _do_deferred(stream: Stream) -> None:
    while stream.deferred:
        stream.busy = True
        try:
            stream.deferred[0]()
        finally:
            stream.busy = False
            del stream.deferred[0]


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        raise_if_from_signal_handler(e)
        _log.debug("cannot remove %s: %s", path, e)


def _reopen(folder: str, info: SpoolInfo, is_closed: bool) -> SpoolWriter | None:
    """Make the copy of a writer, here or in another process. Never raises.

    Returns:
        A writer with streams of its own. None if the folder now belongs to another job, or the job has ended.
    """
    path = Path(folder)
    try:
        if not (found := read_spool_info(path)).open or (found.site, found.job) != (info.site, info.job):
            _log.warning(
                "a copied writer records nothing: in %s, the job %s of site %s has ended, or another job uses it; "
                "copy the writer while its job runs", path, info.job, info.site,
            )  # fmt: skip
            return None
    except SpoolError as e:
        _log.warning("a copied writer finds no spool, and drops records until there is one: %s", e)
    writer = SpoolWriter(path, info=info)
    writer._stream.is_closed = writer._files.is_closed = is_closed
    return writer


_open_writers: weakref.WeakSet[SpoolWriter] = weakref.WeakSet()


def _start_streams_after_fork() -> None:
    for writer in list(_open_writers):
        with contextlib.suppress(Exception):  # if one fails, the others must still leave their parent's streams
            writer._after_fork()


do_in_child(_start_streams_after_fork)
