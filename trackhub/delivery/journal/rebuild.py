# SPDX-License-Identifier: Apache-2.0
"""Makes a sound journal of what can still be read of a damaged one, table by table. `repair` calls it.

A range of records that cannot be read becomes a placeholder row without frames. So all other records keep their
positions, by which backends recognise them, and every lane counts the lost records as ``damaged``. What else is lost is
worked out from the other tables where that is possible; otherwise the report says that it is not known.
"""

from __future__ import annotations

import logging
import sqlite3
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import msgspec

from trackhub.delivery.journal.pages import Cell, PageReader, Value
from trackhub.delivery.journal.schema import JSON_FACTS, REPAIRED_SITES, SCHEMA, Progress
from trackhub.delivery.wire import SiteCounts
from trackhub.errors import JournalError
from trackhub.framing import CorruptFrameError, decode_body, decode_head, scan_frames
from trackhub.records import Gap, Kind

__all__ = ["rebuild"]

_AFTER_ALL = 1 << 62
_MAX_POSITION = 1 << 53
_log = logging.getLogger(__name__)


class _Batch(NamedTuple):
    """A row of ``batches`` without its frames. ``place`` is where `PageReader` finds it."""

    id: int
    site: int
    stream: int
    first_position: int
    records: int
    place: tuple[int, int]

    @property
    def end(self) -> int:
        return self.first_position + self.records


class _Lost(NamedTuple):
    """Positions of a site that no readable row has, and the ids of the rows between which they were."""

    site: int
    first_position: int
    records: int
    after: int
    before: int


@dataclass
class _Site:
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


@dataclass
class _Run:
    """A row of ``runs``."""

    written: int
    confirmed: int
    progress: bytes


@dataclass
class _Found:
    """What can be read of a journal.

    Attributes:
        meta, sites, streams, runs, batches: the rows of the tables, by their keys.
        doubted: the sites of which the receiver's counts are lost.
        names: how often each name with this id is in an index.
        copied_meta, copied_sites, copied_streams: what the indexes hold of the tables.
    """

    meta: dict[str, str] = field(default_factory=dict)
    sites: dict[int, _Site] = field(default_factory=dict)
    streams: dict[int, tuple[int, str, int]] = field(default_factory=dict)
    runs: dict[tuple[str, int], _Run] = field(default_factory=dict)
    batches: dict[int, _Batch] = field(default_factory=dict)
    doubted: set[int] = field(default_factory=set)
    names: Counter[tuple[str, int]] = field(default_factory=Counter)
    copied_meta: dict[str, str] = field(default_factory=dict)
    copied_sites: dict[int, _Site] = field(default_factory=dict)
    copied_streams: dict[int, tuple[int, str]] = field(default_factory=dict)


def rebuild(path: Path, new_path: Path, *, runs_are_whole: bool) -> None:
    """Write a new journal with what can be read of a damaged one. Reads every page of it once or twice.

    Args:
        path: the damaged journal.
        new_path: the file to write; what is there is replaced.
        runs_are_whole: SQLite can read the table ``runs``. If not, a missing row may have been there, and its lane may
            have delivered.

    Raises:
        JournalError: nothing in it can be read, or not which job it belongs to.
        OSError: the damaged file cannot be opened, or the old ``new_path`` not removed.
        sqlite3.Error: the new file cannot be written.
    """
    new_path.unlink(missing_ok=True)
    with PageReader(path) as reader:
        found = _collect(reader)
        _complete_facts(found, path)
        by_site = _group(found, reader)
        _complete_streams(found, reader, by_site)
        _complete_sites(found, reader, by_site)
        _complete_runs(found, runs_are_whole=runs_are_whole)
        db = sqlite3.connect(new_path, isolation_level=None)
        try:
            db.executescript(SCHEMA)
            db.execute("BEGIN")
            _write_tables(db, found)
            _write_batches(db, found, reader, by_site, path)
            db.execute("COMMIT")
        finally:
            db.close()


def _collect(reader: PageReader) -> _Found:
    """Read all cells, and sort them by what they look like."""
    found = _Found()
    for place in reader.places():
        cell = reader.read(*place, first_bytes=True)
        if cell is not None and not _take_batch(found, cell, place):
            whole = reader.read(*place)
            if whole is not None:
                (_take_entry if whole.rowid is None else _take_row)(found, whole)
    return found


def _take_batch(found: _Found, cell: Cell, place: tuple[int, int]) -> bool:
    match cell.values:
        case [None, int(site), int(stream), int(position), int(records), bytes()] if cell.rowid is not None:
            if site > 0 and stream > 0 and records > 0 and 0 <= position < _MAX_POSITION and cell.rowid > 0:
                found.batches[cell.rowid] = _Batch(cell.rowid, site, stream, position, records, place)
            return True
    return False


