# SPDX-License-Identifier: Apache-2.0
"""The delivery report: what became of every record, by site, backend and reason, and whether the sums add up.

`journal.report_builder` makes it from a journal. The receiver stores it as ``delivery.json`` and logs it as a
table; ``trackhub status`` shows the same counts.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from trackhub.delivery.wire import SiteCounts
from trackhub.job_and_run_info import JobInfo
from trackhub.plain_files import open_plain
from trackhub.plain_values_to_structs import prepare
from trackhub.printable import printable
from trackhub.runnable_commands import runnable
from trackhub.spi import Results

__all__ = [
    "NOT_ADDING_UP",
    "REPORT_NAME",
    "Counted",
    "DeliveryReport",
    "RunReport",
    "SiteReport",
    "format_confirmed",
    "format_counted",
    "format_doubts",
    "format_job",
    "format_logged",
    "format_openings",
    "format_report",
    "format_results",
    "format_together",
    "leave_report",
    "read_report",
    "report_without_counts",
    "resolve_results",
    "write_report",
]

REPORT_NAME = "delivery.json"
"""The file beside the journal in which a receiver leaves its report."""

NOT_ADDING_UP = "a defect of trackhub, a damaged disk, or a site that sent false counts; please report it"
"""What to tell a person when counts contradict each other."""

_MAX_ERROR_CHARS = 120
_log = logging.getLogger(__name__)


class Counted(StrEnum):
    """How much is known of what a site logged."""

    FINAL = "final"
    """The site's counts came with its final message."""
    OPEN = "open"
    """The job runs, and so does the site. It may log more, or has sent no counts yet."""
    STALE = "stale"
    """The counts are old: the site fell silent, or its process or the receiver's died. It may have logged more."""
    INCOMPLETE = "incomplete"
    """The site or the receiver could not count everything, or the receiver has more records than the site counted."""
    UNKNOWN = "unknown"
    """The site sent no counts, and perhaps nothing at all."""


class SiteReport(msgspec.Struct, kw_only=True):
    """One site's records, as the site counted them and as the receiver did.

    Attributes:
        at_site: the site's own counts, as of its last message; None if no message with counts came.
        counted: how much is known of what the site logged.
        received: records that arrived. A record that arrived twice counts twice.
        duplicates: how many of these the journal had already.
        journaled: records in the journal.
        earlier: the site's earlier records, which are in another journal.
        missing: records that a stream skipped without a reason; 0 unless something is wrong.
        refused: records that the receiver will never accept, by reason. Batches that it refused whole do not count
            here.
        explained: records that the site could not send, by reason, as the gaps in its streams say.
        final: whether the site's final message has come.
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
        """Return whether the site's own counts and the receiver's counts of it do not contradict each other."""
        adds_up_there = self.at_site is None or self.at_site.adds_up()
        adds_up_here = self.received == self.duplicates + self.journaled + sum(self.refused.values())
        return adds_up_there and adds_up_here and not self.lacking()

    def all_refused(self) -> dict[str, int]:
        """Return the records that the receiver refused, by reason, as the site or the receiver counted them."""
        there = self.at_site.refused if self.at_site else {}
        return {reason: max(there.get(reason, 0), self.refused.get(reason, 0)) for reason in {**there, **self.refused}}

    def lacking(self) -> int:
        """Return how many records the site counts as acknowledged, although no journal has them."""
        return max(0, self.at_site.acked - self.earlier - self.journaled) if self.at_site else 0


class RunReport(msgspec.Struct, kw_only=True):
    """One site's records at one backend. Each journaled record is confirmed, rejected or pending.

    Attributes:
        confirmed: records that are durable at the backend.
        client_confirmed: those of ``confirmed`` that only the SDK calls durable, because the store cannot be asked.
        rejected: records that the backend can never store, by reason.
        pending: records that are in the journal only. ``trackhub replay`` delivers them.
        altered: confirmed records that are not stored as logged, by reason (``nonfinite_removed``, ...).
        possible_duplicates: confirmed records that the backend may hold twice, since it does not recognise them.
        state: ``open``, ``finished``, ``unfinished`` (not all was confirmed, or the run could not be ended) or
            ``stopped`` (the run cannot be opened).
        last_error: the last error that the backend raised; empty if none.
        blocked_by: the record that all others of the run wait for, since the backend keeps the order and fails with
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
    blocked_by: str = ""
    results: Results | None = None

    def trouble(self) -> str:
        """Return in one line why records are pending, as far as it is known. Empty if nothing is known."""
        error = self.last_error.strip().split("\n")[0].strip()
        return f"all behind {self.blocked_by} wait for it: {error}" if self.blocked_by else error


