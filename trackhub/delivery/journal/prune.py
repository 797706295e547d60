# SPDX-License-Identifier: Apache-2.0
"""Removes the content of delivered records from a journal, and the files of images and artifacts beside it.

``trackhub prune`` calls it. A receiver calls it, too, if the site's operator sets ``keep_days``. The rows stay, without
content. So all counts, positions and cursors stay as they were, and a later replay knows what is delivered.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import msgspec

from trackhub.delivery.blob_store import BlobStore
from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.lock import lock_journal
from trackhub.delivery.journal.report_builder import build_report
from trackhub.delivery.journal.swap import check_file_types, finish_swap, is_journal_left
from trackhub.delivery.journal.tables_and_rows import PRUNED
from trackhub.delivery.report import DeliveryReport, SiteReport
from trackhub.errors import ConfigError, DeliveryError, JournalError

__all__ = ["PruneResult", "check_not_pruned", "prune_journal", "prune_older"]

_BUSY_S = 10.0
_DAY_S = 86400.0
_log = logging.getLogger(__name__)


class PruneResult(NamedTuple):
    """What was removed from a journal.

    Attributes:
        records: site -> how many of its records were removed.
        freed_bytes: how much smaller the journal and the folder of its files are.
        kept: site whose records stay -> the reason.
    """

    records: dict[str, int]
    freed_bytes: int
    kept: dict[str, str]


def prune_journal(path: Path) -> PruneResult:
    """Remove the records of the sites that are delivered to all backends. Blocks while SQLite writes the file anew.

    A site's records stay if one of them is pending at a backend, or if the site's run there is not finished. They also
    stay if each backend rejected some of them, or if the site's spool may hold more. This may be killed at any moment,
    and called again.

    Args:
        path: the journal of a job that has ended.

    Raises:
        JournalError: it is not a journal, is damaged, belongs to a running job, or cannot be written.
    """
    if not is_journal_left(path):
        raise JournalError(f"there is no journal {path}")
    lock = lock_journal(path)
    try:
        finish_swap(path)
        check_file_types(path)
        before = _size(path)
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)) as db:
            db.isolation_level = None
            removed, kept = _empty_rows(db)
            # Do this also if nothing was removed now: an earlier call may have been killed before it did this.
            if db.execute("SELECT 1 FROM meta WHERE key = ?", (PRUNED,)).fetchone():
                db.execute("VACUUM")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            pruned = _pruned_before(dict(db.execute("SELECT key, value FROM meta")))
        for site in pruned.keys() - kept.keys():
            _remove_blobs(path, site)
        return PruneResult(removed, max(0, before - _size(path)), kept)
    except (sqlite3.Error, OSError, UnicodeDecodeError) as e:
        raise JournalError(
            f"cannot prune the journal {path}: {e}; `trackhub replay` repairs a damaged journal; on a full disk, free "
            "as much room as the pruned journal takes"
        ) from e
    finally:
        lock.release()


def _empty_rows(db: sqlite3.Connection) -> tuple[dict[str, int], dict[str, str]]:
    """Empty the rows of delivered sites. Return site -> records removed, and site -> why its records stay."""
    removed: dict[str, int] = {}
    db.execute("BEGIN IMMEDIATE")
    try:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        report = build_report(db, runs=False)
        kept = {
            name: reason
            for name, site in sorted(report.sites.items())
            if (reason := _why_kept(name, site, report, meta)) and site.journaled
        }
        for site_id, name in db.execute("SELECT id, name FROM sites").fetchall():
            if name not in kept:
                rows = "FROM batches WHERE site = ? AND length(frames) > 0"
                (records,) = db.execute(f"SELECT ifnull(sum(records), 0) {rows}", (site_id,)).fetchone()
                if records:
                    removed[name] = records
                    db.execute("UPDATE batches SET frames = x'' WHERE site = ?", (site_id,))
        if removed:
            before = _pruned_before(meta)
            total = {name: before.get(name, 0) + removed.get(name, 0) for name in {**before, **removed}}
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (PRUNED, msgspec.json.encode(total).decode()))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return removed, kept


def _why_kept(name: str, site: SiteReport, report: DeliveryReport, meta: Mapping[str, str]) -> str:
    """Return why a site's records must stay; empty if they can be removed."""
    backends = msgspec.json.decode(meta.get("backends", "{}"), type=dict[str, object]).keys() | report.lanes.keys()
    if not meta.get("status"):
        return "the job's processes were killed; `trackhub replay` delivers what is left"
    if not backends:
        return "the job used no backend, so this is the only copy"
    for backend in sorted(backends):
        run = report.lanes.get(backend, {}).get(name)
        pending = site.journaled if run is None else run.pending
        if pending:
            return f"{pending:,} records are pending at {backend}; `trackhub replay` delivers them"
        if run is not None and run.state != "finished":
            return f"its run at {backend} is {run.state}; `trackhub replay` ends it"
    if all(report.lanes[backend][name].rejected for backend in backends):
        return "each backend rejected some of its records, so this may be their only copy"
    if not site.final or (site.at_site is not None and site.at_site.spooled + site.at_site.unreadable):
        return "its spool may hold more; `trackhub replay` on the site's folder delivers it"
    return ""


