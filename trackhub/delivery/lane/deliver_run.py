# SPDX-License-Identifier: Apache-2.0
"""Delivers one run to one backend: opens the run, writes its records, lets the backend confirm them, finishes the run.

A `Lane` has one `RunDelivery` for each site, and calls it for one piece of work at a time. Five parts do the details:
`EntryReader` reads records, `Isolation` holds what must be written, `FileQueue` passes files to a second thread,
`Cursor` counts, and `RetryTimer` says when to try again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path
from threading import Event
from typing import Any

import msgspec

from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.tables_and_rows import RunState
from trackhub.delivery.lane.checked_answers import (
    checked_confirmation,
    checked_left_out,
    checked_report,
    checked_results,
)
from trackhub.delivery.lane.cursor import Cursor
from trackhub.delivery.lane.describe_record import named_rejection
from trackhub.delivery.lane.entry_reader import EntryReader
from trackhub.delivery.lane.file_uploads import FileQueue, FileUploads, is_file
from trackhub.delivery.lane.isolate_bad_record import Isolation
from trackhub.delivery.lane.retry_timer import RetryTimer
from trackhub.delivery.lane.wait_for_disk_room import RunDiskRoom
from trackhub.errors import JournalError, PermanentError, TransientError
from trackhub.job_and_run_info import RunInfo, RunStatus
from trackhub.open_without_links import make_private_folder
from trackhub.spi import (
    Backend,
    BackendRun,
    Confirmation,
    ConfirmedBy,
    Entry,
    Redelivery,
    Rejection,
    Results,
    WriteReport,
)

__all__ = ["RunDelivery"]

_TURN_S = 0.1
"""After this many seconds, a run writes no further batch, and it is another run's turn."""

_LEFT_OUT_S = 0.5
"""The shortest pause, in seconds, before the backend is asked again to confirm the entries that it left out."""

_MAX_LEFT_OUT = 64  # entries that the backend may leave out. Each confirmation stores all of them in the journal

_log = logging.getLogger(__name__)


