# SPDX-License-Identifier: Apache-2.0
"""Makes a new, sound journal from the readable rows of a damaged one, table by table. `repair` calls it.

A range of records that cannot be read becomes a placeholder row without frames. So all other records keep the positions
by which backends recognise them. Every lane counts the lost records as ``damaged``. Other lost values are worked out
from the tables that can be read. Where that is not possible, the report says that they are not known.
"""

from __future__ import annotations

import logging
import sqlite3
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import msgspec

from trackhub.delivery.journal.read_damaged_pages import PageReader
from trackhub.delivery.journal.rows_for_repair import Batch, Found, Run, Site, collect
from trackhub.delivery.journal.tables_and_rows import JSON_FACTS, REPAIRED_SITES, SCHEMA, Progress
from trackhub.delivery.wire import SiteCounts
from trackhub.errors import JournalError
from trackhub.framing import CorruptFrameError, decode_body, decode_head, scan_frames
from trackhub.records import Gap, Kind

__all__ = ["rebuild"]

_AFTER_ALL = 1 << 62
_log = logging.getLogger(__name__)


class _Lost(NamedTuple):
    """A range of a site's positions that no readable row has, and the ids of the rows before and after it."""

    site: int
    first_position: int
    records: int
    after: int
    before: int


def rebuild(path: Path, new_path: Path, *, runs_are_whole: bool) -> None:
    """Write a new journal with everything that can be read in a damaged one. Reads each page once or twice.

    Args:
        path: the damaged journal.
        new_path: the file to write. An existing file is replaced.
        runs_are_whole: True if SQLite can read the table ``runs``. If not, a lane may have delivered although its row
            is missing.

    Raises:
        JournalError: nothing in it can be read, or it does not say which job it belongs to.
        OSError: the damaged file cannot be opened, or an existing ``new_path`` cannot be removed.
        sqlite3.Error: the new file cannot be written.
    """
    new_path.unlink(missing_ok=True)
    with PageReader(path) as reader:
        found = collect(reader)
        _complete_facts(found, path)
        _correct_ids(found)
        by_site = _group(found, reader)
        _complete_streams(found, reader, by_site)
        _complete_sites(found, reader, by_site)
        _complete_runs(found, runs_are_whole=runs_are_whole)
        _make_unique(found)
        db = sqlite3.connect(new_path, isolation_level=None)
        try:
            db.executescript(SCHEMA)
            db.execute("BEGIN")
            _write_tables(db, found)
            _write_batches(db, found, reader, by_site, path)
            _write_runs(db, found)
            db.execute("COMMIT")
        finally:
            db.close()


def _adds_up(counts: bytes | None) -> bool:
    """Return whether these counts of a site are valid. None is valid, too, since a site may have sent no counts."""
    try:
        return counts is None or msgspec.msgpack.decode(counts, type=SiteCounts).adds_up()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


def _is_fact(key: str, value: str | None) -> bool:
    """Return whether this is a valid fact of the table ``meta``."""
    if value is None or key not in JSON_FACTS:
        return value is not None
    try:
        msgspec.json.decode(value, type=JSON_FACTS[key])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _complete_facts(found: Found, path: Path) -> None:
    for key, value in found.copied_meta.items():
        if not _is_fact(key, found.meta.get(key)):
            found.meta[key] = value
    found.meta = {key: value for key, value in found.meta.items() if _is_fact(key, value)}
    if not any((found.meta, found.sites, found.streams, found.batches)):
        raise JournalError(f"the journal {path} is damaged, and nothing in it can be read")
    if missing := [key for key in ("job", "side") if key not in found.meta]:
        raise JournalError(
            f"the journal {path} is damaged, and its {' and '.join(missing)} cannot be read; so the runs of its "
            f"{sum(batch.records for batch in found.batches.values())} readable records are not known"
        )


