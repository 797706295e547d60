# SPDX-License-Identifier: Apache-2.0
"""The delivery report: what became of every record at each site and backend, and whether the sums add up.

`journal.report_builder` makes it from a journal. The receiver stores it as ``delivery.json``; `report_text` makes
tables of it. ``trackhub status``, ``watch``, ``replay`` and ``report`` ask it what is wrong.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from trackhub.delivery.wire import SiteCounts
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.open_without_links import open_plain
from trackhub.plain_values_to_structs import prepare
from trackhub.printable import printable
from trackhub.spi import Results

__all__ = [
    "NOT_ADDING_UP",
    "REPORT_NAME",
    "RUNNING",
    "Counted",
    "DeliveryReport",
    "RunReport",
    "SiteReport",
    "read_report",
    "report_without_counts",
    "resolve_results",
    "status_of_job",
    "write_report",
]

REPORT_NAME = "delivery.json"
"""The file beside the journal in which a receiver leaves its report."""

NOT_ADDING_UP = "a defect of trackhub, a damaged disk, or a site that sent false counts; please report it"
"""What to tell a person when counts contradict each other."""

RUNNING = "running"
"""The status of a job that has not ended."""

_WORSE_AND_WORSE = (RunStatus.FINISHED, RunStatus.ABORTED, RunStatus.FAILED, RunStatus.KILLED)
_MAX_NAMES = 5


class Counted(StrEnum):
    """How complete a site's counts are."""

    FINAL = "final"
    """The site's counts came with its final message."""
    OPEN = "open"
    """The job and the site run. The site may log more, or has sent no counts yet."""
    STALE = "stale"
    """The counts are old: the site fell silent, or its process or the receiver died. The site may have logged more."""
    INCOMPLETE = "incomplete"
    """The site or the receiver could not count everything, or the receiver has more records than the site counted."""
    UNKNOWN = "unknown"
    """The site sent no counts, and perhaps nothing at all."""


class SiteReport(msgspec.Struct, kw_only=True):
    """One site's records, as the site counted them and as the receiver did.

    Attributes:
        at_site: the site's own counts, as of its last message; None if no message with counts came.
        counted: how complete the site's counts are.
        received: records that arrived. A record that arrived twice counts twice.
        duplicates: how many received records the journal had already.
        journaled: records in the journal.
        earlier: the site's earlier records, which are in another journal.
        missing: records that a stream skipped without a reason; 0 unless something is wrong.
        refused: reason -> records that the receiver will never accept. Batches that it refused whole do not count here.
        explained: reason -> records that the site could not send, as the gaps in its streams say.
        final: True if the site's final message has come.
        has_sender: False if the site takes part in the job, and its app has no sender.
    """

    at_site: SiteCounts | None = None
    counted: Counted = Counted.OPEN
    received: int = 0
    duplicates: int = 0
    journaled: int = 0
    earlier: int = 0
    missing: int = 0
    refused: dict[str, int] = {}
    explained: dict[str, int] = {}
    final: bool = False
    has_sender: bool = True

    def is_balanced(self) -> bool:
        """Return whether all counts of this site are known, and add up."""
        return self.counted in (Counted.FINAL, Counted.OPEN) and self.adds_up()

    def adds_up(self) -> bool:
        """Return whether the site's own counts and the receiver's counts fit together."""
        adds_up_there = self.at_site is None or self.at_site.adds_up()
        adds_up_here = self.received == self.duplicates + self.journaled + sum(self.refused.values())
        return adds_up_there and adds_up_here and not self.lacking()

    def all_refused(self) -> dict[str, int]:
        """Return reason -> records that the receiver refused, as the site or the receiver counted them."""
        there = self.at_site.refused if self.at_site else {}
        return {reason: max(there.get(reason, 0), self.refused.get(reason, 0)) for reason in {**there, **self.refused}}

    def lacking(self) -> int:
        """Return how many records the site counts as acknowledged, although no journal has them."""
        return max(0, self.at_site.acked - self.earlier - self.journaled) if self.at_site else 0