def _take_row(found: _Found, cell: Cell) -> None:
    """Take a row of a table with ids. Where an old copy of a page gives a second version, the later one stays."""
    assert cell.rowid is not None
    match cell.values:
        case [str(key), str(value)]:
            found.meta[key] = value
        case [None, int(site), str(name), int(next_seq)]:
            known = found.streams.get(cell.rowid)
            if known is None or known[2] < next_seq:
                found.streams[cell.rowid] = (site, name, next_seq)
        case [None, str(), *_] if len(cell.values) == len(_Site.__dataclass_fields__) + 1:
            if (site_row := _site(cell.values[1:])) is not None:
                known_site = found.sites.get(cell.rowid)
                if known_site is None or known_site.next_position <= site_row.next_position:
                    found.sites[cell.rowid] = site_row


def _site(values: list[Value]) -> _Site | None:
    """Return a row of ``sites``, without the counts that make no sense. None if it is none."""
    try:
        site = msgspec.convert(dict(zip(_Site.__dataclass_fields__, values, strict=True)), _Site)
    except msgspec.ValidationError:
        return None
    if not 0 <= site.first_position < _MAX_POSITION:
        return None
    if site.explained is not None and not _decodes(site.explained, dict[str, int]):
        site.explained = None
    return site


def _take_entry(found: _Found, cell: Cell) -> None:
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
            found.copied_sites[i] = _Site(name, counts=counts, last=last, ended=ended)
        case [str(lane), int(site), int(written), int(confirmed), bytes(progress)]:
            if not _decodes(progress, Progress):
                confirmed, progress = 0, msgspec.msgpack.encode(Progress())
            run = _Run(written, confirmed, progress)
            known = found.runs.setdefault((lane, site), run)
            if run.confirmed < known.confirmed:  # of an old copy of a page: rather deliver twice than not at all
                known.confirmed, known.progress = run.confirmed, run.progress
            known.written = max(known.written, run.written)


def _decodes(data: bytes, kind: type) -> bool:
    try:
        msgspec.msgpack.decode(data, type=kind)
    except msgspec.DecodeError:
        return False
    return True


def _adds_up(counts: bytes | None) -> bool:
    """Return whether these can be the counts of a site, or it has sent none."""
    try:
        return counts is None or msgspec.msgpack.decode(counts, type=SiteCounts).adds_up()
    except msgspec.DecodeError:
        return False


def _is_fact(key: str, value: str | None) -> bool:
    """Return whether this can be what ``meta`` says of the job."""
    if value is None or key not in JSON_FACTS:
        return value is not None
    try:
        msgspec.json.decode(value, type=JSON_FACTS[key])
    except msgspec.DecodeError:
        return False
    return True


def _complete_facts(found: _Found, path: Path) -> None:
    for key, value in found.copied_meta.items():
        if not _is_fact(key, found.meta.get(key)):
            found.meta[key] = value
    found.meta = {key: value for key, value in found.meta.items() if _is_fact(key, value)}
    if not any((found.meta, found.sites, found.streams, found.batches)):
        raise JournalError(f"the journal {path} is damaged, and nothing in it can be read")
    if missing := [key for key in ("job", "side") if key not in found.meta]:
        raise JournalError(
            f"the journal {path} is damaged, and its {' and '.join(missing)} cannot be read; nobody can say which runs "
            f"its {sum(batch.records for batch in found.batches.values())} readable records belong to"
        )


def _group(found: _Found, reader: PageReader) -> dict[int, list[_Batch]]:
    """Return the batches of each site in order, without those whose numbers contradict the others'."""
    by_site: dict[int, list[_Batch]] = defaultdict(list)
    for i in sorted(found.batches):
        batch = found.batches[i]
        site = found.sites.get(batch.site)
        if site is None or site.first_position <= batch.first_position:
            by_site[batch.site].append(batch)
    for site_id, batches in by_site.items():
        if not all(a.end == b.first_position for a, b in pairwise(batches)):
            chain = _longest_chain(batches)
            by_site[site_id] = [_fit(reader, *pair) for pair in zip_longest(chain, chain[1:])]
    return by_site