def _correct_ids(found: Found) -> None:
    """Correct the id of a site or stream if a bit of it has changed: the indexes have the same name with another id."""
    for i, site in list(found.sites.items()):
        others = {j for (name, j), n in found.names.items() if n and name == site.name and j not in found.sites}
        if not found.names[site.name, i] and len(others) == 1:
            found.sites[others.pop()] = found.sites.pop(i)
    ids = {copied: i for i, copied in found.copied_streams.items()}
    for i, (site_id, stream, next_seq) in list(found.streams.items()):
        other = ids.get((site_id, stream), i)
        if i not in found.copied_streams and other not in found.streams:
            del found.streams[i]
            found.streams[other] = (site_id, stream, next_seq)


def _group(found: Found, reader: PageReader) -> dict[int, list[Batch]]:
    """Return the batches of each site in order. A batch whose numbers contradict the other batches is left out."""
    by_site: dict[int, list[Batch]] = defaultdict(list)
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


def _longest_chain(batches: list[Batch]) -> list[Batch]:
    """Return the longest list of batches in which each batch begins after the one before it."""
    # The usual algorithm for a longest rising subsequence. It keeps one chain for each length: the chain whose last
    # batch starts lowest. `starts` has the first position of that batch, and `last` its index in `batches`.
    starts: list[int] = []
    last: list[int] = []
    before: list[int] = []  # for each batch, the index of the batch before it in its chain
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


def _fit(reader: PageReader, batch: Batch, following: Batch | None) -> Batch:
    """Return a batch with as many records as its frames hold, and no more than fit in front of the next batch."""
    frames, records, end = _frames(reader, batch), 0, 0
    with suppress(CorruptFrameError):
        for frame in scan_frames(frames):
            records += frame.kind != Kind.GAP
            end = frame.end
    room = following.first_position - batch.first_position if following else max(records, batch.records)
    if end < len(frames) or not records:  # some frames are damaged, and nobody knows how many records they hold
        records = batch.records if records <= batch.records else room
    return batch._replace(records=min(records, room))


def _complete_streams(found: Found, reader: PageReader, by_site: dict[int, list[Batch]]) -> None:
    """Restore lost rows of ``streams``. An index has the name of a stream. The stream's last batch shows its end."""
    last: dict[int, Batch] = {}
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
        found.streams.setdefault(i, (site, name, 0))  # a stream without batches: it had only gaps


def _next_seq(reader: PageReader, batch: Batch) -> int:
    """Return the number of the record after the last one that can be read in a batch."""
    frames, end = _frames(reader, batch), 0
    with suppress(CorruptFrameError, msgspec.DecodeError, UnicodeDecodeError):
        for frame in scan_frames(frames):
            body = frames[frame.body : frame.end]
            end = decode_head(body).seq + 1
            if frame.kind == Kind.GAP and isinstance(gap := decode_body(body).payload, Gap):
                end += gap.count - 1
    return end


def _complete_sites(found: Found, reader: PageReader, by_site: dict[int, list[Batch]]) -> None:
    """Restore lost rows of ``sites``. An index has a copy, and the batches show how many records a site has."""
    confirmed: dict[int, int] = defaultdict(int)
    for (_, i), run in found.runs.items():
        progress = msgspec.msgpack.decode(run.progress, type=Progress)
        confirmed[i] = max(confirmed[i], progress.stored_to - progress.lost())
    ids = {*by_site, *found.sites, *found.copied_sites, *(site for site, _, _ in found.streams.values())}
    for i in sorted(ids):
        batches = by_site.get(i, [])
        end = max(batches[-1].end if batches else 0, confirmed[i])
        if i not in found.sites:
            found.doubted.add(i)
            site = found.sites[i] = found.copied_sites.get(i) or Site(f"unknown-{i}")
            if i not in found.copied_sites:
                _log.warning("the name of site %d is lost; it is called %s", i, site.name)
            site.created = _time_of_first_record(reader, batches[0]) if batches else 0.0
            if batches and "continues" in found.meta:
                site.first_position = batches[0].first_position
            site.next_position = site.first_position
        site = found.sites[i]
        copied = found.copied_sites.get(i, site)
        if (site.counts, site.last) != (copied.counts, copied.last) or not _adds_up(site.counts):
            good = next((row for row in (site, copied) if _adds_up(row.counts)), Site(""))
            site.counts, site.last = good.counts, good.last
            found.doubted.add(i)
        if found.names[site.name, i] == 0:  # both indexes have another name, so a bit of this name has changed
            others = [name for name, j in found.names if j == i and found.names[name, j] > 1]
            site.name = others[0] if len(others) == 1 else site.name
        contradicts = site.next_position - site.first_position != site.received - site.duplicates
        if contradicts or end > site.next_position:
            # Either a bit has changed, or the row is older than the last batch, since the newer version of its page is
            # lost.
            site.next_position, site.received = end, site.duplicates + end - site.first_position
            if contradicts:
                found.doubted.add(i)


