# SPDX-License-Identifier: Apache-2.0
"""``trackhub status``: what became of a job's records.

It finds the job's journals and spools with `trackhub.delivery.journal.find_journals_and_spools`, and reads them without
changing them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from trackhub.cli.output import print_error, print_json, print_lines, print_table
from trackhub.delivery.journal.find_journals_and_spools import find_all, find_temporary_spools
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.report import RUNNING, Counted, RunReport, SiteReport
from trackhub.delivery.report_text import (
    format_altered,
    format_confirmed,
    format_counted,
    format_job,
    format_openings,
    format_status,
    format_together,
)
from trackhub.delivery.wire import SiteCounts
from trackhub.errors import ConfigError, DeliveryError
from trackhub.process_lock import is_free
from trackhub.runnable_commands import command_for
from trackhub.spool.counts import add_up
from trackhub.spool.layout import read_spool_info
from trackhub.spool.reading import RETIRED, SpoolReader

__all__ = ["journal_status", "spool_status", "status"]

_MAX_TROUBLE_CHARS = 160
# "finished" beside the status "killed" of the job reads as a contradiction.
_RUN_STATES = {"finished": "ended", "unfinished": "not ended"}

JSON_VERSION = 1
"""Version of the JSON document. New keys do not raise it. No key is removed, and none changes its meaning."""


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON; its keys are stable.")
def status(paths: Sequence[Path], as_json: bool) -> None:
    """Show what became of a job's records, by site and backend. The job may be running.

    PATH is a journal, a spool folder, or a folder above, such as a job's. The last lines say how to open the results
    where the job's folder lies now. A spool of the job that had to go to the temporary folder is shown as well, if
    something is wrong with it.

    The exit status is 1 if something is wrong. That is so if counts are not known or do not add up, if records were
    dropped, refused or rejected, or if something cannot be read. It is also 1 if the job has ended, and left records
    or open runs to `trackhub replay`. Values that were left out of a record are shown, and are no error.

    The JSON document is {"version": 1, "journals": [...], "spools": [...], "errors": [...]}. errors names the folders
    below PATH that this user may not read.

    A journal has path, job, job_name, side, status, balanced, adds_up, undelivered, interrupted, delivering, problems,
    left_over, sites and lanes. balanced is true if all counts are known and add up. problems says in words what is
    wrong. left_over has those problems that a replay mends. interrupted is true if the receiver was killed, and no
    replay has ended its runs since. A replay leaves the status "killed". delivering is true while a receiver or a
    replay has the journal, which may be longer than the job runs.

    sites has for each name logged, withheld, dropped, refused, acked, spooled, unreadable, complete, altered,
    at_source, by_message, not_captured, not_used, retries, counted, received, duplicates, journaled, earlier, missing,
    refused_here, explained, final, has_sender and doubts. Those up to retries are what the site last said, null if it
    said nothing yet. at_source and by_message say which way the calls of FLARE's own writers went. not_captured and
    not_used name loggers of the scripts. retries counts repeated requests. refused_here is what the receiver refused.
    has_sender is false if the site's app has no TrackhubSender. counted says how much is known of what the site logged:
    final, open, stale, incomplete or unknown. doubts says it in words.

    lanes has for each backend and site confirmed, client_confirmed, rejected, pending, altered, possible_duplicates,
    state, last_error, recovered, blocked_by and results. client_confirmed is a part of confirmed. state is that of the
    run at the backend, not of the job: open, finished, unfinished or stopped. recovered is true if the backend has
    stored records since last_error. blocked_by names the record that all others wait for. results has url, path and
    command, each null if there is none.

    A spool has path, site, job, job_name, open, problems and receivers. receivers has for each name streams, logged,
    withheld, dropped, refused, acked, spooled, unreadable, complete, altered, withheld_by_rule and altered_by_rule.

    dropped, refused, refused_here, rejected, altered and explained are counts by reason. altered counts
    values, not records. What cannot be read has only path and error.
    """
    found = find_all(paths)
    journals = [_or_error(journal, journal_status) for journal in found.journals]
    spools = [_or_error(spool, spool_status) for spool in found.spools]
    temporary = _temporary_spools(found.spools, [*journals, *spools])
    spools += temporary
    if as_json:
        document = {"version": JSON_VERSION, "journals": journals, "spools": spools}
        print_json({**document, "errors": [*map(str, found.unreadable)]})
    else:
        for journal in journals:
            _show_journal(journal)
        folders = [str(Path(journal["path"]).absolute().parent) for journal in journals]
        print_lines(*(line.strip() for line in format_together(folders)))
        for spool in spools:
            _show_spool(spool)
        for spool in temporary:  # a replay must see the journal beside it
            command = command_for("trackhub replay", paths[0])
            print_lines(
                f"{spool['path']} holds records of this job: move it into {paths[0]}, and deliver with `{command}`"
            )
    errors = [part["error"] for part in (*journals, *spools) if "error" in part]
    errors += map(str, found.unreadable)
    for error in errors:
        print_error(error)
    if errors or any(part["problems"] for part in (*journals, *spools)):
        sys.exit(1)


def journal_status(path: Path) -> dict[str, Any]:
    """Return what a journal says, as plain values.

    Raises:
        JournalError: it cannot be read.
    """
    report = read_journal_report(path)
    return {
        "path": str(path),
        "job": report.job,
        "job_name": report.job_name,
        "side": report.side,
        "status": report.status,
        "balanced": report.balanced,
        "adds_up": report.adds_up,
        "undelivered": report.undelivered(),
        "interrupted": report.interrupted,
        "delivering": report.delivering,
        "problems": report.problems(),
        "left_over": report.left_over(),
        "sites": {name: _plain_site(site) for name, site in sorted(report.sites.items())},
        "lanes": {lane: msgspec.to_builtins(dict(sorted(runs.items()))) for lane, runs in sorted(report.lanes.items())},
    }


def spool_status(folder: Path) -> dict[str, Any]:
    """Return what a spool holds, as plain values. Reads all records that are not acknowledged, to count them.

    Raises:
        SpoolError: it cannot be read.
    """
    info = read_spool_info(folder)
    receivers = {}
    for cursor in info.cursors:
        reader = SpoolReader(folder, cursor)
        counts = reader.counts()
        total = add_up(counts.values())
        receivers[cursor] = {
            "streams": len(counts.keys() - {RETIRED}) + reader.retired_streams(),
            "logged": total.logged,
            "withheld": total.withheld,
            "dropped": total.dropped,
            "refused": total.refused,
            "acked": total.acked,
            "spooled": total.spooled,
            "unreadable": total.unreadable,
            "complete": total.is_complete,
            "altered": total.altered,
            "withheld_by_rule": total.withheld_by_rule,
            "altered_by_rule": total.altered_by_rule,
        }
    return {
        "path": str(folder),
        "site": info.site,
        "job": info.job,
        "job_name": info.name,
        "open": info.open,
        "problems": _spool_problems(folder, receivers),
        "receivers": receivers,
    }


def _spool_problems(folder: Path, receivers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with what a spool holds. Records in the spool of a running job are on their way."""
    problems = []
    for receiver, counts in receivers.items():
        left = counts["spooled"] + counts["unreadable"]
        lock = folder / f"{receiver}.lock"
        if left and (is_free(lock) or not os.path.exists(lock)):
            problems.append(f"{left:,} records have not arrived at the {receiver} side")
        if lost := sum(counts["dropped"].values()) + sum(counts["refused"].values()):
            problems.append(f"{lost:,} records were dropped or refused")
    return problems


