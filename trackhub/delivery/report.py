# SPDX-License-Identifier: Apache-2.0
"""The delivery report: what became of every record, by site, lane and reason, and whether the sums add up."""

from __future__ import annotations

from pathlib import Path

import msgspec

from trackhub.delivery.wire import SiteLedger
from trackhub.spi import Results

__all__ = ["DeliveryReport", "RunReport", "SiteReport", "format_report", "read_report", "write_report"]


class SiteReport(msgspec.Struct, kw_only=True):
    """One site's records: what the site counted (`wire.SiteLedger`), and what the receiver counted.

    Attributes:
        site: the site's own count, as of its last message; None if it never sent one.
        received: records that arrived, the repeated ones included.
        duplicates: of these, the ones that the journal had already.
        journaled: records in the journal.
        missing: records that a stream skipped without giving a reason; 0 unless something is wrong.
        explained: records that a stream said it does not have, by reason.
        said_bye: whether the site finished its delivery.
    """

    site: SiteLedger | None = None
    received: int = 0
    duplicates: int = 0
    journaled: int = 0
    missing: int = 0
    explained: dict[str, int] = {}
    said_bye: bool = False

    def is_balanced(self) -> bool:
        """Return whether the counts of this site add up."""
        return self.received == self.duplicates + self.journaled and (self.site is None or self.site.is_balanced())


class RunReport(msgspec.Struct, kw_only=True):
    """One site's records in one lane; journaled records are confirmed, rejected or pending.

    Attributes:
        confirmed: durable at the backend.
        client_confirmed: the part of ``confirmed`` that only the SDK vouches for; the store could not be asked.
        rejected: never to be stored, by reason.
        pending: in the journal, for ``trackhub replay``.
        altered: confirmed, but not as logged, by reason (``nonfinite_removed``, ``key_shortened``, ...).
        possible_duplicates: confirmed, but perhaps stored twice, since the backend cannot tell.
        state: ``open``, ``finished``, ``unfinished`` (the deadline passed) or ``stopped`` (it cannot be opened).
        last_error: the last error that the backend raised, empty if none.
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
    results: Results | None = None


class DeliveryReport(msgspec.Struct, kw_only=True):
    """What became of a job's records at one receiver.

    Attributes:
        job, side: as in `trackhub.run`.
        status: how the job ended: ``finished``, ``failed``, ``aborted``, or ``running``.
        balanced: whether all counts add up; False means a defect, in trackhub or on the disk.
        sites: by site.
        lanes: by backend, then by site.
    """

    job: str
    side: str
    status: str
    balanced: bool
    sites: dict[str, SiteReport]
    lanes: dict[str, dict[str, RunReport]]

    def undelivered(self) -> int:
        """Return how many records are anywhere on their way: spooled at a site, or pending in a lane."""
        return self.pending() + sum(s.site.spooled for s in self.sites.values() if s.site is not None)

    def pending(self) -> int:
        """Return how many records are in the journal and have no outcome yet, those of all lanes together."""
        return sum(run.pending for lane in self.lanes.values() for run in lane.values())

    def lost(self) -> int:
        """Return how many records have an outcome other than delivery: dropped, refused, rejected or missing."""
        at_sites = sum(
            sum(s.site.dropped.values()) + sum(s.site.refused.values()) for s in self.sites.values() if s.site
        )
        rejected = sum(sum(run.rejected.values()) for lane in self.lanes.values() for run in lane.values())
        return at_sites + rejected + sum(s.missing for s in self.sites.values())


def write_report(path: Path, report: DeliveryReport) -> None:
    """Store the report as JSON, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_suffix(".new")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    partial.replace(path)


def read_report(path: Path) -> DeliveryReport:
    """Return the report in this file.

    Raises:
        OSError: it cannot be read.
        msgspec.DecodeError: it is no delivery report.
    """
    return msgspec.json.decode(path.read_bytes(), type=DeliveryReport)


def format_report(report: DeliveryReport) -> str:
    """Return the report as a table for the end of the log."""
    rows: list[tuple[str, ...]] = [
        ("site", "backend", "logged", "journaled", "confirmed", "rejected", "pending", "not delivered, and why")
    ]
    for name, site in sorted(report.sites.items()):
        logged = str(site.site.logged) if site.site else "?"
        at_site = _reasons(site)
        lanes = [(lane, runs[name]) for lane, runs in sorted(report.lanes.items()) if name in runs]
        for lane, run in lanes:
            why = [*at_site, *(f"{lane} {reason}: {n}" for reason, n in run.rejected.items())]
            if run.last_error and (run.pending or run.state in ("stopped", "unfinished")):
                why.append(run.last_error.splitlines()[0][:120])
            counts = (run.confirmed, sum(run.rejected.values()), run.pending)
            rows.append((name, lane, logged, str(site.journaled), *map(str, counts), "; ".join(why) or "-"))
        if not lanes:
            rows.append((name, "-", logged, str(site.journaled), "-", "-", "-", "; ".join(at_site) or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths[:-1]) + "  " + "-" * 22)
    head = f"trackhub delivery report: job {report.job}, {report.side} side, {report.status}"
    if not report.balanced:
        head += "; THE COUNTS DO NOT ADD UP, please report this"
    return "\n".join([head, *lines])


def _reasons(site: SiteReport) -> list[str]:
    parts = []
    if site.site is not None:
        parts += [f"dropped at the site, {reason}: {n}" for reason, n in site.site.dropped.items()]
        parts += [f"refused by the receiver, {reason}: {n}" for reason, n in site.site.refused.items()]
        if site.site.withheld:
            parts.append(f"withheld by policy: {site.site.withheld}")
        if site.site.spooled:
            parts.append(f"still spooled at the site: {site.site.spooled}")
    if site.missing:
        parts.append(f"missing in the stream: {site.missing}")
    if not site.said_bye:
        parts.append("the site did not finish its delivery")
    return parts
