# SPDX-License-Identifier: Apache-2.0
"""What the journal's tables hold: the schema, and the rows that a lane reads and stores.

`Journal` fills the tables. A lane reads the records of a row with `stored_records`, which also reads damaged rows as
far as possible. The lane's own state is a `Progress`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from trackhub.conceal import conceal
from trackhub.framing import CorruptFrameError, Frame, scan_frames
from trackhub.job_and_run_info import JobInfo
from trackhub.plain_values_to_structs import prepare
from trackhub.records import Kind
from trackhub.spi import Entry, Results

__all__ = [
    "EXPECTED_SITES",
    "FEDERATION_OPTIONS",
    "FEDERATION_ROW",
    "JSON_FACTS",
    "PRUNED",
    "REPAIRED_SITES",
    "SCHEMA",
    "SILENCE_S",
    "SITES_WITHOUT_SENDER",
    "Progress",
    "Row",
    "RunState",
    "Shift",
    "Stored",
    "stored_records",
]

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS meta_copy ON meta (key, value);
CREATE TABLE IF NOT EXISTS sites (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, created REAL NOT NULL,
    first_position INTEGER NOT NULL, next_position INTEGER NOT NULL, received INTEGER NOT NULL DEFAULT 0,
    duplicates INTEGER NOT NULL DEFAULT 0, missing INTEGER NOT NULL DEFAULT 0,
    explained BLOB, counts BLOB, counted_at REAL, session TEXT NOT NULL DEFAULT '', number INTEGER NOT NULL DEFAULT 0,
    last INTEGER NOT NULL DEFAULT 0, ended INTEGER NOT NULL DEFAULT 0, refused BLOB);
CREATE INDEX IF NOT EXISTS sites_copy ON sites (name, counts, last, ended);
CREATE TABLE IF NOT EXISTS streams (
    id INTEGER PRIMARY KEY, site INTEGER NOT NULL, name TEXT NOT NULL, next_seq INTEGER NOT NULL,
    UNIQUE (site, name));
CREATE TABLE IF NOT EXISTS batches (
    id INTEGER PRIMARY KEY, site INTEGER NOT NULL, stream INTEGER NOT NULL,
    first_position INTEGER NOT NULL, records INTEGER NOT NULL, frames BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS batches_of_site ON batches (site, id);
CREATE TABLE IF NOT EXISTS runs (
    lane TEXT NOT NULL, site INTEGER NOT NULL, written INTEGER NOT NULL DEFAULT 0,
    confirmed INTEGER NOT NULL DEFAULT 0, progress BLOB NOT NULL, PRIMARY KEY (lane, site)) WITHOUT ROWID;
"""
"""``sites.counts`` are the site's own counts, and ``last`` is 1 if they came with its final message. ``session`` and
``number`` tell which of two counts are older. ``ended`` is 0 until the site says how its training ended. Then it is 1,
or 2 if the training failed. ``explained`` and ``refused`` are counts by reason, encoded as msgpack. ``received`` counts
no refused records. ``runs.written`` and ``runs.confirmed`` are ids of batches.

The indexes ``meta_copy`` and ``sites_copy`` hold copies of values that nothing else could restore, on other pages of
the file. `repair` reads them if the page of a table is damaged. They have no column that changes with every batch."""

EXPECTED_SITES = "expected_sites"
"""The key in ``meta`` of the sites that should send something: a JSON list of names."""

SITES_WITHOUT_SENDER = "sites_without_sender"
"""The key in ``meta`` of the sites that take part in the job and have no sender: a JSON list of names."""

REPAIRED_SITES = "repaired_sites"
"""The key in ``meta`` of the sites whose counts a repair could not read: a JSON list of names."""

PRUNED = "pruned"
"""The key in ``meta`` of the records that were removed after their delivery: a JSON object, site -> number."""

SILENCE_S = "silence_s"
"""The key in ``meta`` of ``limits.silence_s``: the counts of a site that was silent for longer are old."""

FEDERATION_OPTIONS = "federation"
"""The key in ``meta`` of what the federation run holds, as JSON. A job without one lacks it."""

FEDERATION_ROW = "federation_row"
"""The key in ``meta`` of a row's id. The stored statistics of the federation run include the rows up to this one."""