def _temporary_spools(shown: Sequence[Path], parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the spools in the temporary folder that have records of the shown jobs, and with which something is wrong.

    Args:
        shown: the spools that are shown already.
        parts: the journals and spools that were found.
    """
    jobs = {part["job"] for part in parts if "error" not in part}
    known = {spool.resolve() for spool in shown}
    found = [_or_error(spool, spool_status) for spool in find_temporary_spools(jobs) if spool.resolve() not in known]
    return [spool for spool in found if "error" in spool or spool["problems"]]


def _or_error(path: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read(path)
    except (DeliveryError, ConfigError) as error:
        return {"path": str(path), "error": str(error)}
    except (OSError, msgspec.DecodeError) as error:
        return {"path": str(path), "error": f"cannot read {path}: {error}"}


def _plain_site(site: SiteReport) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(site)
    counts = plain.pop("at_site") or dict.fromkeys(SiteCounts.__struct_fields__)
    plain["refused_here"] = plain.pop("refused")  # what the receiver counted; ``refused`` is what the site did
    return {**counts, **plain, "doubts": format_counted(site)}


def _show_journal(journal: Mapping[str, Any]) -> None:
    if "error" in journal:
        return
    job = format_job(journal["job"], journal["job_name"])
    ended = format_status(journal["status"], is_complete=not journal["problems"])
    if journal["delivering"] and journal["status"] != RUNNING:
        ended += ", and its records are still being delivered"
    print_lines(f"{journal['path']}: job {job}, {journal['side']} side, {ended}")
    print_lines(*journal["problems"])
    lanes = {lane: msgspec.convert(runs, dict[str, RunReport]) for lane, runs in journal["lanes"].items()}
    rows = []
    for name, site in journal["sites"].items():
        at_site = [
            name,
            _logged(site),
            f"{site['received']:,}",
            _reasons({**(site["dropped"] or {}), **({"missing": site["missing"]} if site["missing"] else {})}),
        ]
        altered = (site["altered"] or {}).items()
        left_out = [f"values left out at the site ({reason}): {n:,}" for reason, n in altered]
        doubts = "; ".join([*left_out, *site["doubts"]])
        found = [(lane, runs[name]) for lane, runs in lanes.items() if name in runs]
        rows += [[*at_site, lane, *_run_cells(run, doubts)] for lane, run in found] or [[*at_site, *"-----", doubts]]
    print_table(
        ["site", "logged", "received", "dropped", "backend", "confirmed", "rejected", "pending", "run", "remarks"],
        rows,
    )
    if journal["left_over"]:
        folder = Path(journal["path"]).parent
        killed = "Its process was killed. " if journal["interrupted"] else ""
        print_lines(f"{killed}Deliver what is left, and end its runs, with `{command_for('trackhub replay', folder)}`")
    openings = format_openings((name, lane, run) for lane, runs in lanes.items() for name, run in runs.items())
    if openings:
        print_lines("Open the results", *openings)


def _run_cells(run: RunReport, doubts: str) -> list[str]:
    return [
        format_confirmed(run),
        _reasons(run.rejected),
        f"{run.pending:,}",
        _RUN_STATES.get(run.state, run.state),
        "; ".join(filter(None, [doubts, *format_altered(run), run.trouble()[:_MAX_TROUBLE_CHARS]])),
    ]


def _show_spool(spool: Mapping[str, Any]) -> None:
    if "error" in spool:
        return
    job = format_job(spool["job"], spool["job_name"])
    is_empty = not any(count["logged"] for count in spool["receivers"].values())
    print_lines(
        f"{spool['path']}: spool of site {spool['site']}, job {job}{', open' * spool['open']}"
        f"{', without a record' * is_empty}"
    )
    if is_empty:
        return
    print_table(
        ["receiver", "logged", "acked", "refused", "dropped", "withheld", "pending", "values altered by policy"],
        [
            [
                receiver,
                str(count["logged"]),
                str(count["acked"]),
                _reasons(count["refused"]),
                _reasons(count["dropped"]),
                _reasons(count["withheld_by_rule"]) if count["withheld"] else "0",
                str(count["spooled"] + count["unreadable"]),
                _reasons(count["altered_by_rule"]),
            ]
            for receiver, count in spool["receivers"].items()
        ],
    )


def _logged(site: Mapping[str, Any]) -> str:
    if site["logged"] is None:
        return "?"
    return f"{site['logged']}{'+' * (site['counted'] in (Counted.STALE, Counted.INCOMPLETE))}"


def _reasons(counts: Mapping[str, int]) -> str:
    """Return ``12 (spool_full 10, damaged 2)``."""
    parts = [f"{reason} {number}" for reason, number in sorted(counts.items()) if number]
    return f"{sum(counts.values())} ({', '.join(parts)})" if parts else "0"
