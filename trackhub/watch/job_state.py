# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a job from outside: a row for each site, put together from the journals in its folder.

`follow` looks at it again and again, and `panel` draws it. This module reads the journals of all receivers of the job,
at the server and at the clients, and changes none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.delivery.journal.newest_metrics import NewestMetrics
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.report import RUNNING, DeliveryReport
from trackhub.delivery.report_text import format_status
from trackhub.errors import ConfigError, DeliveryError

__all__ = ["JobFollower", "JobState", "LaneState", "SiteState"]

_LOOK_EVERY_S = 3.0


@dataclass
class LaneState:
    """One site's records at one backend.

    Attributes:
        confirmed: records that are stored.
        pending: records that are journaled and not stored yet.
        state: as in `trackhub.delivery.report.RunReport`.
        error: the backend's last error; empty if it works.
    """

    confirmed: int
    pending: int
    state: str
    error: str


@dataclass
class SiteState:
    """One site.

    Attributes:
        name: its name.
        round, step: its newest round and its highest step; None where its metrics have none.
        values: the newest value of each key, the newest last.
        logged: how many records it has logged, as its last message says; None before the first message.
        dropped: records that will not be delivered, by reason.
        lanes: backend -> lane. The name of a backend at the site itself ends in ``@client``.
    """

    name: str
    round: int | None = None
    step: int | None = None
    values: dict[str, float] = field(default_factory=dict)
    logged: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    lanes: dict[str, LaneState] = field(default_factory=dict)


@dataclass
class JobState:
    """One job, as of now.

    Attributes:
        name: what a person calls it; empty while nothing is known.
        status: how it ended, or ``running``.
        sites: by name, sorted.
        reports: the counts of each receiver.
        problem: why something cannot be seen; empty if all can be seen.
    """

    name: str = ""
    status: str = RUNNING
    sites: dict[str, SiteState] = field(default_factory=dict)
    reports: list[DeliveryReport] = field(default_factory=list)
    problem: str = ""

    def shown_status(self) -> str:
        """Return how the job ended, in words: of a killed job, also whether all is delivered since."""
        return format_status(self.status, is_complete=all(report.is_complete() for report in self.reports))


class JobFollower:
    """Looks at a job again and again. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        """Look at nothing yet.

        Args:
            folder: the job's folder, or any above. It need not exist yet.
        """
        self._folder = folder
        self._journals: list[Path] = []
        self._metrics: dict[Path, NewestMetrics] = {}
        self._look_at = 0.0

    def look(self) -> JobState:
        """Return what can be seen now. Never raises for a journal or a folder that cannot be read."""
        state = JobState(problem=self._find())
        for journal in self._journals:
            metrics = self._metrics.setdefault(journal, NewestMetrics(journal))
            try:
                report = read_journal_report(journal)
                metrics.read()
            except DeliveryError as error:
                state.problem = str(error)
                continue
            state.reports.append(report)
            _merge(state, report, metrics)
        statuses = [report.status for report in state.reports]
        state.status = RUNNING if not statuses or RUNNING in statuses else _worst(state.reports)
        state.sites = dict(sorted(state.sites.items()))
        return state

    def _find(self) -> str:
        """Look for journals from time to time, since clients may begin later. Return why there are none."""
        if time.monotonic() < self._look_at and self._journals:
            return ""
        self._look_at = time.monotonic() + _LOOK_EVERY_S
        try:
            self._journals = find(self._folder).journals
        except ConfigError as error:
            self._journals = []
            return str(error)
        return "" if self._journals else f"no receiver has begun in {self._folder} yet"


def _worst(reports: list[DeliveryReport]) -> str:
    """Return how the job ended: as the server says, or else the worst that a site says."""
    of_server = [report.status for report in reports if report.side == "server"]
    order = ["finished", "aborted", "failed", "killed"]
    found = of_server or [report.status for report in reports]
    return max(found, key=lambda status: order.index(status) if status in order else len(order))


def _merge(state: JobState, report: DeliveryReport, metrics: NewestMetrics) -> None:
    state.name = state.name or report.job_name or report.job
    for name, site in report.sites.items():
        seen = state.sites.setdefault(name, SiteState(name))
        if site.at_site is not None:
            # The site's own count may be a second old. So the receiver may already have more records: take the larger
            # number.
            seen.logged = max(seen.logged or 0, site.at_site.logged, site.journaled)
            for reason, number in site.at_site.dropped.items():  # the site tells each of its receivers
                seen.dropped[reason] = max(seen.dropped.get(reason, 0), number)
        _add(seen.dropped, site.all_refused())
        _add(seen.dropped, {"missing": site.missing})
        if (newest := metrics.sites.get(name)) is not None:
            seen.round, seen.step, seen.values = newest.round, newest.step, newest.values
        for backend, runs in report.lanes.items():
            if (run := runs.get(name)) is not None:
                label = f"{backend}@client" if report.side == "client" else backend
                seen.lanes[label] = LaneState(run.confirmed, max(run.pending, 0), run.state, run.trouble())
                _add(seen.dropped, run.rejected)


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for reason, number in more.items():
        if number:
            counts[reason] = counts.get(reason, 0) + number