def _longest_chain(batches: list[_Batch]) -> list[_Batch]:
    """Return as many batches as possible of which each begins behind the one before it."""
    starts: list[int] = []  # of the last batch of each chain: of all chains of a length, the one that begins first
    last: list[int] = []  # the number of that batch
    before: list[int] = []
    for i, batch in enumerate(batches):
        length = bisect_left(starts, batch.first_position)
        before.append(last[length - 1] if length else -1)
        starts[length : length + 1] = [batch.first_position]
        last[length : length + 1] = [i]
    chain = []
    i = last[-1]
    while i >= 0:
        chain.append(batches[i])
        i = before[i]
    return chain[::-1]


def _fit(reader: PageReader, batch: _Batch, following: _Batch | None) -> _Batch:
    """Return a batch with as many records as its frames hold, and no more than fit in front of the next batch."""
    frames, records, end = _frames(reader, batch), 0, 0
    with suppress(CorruptFrameError):
        for frame in scan_frames(frames):
            records += frame.kind != Kind.GAP
            end = frame.end
    room = following.first_position - batch.first_position if following else max(records, batch.records)
    if end < len(frames) or not records:  # some frames are damaged, and hold an unknown number of records
        records = batch.records if records <= batch.records else room
    return batch._replace(records=min(records, room))


def _complete_streams(found: _Found, reader: PageReader, by_site: dict[int, list[_Batch]]) -> None:
    """Find the streams whose rows are lost by the index of their names, and where they ended by their last batch."""
    last: dict[int, _Batch] = {}
    for batches in by_site.values():
        last.update((batch.stream, batch) for batch in batches)
    for i, batch in last.items():
        if i not in found.streams:
            _, name = found.copied_streams.get(i, (0, ""))
            if not name:
                name = f"unknown-{i}"
                _log.warning("the name of stream %d of site %d is lost; it is called %s", i, batch.site, name)
            found.streams[i] = (batch.site, name, _next_seq(reader, batch))
    for i, (site, name) in found.copied_streams.items():
        found.streams.setdefault(i, (site, name, 0))  # it had gaps alone


def _next_seq(reader: PageReader, batch: _Batch) -> int:
    """Return the number of the record after the last one that can be read in a batch."""
    frames, end = _frames(reader, batch), 0
    with suppress(CorruptFrameError, msgspec.DecodeError):
        for frame in scan_frames(frames):
            body = frames[frame.body : frame.end]
            end = decode_head(body).seq + 1
            if frame.kind == Kind.GAP and isinstance(gap := decode_body(body).payload, Gap):
                end += gap.count - 1
    return end


def _complete_sites(found: _Found, reader: PageReader, by_site: dict[int, list[_Batch]]) -> None:
    """Find the sites whose rows are lost by the copy in an index, and count their records by their batches."""
    confirmed: dict[int, int] = defaultdict(int)
    for (_, i), run in found.runs.items():
        confirmed[i] = max(confirmed[i], msgspec.msgpack.decode(run.progress, type=Progress).stored_to)
    ids = {*by_site, *found.sites, *found.copied_sites, *(site for site, _, _ in found.streams.values())}
    for i in sorted(ids):
        batches = by_site.get(i, [])
        end = max(batches[-1].end if batches else 0, confirmed[i])
        if i not in found.sites:
            found.doubted.add(i)
            site = found.sites[i] = found.copied_sites.get(i) or _Site(f"unknown-{i}")
            if i not in found.copied_sites:
                _log.warning("the name of site %d is lost; it is called %s", i, site.name)
            site.created = _begin(reader, batches[0]) if batches else 0.0
            if batches and "continues" in found.meta:
                site.first_position = batches[0].first_position
            site.next_position = site.first_position
        site = found.sites[i]
        copied = found.copied_sites.get(i, site)
        if (site.counts, site.last) != (copied.counts, copied.last) or not _adds_up(site.counts):
            good = next((row for row in (site, copied) if _adds_up(row.counts)), _Site(""))
            site.counts, site.last = good.counts, good.last
            found.doubted.add(i)
        if found.names[site.name, i] == 0:  # both indexes have another one: a bit of this one has changed
            others = [name for name, j in found.names if j == i and found.names[name, j] > 1]
            site.name = others[0] if len(others) == 1 else site.name
        contradicts = site.next_position - site.first_position != site.received - site.duplicates
        if contradicts or end > site.next_position:
            # A changed bit; or the row is older than the last batch, since a newer version of its page is lost.
            site.next_position, site.received = end, site.duplicates + end - site.first_position
            if contradicts:
                found.doubted.add(i)


def _begin(reader: PageReader, batch: _Batch) -> float:
    """Return the time of the first record of a batch."""
    frames = _frames(reader, batch)
    with suppress(CorruptFrameError, msgspec.DecodeError):
        for frame in scan_frames(frames):
            return decode_head(frames[frame.body : frame.end]).time
    return 0.0


