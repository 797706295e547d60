# SPDX-License-Identifier: Apache-2.0
"""Reading a journal: what became of every record, while the job runs or long after it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from trackhub.delivery.report import DeliveryReport, RunReport, SiteReport
from trackhub.delivery.wire import SiteLedger
from trackhub.errors import JournalError
from trackhub.spi import Results

__all__ = ["Progress", "build_report", "read_journal_meta", "read_journal_report", "read_stream_positions"]


class Progress(msgspec.Struct, kw_only=True):
    """What a lane counted for one run up to its confirmed cursor, and what it must remember to go on from there.

    Attributes:
        confirmed, client_confirmed, rejected, altered, possible_duplicates, state, last_error, results: as in `report.RunReport`.
        memory: the shaper's state at the confirmed cursor.
        stored_to: the position after the last record that was confirmed.
    """

    confirmed: int = 0
    client_confirmed: int = 0
    rejected: dict[str, int] = {}
    altered: dict[str, int] = {}
    possible_duplicates: int = 0
    state: str = "open"
    last_error: str = ""
    results: Results | None = None
    memory: bytes = b""
    stored_to: int = 0


@contextmanager
def _read_only(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?{_reading_mode(path)}", uri=True, timeout=10.0)
        try:
            yield db
        finally:
            db.close()
    except sqlite3.Error as e:
        damaged = type(e) is sqlite3.DatabaseError  # its subclasses are for what may pass
        what_next = "; `trackhub replay` delivers what can still be read of it" if damaged else ""
        raise JournalError(f"cannot read the journal {path}: {e}{what_next}") from e


def read_journal_report(path: Path) -> DeliveryReport:
    """Return what a journal says, without writing to it; the job may be running.

    Raises:
        JournalError: it is no journal, or cannot be read.
    """
    with _read_only(path) as db:
        return build_report(db, [])


def read_journal_meta(path: Path) -> dict[str, str]:
    """Return the facts that a journal holds about its job: ``job``, ``side``, ``status``, ``backends``, ``format``.

    Raises:
        JournalError: it is no journal, or cannot be read.
    """
    with _read_only(path) as db:
        return dict(db.execute("SELECT key, value FROM meta"))


def read_stream_positions(path: Path, site: str) -> dict[str, int]:
    """Return the number of the next record that a journal expects of each stream of a site.

    Raises:
        JournalError: it is no journal, or cannot be read.
    """
    query = "SELECT streams.name, next_seq FROM streams JOIN sites ON sites.id = streams.site WHERE sites.name = ?"
    with _read_only(path) as db:
        return dict(db.execute(query, (site,)))


def _reading_mode(path: Path) -> str:
    """Return how to open a journal that must not be changed, not even by new files beside it."""
    try:
        with path.open("rb") as file:
            write_ahead = file.read(20)[18:] == b"\x02\x02"  # https://www.sqlite.org/fileformat.html, 1.3.3
    except OSError:
        write_ahead = False
    # A closed one has no log beside it. Opened in the ordinary way, SQLite would create log and index, and fail where
    # the folder cannot be written.
    closed = write_ahead and not path.with_name(f"{path.name}-wal").exists()
    return "mode=ro&immutable=1" if closed else "mode=ro"


def build_report(db: sqlite3.Connection, lanes: list[str]) -> DeliveryReport:
    """Return the report that the journal on this connection holds.

    Args:
        lanes: lanes to include even if nothing was delivered by them yet.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    meta = dict(db.execute("SELECT key, value FROM meta"))
    sites: dict[str, SiteReport] = {}
    names: dict[int, str] = {}
    query = (
        "SELECT id, name, next_position - first_position, received, duplicates, missing, explained, ledger, bye"
        " FROM sites"
    )
    for i, name, journaled, received, duplicates, missing, explained, ledger, bye in db.execute(query):
        names[i] = name
        site = msgspec.msgpack.decode(ledger, type=SiteLedger) if ledger else None
        # The site counts what this receiver refused, and has gone on behind it.
        missing = max(0, missing - sum(site.refused.values())) if site else missing
        sites[name] = SiteReport(
            site=site,
            received=received,
            duplicates=duplicates,
            journaled=journaled,
            missing=missing,
            explained=msgspec.msgpack.decode(explained, type=dict[str, int]) if explained else {},
            said_bye=bool(bye),
        )
    runs: dict[str, dict[str, RunReport]] = {
        lane: {name: RunReport(pending=site.journaled) for name, site in sites.items()} for lane in lanes
    }
    for lane, i, blob in db.execute("SELECT lane, site, progress FROM runs"):
        p = msgspec.msgpack.decode(blob, type=Progress)
        runs.setdefault(lane, {})[names[i]] = RunReport(
            confirmed=p.confirmed,
            client_confirmed=p.client_confirmed,
            rejected=p.rejected,
            pending=sites[names[i]].journaled - p.confirmed - sum(p.rejected.values()),
            altered=p.altered,
            possible_duplicates=p.possible_duplicates,
            state=p.state,
            last_error=p.last_error,
            results=p.results,
        )
    balanced = all(site.is_balanced() for site in sites.values()) and all(
        run.pending >= 0 for lane in runs.values() for run in lane.values()
    )
    return DeliveryReport(
        job=meta.get("job", ""),
        side=meta.get("side", ""),
        status=meta.get("status", "running"),
        balanced=balanced,
        sites=sites,
        lanes=runs,
    )
