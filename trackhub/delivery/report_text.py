# SPDX-License-Identifier: Apache-2.0
"""The delivery report as text: as a table with a row for each site and backend, and in sentences.

The receiver logs it, ``trackhub.local`` and the script of a job print it at the end, and the commands show parts of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trackhub.delivery.report import (
    REPORT_NAME,
    Counted,
    DeliveryReport,
    RunReport,
    SiteReport,
    resolve_results,
    write_report,
)
from trackhub.job_and_run_info import RunStatus
from trackhub.printable import printable
from trackhub.runnable_commands import command_for
from trackhub.spi import Results

__all__ = [
    "format_altered",
    "format_confirmed",
    "format_counted",
    "format_doubts",
    "format_job",
    "format_logged",
    "format_openings",
    "format_report",
    "format_results",
    "format_status",
    "format_together",
    "leave_report",
]

_MAX_ERROR_CHARS = 120
_log = logging.getLogger(__name__)


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
    rest = ""
    if report.pending() and not moves_to:
        rest = f"\nDeliver what is pending with `{command_for('trackhub replay', folder)}`"
    _log.info("%s%s", format_report(report, moves_to), rest)
    return report


def format_job(job: str, job_name: str) -> str:
    """Return what to call a job in a line of text: its name with its id, or its id alone if it has no name.

    Args:
        job: the job's id.
        job_name: the job's name.
    """
    return printable(job if job_name in ("", job) else f"{job_name} ({job})")


def format_status(status: str, *, is_complete: bool) -> str:
    """Return how a job ended. For a killed job, add whether a replay has delivered the rest.

    Args:
        status: how it ended.
        is_complete: what `DeliveryReport.is_complete` returned.
    """
    return f"{status}, all delivered since" if status == RunStatus.KILLED and is_complete else status


def format_confirmed(run: RunReport) -> str:
    """Return how many records of a run are confirmed, and how many of them only the backend's SDK confirmed."""
    client = f" ({run.client_confirmed:,} by the SDK alone)" if run.client_confirmed else ""
    return f"{run.confirmed:,}{client}"


def format_logged(site: SiteReport) -> str:
    """Return how many records a site logged: ``1,300``, or ``1,300+`` for at least so many, or ``?`` if unknown."""
    if site.at_site is None:
        return "?"
    return f"{site.at_site.logged:,}{'+' * (site.counted in (Counted.STALE, Counted.INCOMPLETE))}"


def format_doubts(report: DeliveryReport) -> str:
    """Return what to add to the first line of a report whose counts are not balanced; empty if they are."""
    return "" if report.balanced and report.adds_up and not report.error else f". {report.problems()[0]}"


def format_openings(runs: Iterable[tuple[str, str, RunReport]]) -> list[str]:
    """Return how to look at what the backends stored: lines with a command, a URL or a path each.

    A line that is about one of several runs of a backend names its site, since a URL alone may not show it.

    Args:
        runs: (site, backend's name, run) for each run. A command that opens several runs is shown once. A command is
            left out if a later run of the same backend has it with more flags.
    """
    sites_of: dict[tuple[str, str], list[str]] = {}
    for site, backend, run in runs:
        for opening in run.results.openings() if run.results else ():
            sites_of.setdefault((backend, opening), []).append(site)
    words = {(backend, opening): set(opening.split()) for backend, opening in sites_of if " " in opening}
    for key, own in words.items():
        fuller = [other for other, more in words.items() if other[0] == key[0] and own < more]
        if fuller:
            sites_of[max(fuller, key=lambda other: len(words[other]))] += sites_of.pop(key)
    all_sites: dict[str, set[str]] = {}
    for (backend, _), sites in sites_of.items():
        all_sites.setdefault(backend, set()).update(sites)
    lines = []
    for (backend, opening), sites in sites_of.items():
        is_one_of_several = len(set(sites)) == 1 < len(all_sites[backend])
        name = f"{backend} ({sites[0]})" if is_one_of_several else backend
        lines.append(printable(f"  {name}: {opening}"))
    return lines


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
            counts = (format_confirmed(run), f"{sum(run.rejected.values()):,}", f"{run.pending:,}")
            remark = "; ".join([*remarks, *_run_remarks(lane, run)]) or "-"
            rows.append((name, lane, logged, f"{site.journaled:,}", *counts, remark))
        if not own:
            rows.append((name, "-", logged, f"{site.journaled:,}", "-", "-", "-", "; ".join(remarks) or "-"))
    runs = [(site, lane, run) for lane, by_site in sorted(report.lanes.items()) for site, run in by_site.items()]
    stays = [run for run in runs if not (moves_to and _lies_in(run[2].results, report.run_dir))]
    openings = [*format_openings(stays), *([f"  {moves_to}"] if len(stays) < len(runs) else [])]
    footer = ["Open the results", *openings] if openings else []
    job = format_job(report.job, report.job_name)
    status = format_status(report.status, is_complete=report.is_complete())
    head = f"trackhub delivery report: job {job}, {report.side} side, {status}"
    return "\n".join([head + format_doubts(report), *_table(rows), *footer])


