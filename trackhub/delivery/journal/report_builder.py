# SPDX-License-Identifier: Apache-2.0
"""Makes the delivery report of a journal: counts the records for each site, backend and outcome.

The receiver calls it when it finishes. ``trackhub status`` and ``trackhub replay`` call it at any time.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from trackhub.delivery.journal.lock import is_delivering, is_journal_locked
from trackhub.delivery.journal.read_only import open_read_only
from trackhub.delivery.journal.tables_and_rows import (
    EXPECTED_SITES,
    REPAIRED_SITES,
    SILENCE_S,
    SITES_WITHOUT_SENDER,
    Progress,
)
from trackhub.delivery.report import RUNNING, Counted, DeliveryReport, RunReport, SiteReport, resolve_results
from trackhub.delivery.wire import SiteCounts
from trackhub.job_and_run_info import JobInfo, RunStatus

__all__ = ["build_report", "read_journal_report"]

_Kind = TypeVar("_Kind")


def read_journal_report(path: Path) -> DeliveryReport:
    """Return the report of a journal, without writing to it. The job may be running.

    Its paths are absolute and its commands work in any folder, even after the job's folder was moved.

    Raises:
        JournalError: it is not a journal, or cannot be read.
    """
    # Ask this first. If the job ends afterwards, the journal says how it ended. In the other order, a job that ends in
    # between would be called killed.
    runs, delivering = is_journal_locked(path), is_delivering(path)
    with open_read_only(path) as db:
        return resolve_results(build_report(db, runs=runs, delivering=delivering), path.parent)


def build_report(
    db: sqlite3.Connection,
    lanes: Sequence[str] = (),
    *,
    facts: Mapping[str, str] | None = None,
    runs: bool = True,
    delivering: bool = False,
) -> DeliveryReport:
    """Return the report of the journal on this connection, with relative paths, as ``delivery.json`` has it.

    Args:
        db: the connection.
        lanes: lanes to include even if they have delivered nothing yet.
        facts: facts about the job, in case the journal could not store them.
        runs: True if the receiver's process runs. If it does not, a job without a stored end was killed.
        delivering: True if somebody else has the journal. Then no count is final, also if the job has ended.

    Raises:
        sqlite3.Error: the journal cannot be read.
    """
    # All queries are in one transaction. Otherwise a lane could confirm between two queries, and there would be more
    # outcomes than records.
    own = not db.in_transaction
    if own:
        db.execute("BEGIN")
    try:
        meta = {**dict(db.execute("SELECT key, value FROM meta")), **(facts or {})}
        status = meta.get("status") or (RUNNING if runs else RunStatus.KILLED)
        is_running = delivering or status == RUNNING
        sites = _sites(db, meta, is_running=is_running)
        by_lane = _runs(db, sites, lanes, is_running=is_running)
        has_open = _has_open_runs(sites, by_lane, meta)
    finally:
        if own:
            db.execute("COMMIT")
    for name in msgspec.json.decode(meta.get(EXPECTED_SITES, "[]"), type=list[str]):
        sites.setdefault(name, SiteReport(counted=Counted.OPEN if is_running else Counted.UNKNOWN))
    for name in msgspec.json.decode(meta.get(SITES_WITHOUT_SENDER, "[]"), type=list[str]):
        sites[name].has_sender = False
    adds_up = all(site.adds_up() for site in sites.values()) and all(
        run.pending >= 0 for lane in by_lane.values() for run in lane.values()
    )
    job = msgspec.json.decode(meta["job_info"], type=JobInfo) if "job_info" in meta else None
    return DeliveryReport(
        job=meta.get("job", ""),
        job_name=job.name if job else "",
        side=meta.get("side", ""),
        status=status,
        balanced=adds_up and all(site.is_balanced() for site in sites.values()),
        adds_up=adds_up,
        sites=sites,
        lanes=by_lane,
        run_dir=meta.get("run_dir", os.pardir),
        # The status alone does not show this. The receiver notes the status before it ends the runs, and a replay keeps
        # "killed".
        interrupted=not runs and (has_open or not meta.get("status")),
        delivering=delivering,
    )


def _sites(db: sqlite3.Connection, meta: Mapping[str, str], *, is_running: bool) -> dict[str, SiteReport]:
    sites = {}
    doubted = msgspec.json.decode(meta.get(REPAIRED_SITES, "[]"), type=list[str])
    silent_before = time.time() - float(meta.get(SILENCE_S, "inf"))
    query = (
        "SELECT name, next_position - first_position, first_position, received, duplicates, missing, explained,"
        " refused, counts, counted_at, last FROM sites"
    )
    rows = db.execute(query)
    for row in rows:
        name, journaled, earlier, received, duplicates, missing, explained, refused, counts, counted_at, last = row
        at_site = _decoded(counts, SiteCounts)
        refused_here: dict[str, int] = _decoded(refused, dict[str, int]) or {}
        # If a whole batch was refused, its numbers are missing in the journal. The site counts these records as
        # refused, so the report must not count them as missing.
        refused_batches = sum(at_site.refused.values()) - sum(refused_here.values()) if at_site else 0
        site = sites[name] = SiteReport(
            at_site=at_site,
            received=received + sum(refused_here.values()),
            duplicates=duplicates,
            journaled=journaled,
            refused=refused_here,
            earlier=earlier,
            missing=max(0, missing - max(0, refused_batches)),
            explained=_decoded(explained, dict[str, int]) or {},
            final=bool(last),
        )
        is_fresh = is_running and (counted_at is None or counted_at >= silent_before)
        site.counted = _counted(site, is_fresh=is_fresh, is_doubted=name in doubted)
    return sites


def _decoded(stored: bytes | None, kind: type[_Kind]) -> _Kind | None:
    """Return a stored value. None if there is none, or if it is invalid: the journal may come from somebody else."""
    try:
        return msgspec.msgpack.decode(stored, type=kind) if stored else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _counted(site: SiteReport, *, is_fresh: bool, is_doubted: bool) -> Counted:
    """Return how complete a site's counts are.

    Args:
        site: its counts.
        is_fresh: True if the job runs and the site's last message is not too old.
        is_doubted: True if a repair of the journal could not read the receiver's counts.
    """
    if site.at_site is None:
        return Counted.OPEN if is_fresh and not is_doubted else Counted.UNKNOWN
    if not site.final and not is_fresh:
        return Counted.STALE
    here = site.earlier + site.journaled
    more_here = site.final and here > site.at_site.acked + site.at_site.spooled + site.at_site.unreadable
    if is_doubted or more_here or not site.at_site.complete:
        return Counted.INCOMPLETE
    return Counted.FINAL if site.final else Counted.OPEN


def _has_open_runs(
    sites: Mapping[str, SiteReport], by_lane: Mapping[str, Mapping[str, RunReport]], meta: Mapping[str, str]
) -> bool:
    """Return whether a run that has records is open, or no lane has begun although the job has backends."""
    if by_lane:
        return any(
            run.state == "open" and sites[name].journaled for lane in by_lane.values() for name, run in lane.items()
        )
    return meta.get("backends", "{}") != "{}" and any(site.journaled for site in sites.values())


def _not_begun(site: SiteReport, *, is_running: bool) -> RunReport:
    """Return the run of a site that a lane has not begun. All the site's records are pending."""
    # A site without records has no run at any backend, so there is nothing to open or to finish.
    state = "open" if is_running or site.journaled else "finished"
    return RunReport(pending=site.journaled, state=state)


