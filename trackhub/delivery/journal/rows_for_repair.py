# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of a damaged journal page by page, and sorts them by table. `rebuild` makes a sound journal from them.

The file does not say which table a page belongs to. So the number and the types of a row's columns tell its table.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from trackhub.delivery.journal.read_damaged_pages import Cell, PageReader, Value
from trackhub.delivery.journal.tables_and_rows import Progress

__all__ = ["Batch", "Found", "Run", "Site", "collect"]

_MAX_POSITION = 1 << 53


class Batch(NamedTuple):
    """A row of ``batches`` without its frames. ``place`` is where `PageReader` finds it."""

    id: int
    site: int
    stream: int
    first_position: int
    records: int
    place: tuple[int, int]

    @property
    def end(self) -> int:
        """The position after its last record."""
        return self.first_position + self.records


@dataclass
class Site:
    """A row of ``sites``."""

    name: str
    created: float = 0.0
    first_position: int = 0
    next_position: int = 0
    received: int = 0
    duplicates: int = 0
    missing: int = 0
    explained: bytes | None = None
    counts: bytes | None = None
    counted_at: float | None = None
    session: str = ""
    number: int = 0
    last: int = 0
    ended: int = 0
    refused: bytes | None = None


@dataclass
class Run:
    """A row of ``runs``."""

    written: int
    confirmed: int
    progress: bytes


@dataclass
class Found:
    """What can be read of a journal.

    Attributes:
        meta, sites, streams, runs, batches: the rows of the tables, by their keys.
        doubted: the sites for which the receiver's counts are lost.
        names: (name, id) -> how often an index has them together.
        copied_meta, copied_sites, copied_streams: the copies of rows that the indexes have.
    """

    meta: dict[str, str] = field(default_factory=dict)
    sites: dict[int, Site] = field(default_factory=dict)
    streams: dict[int, tuple[int, str, int]] = field(default_factory=dict)
    runs: dict[tuple[str, int], Run] = field(default_factory=dict)
    batches: dict[int, Batch] = field(default_factory=dict)
    doubted: set[int] = field(default_factory=set)
    names: Counter[tuple[str, int]] = field(default_factory=Counter)
    copied_meta: dict[str, str] = field(default_factory=dict)
    copied_sites: dict[int, Site] = field(default_factory=dict)
    copied_streams: dict[int, tuple[int, str]] = field(default_factory=dict)


def collect(reader: PageReader) -> Found:
    """Read all cells, and sort them by table."""
    found = Found()
    for place in reader.places():
        cell = reader.read(*place, first_bytes=True)
        if cell is not None and not _take_batch(found, cell, place):
            whole = reader.read(*place)
            if whole is not None:
                (_take_entry if whole.rowid is None else _take_row)(found, whole)
    return found


def _take_batch(found: Found, cell: Cell, place: tuple[int, int]) -> bool:
    match cell.values:
        case [None, int(site), int(stream), int(position), int(records), bytes()] if cell.rowid is not None:
            if site > 0 and stream > 0 and records > 0 and 0 <= position < _MAX_POSITION and cell.rowid > 0:
                found.batches[cell.rowid] = Batch(cell.rowid, site, stream, position, records, place)
            return True
    return False


def _take_row(found: Found, cell: Cell) -> None:
    """Take a row of a table with ids. If an old copy of a page has an older version of the row, keep the newer one."""
    assert cell.rowid is not None
    match cell.values:
        case [str(key), str(value)]:
            found.meta[key] = value
        case [None, int(site), str(name), int(next_seq)]:
            known = found.streams.get(cell.rowid)
            if known is None or known[2] < next_seq:
                found.streams[cell.rowid] = (site, name, next_seq)
        case [None, str(), *_] if len(cell.values) == len(Site.__dataclass_fields__) + 1:
            if (site_row := _site(cell.values[1:])) is not None:
                known_site = found.sites.get(cell.rowid)
                if known_site is None or known_site.next_position <= site_row.next_position:
                    found.sites[cell.rowid] = site_row


def _site(values: list[Value]) -> Site | None:
    """Return a row of ``sites``, without invalid counts. None if these values are not such a row."""
    try:
        site = msgspec.convert(dict(zip(Site.__dataclass_fields__, values, strict=True)), Site)
    except msgspec.ValidationError:
        return None
    if not 0 <= site.first_position < _MAX_POSITION:
        return None
    if site.explained is not None and not _decodes(site.explained, dict[str, int]):
        site.explained = None
    if site.refused is not None and not _decodes(site.refused, dict[str, int]):
        site.refused = None
    return site


def _take_entry(found: Found, cell: Cell) -> None:
    """Take an entry of an index, or a row of a table without ids."""
    match cell.values:
        case [str(key), str(value), int()]:
            found.copied_meta[key] = value
        case [str(name), int(i)]:
            found.names[name, i] += 1
        case [int(site), str(name), int(i)]:
            found.copied_streams[i] = (site, name)
        case [str(name), bytes() | None as counts, int(last), int(ended), int(i)]:
            found.names[name, i] += 1
            found.copied_sites[i] = Site(name, counts=counts, last=last, ended=ended)
        case [str(lane), int(site), int(written), int(confirmed), bytes(progress)]:
            if not _decodes(progress, Progress):
                confirmed, progress = 0, msgspec.msgpack.encode(Progress())
            run = Run(written, confirmed, progress)
            known = found.runs.setdefault((lane, site), run)
            if run.confirmed < known.confirmed:  # one is from an old copy of a page. Delivering twice loses no record
                known.confirmed, known.progress = run.confirmed, run.progress
            known.written = max(known.written, run.written)


def _decodes(data: bytes, kind: type) -> bool:
    try:
        msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True
