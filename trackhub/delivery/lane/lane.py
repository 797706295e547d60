# SPDX-License-Identifier: Apache-2.0
"""A lane: the thread that moves records from the journal into one backend.

A receiver starts one lane for each backend, and notifies it of new rows in the journal. The lane has a `RunDelivery`
for each site and calls them in turn, so that a run that has to wait delays no other run. Lanes do not know each other.
If the backend allows it by ``files_beside``, `FileUploads` writes images and artifacts in a second thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.tables_and_rows import RunState
from trackhub.delivery.lane.deliver_run import RunDelivery
from trackhub.delivery.lane.fair_turns import FairTurns
from trackhub.delivery.lane.file_uploads import FileUploads
from trackhub.delivery.lane.wait_for_disk_room import RunDiskRoom
from trackhub.delivery.lane.where_to_look_notice import OpeningNotice
from trackhub.delivery.share_last_disk_room import DiskRoom
from trackhub.environment_trouble import is_environment_trouble
from trackhub.errors import ConfigError, JournalError, TransientError
from trackhub.job_and_run_info import FEDERATION, JobInfo, RunInfo, RunKey, RunStatus
from trackhub.mark_own_threads import OwnThread
from trackhub.runnable_commands import command_for
from trackhub.spi import Backend, Side

__all__ = ["Lane"]

_IDLE_S = 3600.0
_JOURNAL_RETRY_S = 1.0
_END_WAIT_S = 0.2
_KEPT_SHARE = 0.25  # the share of the time at the job's end that is kept for ending runs that are not delivered
_MAX_KEPT_S = 5.0  # at most this much of that time is kept
_log = logging.getLogger(__name__)


class _Ending(NamedTuple):
    """How the runs end.

    Attributes:
        statuses: site -> the status of its run.
        otherwise: the status of the runs whose sites are not in ``statuses``.
        deliver_until: at this time on the monotonic clock, the lane stops delivering and ends the runs that are still
            open.
    """

    statuses: Mapping[str, RunStatus]
    otherwise: RunStatus
    deliver_until: float


class Lane:
    """Delivers all runs of a receiver to one backend.

    The lane's own thread makes all calls into the backend. Only the files of `FileUploads` are written by another one.
    """

    def __init__(
        self,
        name: str,
        backend: Backend[Any],
        journal: Journal,
        *,
        job: JobInfo,
        side: Side,
        blob_dir: Callable[[str], Path],
        run_folder: Path,
        room: DiskRoom,
        flush_s: float,
        is_running: Callable[[], bool],
        workdir: Path | None = None,
        say_where_to_look: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare a lane; ``start`` starts it.

        Args:
            name: the name of the backend and of the lane.
            backend: where to deliver.
            journal: where the records are, and where the lane stores how far it got.
            job: the job that all runs belong to.
            side: where the receiver is.
            blob_dir: site -> the folder of its blobs.
            run_folder: the job's run folder, in which the backend's files lie.
            room: says whether the lane may hand records of a site to the backend now.
            flush_s: how many seconds the lane waits before it asks a backend with ``ConfirmedBy.FLUSH`` to confirm the
                records that it wrote. At the end of the job it does not wait.
            is_running: as for `OpeningNotice`.
            workdir: the backend's folder. The receiver makes it, but may have failed on a full disk. So it is also made
                before a run is opened.
            say_where_to_look: as for `OpeningNotice`.
        """
        self.name = name
        self._backend = backend
        self._journal = journal
        self._run_info = partial(_run_info, job=job, side=side, blob_dir=blob_dir)
        self._room = room
        self._runs: dict[int, RunDelivery] = {}
        self._uploads: FileUploads | None = None
        self._news: set[int] = set()
        self._news_lock = threading.Lock()
        self._wake = threading.Event()
        self._checked = Future[None]()
        self._ending: _Ending | None = None
        self._may_deliver = threading.Event()
        self._stop = threading.Event()
        self._new_run = partial(RunDelivery, name, backend, journal, flush_s=flush_s, stop=self._stop, workdir=workdir)
        self._busy_since: float | None = None
        self._defect = ""
        self._turns = FairTurns()
        self._notice = OpeningNotice(name, run_folder, is_running, say_where_to_look)
        self._thread = OwnThread(target=self._main, name=f"trackhub-lane-{name}", daemon=True)

    def check(self) -> None:
        """Start the thread. It checks the backend, and then waits for ``start`` before it delivers."""
        self._thread.start()

    def start(self) -> None:
        """Deliver what the journal has, once the backend is checked. Starts the thread if ``check`` did not."""
        self._may_deliver.set()
        if self._thread.ident is None:
            self._thread.start()

    def abandon(self) -> None:
        """Stop before the next call of the backend, and end no run. Does not block; ``wait`` waits for the end."""
        self._stop.set()
        self._may_deliver.set()
        self._wake.set()

    def wait(self, timeout_s: float) -> None:
        """Wait until an abandoned lane has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def wait_for_preflight(self, timeout_s: float) -> None:
        """Wait until the backend's own check is done. A check that takes longer is logged, and the job goes on.

        If it then says that the backend cannot be used, the lane delivers nothing, and the report says why.

        Raises:
            ConfigError: the backend says that it cannot be used as configured.
        """
        try:
            self._checked.result(timeout_s)
        except TimeoutError:
            _log.warning(
                "backend %s did not finish its check within %.3g s; the job goes on, and records wait in the journal",
                self.name, timeout_s,
            )  # fmt: skip

    def notify(self, site: int) -> None:
        """Tell the lane that the journal has new rows of this site. Thread-safe; does not block."""
        with self._news_lock:
            self._news.add(site)
        self._wake.set()

    def begin_finish(self, status: Mapping[str, RunStatus], otherwise: RunStatus, deadline_s: float = math.inf) -> None:
        """Have the lane deliver what is left, finish each run with its status, and end. Does not block.

        Args:
            status: site -> the status of its run.
            otherwise: the status of the runs whose sites are not in ``status``.
            deadline_s: the seconds after which ``join`` will stop the lane. Shortly before, the lane ends the runs that
                are not delivered, so that the backend knows how they ended.
        """
        left_s = deadline_s - min(_MAX_KEPT_S, deadline_s * _KEPT_SHARE)
        self._ending = _Ending(status, otherwise, time.monotonic() + left_s)
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the lane to end. After ``timeout_s``, stop it between two calls of the backend.

        Afterwards call `unstored_ends`, and store what it returns.

        Returns:
            True if it has ended. False if the backend does not return from a call: the lane's thread is left behind.
        """
        self._thread.join(max(timeout_s, 0.0))
        self._stop.set()
        self._wake.set()
        self._thread.join(1.0)  # between two calls it ends at once
        if self._uploads is not None:
            self._uploads.stop(0.0)
        ended = not self._thread.is_alive()
        busy_s = time.monotonic() - (self._busy_since or time.monotonic())
        reason = self._defect if ended else f"backend {self.name} has not returned from a call for {busy_s:.0f} s"
        try:
            for run in list(self._runs.values()):  # a copy: a thread that is left behind may add a run
                run.give_up(reason)
            if reason:  # the runs that the lane never reached must show the reason as well
                for site in self._journal.sites().keys() - self._runs.keys():
                    self._run(site).give_up(reason)
        except JournalError as e:
            _log.warning("lane %s cannot read which runs it did not reach: %s", self.name, e)
        return ended

    def unstored_ends(self) -> dict[tuple[str, int], RunState]:
        """Return the ends of runs that the journal does not have yet, in the form that `Journal.save_runs` takes."""
        ends = {(self.name, run.site_id): run.unstored_end() for run in list(self._runs.values())}
        return {key: end for key, end in ends.items() if end is not None}

    def _store_ends(self) -> None:
        """Store how the runs ended, in one transaction. If the journal is locked, the receiver tries again."""
        try:
            self._journal.save_runs(self.unstored_ends(), wait_s=_END_WAIT_S)
        except JournalError as e:
            _log.debug("lane %s cannot store how its runs ended: %s", self.name, e)
            return
        for run in self._runs.values():
            run.note_end_stored()

    def _main(self) -> None:
        try:
            self._preflight()
            self._may_deliver.wait()
            if self._stop.is_set():
                return
            if (problem := self._checked.exception()) is None:
                self._deliver()
            else:  # it came after `wait_for_preflight` had given up, so the job goes on
                self._end_unusable(problem)
        except BaseException as e:
            # A defect of trackhub's own; training must go on, and the journal keeps the records.
            if not self._stop.is_set():
                self._defect = f"the lane ended unexpectedly: {type(e).__name__}: {e}"
                _log.exception("lane %s ended unexpectedly; its records stay in the journal", self.name)
        finally:
            if not self._checked.done():
                self._checked.set_result(None)
            self._close()

    def _end_unusable(self, problem: BaseException) -> None:
        """Say why this lane delivers nothing. `join` stores it for all runs."""
        self._defect = f"{type(problem).__name__}: {problem}"
        _log.error(
            "backend %s cannot be used: %s. Its records stay in the journal. Mend this, then deliver them with `%s`",
            self.name, problem, command_for("trackhub replay", self._journal.path.parent),
        )  # fmt: skip

    def _close(self) -> None:
        if self._uploads is not None:
            self._uploads.stop(0.1)  # it ends at once, unless a file is still being written
        try:
            self._backend.close()
        except BaseException as e:
            _log.warning("backend %s could not close: %s: %s", self.name, type(e).__name__, e)

    def _preflight(self) -> None:
        self._busy_since = time.monotonic()
        problem: ConfigError | None = None
        try:
            self._backend.preflight()
        except (ConfigError, ImportError) as e:
            if is_environment_trouble(e):  # a full disk is not a wrong configuration, even if a plugin says so
                self._warn_of_preflight(e)
            elif isinstance(e, ConfigError):
                problem = e
            else:  # nobody installs a missing SDK while the job runs
                problem = ConfigError(
                    f"the backend {self.name} cannot import what it needs: {e}. Install it where this backend runs"
                )
        except TransientError as e:
            self._warn_of_preflight(e)
        except BaseException as e:  # also SystemExit, which an SDK may raise: no error of a plugin ends the lane
            _log.warning("the check of backend %s failed: %s: %s", self.name, type(e).__name__, e, exc_info=True)
        self._busy_since = None
        if problem is None:
            self._checked.set_result(None)
        else:
            self._checked.set_exception(problem)

    def _warn_of_preflight(self, error: BaseException) -> None:
        _log.warning("backend %s is not available now (%s); records wait in the journal", self.name, error)

    def _deliver(self) -> None:
        """Deliver until the lane is stopped, or until everything is delivered and the runs are finished."""
        self._uploads = self._start_uploads()
        active = set(self._journal.sites())  # the sites that may have something to deliver
        while not self._stop.is_set():
            # Clear the event before anything is read, so that later news sets it again. Otherwise the lane could sleep
            # through `begin_finish`, and the job would end only at its deadline.
            self._wake.clear()
            # Read `_ending` before the news. The lane was notified of all rows before `begin_finish` was called. In the
            # other order, it could miss the last rows.
            ending = self._ending
            with self._news_lock:
                active |= self._news
                self._news.clear()
            if ending is not None and time.monotonic() >= ending.deliver_until:
                self._end_runs(ending)
                self._store_ends()
                return
            progressed, due = self._advance_runs(active, finishing=ending is not None)
            # Finish idle runs while others still deliver. Otherwise one site with many records would keep the runs of
            # all other sites from ending in time.
            finish_due = None if ending is None else self._finish_idle_runs(active, ending)
            if progressed or self._stop.is_set():
                continue
            if ending is not None:
                if finish_due is None and not active:
                    self._store_ends()
                    return
                due = min(due, finish_due or due, ending.deliver_until)
            self._wake.wait(max(0.0, due - time.monotonic()))

    def _start_uploads(self) -> FileUploads | None:
        """Return the second thread, if the backend allows one. Otherwise the lane's own thread writes the files."""
        can = self._backend.capabilities  # the preflight may have changed them, so do not read them earlier
        if not can.files_beside or can.redelivery.needs_order:
            return None
        try:
            return FileUploads(self.name, self.notify)
        except RuntimeError as e:  # the process has too many threads, or the script has ended: see `FileUploads`
            _log.debug("lane %s writes its files in its own thread: %s", self.name, e)
            return None

    def _advance_runs(self, active: set[int], *, finishing: bool) -> tuple[bool, float]:
        """Do one piece of work for each run. Remove the runs from ``active`` that have nothing left to deliver.

        Returns:
            True if something was done, and when to come back if nothing was done, on the monotonic clock.
        """
        progressed, due = False, time.monotonic() + _IDLE_S
        for site in self._turns.begin(active):
            now = time.monotonic()
            try:
                run = self._run(site)
            except JournalError as e:
                _log.warning("lane %s cannot read how far a run got: %s; it tries again", self.name, e)
                due = min(due, now + _JOURNAL_RETRY_S)
                continue
            except Exception:  # an earlier lane stored an invalid state of this run. Stop only this run.
                _log.exception("lane %s cannot continue a run; the run's records stay in the journal", self.name)
                active.discard(site)
                continue
            if now < run.timer.not_before and not (finishing and run.timer.hurry()):
                due = min(due, run.timer.not_before)
                continue
            if self._turns.must_wait(site):
                continue
            if finishing and self._uploads is not None:
                self._uploads.hurry()
            self._busy_since = now
            moved = run.advance(flush_now=finishing)
            self._busy_since = None
            self._turns.add(site, time.monotonic() - now, moved=moved)
            if self._stop.is_set():
                break
            if moved:
                progressed = True
                self._notice.note(site, run.results)
            elif run.is_idle():
                active.discard(site)
            else:
                due = min(due, run.due())
        return progressed, due

    def _finish_idle_runs(self, active: set[int], ending: _Ending) -> float | None:
        """Finish the runs that have nothing left to deliver.

        Returns:
            When to come back for the runs that need another attempt; None if no run does.
        """
        due: float | None = None
        for run in self._runs.values():
            if run.site_id in active or run.is_over() or self._stop.is_set():
                continue
            if time.monotonic() >= run.timer.not_before:
                self._finish_run(run, ending)
            if not run.is_over():
                due = min(run.timer.not_before, due or run.timer.not_before)
        return due

    def _end_runs(self, ending: _Ending) -> None:
        """End the runs that are still open, although some records are not confirmed.

        Perhaps the job is never replayed. Even then, the backend must not show these runs as running for ever.
        """
        left = [run for run in self._runs.values() if run.is_open()]
        while left and not self._stop.is_set():
            for run in left:
                if not self._stop.is_set():
                    self._finish_run(run, ending)
            left = [run for run in left if run.is_open()]
            if left:
                self._wake.clear()
                self._wake.wait(max(0.0, min(run.timer.not_before for run in left) - time.monotonic()))

    def _finish_run(self, run: RunDelivery, ending: _Ending) -> None:
        self._busy_since = time.monotonic()
        run.finish(ending.statuses.get(run.site, ending.otherwise))
        self._busy_since = None

    def _run(self, site: int) -> RunDelivery:
        run = self._runs.get(site)
        if run is None:
            info = self._run_info(*self._journal.site(site))
            room = RunDiskRoom(self._room, info.site)
            run = self._runs[site] = self._new_run(site, info, room=room, uploads=self._uploads)
        return run


def _run_info(site: str, created: float, *, job: JobInfo, side: Side, blob_dir: Callable[[str], Path]) -> RunInfo:
    """Return what the backend is told of a run. When `RunDelivery` opens the run, it fills in ``resume_from``."""
    parent = None if site == FEDERATION else RunKey(job.id, FEDERATION)
    return RunInfo(job, site, side, created, resume_from=0, blob_dir=blob_dir(site), parent=parent)
