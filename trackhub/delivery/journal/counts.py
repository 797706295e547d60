# SPDX-License-Identifier: Apache-2.0
"""Makes the delivery report of a journal: counts its records by site, by backend and by outcome.

The receiver asks for it when it finishes, ``trackhub status`` and ``trackhub replay`` at any time.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec

from trackhub.delivery.journal.read_only import open_read_only
from trackhub.delivery.journal.rows import Progress
from trackhub.delivery.report import DeliveryReport, RunReport, SiteReport, resolve_results
from trackhub.delivery.wire import SiteCounts
from trackhub.run import JobInfo

__all__ = ["build_report", "read_journal_report"]


def read_journal_report(path: Path) -> DeliveryReport:
    """Return the report of a journal, without writing to it. The job may be running.

    Its results can be used as they are, also after the job's folder was moved.

    Raises:
        JournalError: it is no journal, or cannot be read.
    """
    with open_read_only(path) as db:
        return resolve_results(build_report(db), path.parent)


def build_report(db: sqlite3.Connection, lanes: Sequence[str] = ()) -> DeliveryReport:
    """Return the report of the journal on this connection, as ``delivery.json`` is to hold it.

    Args:
        db: the connection.
        lanes: lanes to include even if they have delivered nothing yet.

    Raises:
        sqlite3.Error: the journal cannot be read.
    """
    # In one transaction: a lane that confirms between two queries would otherwise have more outcomes than records.
    own = not db.in_transaction
    if own:
        db.execute("BEGIN")
    try:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        sites = _sites(db)
        runs = _runs(db, sites, lanes)
    finally:
        if own:
            db.execute("COMMIT")
    balanced = all(site.is_balanced() for site in sites.values()) and all(
        run.pending >= 0 for lane in runs.values() for run in lane.values()
    )
    job = msgspec.json.decode(meta["job_info"], type=JobInfo) if "job_info" in meta else None
    return DeliveryReport(
        job=meta.get("job", ""),
        job_name=job.name if job else "",
        side=meta.get("side", ""),
        status=meta.get("status", "running"),
        balanced=balanced,
        sites=sites,
        lanes=runs,
        run_dir=meta.get("run_dir", os.pardir),
    )


def _sites(db: sqlite3.Connection) -> dict[str, SiteReport]:
    sites = {}
    query = (
        "SELECT name, next_position - first_position, received, duplicates, missing, explained, counts, final"
        " FROM sites"
    )
    for name, journaled, received, duplicates, missing, explained, counts, final in db.execute(query):
        at_site = msgspec.msgpack.decode(counts, type=SiteCounts) if counts else None
        # Refused records leave a hole in the journal's numbers. The site counts them, so they are not missing.
        refused = sum(at_site.refused.values()) if at_site else 0
        sites[name] = SiteReport(
            at_site=at_site,
            received=received,
            duplicates=duplicates,
            journaled=journaled,
            missing=max(0, missing - refused),
            explained=msgspec.msgpack.decode(explained, type=dict[str, int]) if explained else {},
            final=bool(final),
        )
    return sites


def _runs(
    db: sqlite3.Connection, sites: dict[str, SiteReport], lanes: Sequence[str]
) -> dict[str, dict[str, RunReport]]:
    runs: dict[str, dict[str, RunReport]] = {
        lane: {name: RunReport(pending=site.journaled) for name, site in sites.items()} for lane in lanes
    }
    query = "SELECT runs.lane, sites.name, runs.progress FROM runs JOIN sites ON sites.id = runs.site"
    for lane, name, blob in db.execute(query):
        progress = msgspec.msgpack.decode(blob, type=Progress)
        # What has no outcome yet is pending. A negative number means that a lane counted a record twice.
        runs.setdefault(lane, {})[name] = RunReport(
            confirmed=progress.confirmed,
            client_confirmed=progress.client_confirmed,
            rejected=progress.rejected,
            pending=sites[name].journaled - progress.confirmed - sum(progress.rejected.values()),
            altered=progress.altered,
            possible_duplicates=progress.possible_duplicates,
            state=progress.state,
            last_error=progress.last_error,
            results=progress.results,
        )
    return runs