class DeliveryReport(msgspec.Struct, kw_only=True):
    """What became of a job's records at one receiver.

    Attributes:
        job: the job's id.
        job_name: what a person calls the job.
        side: where the receiver was, as in `trackhub.job_and_run_info.Side`.
        status: how the job ended, as in `trackhub.job_and_run_info.RunStatus`; ``running`` if it has not.
        balanced: whether all counts are known, and add up.
        adds_up: whether no count contradicts another. False means a defect of trackhub, a damaged disk, or false counts
            of a site. The counts of the other sites are right in any case.
        sites: what each site and the receiver counted, by site.
        lanes: what each lane counted, by backend and then by site.
        run_dir: the job's run folder. In ``delivery.json`` it is relative to the file's folder where possible, and the
            results in ``lanes`` are relative to the run folder. `read_report` makes all of them absolute.
        error: why the journal could not be read, so that there are no counts. Empty if the journal could be read.
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

    def is_complete(self) -> bool:
        """Return whether all counts are known, and each record is stored in every backend or withheld at its site."""
        return self.balanced and not self.undelivered() and not self.lost()

    def undelivered(self) -> int:
        """Return how many records are still on their way: in a site's spool, or pending at a backend."""
        counted = [site.at_site for site in self.sites.values() if site.at_site is not None]
        return self.pending() + sum(counts.spooled + counts.unreadable for counts in counted)

    def pending(self) -> int:
        """Return how many records are pending, at all backends together."""
        return sum(run.pending for lane in self.lanes.values() for run in lane.values())

    def lost(self) -> int:
        """Return how many records will not be delivered: dropped, refused, rejected or missing."""
        counted = [site.at_site for site in self.sites.values() if site.at_site is not None]
        at_sites = sum(sum(counts.dropped.values()) for counts in counted)
        at_sites += sum(sum(site.all_refused().values()) for site in self.sites.values())
        rejected = sum(sum(run.rejected.values()) for lane in self.lanes.values() for run in lane.values())
        return at_sites + rejected + sum(site.missing for site in self.sites.values())


prepare(DeliveryReport)


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
    # A rename puts it in place, so that neither a crash nor a full disk leaves half a report.
    partial = path.with_suffix(".new")
    with open(partial, "wb", opener=open_plain) as file:
        file.write(msgspec.json.format(msgspec.json.encode(report), indent=2))
    partial.replace(path)


def leave_report(folder: Path, report: DeliveryReport, moves_to: str = "") -> DeliveryReport:
    """Store the report of a receiver in its folder, log it, and return it with absolute paths. Never raises OSError.

    Args:
        folder: the receiver's folder.
        report: the report, with relative paths.
        moves_to: as for `format_report`.
    """
    try:
        write_report(folder / REPORT_NAME, report)
    except OSError as e:
        _log.warning("cannot write %s: %s; `trackhub status` shows the same", REPORT_NAME, e)
    report = resolve_results(report, folder)
    _log.info("%s", format_report(report, moves_to))
    return report


def read_report(path: Path) -> DeliveryReport:
    """Return the report in this file, such as the ``delivery.json`` that a receiver leaves in its folder.

    Its results can be used as they are, also after the job's folder was moved.

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
        folder: where the folder of that file lies now: of the journal, or of ``delivery.json``.
    """
    run_folder = Path(os.path.abspath(folder / report.run_dir))

    def resolved(run: RunReport) -> RunReport:
        return msgspec.structs.replace(run, results=run.results and run.results.resolved(run_folder))

    lanes = {lane: {site: resolved(run) for site, run in runs.items()} for lane, runs in report.lanes.items()}
    return msgspec.structs.replace(report, lanes=lanes, run_dir=str(run_folder))


def format_job(job: str, job_name: str) -> str:
    """Return what to call a job in a line of text: its name with its id, or its id alone if it has no name.

    Args:
        job: the job's id.
        job_name: the job's name.
    """
    return printable(job if job_name in ("", job) else f"{job_name} ({job})")


def format_confirmed(run: RunReport) -> str:
    """Return how many records of a run are confirmed, and how many of them only the backend's SDK confirmed."""
    client = f" ({run.client_confirmed} by the SDK alone)" if run.client_confirmed else ""
    return f"{run.confirmed}{client}"


def format_logged(site: SiteReport) -> str:
    """Return how many records a site logged: ``1,300``, or ``1,300+`` for at least so many, or ``?`` if unknown."""
    if site.at_site is None:
        return "?"
    return f"{site.at_site.logged:,}{'+' * (site.counted in (Counted.STALE, Counted.INCOMPLETE))}"


