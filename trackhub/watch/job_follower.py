# SPDX-License-Identifier: Apache-2.0
"""Finds the journals below a folder, and looks at one job there again and again.

`show_until_end` calls it. It reads the journals of all receivers of the job, at the server and at the clients, changes
none, and makes a `JobState` of them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.delivery.journal.lock import is_delivering
from trackhub.delivery.journal.newest_metrics import NewestMetrics
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.journal.swap import is_journal_left
from trackhub.delivery.report import RUNNING
from trackhub.delivery.report_text import format_job
from trackhub.errors import ConfigError, DeliveryError, JournalError
from trackhub.watch.job_state import JobState, ReceiverState, job_state

__all__ = ["JobFollower"]

_LOOK_EVERY_S = 3.0


@dataclass(frozen=True)
class _Read:
    """A receiver, and the time at which its journal had last changed, in nanoseconds."""

    receiver: ReceiverState
    changed_at_ns: int


class JobFollower:
    """Looks at a job again and again. Used by one thread.

    If the folder holds several jobs, it shows a running one. If several run, or none, it shows the newest of these. It
    stays with a running job until that job ends.

    Attributes:
        new_only: whether the jobs that were there when it was made are left out.
    """

    def __init__(self, folder: Path, *, new_only: bool = False) -> None:
        """Look which jobs are to be left out, if any.

        Args:
            folder: the job's folder, or any above. It need not exist yet.
            new_only: leave out the jobs that are there now, also running ones, until they begin again.
        """
        self.new_only = new_only
        self._folder = folder
        self._journals: list[Path] = []
        self._reads: dict[Path, _Read] = {}
        self._left_out: set[str] = set()  # the ids of jobs
        self._ended: set[str] = set()  # the ids of the jobs that had ended at the last look
        self._running = ""  # the id of the job that was shown last, if it had not ended then
        self._look_at = 0.0
        if new_only:
            self._find()
            jobs, _ = self._read_all()
            self._left_out, self._ended = set(jobs), _ended(jobs)

    def look(self) -> JobState:
        """Return what can be seen now. Never raises for a journal or a folder that cannot be read."""
        not_found = self._find()
        jobs, problem = self._read_all()
        ended = _ended(jobs)
        self._left_out -= self._ended - ended  # they began again, or their folder was emptied for a new job
        self._ended = ended
        for job in self._left_out & jobs.keys():
            del jobs[job]
        if not jobs:
            return JobState(problem=problem or not_found or f"no receiver has begun in {self._folder} yet")
        shown, *others = sorted(
            jobs, key=lambda job: (job == self._running, job not in ended, _began(jobs[job])), reverse=True
        )
        self._running = "" if shown in ended else shown
        names = [format_job(job, jobs[job][0].report.job_name) for job in others]
        return job_state(jobs[shown], others=names, problem=problem)

    def _find(self) -> str:
        """Look for journals from time to time, since receivers may begin later. Return why none can be found."""
        if time.monotonic() < self._look_at and self._journals:
            return ""
        self._look_at = time.monotonic() + _LOOK_EVERY_S
        self._journals = []
        try:
            self._journals = find(self._folder).journals
        except JournalError as error:
            return str(error)
        except ConfigError:
            missing = "" if os.path.exists(self._folder) else ", and there is no such folder"
            return f"no receiver has begun in {self._folder} yet{missing}"
        return ""

    def _read_all(self) -> tuple[dict[str, list[ReceiverState]], str]:
        """Return the receivers of each job, by the job's id, and why a journal cannot be read."""
        jobs: dict[str, list[ReceiverState]] = {}
        problem = ""
        for journal in self._journals:
            try:
                receiver = self._read(journal)
            except DeliveryError as error:
                if _is_left(journal):  # otherwise, a new job has emptied the folder
                    problem = str(error)
                continue
            jobs.setdefault(receiver.report.job, []).append(receiver)
        return jobs, problem

    def _read(self, journal: Path) -> ReceiverState:
        """Return what the receiver of this journal has.

        Raises:
            JournalError: the journal cannot be read.
        """
        earlier, changed_at_ns = self._reads.get(journal), _changed_at_ns(journal)
        # Ask this first. If the receiver ends afterwards, the next look sees it. In the other order, the receiver could
        # store its last records and end in between. This look would then show an ended receiver without them.
        is_done = not is_delivering(journal)
        if earlier is not None and earlier.receiver.has_ended and is_done and earlier.changed_at_ns == changed_at_ns:
            return earlier.receiver
        report = read_journal_report(journal)
        is_same_job = earlier is not None and earlier.receiver.report.job == report.job
        metrics = earlier.receiver.metrics if earlier is not None and is_same_job else NewestMetrics(journal)
        metrics.read()
        receiver = ReceiverState(report, metrics, is_done and report.status != RUNNING)
        self._reads[journal] = _Read(receiver, changed_at_ns)
        return receiver


def _ended(jobs: Mapping[str, Sequence[ReceiverState]]) -> set[str]:
    """Return the ids of the jobs that have ended."""
    return {job for job, receivers in jobs.items() if all(receiver.has_ended for receiver in receivers)}


def _is_left(journal: Path) -> bool:
    try:
        return is_journal_left(journal)
    except JournalError:  # nobody knows
        return True


def _changed_at_ns(journal: Path) -> int:
    changed_at_ns = 0
    for file in (journal, journal.with_name(f"{journal.name}-wal")):  # what was stored last is in the log at first
        with suppress(OSError):  # a closed journal has no log, and one in the middle of a repair is not there
            changed_at_ns = max(changed_at_ns, file.stat().st_mtime_ns)
    return changed_at_ns


def _began(receivers: Sequence[ReceiverState]) -> float:
    """Return when the first site of a job was heard, in unix seconds.

    A running job without a site counts as the newest, and an ended one without a site as the oldest.
    """
    times = [receiver.metrics.began for receiver in receivers if receiver.metrics.began is not None]
    return min(times, default=0.0 if all(receiver.has_ended for receiver in receivers) else math.inf)