def _time_of_first_record(reader: PageReader, batch: Batch) -> float:
    """Return the time of a batch's first record in unix seconds; 0 if it cannot be read."""
    frames = _frames(reader, batch)
    with suppress(CorruptFrameError, msgspec.DecodeError, UnicodeDecodeError):
        for frame in scan_frames(frames):
            return decode_head(frames[frame.body : frame.end]).time
    return 0.0


def _cut(frames: bytes, records: int) -> bytes:
    """Keep only the first ``records`` records. A page that was written to a wrong place may repeat some."""
    seen = 0
    with suppress(CorruptFrameError):
        for frame in scan_frames(frames):
            seen += frame.kind != Kind.GAP
            if seen > records:
                return frames[: frame.start]
    return frames


def _frames(reader: PageReader, batch: Batch) -> bytes:
    """Return the readable part of a batch's frames."""
    cell = reader.read(*batch.place)
    frames = cell.values[-1] if cell is not None else b""
    return frames if isinstance(frames, bytes) else b""


def _complete_runs(found: Found, *, runs_are_whole: bool) -> None:
    """Restore lost cursors of lanes. Assume that the lane has handed over everything, and that nothing is confirmed.

    The lane then delivers everything again. It counts possible duplicates if the backend does not recognise records.
    """
    if runs_are_whole:
        return
    backends = msgspec.json.decode(found.meta.get("backends", "{}"), type=dict[str, object])
    for lane in {*backends, *(lane for lane, _ in found.runs)}:
        for site in found.sites:
            found.runs.setdefault((lane, site), Run(_AFTER_ALL, 0, msgspec.msgpack.encode(Progress())))


def _settled_to(found: Found, site: int, run: Run) -> int:
    """Return the position up to which a lane has confirmed or rejected each record of a site."""
    progress = msgspec.msgpack.decode(run.progress, type=Progress)
    return found.sites[site].first_position + progress.confirmed + sum(progress.rejected.values())


def _write_tables(db: sqlite3.Connection, found: Found) -> None:
    doubted = {found.sites[i].name for i in found.doubted}
    doubted |= set(msgspec.json.decode(found.meta.get(REPAIRED_SITES, "[]"), type=list[str]))
    if doubted:
        found.meta[REPAIRED_SITES] = msgspec.json.encode(sorted(doubted)).decode()
    db.executemany("INSERT INTO meta VALUES (?, ?)", found.meta.items())
    columns = ", ".join(Site.__dataclass_fields__)
    marks = ", ".join("?" * (1 + len(Site.__dataclass_fields__)))
    db.executemany(
        f"INSERT INTO sites (id, {columns}) VALUES ({marks})",
        [(i, *vars(site).values()) for i, site in found.sites.items()],
    )
    streams = [(i, *stream) for i, stream in found.streams.items()]
    db.executemany("INSERT INTO streams (id, site, name, next_seq) VALUES (?, ?, ?, ?)", streams)


