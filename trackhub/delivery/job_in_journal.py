# SPDX-License-Identifier: Apache-2.0
"""Stores in the journal what a replay and a report must know about a receiver's job, and decides how its runs end.

`Receiver` calls this when the job starts and when it ends. The facts go into the table ``meta`` of the journal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trackhub.delivery.federation.federation_run import FederationOptions
from trackhub.delivery.job_sites import JobSites
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.tables_and_rows import (
    EXPECTED_SITES,
    FEDERATION_OPTIONS,
    SILENCE_S,
    SITES_WITHOUT_SENDER,
)
from trackhub.delivery.lane.lanes_of_receiver import EXTRA_S
from trackhub.delivery.report import REPORT_NAME, DeliveryReport, report_without_counts
from trackhub.delivery.report_text import leave_report
from trackhub.errors import JournalError
from trackhub.job_and_run_info import FEDERATION, JobInfo, RunStatus, Side
from trackhub.runnable_commands import command_for

__all__ = ["JobInJournal"]

_STATUS = "status"
_log = logging.getLogger(__name__)


class JobInJournal:
    """A receiver's job, as the journal has it.

    Any thread may use ``status`` and ``note_status``. One thread at a time calls the other methods.

    Attributes:
        federation: what the job's federation run holds; None for no such run.
        status: how the job ended or will end; empty while that is not known.
    """

    def __init__(
        self,
        job: JobInfo,
        side: Side,
        run_dir: Path,
        sites: JobSites,
        *,
        silence_s: float,
        federation: FederationOptions | None,
        ended: RunStatus | None,
    ) -> None:
        """Store nothing yet.

        Args:
            job: the job.
            side: where the receiver is.
            run_dir: the job's run folder, absolute.
            sites: the job's sites.
            silence_s: ``limits.silence_s``.
            federation: what the job's federation run holds; None for no such run.
            ended: for a replay, how the job ended; None for a running job.
        """
        self.federation = federation
        self.status: str = ended or ""
        self._stored_status: str | None = None
        self._job = job
        self._side = side
        self._run_dir = run_dir
        self._sites = sites
        self._silence_s = silence_s
        self._ended = ended
        self._is_new = False
        self._earlier_status = ""

    def read_earlier(self, journal: Journal) -> None:
        """Read the status that an earlier receiver stored, if there was one. Call it before ``store_start``.

        Raises:
            JournalError: the journal cannot be read.
        """
        meta = journal.meta()
        self._is_new = _STATUS not in meta
        self._earlier_status = meta.get(_STATUS, "")

    def status_after_failure(self) -> RunStatus:
        """Return the job's status if this receiver cannot be used.

        In a replay, it is the status that the replay was given. If the journal is new, the job failed. Otherwise it is
        the status that the journal had before, or killed if that was empty.
        """
        if self._ended is not None:
            return self._ended
        return RunStatus.FAILED if self._is_new else RunStatus(self._earlier_status or RunStatus.KILLED)

    def store_start(self, journal: Journal, backends: Mapping[str, Mapping[str, Any]]) -> None:
        """Store what a later replay or report must know, in one transaction. If the job runs, remove an earlier report.

        Call it after every check of options and backends. Otherwise a failed start would overwrite the status of a job
        that has ended, and later replays would use its wrong options. After a failed start, only `store_failed_start`
        calls it, and only for a new journal.

        Args:
            journal: where to store it.
            backends: name -> options of each backend, as they were given. A replay resolves their secrets anew.

        Raises:
            JournalError: the journal cannot be written.
        """
        folder = journal.path.parent
        inside = folder.is_relative_to(self._run_dir)
        known = msgspec.json.decode(journal.meta().get("backends", "{}"), type=dict[str, dict[str, Any]])
        facts = {
            "job_info": msgspec.json.encode(self._job).decode(),
            # Relative where possible, so that a folder that was moved still leads to its results.
            "run_dir": os.path.relpath(self._run_dir, folder) if inside else str(self._run_dir),
            "backends": msgspec.json.encode({**known, **backends}).decode(),
            # The status is empty while the job runs. If it is still empty afterwards, the job was killed.
            _STATUS: self.status,
            SILENCE_S: str(self._silence_s),
        }
        if self.federation is not None:  # so that a replay goes on with the same options
            facts[FEDERATION_OPTIONS] = msgspec.json.encode(self.federation).decode()
        journal.set_facts(facts)
        self._stored_status = facts[_STATUS]
        if self._ended is None:
            with contextlib.suppress(OSError):  # if this receiver is killed, an old report would hide that
                (folder / REPORT_NAME).unlink(missing_ok=True)

    def store_failed_start(self, journal: Journal, lanes: Sequence[str]) -> None:
        """Store how the job ends, and write its report, if the journal is new or has the start. Otherwise do nothing.

        The status is that of `status_after_failure`. The backends are not stored, since a replay could not use them
        either.

        Args:
            journal: where to store it.
            lanes: the names of all lanes of the receiver.
        """
        is_started = self._stored_status is not None
        if not self._is_new and not is_started:
            return
        journal.limit_waits(time.monotonic() + EXTRA_S)
        with contextlib.suppress(JournalError):  # the error of the start says more
            if not is_started:
                self.store_start(journal, {})
            leave_report(journal.path.parent, self.make_report(journal, lanes, self.status_after_failure()))

    def note_status(self, journal: Journal, wait_s: float) -> None:
        """Store how the job ends, before its end. If that is not possible, ``make_report`` does it.

        Does nothing if the journal has it already.

        Args:
            journal: where to store it.
            wait_s: the longest wait for a locked journal, in seconds.
        """
        status = self.status
        if status == self._stored_status:
            return
        try:
            journal.set_facts({_STATUS: status}, wait_s=wait_s)
            self._stored_status = status
        except JournalError as e:
            _log.warning(
                "the journal cannot store the job's status %s now: %s. The receiver stores it when the job ends",
                status, e,
            )  # fmt: skip

    def run_statuses(self, journal: Journal, stored: Iterable[str], status: RunStatus) -> dict[str, RunStatus]:
        """Return site -> how its run ends. If the job runs, note first that the federation run has ended well.

        Args:
            journal: the journal, which knows the sites that an earlier receiver stored.
            stored: the sites that this receiver has stored in the journal.
            status: how the job ends.
        """
        sites = {FEDERATION, *stored}
        if self._ended is None:
            self._sites.assume_ended(FEDERATION)
        try:
            sites |= {name for name, _ in journal.sites().values()}
        except JournalError as e:
            # A disk that fails now must not keep the lanes from ending their runs at the backends.
            _log.warning("%s; if the job finished, the runs of sites that this receiver has not heard end as failed", e)
        was_killed = self._ended is RunStatus.KILLED
        return {name: self._sites.status(name, status, was_killed=was_killed) for name in sites}

    def close(self, journal: Journal, lanes: Sequence[str], status: RunStatus, moves_to: str) -> DeliveryReport:
        """Store how the job ended, close the journal, and leave the report beside it. Return the report.

        Args:
            journal: what is closed, also if an exception is raised.
            lanes: the names of all lanes of the receiver.
            status: how the job ended.
            moves_to: as for `format_report`.
        """
        try:
            report = self.make_report(journal, lanes, status)
        finally:
            journal.close()
        return leave_report(journal.path.parent, report, moves_to)

    def make_report(self, journal: Journal, lanes: Sequence[str], status: RunStatus) -> DeliveryReport:
        """Store how the job ended, and return the report. If the journal cannot be read, the report says so.

        Args:
            journal: where to store it.
            lanes: the names of all lanes of the receiver.
            status: how the job ended.
        """
        facts: dict[str, str] = {_STATUS: status}
        sites = self._sites
        for fact, names in ((EXPECTED_SITES, sites.known()), (SITES_WITHOUT_SENDER, sites.without_sender)):
            if names:
                facts[fact] = msgspec.json.encode(sorted(names)).decode()
        try:
            journal.set_facts(facts)
        except JournalError as e:
            _log.warning("the journal cannot store how the job ended (%s): %s", status, e)
        try:
            return journal.report(lanes, facts)
        except JournalError as e:
            _log.warning(
                "the report has no counts, since the journal cannot be read: %s. Run `%s`, which repairs a "
                "damaged journal", e, command_for("trackhub replay", journal.path.parent),
            )  # fmt: skip
            return report_without_counts(self._job, self._side, status, str(e))