def _frames(reader: PageReader, batch: _Batch) -> bytes:
    """Return as much of a batch's frames as can be read."""
    cell = reader.read(*batch.place)
    frames = cell.values[-1] if cell is not None else b""
    return frames if isinstance(frames, bytes) else b""


def _complete_runs(found: _Found, *, runs_are_whole: bool) -> None:
    """Take it that a lane whose cursor is lost has handed over everything, and that nothing of it is confirmed.

    It then delivers everything again, and counts possible duplicates where the backend does not recognise records.
    """
    if runs_are_whole:
        return
    backends = msgspec.json.decode(found.meta.get("backends", "{}"), type=dict[str, object])
    last = max(found.batches, default=0)
    for lane in {*backends, *(lane for lane, _ in found.runs)}:
        for site in found.sites:
            found.runs.setdefault((lane, site), _Run(last, 0, msgspec.msgpack.encode(Progress())))


def _write_tables(db: sqlite3.Connection, found: _Found) -> None:
    doubted = {found.sites[i].name for i in found.doubted}
    doubted |= set(msgspec.json.decode(found.meta.get(REPAIRED_SITES, "[]"), type=list[str]))
    if doubted:
        found.meta[REPAIRED_SITES] = msgspec.json.encode(sorted(doubted)).decode()
    db.executemany("INSERT INTO meta VALUES (?, ?)", found.meta.items())
    columns = ", ".join(_Site.__dataclass_fields__)
    marks = ", ".join("?" * (1 + len(_Site.__dataclass_fields__)))
    db.executemany(
        f"INSERT INTO sites (id, {columns}) VALUES ({marks})",
        [(i, *vars(site).values()) for i, site in found.sites.items()],
    )
    streams = [(i, *stream) for i, stream in found.streams.items()]
    db.executemany("INSERT OR IGNORE INTO streams (id, site, name, next_seq) VALUES (?, ?, ?, ?)", streams)
    runs = [(lane, i, run.written, run.confirmed, run.progress) for (lane, i), run in found.runs.items()]
    db.executemany("INSERT INTO runs (lane, site, written, confirmed, progress) VALUES (?, ?, ?, ?, ?)", runs)


def _write_batches(
    db: sqlite3.Connection, found: _Found, reader: PageReader, by_site: dict[int, list[_Batch]], path: Path
) -> None:
    """Write the readable rows, and placeholder rows where others were."""
    insert = "INSERT INTO batches (id, site, stream, first_position, records, frames) VALUES (?, ?, ?, ?, ?, ?)"
    kept = sorted(batch for batches in by_site.values() for batch in batches)
    for batch in kept:
        db.execute(insert, (*batch[:5], _frames(reader, batch)))
    taken = {batch.id for batch in kept}
    for lost, i in _with_ids(_lost(found.sites, by_site), taken):
        stream = min((s for s, (site, _, _) in found.streams.items() if site == lost.site), default=0)
        if not stream:
            query = "INSERT INTO streams (site, name, next_seq) VALUES (?, ?, 0)"
            stream = db.execute(query, (lost.site, f"unknown-{lost.site}")).lastrowid or 0
            found.streams[stream] = (lost.site, f"unknown-{lost.site}", 0)
        db.execute(insert, (i, lost.site, stream, lost.first_position, lost.records, b""))
        _log.warning(
            "%s: records %d to %d of site %s cannot be read (after row %d); they are counted as damaged",
            path, lost.first_position, lost.first_position + lost.records - 1, found.sites[lost.site].name, lost.after,
        )  # fmt: skip


def _lost(sites: dict[int, _Site], by_site: dict[int, list[_Batch]]) -> Iterator[_Lost]:
    """Yield the ranges of positions that no readable row has."""
    for i, site in sites.items():
        position, last = site.first_position, 0
        for batch in by_site.get(i, []):
            if batch.first_position > position:
                yield _Lost(i, position, batch.first_position - position, last, batch.id)
            position, last = batch.end, batch.id
        if position < site.next_position:
            yield _Lost(i, position, site.next_position - position, last, _AFTER_ALL)


def _with_ids(ranges: Iterator[_Lost], taken: set[int]) -> Iterator[tuple[_Lost, int]]:
    """Give each lost range the id of a row that was lost between its neighbours, so that rows stay in order."""
    for lost in sorted(ranges, key=lambda lost: (lost.before, lost.after)):
        i = lost.after + 1
        while i in taken:
            i += 1
        taken.add(i)
        yield lost, i