class RunReport(msgspec.Struct, kw_only=True):
    """One site's records at one backend. Each journaled record is confirmed, rejected or pending.

    Attributes:
        confirmed: records that are durable at the backend.
        client_confirmed: records in ``confirmed`` that only the SDK confirmed, because the store cannot be asked.
        rejected: reason -> records that the backend can never store.
        pending: records that are neither confirmed nor rejected yet. ``trackhub replay`` delivers them.
        altered: reason (``nonfinite_removed``, ...) -> confirmed records that are not stored as they were logged.
        possible_duplicates: confirmed records that the backend may hold twice, since it does not recognise them.
        state: ``open``, ``finished``, ``unfinished`` (not all was confirmed, or the run could not be ended) or
            ``stopped`` (the run cannot be opened, or trackhub has a defect).
        last_error: the last error that the backend raised; empty if none.
        recovered: True if the backend has stored records since the last error, and nothing fails any more.
        blocked_by: the record that all later records of the run wait for: the backend keeps the order, and fails with
            this record each time. Empty if there is none.
        results: how to look at the run.
    """

    confirmed: int = 0
    client_confirmed: int = 0
    rejected: dict[str, int] = {}
    pending: int = 0
    altered: dict[str, int] = {}
    possible_duplicates: int = 0
    state: str = "open"
    last_error: str = ""
    recovered: bool = False
    blocked_by: str = ""
    results: Results | None = None

    def trouble(self) -> str:
        """Return in one line why the run is not delivered. Empty if it is, or if nothing is known."""
        if self.recovered or (not self.pending and self.state not in ("stopped", "unfinished")):
            return ""  # an error of the past
        error = self.last_error.strip().split("\n")[0].strip()
        return f"all records after {self.blocked_by} wait for it: {error}" if self.blocked_by else error


class DeliveryReport(msgspec.Struct, kw_only=True):
    """What became of a job's records at one receiver.

    Attributes:
        job: the job's id.
        job_name: what a person calls the job.
        side: where the receiver was, as in `trackhub.job_and_run_info.Side`.
        status: how the job ended, as in `trackhub.job_and_run_info.RunStatus`; ``running`` if it has not.
        balanced: True if all counts are known and add up.
        adds_up: True if no count contradicts another. False means a defect of trackhub, a damaged disk, or false counts
            of a site. The counts of the other sites are right in any case.
        sites: site -> what the site and the receiver counted.
        lanes: backend -> site -> what the backend's lane counted.
        run_dir: the job's run folder. In ``delivery.json`` it is relative to the file's folder where possible, and the
            results in ``lanes`` are relative to the run folder. `read_report` makes all of them absolute.
        error: why the journal could not be read, so that there are no counts. Empty if the journal could be read.
        interrupted: True if the receiver was killed before it had ended the runs, and no replay has ended them since.
        delivering: True if a receiver or a replay had the journal when somebody else read it. So what is not delivered
            is on its way. False in the receiver's own report.
    """

    job: str
    job_name: str = ""
    side: str
    status: str
    balanced: bool
    adds_up: bool = True
    sites: dict[str, SiteReport]
    lanes: dict[str, dict[str, RunReport]]
    run_dir: str = os.pardir
    error: str = ""
    interrupted: bool = False
    delivering: bool = False

    def is_complete(self) -> bool:
        """Return whether nothing is wrong, and each record is stored in every backend or withheld at its site."""
        return not self.problems() and not self.undelivered()

    def problems(self) -> list[str]:
        """Return what is wrong, a phrase each; empty if all is well. While the job runs, records may be on their way.

        This is the only rule for it: ``status``, ``watch``, ``replay``, ``report`` and the script of a job ask here.
        """
        found = []
        if self.error:
            found.append(f"NOTHING IS KNOWN OF ITS RECORDS: {self.error}")
        elif not self.adds_up:
            # Name the sites: one site may have sent false counts, and the counts of all others are right then.
            wrong = _some(name for name, site in self.sites.items() if not site.adds_up())
            found.append(f"THE COUNTS DO NOT ADD UP for {wrong or 'a backend'}: {NOT_ADDING_UP}")
        elif not self.balanced:
            unknown = _some(name for name, site in self.sites.items() if not site.is_balanced())
            found.append(f"NOT ALL COUNTS ARE KNOWN of {unknown or 'the sites'}")
        if reasons := self.lost_by_reason():
            counts = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items()))
            found.append(f"{self.lost():,} records were dropped, refused or rejected ({printable(counts)})")
        return found + self.left_over()

    def left_over(self) -> list[str]:
        """Return what a replay still has to do, a phrase each. Empty if nothing is left, or somebody still delivers."""
        if self.status == RUNNING or self.delivering:
            return []
        found = [f"{left:,} records are not delivered yet"] if (left := self.undelivered()) else []
        if self.interrupted:
            found.append("the receiver was killed before it had ended the runs")
        # Such a run shows as running at its backend, although all its records are there.
        runs = [run for lane in self.lanes.values() for run in lane.values()]
        if number := sum(run.state in ("stopped", "unfinished") and not run.pending for run in runs):
            found.append(f"{number} {'run is' if number == 1 else 'runs are'} not ended at the backend")
        return found

    def undelivered(self) -> int:
        """Return how many records are still on their way: in a site's spool, or pending at a backend."""
        counted = [site.at_site for site in self.sites.values() if site.at_site is not None]
        return self.pending() + sum(counts.spooled + counts.unreadable for counts in counted)

    def pending(self) -> int:
        """Return how many records are pending, at all backends together."""
        return sum(run.pending for lane in self.lanes.values() for run in lane.values())

    def lost(self) -> int:
        """Return how many records will not be delivered: dropped, refused, rejected or missing."""
        return sum(self.lost_by_reason().values())

    def lost_by_reason(self) -> dict[str, int]:
        """Return reason -> how many records will not be delivered. A record that two backends rejected counts twice."""
        found: Counter[str] = Counter()
        for site in self.sites.values():
            found.update(site.at_site.dropped if site.at_site is not None else {})
            found.update(site.all_refused())
            found.update({"missing": site.missing})
        for lane in self.lanes.values():
            for run in lane.values():
                found.update(run.rejected)
        return {reason: n for reason, n in found.items() if n}