# The states of a RunDelivery, and what leads from one state to the next. "stopped", "finished" and "unfinished" are
# final: nothing more is done in them.
#
#   closed ──> open         open_run returned. A run is opened when it has records to deliver. It is also opened when an
#                           earlier receiver opened it and could not finish it, since the store shows it as running.
#   closed ──> closed       open_run failed. It is called again later.
#   closed ──> stopped      open_run raised PermanentError, or the run holds records of another journal.
#   closed ──> finished     The job ends, and the run has nothing to deliver.
#   open   ──> open         Entries are written and confirmed. A call that fails is made again later.
#   closed, open ──> stopped       trackhub itself raised an error: a defect.
#   open   ──> finished     The job ends, all is confirmed, and finish returned.
#   open   ──> unfinished   The job ends, and not all is confirmed, or finish raised another error than TransientError.
#   closed, open ──> unfinished    give_up: the lane hangs, or it ended before the run was finished.
#
# In the state open, entries go through these steps:
#
#   read ──> announce ──> write ──> flush, for a backend with ConfirmedBy.FLUSH ──> confirm
class RunDelivery:
    """Delivers one site's records to one backend.

    Used by the lane's thread. When that has ended or hangs, another thread calls `give_up` and `unstored_end`.
    """

    def __init__(
        self,
        lane: str,
        backend: Backend[Any],
        journal: Journal,
        site_id: int,
        info: RunInfo,
        *,
        room: RunDiskRoom,
        flush_s: float,
        stop: Event,
        uploads: FileUploads | None = None,
        workdir: Path | None = None,
    ) -> None:
        """Continue the run from the cursors in the journal.

        Args:
            lane: the lane's name.
            backend: where to deliver; its preflight is over.
            journal: where the records are.
            site_id: the site's id in the journal.
            info: what the backend is told of the run; ``resume_from`` is filled in here.
            room: is asked before each call of the backend that stores records.
            flush_s: how many seconds to wait before a backend with ``ConfirmedBy.FLUSH`` is asked to confirm the
                records that it got.
            stop: once set, no further batch is written.
            uploads: writes files in a second thread. None if this lane writes files in order with everything else.
            workdir: the backend's folder, which is made before the run is opened. None if it has no folder.

        Raises:
            JournalError: the journal cannot be read.
        """
        self.site_id = site_id
        self.site = info.site
        self.timer = RetryTimer()
        self._lane = lane
        self._info = info
        self._backend = backend
        self._room = room
        self._flush_s = flush_s
        self._workdir = workdir
        self._stop = stop
        self._cursor = Cursor(journal, lane, site_id, self.site, backend.capabilities.redelivery)
        self._reader = EntryReader(journal, self._cursor, backend.capabilities, info.blob_dir)
        self._isolation = Isolation(self._backend.capabilities)
        self._files = FileQueue(uploads, site_id, room) if uploads is not None else None
        self._to_write: list[Entry] = list(self._cursor.progress.aside)
        self._aside_timer = RetryTimer()
        self._run: BackendRun | None = None
        self._flush_due: float | None = None
        self._over = False
        self._end_is_stored = True

    @property
    def results(self) -> Results | None:
        """Where a person can see the run, as the backend last said. None before the run is open."""
        return self._cursor.progress.results

    def advance(self, *, flush_now: bool) -> bool:
        """Do one piece of work: open the run, write what was read, or have it confirmed. Blocks as the backend does.

        Args:
            flush_now: ask for a confirmation as soon as there is nothing left to write.

        Returns:
            True if the run can go on at once. If not, `is_idle` says whether it has work left, and `due` when to call
            this again.
        """
        if self._over:
            return False
        try:
            if self._run is None:  # do not read before the run is open: only the open run says which records to skip
                return (self._reader.has_more() or self._has_work()) and self._open()
            return self._collect_files(self._run) or self._advance(self._run, flush_now)
        except JournalError as e:
            self._failed(e)
            return False
        except Exception as e:
            # A defect of trackhub. It must stop only this run, so that the lane delivers the others.
            _log.exception("backend %s: run %s is stopped; its records stay in the journal", self._lane, self.site)
            self._cursor.note_error(e)
            self._end("stopped")
            return False

    def _advance(self, run: BackendRun, flush_now: bool) -> bool:
        all_written = self._isolation.is_empty() and self._cursor.written == self._reader.upto
        if all_written and not self._read(run):
            if self._is_flush_due(flush_now=flush_now):
                return self._flush(run)
            return self._try_aside(run)
        turn_ends = time.monotonic() + _TURN_S
        while (batch := self._isolation.next()) is not None:
            if self._stop.is_set():
                return False
            if time.monotonic() >= turn_ends:
                return True
            if not self._write(run, batch):
                return False
        if not self._isolation.is_empty():  # every entry that is left must wait for an entry that is set aside
            return self._try_aside(run)
        return self._after_writing(run)

    def _after_writing(self, run: BackendRun) -> bool:
        self._cursor.written = self._reader.upto
        if self._backend.capabilities.confirmed_by is not ConfirmedBy.FLUSH:
            self._confirm(Confirmation.STORE)
        elif self._flush_due is None:
            self._flush_due = time.monotonic() + self._flush_s
        elif self._is_flush_due(flush_now=False):
            return self._flush(run)
        return True

    def is_idle(self) -> bool:
        """Return whether everything that the journal has is confirmed or cannot be delivered."""
        if self._over:
            return True
        if self._flush_due is not None or self._cursor.written != self._reader.upto or self._has_work():
            return False
        try:
            return not self._reader.has_more()
        except JournalError as e:
            self._failed(e)
            return False

    def _has_work(self) -> bool:
        was_open = self._cursor.confirmed > 0 and self._cursor.progress.state in ("open", "unfinished")
        return (
            (was_open and self._run is None) or not self._isolation.is_empty() or bool(self._aside() or self._to_write)
        )

    def _aside(self) -> list[Entry]:
        """Return the entries that are neither stored nor rejected, although later entries are written already."""
        left_out = list(self._cursor.left_out.values())
        return self._isolation.aside() + left_out + (self._files.unsettled() if self._files is not None else [])

    def is_open(self) -> bool:
        """Return whether the backend has the run open, so that it must be told how the run ends."""
        return self._run is not None and not self._over

    def is_over(self) -> bool:
        """Return whether nothing more will be done: the run is finished, stopped or unfinished."""
        return self._over

    def due(self) -> float:
        """Return when there will be something to do, on the monotonic clock."""
        dues = [self._flush_due] if self._flush_due is not None else []
        if self._isolation.aside():
            dues.append(self._aside_timer.not_before)
        if not dues and self._isolation.is_empty() and self._files is not None and self._files.unsettled():
            return math.inf  # the lane is notified when a file is written or has failed
        return max(self.timer.not_before, min(dues, default=0.0))

    def finish(self, status: RunStatus) -> None:
        """End the run with this status. If some records are not confirmed, mark the run as unfinished.

        This does not store how the run ended: see `unstored_end`. If `is_over` is still False afterwards, call this
        again at ``timer.not_before``.
        """
        if self._run is None:
            self._over = self.is_idle()
            if self._over and self._cursor.progress.state != "finished":  # else an earlier receiver has finished it
                self._end("finished")
            return
        state = "finished" if self.is_idle() else "unfinished"
        # Ask while the run is open: if it stays unfinished, a replay continues it, so these results stay right.
        self._cursor.progress.results = self._results()
        try:
            self._run.finish(status)
        except TransientError as e:
            self._failed(e)
            return
        except BaseException as e:
            state = "unfinished"
            self._cursor.note_error(e)
            _log.warning("backend %s could not finish run %s (%s); the run stays unfinished", self._lane, self.site, e)
        if state == "finished":
            self._cursor.progress.results = self._results()
        self._end(state)

    def give_up(self, reason: str) -> None:
        """Mark the run as unfinished, unless it is over already.

        Another thread calls it after the lane ended, or while the lane hangs. This does not store how the run ended:
        see `unstored_end`.

        Args:
            reason: why; empty to keep the run's last error.

        Raises:
            JournalError: the journal cannot be read, so it is not known whether the run is finished.
        """
        if self._cursor.progress.state == "finished" and not (self._has_work() or self._cursor.has_unconfirmed_rows()):
            self._over = True  # an earlier receiver finished it
        if not self._over:
            if reason:
                self._cursor.progress.last_error, self._cursor.progress.recovered = reason, False
            self._end("unfinished")

    def unstored_end(self) -> RunState | None:
        """Return how the run ended. None if it has not ended, or if the journal has its end already.

        The caller stores the ends of all runs in one transaction, which waits only once for a locked journal.
        """
        return None if self._end_is_stored else self._cursor.state()

    def note_end_stored(self) -> None:
        """Say that the journal has what `unstored_end` returned."""
        self._end_is_stored = True

    def _end(self, state: str) -> None:
        self._over = True
        self._end_is_stored = False
        self._cursor.progress.state = state

    def _open(self) -> bool:
        """Open the run at the backend, and find out which records it may hold. Return whether it is open."""
        if self._cursor.must_rebuild:
            self._start_over()
        try:
            self._info = msgspec.structs.replace(self._info, resume_from=self._cursor.resume_from())
            if self._workdir is not None:
                with contextlib.suppress(OSError):  # a backend that writes elsewhere does not need it
                    make_private_folder(self._workdir)
            run = self._backend.open_run(self._info)
            if self._backend.capabilities.redelivery is Redelivery.RESUMABLE:
                self._resume(run.next_position())
            self._cursor.doubt_earlier_lanes()
        except PermanentError as e:
            self._cursor.note_error(e)
            _log.warning("backend %s cannot open run %s: %s; its records stay in the journal", self._lane, self.site, e)
            self._over = True
            self._cursor.end("stopped")  # store it now, since the job may go on for long
            return False
        except BaseException as e:  # also SystemExit, which an SDK may raise: no error of a plugin ends the lane
            self._failed(e)
            return False
        self._run = run
        self._cursor.progress.results = self._results()  # a person may look while the job runs; asked again at its end
        self.timer.succeeded()
        if self._to_write:  # what an earlier lane had set aside
            self._add(run, self._to_write)
            self._to_write = []
        return True

    def _resume(self, position: int) -> None:
        """Skip the records before ``position``, which the opened run holds."""
        self._cursor.check_held(position)
        if self._cursor.is_missing_confirmed(position):
            self._start_over()
        self._reader.skip_before = position

    def _start_over(self) -> None:
        self._reader.start_over()
        self._cursor.start_over()
        self._isolation = Isolation(self._backend.capabilities)
        self._to_write = []

    def _read(self, run: BackendRun) -> bool:
        """Queue the entries of the next rows for writing. Return False if none are left, or too many entries wait."""
        if len(self._cursor.left_out) >= _MAX_LEFT_OUT or (self._files is not None and self._files.is_full()):
            return False
        entries = self._reader.read()
        if entries is None:
            return False
        self._add(run, entries)
        return True

    def _add(self, run: BackendRun, entries: list[Entry]) -> None:
        beside = self._backend.capabilities.files_beside
        if self._files is not None and (files := [entry for entry in entries if is_file(entry, beside)]):
            self._cursor.announce(self._reader.upto)
            self._files.add(run, files)
            entries = [entry for entry in entries if not is_file(entry, beside)]
        self._isolation.add(entries)

    def _collect_files(self, run: BackendRun) -> bool:
        """Count the files that the second thread stored, and those that failed. Return whether the run can go on now.

        It cannot if no file is settled, or if a confirmation that is due fails.
        """
        outcomes = self._files.collect() if self._files is not None else []
        for outcome in outcomes:
            if outcome.error is not None:
                self._cursor.doubt([outcome.entry] if outcome.is_handed_over else [])
                self._cursor.note_error(outcome.error)
            if outcome.is_first:
                _log.warning(
                    "backend %s, run %s: the file of record %d is not stored yet: %s; the lane tries again, and writes "
                    "other records", self._lane, self.site, outcome.entry.position, self._cursor.progress.last_error,
                )  # fmt: skip
            if outcome.rejected is not None:
                self._cursor.reject_at_backend([outcome.rejected])
            elif outcome.is_settled:
                self._cursor.count_stored([outcome.entry])
        if not any(outcome.is_settled for outcome in outcomes):
            return False
        return not self._isolation.is_empty() or self._cursor.written != self._reader.upto or self._after_writing(run)

    def _write(self, run: BackendRun, batch: list[Entry]) -> bool:
        """Write a batch, or call the plugin's probe instead. Return False if the lane must wait before the next one."""
        report, error = self._hand_over(run, batch)
        if error is not None:
            return self._write_failed(batch, error)
        self.timer.succeeded()
        self._take(batch, report)
        return True

    def _hand_over(self, run: BackendRun, batch: list[Entry]) -> tuple[WriteReport | None, BaseException | None]:
        """Call the backend with a batch. Return its report, and the error if it failed or its disk has no room."""
        with self._room.hold(batch) as refusal:
            if refusal is not None:
                return None, refusal
            self._cursor.announce(self._reader.upto)
            try:
                if self._isolation.is_probe():
                    run.probe(batch[0])
                    return None, None
                # Hand over a copy: a plugin may change its list, and ``batch`` is counted afterwards.
                return checked_report(run.write(list(batch))), None
            except BaseException as e:
                self._cursor.doubt(batch)  # a backend may have stored the first records before it failed
                return None, e

    def _take(self, batch: list[Entry], report: WriteReport | None) -> None:
        """Count the records of a batch that the backend took: which are stored, and which it rejected."""
        is_test = self._isolation.only_tests_store()
        rejected: list[Rejection] = []
        if report is not None and report.rejected and not is_test:
            named = {r.position: r for r in report.rejected}
            rejected = [named_rejection(e.payload, named[e.position]) for e in batch if e.position in named]
            batch = [e for e in batch if e.position not in named]
        self._cursor.reject_at_backend(rejected + self._isolation.succeeded(batch))
        if not is_test:
            self._cursor.count_stored(batch)
            self._cursor.note_unblocked()

    def _write_failed(self, batch: list[Entry], error: BaseException) -> bool:
        verdict = self._isolation.failed(error)
        if verdict.wait:
            self._failed(error)
        else:
            self._cursor.note_error(error)
        if verdict.narrowed:
            self.timer.succeeded()
        if verdict.blocks:
            self._cursor.note_blocked(batch[0], error)
        if verdict.rejected is not None:
            self._cursor.reject_at_backend([verdict.rejected])
        return not verdict.wait

    def _try_aside(self, run: BackendRun) -> bool:
        """Try one of the entries that are set aside. Return whether the run can go on at once.

        The entries that are held back for them wait, too. If these are ``isolate_bad_record._MAX_HELD``, no more are
        written.
        """
        is_early = time.monotonic() < self._aside_timer.not_before
        if is_early or self._stop.is_set() or not (batch := self._isolation.next_aside()):
            return False
        report, error = self._hand_over(run, batch)
        if error is None:
            self._take(batch, report)
        else:
            self._cursor.note_error(error)
            rejected = self._isolation.failed(error).rejected
            if rejected is None:
                self._aside_timer.failed(error)
                return False
            self._cursor.reject_at_backend([rejected])
        self._aside_timer.succeeded()
        return not self._isolation.is_empty() or self._after_writing(run)

    def _is_flush_due(self, *, flush_now: bool) -> bool:
        flush_now = flush_now and not self._cursor.left_out  # asking again without a pause would be a busy loop
        return self._flush_due is not None and (flush_now or time.monotonic() >= self._flush_due)

    def _flush(self, run: BackendRun) -> bool:
        """Have the backend confirm what was written. Return whether it did."""
        try:
            confirmation = checked_confirmation(run.flush())
            keeps_order = self._backend.capabilities.redelivery.needs_order
            left_out = {} if keeps_order else checked_left_out(run.left_out())
            if len(left_out) > _MAX_LEFT_OUT:
                text = "left_out() returned %d records that are still on their way; expected %d at most"
                raise TransientError(text % (len(left_out), _MAX_LEFT_OUT))
        except BaseException as e:
            self._failed(e)
            return False
        self._cursor.leave_out(left_out)
        self._flush_due = time.monotonic() + max(self._flush_s, _LEFT_OUT_S) if left_out else None
        self.timer.succeeded()
        self._confirm(confirmation)
        return True

    def _confirm(self, by: Confirmation) -> None:
        if not self._isolation.aside() and (self._files is None or not self._files.has_failures()):
            self._cursor.note_recovered()
        self._cursor.confirm(self._reader.memory(), by, self._aside())
        self.timer.allow_hurry()

    def _results(self) -> Results | None:
        try:
            return checked_results(self._backend.results(self._info))
        except BaseException as e:
            _log.warning("backend %s cannot say where run %s can be seen: %s", self._lane, self.site, e)
            return None

    def _failed(self, error: BaseException) -> None:
        self._cursor.note_error(error)
        if self.timer.failed(error):
            _log.warning(
                "backend %s, run %s: %s; the records stay in the journal, and the lane tries again",
                self._lane, self.site, self._cursor.progress.last_error,
            )  # fmt: skip