def _lies_in(results: Results | None, folder: str) -> bool:
    """Return whether what a run stored lies in this folder."""
    path = results and (results.command or not results.url) and results.path
    return bool(path) and Path(str(path)).is_relative_to(folder)


def format_results(reports: Mapping[str, DeliveryReport]) -> str:
    """Return what each backend stored of a job, and how to look at it, for the end of the script that ran the job.

    Args:
        reports: receiver (the name of its site, or ``server``) -> its report.
    """
    rows = [("site", "receiver", "backend", "confirmed", "remarks")]
    runs_shown: list[tuple[str, str, RunReport]] = []
    for receiver, report in reports.items():
        for backend, runs in sorted(report.lanes.items()):
            for name, run in sorted(runs.items()):
                rows.append((name, receiver, backend, *_result_cells(run, report.sites.get(name))))
                runs_shown.append((name, backend, run))
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
    return [f"  all together: {command_for('trackhub report', printable(os.path.commonpath(folders)))}"]


def _result_cells(run: RunReport | None, site: SiteReport | None) -> tuple[str, str]:
    """Return how many records of a run are confirmed, and why the others are not."""
    outcomes = [*run.rejected.items()] if run else []
    if site is not None and (counts := site.at_site) is not None:
        outcomes += [*counts.dropped.items()]
        outcomes += [("in the spool", counts.spooled), ("unreadable at the site", counts.unreadable)]
    outcomes += [*site.all_refused().items()] if site else []
    outcomes += [("pending", run.pending), ("by the SDK alone", run.client_confirmed)] if run else []
    remarks = [f"{reason}: {n}" for reason, n in outcomes if n]
    remarks += [run.trouble()] if run and run.trouble() else []
    remarks += format_altered(run) if run else []
    remarks += [*format_altered(site), *format_counted(site)] if site else []
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
        if counts.withheld:
            remarks.append(f"withheld by the site's policy: {counts.withheld}")
        if counts.spooled:
            remarks.append(f"still in the site's spool: {counts.spooled}")
        if counts.unreadable:
            remarks.append(f"cannot be read at the site: {counts.unreadable}")
    remarks += [f"refused by the receiver ({reason}): {n}" for reason, n in site.all_refused().items()]
    if site.missing:
        remarks.append(f"missing without a reason: {site.missing}")
    return [*remarks, *format_altered(site), *format_counted(site)]


def format_altered(altered_by: SiteReport | RunReport) -> list[str]:
    """Return remarks on values that a site left out of records, or on records that were altered for a backend."""
    if isinstance(altered_by, RunReport):
        return [f"records altered for this backend ({reason}): {n:,}" for reason, n in altered_by.altered.items() if n]
    counts = altered_by.at_site
    return [
        f"values left out at the site ({reason}): {n:,}" for reason, n in (counts.altered if counts else {}).items()
    ]


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
    # Records of a spool that was deleted were logged, but are not counted.
    is_empty = not counts.logged and site.counted is Counted.FINAL and not (site.received or site.earlier)
    if is_empty and counts.not_captured:
        names = ", ".join(counts.not_captured)
        remarks.append(
            f"nothing was logged with trackhub or FLARE; the scripts used {names}: give capture to record it"
        )
    elif is_empty:
        remarks.append("nothing was logged: no log call of trackhub or FLARE was made")
    if counts.not_used:
        remarks.append(f"capture: no use of {', '.join(counts.not_used)} was seen")
    return remarks


def _run_remarks(lane: str, run: RunReport) -> list[str]:
    """Return why records of this run are not delivered."""
    remarks = [f"rejected by {lane} ({reason}): {n}" for reason, n in run.rejected.items()]
    if run.trouble():
        remarks.append(run.trouble()[:_MAX_ERROR_CHARS])
    return remarks + format_altered(run)