prepare(DeliveryReport)


def _some(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - _MAX_NAMES:,} more" if len(found) > _MAX_NAMES else ""
    return printable(", ".join(found[:_MAX_NAMES]) + more)


def report_without_counts(job: JobInfo, side: str, status: str, error: str) -> DeliveryReport:
    """Return the report of a receiver whose journal cannot be read.

    Args:
        job: the job.
        side: where the receiver was.
        status: how the job ended.
        error: why the journal cannot be read.
    """
    return DeliveryReport(
        job=job.id, job_name=job.name, side=side, status=status, balanced=False, sites={}, lanes={}, error=error
    )


def write_report(path: Path, report: DeliveryReport) -> None:
    """Store the report as JSON, completely or not at all.

    Raises:
        OSError: it cannot be written.
    """
    # Write a new file and rename it, so that a crash or a full disk cannot leave half a report.
    partial = path.with_suffix(".new")
    with open(partial, "wb", opener=open_plain) as file:
        file.write(msgspec.json.format(msgspec.json.encode(report), indent=2))
    partial.replace(path)


def read_report(path: Path) -> DeliveryReport:
    """Return the report in this file, such as the ``delivery.json`` that a receiver leaves in its folder.

    Its paths are absolute and its commands work in any folder, even after the job's folder was moved.

    Raises:
        OSError: it cannot be read.
        msgspec.DecodeError: it holds no delivery report.
    """
    return resolve_results(msgspec.json.decode(path.read_bytes(), type=DeliveryReport), path.parent)


def resolve_results(report: DeliveryReport, folder: Path) -> DeliveryReport:
    """Return the report with absolute paths, and with commands that work in any folder.

    Everything that reads a report calls it: `read_report`, `journal.report_builder.read_journal_report` and
    the receiver.

    Args:
        report: a report as a file has it.
        folder: the folder in which that file lies now. The file is the journal or ``delivery.json``.
    """
    run_folder = Path(os.path.abspath(folder / report.run_dir))

    def resolved(run: RunReport) -> RunReport:
        return msgspec.structs.replace(run, results=run.results and run.results.resolved(run_folder))

    lanes = {lane: {site: resolved(run) for site, run in runs.items()} for lane, runs in report.lanes.items()}
    return msgspec.structs.replace(report, lanes=lanes, run_dir=str(run_folder))


def status_of_job(reports: Sequence[DeliveryReport]) -> str:
    """Return how a job ended: as the server's receiver says, or else the worst that a site's receiver says.

    Args:
        reports: those of the job's receivers. The job runs while one of these receivers does, or if there is none yet.
    """
    of_server = [report.status for report in reports if report.side == Side.SERVER]
    found = of_server or [report.status for report in reports]
    if not found or RUNNING in found:
        return RUNNING
    order = [str(status) for status in _WORSE_AND_WORSE]
    return max(found, key=lambda status: order.index(status) if status in order else len(order))