def _runs(
    db: sqlite3.Connection, sites: dict[str, SiteReport], lanes: Sequence[str], *, is_running: bool
) -> dict[str, dict[str, RunReport]]:
    runs = {lane: {name: _not_begun(site, is_running=is_running) for name, site in sites.items()} for lane in lanes}
    query = "SELECT runs.lane, sites.name, runs.progress FROM runs JOIN sites ON sites.id = runs.site"
    for lane, name, blob in db.execute(query):
        progress = _decoded(blob, Progress) or Progress(state="stopped", last_error="the journal is damaged here")
        # A record without an outcome is pending. A negative number means that a lane counted a record twice.
        runs.setdefault(lane, {})[name] = RunReport(
            confirmed=progress.confirmed,
            client_confirmed=progress.client_confirmed,
            rejected=progress.rejected,
            pending=sites[name].journaled - progress.confirmed - sum(progress.rejected.values()),
            altered=progress.altered,
            possible_duplicates=progress.possible_duplicates,
            state=progress.state,
            last_error=progress.last_error,
            recovered=progress.recovered,
            blocked_by=progress.blocked_by,
            results=progress.results,
        )
    for by_site in runs.values():  # without a row in the journal, all of a site's records are pending at the lane
        for name, site in sites.items():
            if name not in by_site and (site.at_site is not None or site.received):
                by_site[name] = _not_begun(site, is_running=is_running)
    return runs