def format_doubts(report: DeliveryReport) -> str:
    """Return what to add to the first line of a report whose counts are not balanced; empty if they are."""
    if report.error:
        return f". NOTHING IS KNOWN OF ITS RECORDS: {report.error}"
    if not report.adds_up:
        # Name the sites: one site may have sent false counts, and the counts of all others are right then.
        sites = ", ".join(name for name, site in sorted(report.sites.items()) if not site.adds_up()) or "a backend"
        return f". THE COUNTS DO NOT ADD UP for {printable(sites)}: {NOT_ADDING_UP}"
    return "" if report.balanced else ". NOT ALL COUNTS ARE KNOWN: the table says of which sites"


def format_openings(runs: Iterable[tuple[str, RunReport]]) -> list[str]:
    """Return how to look at what the backends stored: lines with a command, a URL or a path each.

    Args:
        runs: the runs, each with the name of its backend. A command that opens several runs is shown once. A command is
            left out if the same backend has it with one more flag as well: a later run needed that flag.
    """
    backend_of: dict[str, str] = {}
    for backend, run in runs:
        for opening in run.results.openings() if run.results else ():
            backend_of.setdefault(opening, backend)
    words = {opening: (backend, set(opening.split())) for opening, backend in backend_of.items() if " " in opening}
    repeated = {
        opening
        for opening, (backend, own) in words.items()
        if any(backend == other and own < more for other, more in words.values())
    }
    return [f"  {by}: {printable(opening)}" for opening, by in backend_of.items() if opening not in repeated]


def format_report(report: DeliveryReport, moves_to: str = "") -> str:
    """Return the report as text: a row for each site and backend, and how to open the results.

    Args:
        report: the report, with absolute paths.
        moves_to: a sentence that says where the job's folder moves to. It is shown in place of commands and paths that
            the move makes useless.
    """
    rows: list[tuple[str, ...]] = [
        ("site", "backend", "logged", "journaled", "confirmed", "rejected", "pending", "not delivered, and why")
    ]
    for name, site in sorted(report.sites.items()):
        logged = format_logged(site)
        remarks = _site_remarks(site)
        own = [(lane, by_site[name]) for lane, by_site in sorted(report.lanes.items()) if name in by_site]
        for lane, run in own:
            counts = (format_confirmed(run), str(sum(run.rejected.values())), str(run.pending))
            remark = "; ".join([*remarks, *_run_remarks(lane, run)]) or "-"
            rows.append((name, lane, logged, str(site.journaled), *counts, remark))
        if not own:
            rows.append((name, "-", logged, str(site.journaled), "-", "-", "-", "; ".join(remarks) or "-"))
    runs = [(lane, run) for lane, by_site in sorted(report.lanes.items()) for run in by_site.values()]
    stays = [run for run in runs if not (moves_to and _lies_in(run[1].results, report.run_dir))]
    openings = [*format_openings(stays), *([f"  {moves_to}"] if len(stays) < len(runs) else [])]
    footer = ["Open the results", *openings] if openings else []
    job = format_job(report.job, report.job_name)
    head = f"trackhub delivery report: job {job}, {report.side} side, {report.status}"
    return "\n".join([head + format_doubts(report), *_table(rows), *footer])


def _lies_in(results: Results | None, folder: str) -> bool:
    """Return whether what a run stored lies in this folder."""
    path = results and (results.command or not results.url) and results.path
    return bool(path) and Path(str(path)).is_relative_to(folder)


def format_results(reports: Mapping[str, DeliveryReport]) -> str:
    """Return what each backend stored of a job, and how to look at it, for the end of the script that ran the job.

    Args:
        reports: the report of each receiver, by the name of its site, or ``server``.
    """
    rows = [("site", "receiver", "backend", "confirmed", "remarks")]
    runs_shown: list[tuple[str, RunReport]] = []
    for receiver, report in reports.items():
        for backend, runs in sorted(report.lanes.items()):
            for name, run in sorted(runs.items()):
                rows.append((name, receiver, backend, *_result_cells(run, report.sites.get(name))))
                runs_shown.append((backend, run))
        without_run = report.sites.keys() - {name for runs in report.lanes.values() for name in runs}
        rows += [(name, receiver, "-", *_result_cells(None, report.sites[name])) for name in sorted(without_run)]
    lines = ["Delivered (confirmed of logged)", *(f"  {line}" for line in _table(rows))] if len(rows) > 1 else []
    openings = [*format_openings(runs_shown), *format_together([report.run_dir for report in reports.values()])]
    if openings:
        lines += ["", "Open the results", *openings]
    return "\n".join(lines)