def _make_unique(found: Found) -> None:
    """Give each site and each stream a unique name. If two have the same name, the one with batches keeps it."""
    sites, streams = {batch.site for batch in found.batches.values()}, {b.stream for b in found.batches.values()}
    taken: set[object] = set()
    for i in sorted(found.sites, key=lambda i: i not in sites):
        if found.sites[i].name in taken:
            found.sites[i].name = f"unknown-{i}"
        taken.add(found.sites[i].name)
    for i in sorted(found.streams, key=lambda i: i not in streams):
        site, name, next_seq = found.streams[i]
        if (site, name) in taken:
            name = f"unknown-{i}"
        taken.add((site, name))
        found.streams[i] = (site, name, next_seq)


def _write_runs(db: sqlite3.Connection, found: Found) -> None:
    """Write the lanes' cursors. A cursor is the id of a row, and that row may be lost.

    A cursor must not be higher than the last row. Otherwise new rows would get ids below the cursor, and would count as
    delivered.
    """
    last = db.execute("SELECT ifnull(max(id), 0) FROM batches").fetchone()[0]
    query = "SELECT ifnull(max(id), 0) FROM batches WHERE site = ? AND first_position + records <= ?"
    for (lane, i), run in found.runs.items():
        if i in found.sites:
            confirmed = db.execute(query, (i, _settled_to(found, i, run))).fetchone()[0]
            row = (lane, i, min(run.written, last), confirmed, run.progress)
            db.execute("INSERT INTO runs (lane, site, written, confirmed, progress) VALUES (?, ?, ?, ?, ?)", row)


def _write_batches(
    db: sqlite3.Connection, found: Found, reader: PageReader, by_site: dict[int, list[Batch]], path: Path
) -> None:
    """Write the readable rows, and placeholder rows for the lost ones."""
    insert = "INSERT INTO batches (id, site, stream, first_position, records, frames) VALUES (?, ?, ?, ?, ?, ?)"
    kept = sorted(batch for batches in by_site.values() for batch in batches)
    for batch in kept:
        db.execute(insert, (*batch[:5], _cut(_frames(reader, batch), batch.records)))
    taken = {batch.id for batch in kept}
    for lost, i in _with_ids(_lost(found, by_site), taken):
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


def _lost(found: Found, by_site: dict[int, list[Batch]]) -> Iterator[_Lost]:
    """Yield the ranges of positions that no readable row has.

    They are divided so that no lane has settled only a part of a range.
    """
    settled = defaultdict(set)
    for (_, i), run in found.runs.items():
        if i in found.sites:
            settled[i].add(_settled_to(found, i, run))
    for i, site in found.sites.items():
        position, last = site.first_position, 0
        for batch in by_site.get(i, []):
            yield from _split(_Lost(i, position, batch.first_position - position, last, batch.id), settled[i])
            position, last = batch.end, batch.id
        yield from _split(_Lost(i, position, site.next_position - position, last, _AFTER_ALL), settled[i])


def _split(lost: _Lost, settled: set[int]) -> Iterator[_Lost]:
    """Divide a range at the positions up to which lanes have settled it, and yield the parts that are not empty."""
    end = lost.first_position + lost.records
    bounds = [lost.first_position, *sorted(at for at in settled if lost.first_position < at < end), end]
    for start, stop in pairwise(bounds):
        if start < stop:
            yield lost._replace(first_position=start, records=stop - start)


def _with_ids(ranges: Iterator[_Lost], taken: set[int]) -> Iterator[tuple[_Lost, int]]:
    """Give each lost range the id of a row that was lost between its neighbours, so that rows stay in order."""
    for lost in sorted(ranges, key=lambda lost: (lost.before, lost.after, lost.first_position)):
        i = lost.after + 1
        while i in taken:
            i += 1
        taken.add(i)
        yield lost, i
