# SPDX-License-Identifier: Apache-2.0
"""One process's stream in a spool: numbers its records, appends them to segments, and counts what it must drop.

`trackhub.spool.writing` has two streams at a time, and new ones after a fork. It decides which thread may append.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from trackhub.errors import SpoolError
from trackhub.framing import encode_frame
from trackhub.records import Payload, Record
from trackhub.signal_handler_errors import find_signal_handler_error, raise_if_from_signal_handler
from trackhub.spool.drops import Drops, DropWarnings
from trackhub.spool.layout import SpoolInfo, create_expected, expected_spool, ledger_file
from trackhub.spool.room import Room
from trackhub.spool.round_file import RoundFile
from trackhub.spool.segment_writer import SegmentFile
from trackhub.spool.write_on_full_disk import reason_of

__all__ = ["CLOSED", "Stream"]

SEGMENT_BYTES = 8 << 20
"""A writer closes a segment at this size, so that acknowledged bytes can be deleted while training goes on."""

_CREATE_EVERY_S = 0.5
_LOOK_EVERY_S = 0.05
CLOSED = "the writer is closed; records logged after close() cannot be delivered"


class Stream:
    """A stream and the locks around it. The methods are called by one thread at a time: the one that holds ``lock``.

    Attributes:
        id: the stream's id.
        lock, busy, deferred: say which thread may append; see `trackhub.spool.writing.SpoolWriter`.
        next_seq: how many records were logged to it so far, including the dropped ones.
        drops: what it has dropped.
        room: how much room there is in the spool.
        is_closed: True once nothing may be logged to it any more.
        is_abandoned: True if it belongs to the process that this one was forked from.
    """

    def __init__(
        self,
        folder: Path,
        info: SpoolInfo,
        round_file: RoundFile,
        clock: Callable[[], float],
        warnings: DropWarnings,
    ) -> None:
        """Begin a stream. Its files are made with the first record.

        Args:
            folder: the spool's folder.
            info: has the spool's limit.
            round_file: says which round the records belong to.
            clock: a monotonic clock, in seconds.
            warnings: when the writer last warned, shared by its streams.
        """
        self.id = uuid.uuid4().hex
        self.lock = threading.RLock()
        self.busy = False
        self.deferred: list[Callable[[], object]] = []
        self.next_seq = 0
        self.is_closed = False
        self.is_abandoned = False
        self._segment_bytes = min(SEGMENT_BYTES, max(info.max_bytes // 8, 1))
        self.room = Room(folder, info.max_bytes, self._segment_bytes, clock)
        self.drops = Drops(ledger_file(folder, self.id), clock, warnings)
        self._segment = SegmentFile(folder, self.id, self._segment_bytes)
        self._last_look = self._next_look = 0.0
        self._seen_seq = 0
        self._warnings = warnings
        self._folder = folder
        self._clock = clock
        self._create_at = 0.0
        self._round = round_file
        self._max_bytes = info.max_bytes

    def append(self, payload: Payload, step: int | None, log_time: float) -> bool:
        """Append one record, or drop it. Return whether it is in the stream.

        Args:
            payload: what was logged.
            step: its step, if it has one.
            log_time: unix seconds of the log call.

        Raises:
            RecordError: as ``encode_frame``; nothing was logged.
            SpoolError: the stream is closed.
        """
        if self.is_closed:
            raise SpoolError(CLOSED)
        if log_time >= self._next_look or log_time < self._last_look:  # the clock may be set back
            self._look_after_files(log_time)
        segment, drops = self._segment, self.drops
        seq = self.next_seq
        current_round = self._round.get()
        frame = encode_frame(Record(seq, log_time, step, current_round, payload))
        if drops.gaps:
            frame = drops.gap_frames(log_time, current_round) + frame
        size = len(frame)
        try:
            if segment.offset + size > segment.limit and not self._make_room(size):
                self.drop("spool_full", f"its limit is {self._max_bytes} bytes")
                return False
            written = os.write(segment.fd, frame)
        except BaseException as e:
            if isinstance(e, OSError) and find_signal_handler_error(e) is None:
                if self.begin_anew_if_files_are_lost():
                    return self.append(payload, step, log_time)
                self.drop_after(e)
                return False
            # Otherwise a signal handler raised the exception (such as KeyboardInterrupt), perhaps right after the
            # write.
            if segment.has_grown_by(size):
                self.next_seq = seq + 1
                segment.offset += size
                drops.gaps = []
            raise
        if written != size:
            if self.begin_anew_if_files_are_lost():
                return self.append(payload, step, log_time)
            segment.cut_torn_frame()
            self.drop("disk_full", f"{written} of {size} bytes could be written")
            return False
        # Put no call between these lines. Either all of them must run, or none. A signal handler, which may raise, runs
        # only at a call.
        self.next_seq = seq + 1
        segment.offset += size
        drops.gaps = []
        if drops.ledger is not None:
            drops.ledger.set_logged(seq + 1)
        return True

    def _look_after_files(self, log_time: float) -> None:
        """Look whether the stream's files are still open, and decide when to look again."""
        self.begin_anew_if_files_are_lost()
        # A look takes a third of the time of a log call. So look before each call only if the script's next file may
        # get the number of the segment's file.
        self._seen_seq = self.next_seq
        self._last_look = log_time
        self._next_look = log_time + (0.0 if self._segment.is_within_reach() else _LOOK_EVERY_S)

    def begin_anew_if_files_are_lost(self) -> bool:
        """If the script has closed the files of this stream, begin another one and return True. Never raises.

        A script may close all descriptors of its process, as daemons do. Readers then treat the stream as ended, and
        the script's next files may get the numbers of the stream's files.
        """
        segment, drops = self._segment, self.drops
        is_lost = segment.is_lost() or (drops.ledger is not None and drops.ledger.is_lost())
        if not is_lost or self.is_abandoned:
            return False
        unseen = self.next_seq - self._seen_seq
        self.id = uuid.uuid4().hex
        self.next_seq = self._seen_seq = 0
        self._segment = SegmentFile(self._folder, self.id, self._segment_bytes)
        self.drops = Drops(ledger_file(self._folder, self.id), self._clock, self._warnings)
        if self.is_abandoned:  # a signal handler has forked during these lines, and this is the child
            self._segment.abandon()
            self.drops.abandon()
        segment.close()
        drops.close()
        self.drops.warn_of_closed_files(f"up to {unseen} earlier records may be lost; the report counts the lost ones")
        return True

    def _make_room(self, size: int) -> bool:
        """Get room for a frame, in this segment or in the next one. Return False if the spool is full.

        Raises:
            OSError: the ledger or the next segment cannot be made, or the folder cannot be measured.
        """
        segment, drops, room = self._segment, self.drops, self.room
        if not room.may_ask_for(size):
            return False
        if (now := self._clock()) >= self._create_at and expected_spool(self._folder) is not None:
            self._create_at = now + _CREATE_EVERY_S
            create_expected(self._folder)
        ledger = drops.open_ledger()
        if segment.must_be_followed(size):
            if not room.fits(0, more=size):  # asked first, since a full spool must not fill with empty segments
                room.note_full(size)
                return False
            segment.open_next()
            self._next_look = 0.0  # look before the next record
        for end in segment.ends(size):
            ledger.reserve(end)
            if room.fits(end - segment.offset):
                segment.limit = end
                return True
        ledger.reserve(segment.offset)
        room.note_full(size)
        return False

    def drop(self, reason: str, detail: str) -> None:
        """Count the next record as dropped.

        Args:
            reason: one of ``DROP_REASONS``.
            detail: what happened, for the warning.
        """
        self.begin_anew_if_files_are_lost()
        seq = self.next_seq
        self.next_seq = seq + 1
        self.drops.add(seq, reason, detail)

    def drop_after(self, error: OSError) -> None:
        """Count the next record as dropped, because of this error."""
        expected = expected_spool(self._folder) if isinstance(error, FileNotFoundError) else None
        if expected is None:
            self.drop(reason_of(error), str(error))
        else:
            self.drop(expected[1], "the spool could not be created yet")

    def open_ledger(self) -> None:
        """Open the stream's ledger, if that is possible. Its lock shows others that this stream's writer lives."""
        try:
            self.drops.open_ledger()
        except OSError as e:
            raise_if_from_signal_handler(e)

    def close(self) -> None:
        """Close the files. Idempotent."""
        self.is_closed = True
        self._segment.close()
        self.drops.close()

    def abandon(self) -> None:
        """Leave the stream to the process that this one was forked from. Never raises.

        A signal handler may have forked in the middle of a log call. The call then goes on in the child as well, where
        it has no effect: the record belongs to the parent.
        """
        self.is_abandoned = True
        self._segment.abandon()
        self.drops.abandon()