def format_together(folders: Sequence[str]) -> list[str]:
    """Return a line with the command that shows all receivers' results on one page. No line for a single receiver.

    Args:
        folders: the receivers' run folders, or any folders that hold them, as absolute paths.
    """
    if len(set(folders)) < 2:
        return []
    return [f"  all together: {runnable('trackhub report')} {shlex.quote(printable(os.path.commonpath(folders)))}"]


def _result_cells(run: RunReport | None, site: SiteReport | None) -> tuple[str, str]:
    """Return how much of a run is confirmed, and why not all of it is."""
    outcomes = [*run.rejected.items()] if run else []
    if site is not None and (counts := site.at_site) is not None:
        outcomes += [*counts.dropped.items()]
        outcomes += [("in the spool", counts.spooled), ("unreadable at the site", counts.unreadable)]
    outcomes += [*site.all_refused().items()] if site else []
    outcomes += [("pending", run.pending), ("by the SDK alone", run.client_confirmed)] if run else []
    remarks = [f"{reason}: {n}" for reason, n in outcomes if n]
    remarks += [run.trouble()] if run and run.pending and run.trouble() else []
    remarks += format_counted(site) if site else []
    confirmed = f"{run.confirmed if run else 0:,} of {format_logged(site) if site else '?'}"
    return confirmed, "; ".join(remarks)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table. The first row is its head. Each row is one line, whatever its cells hold."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in [*widths[:-1], len(rows[0][-1])]))
    return lines


def _site_remarks(site: SiteReport) -> list[str]:
    """Return what a reader should know of a site's records, whatever the backend."""
    remarks = []
    if (counts := site.at_site) is not None:
        remarks += [f"dropped at the site ({reason}): {n}" for reason, n in counts.dropped.items()]
        remarks += [f"values left out at the site ({reason}): {n}" for reason, n in counts.altered.items()]
        if counts.withheld:
            remarks.append(f"withheld by the site's policy: {counts.withheld}")
        if counts.spooled:
            remarks.append(f"still in the site's spool: {counts.spooled}")
        if counts.unreadable:
            remarks.append(f"cannot be read at the site: {counts.unreadable}")
    remarks += [f"refused by the receiver ({reason}): {n}" for reason, n in site.all_refused().items()]
    if site.missing:
        remarks.append(f"missing without a reason: {site.missing}")
    return [*remarks, *format_counted(site)]


def format_counted(site: SiteReport) -> list[str]:
    """Return what is unknown about a site's counts, and where they contradict each other."""
    remarks = []
    if site.at_site is not None and not site.at_site.adds_up():
        remarks.append("the site's own counts do not add up")
    if lacking := site.lacking():
        remarks.append(f"the receiver lacks {lacking} records that it had acknowledged")
    if site.at_site is not None and (came := site.at_site.by_message):
        remarks.append(f"{came} came in FLARE's messages, which are not counted at their source: there may be more")
    if not site.has_sender:
        return [*remarks, "its app has no TrackhubSender: only what FLARE's own writers send from there is recorded"]
    remarks += _format_loggers(site)
    match site.counted:
        case Counted.STALE:
            remarks.append("the site's final message did not come: it may have logged more")
        case Counted.UNKNOWN if site.received or site.earlier:
            remarks.append("the site sent no counts")
        case Counted.UNKNOWN:
            remarks.append("nothing arrived from this site")
        case Counted.INCOMPLETE:
            remarks.append("the site or the receiver could not count everything: there may be more")
    return remarks


def _format_loggers(site: SiteReport) -> list[str]:
    """Return why a site has no records, and which loggers the job captures although no script uses them."""
    if (counts := site.at_site) is None or not site.final:
        return []
    remarks = []
    if not counts.logged and counts.not_captured:
        names = ", ".join(counts.not_captured)
        remarks.append(
            f"nothing was logged with trackhub or FLARE; the scripts used {names}: give capture to record it"
        )
    elif not counts.logged:
        remarks.append("nothing was logged: no log call of trackhub or FLARE was made")
    if counts.not_used:
        remarks.append(f"capture: no use of {', '.join(counts.not_used)} was seen")
    return remarks


def _run_remarks(lane: str, run: RunReport) -> list[str]:
    """Return why records of this run are not delivered."""
    remarks = [f"rejected by {lane} ({reason}): {n}" for reason, n in run.rejected.items()]
    if run.trouble() and (run.pending or run.state in ("stopped", "unfinished")):
        remarks.append(run.trouble()[:_MAX_ERROR_CHARS])
    return remarks
