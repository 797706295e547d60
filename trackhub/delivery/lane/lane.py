# SPDX-License-Identifier: Apache-2.0
"""A lane: one thread that moves records from the journal into one backend.

For each run it keeps two cursors into the journal: *written*, up to which records were handed to the backend, and
*confirmed*, up to which they are durable there. Only confirmed records count as delivered, and after a crash the lane
goes on from *confirmed*. Lanes know nothing of each other: a dead backend delays no other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trackhub.delivery.journal.store import Journal
from trackhub.delivery.lane.run_delivery import RunLane
from trackhub.errors import ConfigError, JournalError, TransientError
from trackhub.run import JobInfo, RunStatus
from trackhub.spi import Backend, Side

__all__ = ["Lane"]

_IDLE_S = 3600.0
_JOURNAL_RETRY_S = 1.0
_log = logging.getLogger(__name__)


class Lane:
    """Delivers all runs of a receiver to one backend. All calls into the backend are made by the lane's own thread."""

    def __init__(
        self,
        name: str,
        backend: Backend[Any],
        journal: Journal,
        *,
        job: JobInfo,
        side: Side,
        blob_dir: Callable[[str], Path],
        flush_s: float,
    ) -> None:
        """Prepare a lane; ``start`` starts it.

        Args:
            blob_dir: gives the folder of a site's blobs.
            flush_s: longest time from handing records to a backend that buffers to asking it to confirm them.
        """
        self.name = name
        self._backend = backend
        self._journal = journal
        self._job = job
        self._side = side
        self._blob_dir = blob_dir
        self._flush_s = flush_s
        self._runs: dict[int, RunLane] = {}
        self._news: set[int] = set()
        self._news_lock = threading.Lock()
        self._wake = threading.Event()
        self._preflight_done = threading.Event()
        self._preflight_error: ConfigError | None = None
        self._final: Mapping[str, RunStatus] | None = None
        self._otherwise = RunStatus.FAILED
        self._stop = threading.Event()
        self._busy_since: float | None = None
        self._defect = ""
        self._thread = threading.Thread(target=self._main, name=f"trackhub-lane-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread; it checks the backend first, then delivers what the journal has."""
        self._thread.start()

    def wait_for_preflight(self, timeout_s: float) -> None:
        """Wait until the backend's own check is done. One that takes longer counts as "not now", which is no error.

        Raises:
            ConfigError: the backend says that it cannot be used as configured.
        """
        if not self._preflight_done.wait(timeout_s):
            _log.warning(
                "backend %s did not finish its check within %g s; records wait in the journal", self.name, timeout_s
            )
        if self._preflight_error is not None:
            raise self._preflight_error

    def notify(self, site: int) -> None:
        """Say that the journal has new rows of this site. Does not block."""
        with self._news_lock:
            self._news.add(site)
        self._wake.set()

    def begin_finish(self, status: Mapping[str, RunStatus], otherwise: RunStatus) -> None:
        """Deliver what is left without further waiting for new rows, then finish each run with its status.

        Args:
            status: by site.
            otherwise: that of the sites that are not in it.
        """
        self._otherwise = otherwise
        self._final = status
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the lane to end; after ``timeout_s`` make it stop between two calls of the backend.

        Returns:
            True if it has ended. False if the backend does not return from a call: its thread is left behind.
        """
        self._thread.join(max(timeout_s, 0.0))
        self._stop.set()
        self._wake.set()
        self._thread.join(1.0)
        ended = not self._thread.is_alive()
        busy_s = time.monotonic() - (self._busy_since or time.monotonic())
        reason = self._defect if ended else f"backend {self.name} has not returned from a call for {busy_s:.0f} s"
        try:
            for run in list(self._runs.values()):
                run.give_up(reason)
            if reason:  # also for the runs that the lane never came to
                for site in self._journal.sites().keys() - self._runs.keys():
                    self._run(site).give_up(reason)
        except JournalError as e:
            _log.warning("lane %s cannot store why it did not deliver: %s", self.name, e)
        return ended

    def _main(self) -> None:
        try:
            self._preflight()
            self._deliver()
        except BaseException as e:
            # A defect of trackhub's own; training must go on, and the journal keeps the records.
            if not self._stop.is_set():
                self._defect = f"the lane ended unexpectedly: {type(e).__name__}: {e}"
                _log.exception("lane %s ended unexpectedly; its records stay in the journal", self.name)
        finally:
            self._preflight_done.set()
            self._close()

    def _close(self) -> None:
        try:
            self._backend.close()
        except BaseException as e:
            _log.warning("backend %s could not close: %s: %s", self.name, type(e).__name__, e)

    def _preflight(self) -> None:
        self._busy_since = time.monotonic()
        try:
            self._backend.preflight()
        except ConfigError as e:
            self._preflight_error = e
        except TransientError as e:
            _log.warning("backend %s is not available now (%s); records wait in the journal", self.name, e)
        except BaseException as e:  # also SystemExit, which an SDK may raise: nothing of a plugin's ends the lane
            _log.warning("the check of backend %s failed: %s: %s", self.name, type(e).__name__, e, exc_info=True)
        self._busy_since = None
        self._preflight_done.set()

    def _deliver(self) -> None:
        active = set(self._journal.sites())
        while not self._stop.is_set():
            # Which phase this round is in must be read before the news: rows that come before `begin_finish` are seen.
            finishing = self._final is not None
            with self._news_lock:
                active |= self._news
                self._news.clear()
            self._wake.clear()
            progressed, due = False, time.monotonic() + _IDLE_S
            for site in list(active):
                now = time.monotonic()
                try:
                    run = self._run(site)
                except JournalError as e:
                    _log.warning("lane %s cannot take up a run: %s; trying again", self.name, e)
                    due = min(due, now + _JOURNAL_RETRY_S)
                    continue
                if now < run.not_before and not (finishing and run.hurry()):
                    due = min(due, run.not_before)
                    continue
                self._busy_since = now
                moved = run.advance(flush_now=finishing)
                self._busy_since = None
                progressed |= moved
                if self._stop.is_set():
                    return
                if moved:
                    continue
                if run.is_idle():
                    active.discard(site)
                else:
                    due = min(due, run.due())
            if progressed:
                continue
            if finishing:
                finish_due = self._finish_idle_runs(active)
                if finish_due is None and not active:
                    return
                due = min(due, finish_due or due)
            self._wake.wait(max(0.0, due - time.monotonic()))

    def _finish_idle_runs(self, active: set[int]) -> float | None:
        """Finish the runs that have nothing left to deliver.

        Returns:
            When to come back for those that ask for another attempt, None if there are none.
        """
        assert self._final is not None
        due: float | None = None
        for run in self._runs.values():
            if run.site_id in active or run.is_over() or self._stop.is_set():
                continue
            if time.monotonic() >= run.not_before:
                self._busy_since = time.monotonic()
                run.finish(self._final.get(run.site, self._otherwise))
                self._busy_since = None
            if not run.is_over():
                due = min(run.not_before, due or run.not_before)
        return due

    def _run(self, site: int) -> RunLane:
        run = self._runs.get(site)
        if run is None:
            name, created = self._journal.site(site)
            run = self._runs[site] = RunLane(
                self.name,
                self._backend,
                self._journal,
                site_id=site,
                site=name,
                job=self._job,
                side=self._side,
                created=created,
                blob_dir=self._blob_dir(name),
                flush_s=self._flush_s,
                stop=self._stop,
            )
        return run