def _pruned_before(meta: Mapping[str, str]) -> dict[str, int]:
    return msgspec.json.decode(meta.get(PRUNED, "{}"), type=dict[str, int])


def _remove_blobs(path: Path, site: str) -> None:
    folder = BlobStore(path.parent / "blobs").folder(site)
    # Follow no link. Whoever made the job's folder may have put one there, to have files of another folder deleted.
    if folder.is_dir() and not folder.is_symlink() and not folder.parent.is_symlink():
        for blob in folder.iterdir():
            blob.unlink()
        folder.rmdir()


def _size(path: Path) -> int:
    files = [*path.parent.glob(f"{path.name}*"), *(path.parent / "blobs").glob("*/*")]
    return sum(file.lstat().st_size for file in files)


def prune_older(folder: Path, keep_days: float) -> None:
    """Prune the journals below a folder whose jobs ended some days ago. Never raises: the log says what it did.

    Args:
        folder: the folder of many jobs.
        keep_days: how long records stay after the job's end, in days.
    """
    try:
        journals, _, unreadable = find(folder)
    except ConfigError:
        return
    except JournalError as e:
        journals, unreadable = [], [e]
    for error in unreadable:
        _log.warning("%s is not pruned: %s", folder, error)
    for path in journals:
        try:
            if time.time() - path.stat().st_mtime < keep_days * _DAY_S:
                continue
            result = prune_journal(path)
        except (DeliveryError, OSError) as e:
            _log.warning("%s is not pruned: %s", path, e)
        else:
            if result.records:
                _log.info("pruned %s: %d delivered records", path, sum(result.records.values()))


def check_not_pruned(journal: Journal, backends: Collection[str], *, goes_on: bool, from_start: bool) -> None:
    """If a journal lacks pruned records that would be needed, close it and raise. Otherwise do nothing.

    Args:
        journal: the open journal.
        backends: where to deliver.
        goes_on: True if the job goes on. A backend may then ask for its run from the start again.
        from_start: True if everything must be delivered again.

    Raises:
        ConfigError: the removed records would be needed.
        JournalError: the journal cannot be read.
    """
    meta = journal.meta()
    removed = sum(_pruned_before(meta).values())
    new = sorted(set(backends) - msgspec.json.decode(meta.get("backends", "{}"), type=dict[str, object]).keys())
    if not removed or not (goes_on or from_start or new):
        return
    journal.close()
    what = "the job cannot go on" if goes_on else f"{', '.join(new) or 'a backend'} cannot get the whole job"
    raise ConfigError(
        f"{journal.path}: {what}, since `trackhub prune` removed {removed:,} delivered records from it. Give the job a "
        "new id, or copy the records from a backend that has them"
    )
