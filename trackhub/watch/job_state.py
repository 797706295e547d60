# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a job from outside: a row for each site, put together from what its receivers have.

`job_follower` reads the journals and calls this module, and `panel` draws the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trackhub.delivery.journal.newest_metrics import NewestMetrics
from trackhub.delivery.report import RUNNING, DeliveryReport, status_of_job
from trackhub.delivery.report_text import format_openings, format_status, format_together
from trackhub.job_and_run_info import Side

__all__ = ["FINISHING", "JobState", "LaneState", "ReceiverState", "SiteState", "job_state"]

FINISHING = "finishing"
"""The status of a job that has ended, while a receiver of it still delivers."""


@dataclass(frozen=True)
class ReceiverState:
    """One receiver of a job.

    Attributes:
        report: its counts.
        metrics: the newest metrics in its journal.
        has_ended: True if it has noted how the job ended, and delivers nothing any more.
    """

    report: DeliveryReport
    metrics: NewestMetrics
    has_ended: bool


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
        status: how it ended, or ``running``, or `FINISHING`.
        sites: by name, sorted.
        reports: the counts of each receiver.
        openings: how to look at what is stored: a line for each backend, and one for several receivers together.
        others: the names of the other jobs in the folder, the newest first.
        problem: why something cannot be seen; empty if all can be seen.
    """

    name: str = ""
    status: str = RUNNING
    sites: dict[str, SiteState] = field(default_factory=dict)
    reports: list[DeliveryReport] = field(default_factory=list)
    openings: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    problem: str = ""

    def has_ended(self) -> bool:
        """Return whether the job has ended, and no receiver delivers any more."""
        return self.status not in (RUNNING, FINISHING)

    def shown_status(self) -> str:
        """Return how the job ended, in words: of a killed job, also whether all is delivered since."""
        return format_status(self.status, is_complete=all(report.is_complete() for report in self.reports))


def job_state(receivers: Sequence[ReceiverState], *, others: Sequence[str], problem: str) -> JobState:
    """Return the state of a job.

    Args:
        receivers: all receivers of this job. Without any, nothing is known yet.
        others: the names of the other jobs.
        problem: why something cannot be seen; empty if all can be seen.
    """
    reports = [receiver.report for receiver in receivers]
    state = JobState(reports=reports, others=[*others], problem=problem)
    for receiver in receivers:
        _merge(state, receiver)
    state.status = status_of_job(reports)
    if state.status != RUNNING and not all(receiver.has_ended for receiver in receivers):
        state.status = FINISHING
    state.openings = _openings(reports)
    state.sites = dict(sorted(state.sites.items()))
    return state


def _openings(reports: Sequence[DeliveryReport]) -> list[str]:
    """Return for each backend how to look at its first run, and the command that shows several receivers together."""
    first: dict[str, str] = {}
    for report in reports:
        for backend, runs in sorted(report.lanes.items()):
            lines = format_openings((site, backend, run) for site, run in runs.items())
            if lines:
                first.setdefault(backend, lines[0].strip())
    together = format_together([report.run_dir for report in reports]) if first else []
    return [*(f"look at it in {line}" for line in first.values()), *(f"look at it {line.strip()}" for line in together)]


def _merge(state: JobState, receiver: ReceiverState) -> None:
    report = receiver.report
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
        if (newest := receiver.metrics.sites.get(name)) is not None:
            seen.round, seen.step, seen.values = newest.round, newest.step, newest.values
        for backend, runs in report.lanes.items():
            if (run := runs.get(name)) is not None:
                label = f"{backend}@client" if report.side == Side.CLIENT else backend
                seen.lanes[label] = LaneState(run.confirmed, max(run.pending, 0), run.state, run.trouble())
                _add(seen.dropped, run.rejected)


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for reason, number in more.items():
        if number:
            counts[reason] = counts.get(reason, 0) + number