JSON_FACTS: dict[str, Any] = {
    "job_info": JobInfo,
    "backends": dict[str, dict[str, Any]],
    EXPECTED_SITES: list[str],
    REPAIRED_SITES: list[str],
    PRUNED: dict[str, int],
    FEDERATION_OPTIONS: dict[str, Any],
    SITES_WITHOUT_SENDER: list[str],
}
"""The facts in ``meta`` that are JSON, and the type of each."""

_GAP = int(Kind.GAP)


class Row(NamedTuple):
    """A batch as a lane reads it. Its records have the positions from ``first_position`` on."""

    id: int
    stream: str
    first_position: int
    records: int
    frames: bytes


class Shift(msgspec.Struct, frozen=True, array_like=True):
    """How positions shift after the journal lost records that a resumable backend holds.

    Attributes:
        after: the last row that the journal had handed over when the loss was noticed. Later rows are shifted.
        by: how many records were lost. At the backend, later records have positions that are higher by this number.
        doubted_to: a position at the backend. Of the later records, the backend may hold those before this position
            twice.
    """

    after: int
    by: int
    doubted_to: int


class Progress(msgspec.Struct, kw_only=True):
    """What a lane counted for one run up to its confirmed cursor, and what it must remember to go on from there.

    Attributes:
        confirmed, client_confirmed, rejected, altered, possible_duplicates, state, last_error, recovered, blocked_by,
            results: as in `report.RunReport`.
        memory: the adaptation's state at the confirmed cursor.
        stored_to: the position, at the backend, after the last confirmed record.
        aside: the entries before the confirmed cursor that are neither stored nor rejected yet.
        rejected_at: position -> reason, for the records after the confirmed cursor that a resumable backend rejected.
        shifts: the rows after which the backend's positions differ from the journal's.
    """

    confirmed: int = 0
    client_confirmed: int = 0
    rejected: dict[str, int] = {}
    altered: dict[str, int] = {}
    possible_duplicates: int = 0
    state: str = "open"
    last_error: str = ""
    recovered: bool = False
    blocked_by: str = ""
    results: Results | None = None
    memory: bytes = b""
    stored_to: int = 0
    aside: list[Entry] = []
    rejected_at: dict[int, str] = {}
    shifts: list[Shift] = []

    def lost(self) -> int:
        """Return how many records the backend holds that the journal lost."""
        return sum(shift.by for shift in self.shifts)

    def concealed(self) -> Progress:
        """Return a copy without secrets. An error of a backend, or the address of its results, may contain one."""
        results = self.results
        if results is not None:
            shown = (results.url, results.path, results.command)
            results = Results(*(None if text is None else conceal(text) for text in shown))
        return msgspec.structs.replace(self, last_error=conceal(self.last_error), results=results)


prepare(Progress, JobInfo)


class RunState(NamedTuple):
    """How far a lane got with a run: its two cursors, which are ids of batches, and its progress."""

    written: int
    confirmed: int
    progress: Progress


Stored = tuple[int, int, bytes]
"""One record of a row, not decoded yet: position, kind, body. A plain tuple, since there is one for every record."""


def stored_records(row: Row) -> Iterator[Stored]:
    """Yield the records of a row that can be read, each with its position.

    A damaged row yields fewer than ``row.records``. The records behind the damage are counted from the row's end, so
    that each keeps the position under which a backend may know it already.
    """
    frames, position, end = row.frames, row.first_position, 0
    with suppress(CorruptFrameError):
        for kind, _, body, end in scan_frames(frames):
            if kind != _GAP:
                yield position, kind, frames[body:end]
                position += 1
    missing = row.first_position + row.records - position
    if missing > 0:
        # No more than are missing: a page that was written to a wrong place may repeat some.
        rest = [frame for frame in _behind_damage(frames, end) if frame.kind != _GAP][-missing:]
        position += missing - len(rest)
        for i, frame in enumerate(rest):
            yield position + i, frame.kind, frames[frame.body : frame.end]


def _behind_damage(data: bytes, offset: int) -> Iterator[Frame]:
    """Yield the sound frames at or after this offset. Nothing says where they start, so try every offset."""
    view = memoryview(data)
    while offset < len(view):
        end = offset
        with suppress(CorruptFrameError):
            for frame in scan_frames(view, offset):
                yield frame
                end = frame.end
        offset = max(end, offset + 1)
