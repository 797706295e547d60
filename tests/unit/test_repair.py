# SPDX-License-Identifier: Apache-2.0
"""Damaged rows yield the records that can be read, and damaged journals are rebuilt around what is lost."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.readers_and_bad_backends import STREAM, batch_of, metric
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.repair import repair
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.journal.tables_and_rows import Row, stored_records
from trackhub.delivery.wire import Batch
from trackhub.errors import JournalError
from trackhub.framing import decode_body, encode_frame
from trackhub.records import Gap, Record

OTHER = "f" * 32


def row_of(frames: bytes, records: int, first_position: int = 100) -> Row:
    return Row(7, STREAM, first_position, records, frames)


def found(row: Row) -> list[tuple[int, int]]:
    """Return position and seq of each record that is found."""
    return [(position, decode_body(body).seq) for position, _, body in stored_records(row)]


def test_records_of_a_sound_row_have_consecutive_positions() -> None:
    gap = Record(2, 0.0, None, None, Gap(3, "spool_full"))
    frames = b"".join(map(encode_frame, [metric(0), metric(1), gap, metric(5)]))

    assert found(row_of(frames, 3)) == [(100, 0), (101, 1), (102, 5)]


@pytest.mark.parametrize("victim", range(5))
def test_records_behind_a_damaged_record_keep_their_positions(victim: int) -> None:
    frames = [encode_frame(metric(i)) for i in range(5)]
    frames[victim] = frames[victim][:-1] + bytes([frames[victim][-1] ^ 1])

    assert found(row_of(b"".join(frames), 5)) == [(100 + i, i) for i in range(5) if i != victim]


def test_a_damaged_size_field_costs_one_record_and_none_behind_it() -> None:
    frames = bytearray(b"".join(encode_frame(metric(i)) for i in range(5)))
    frames[len(encode_frame(metric(0))) + 4] ^= 0x40  # the size of the second

    assert found(row_of(bytes(frames), 5)) == [(100, 0), (102, 2), (103, 3), (104, 4)]


def test_a_row_without_any_readable_frame_yields_nothing() -> None:
    assert found(row_of(b"", 5)) == []
    assert found(row_of(bytes(1000), 5)) == []


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal.open(tmp_path / "trackhub.db", job="job-1", side="server")
    yield opened
    opened.close()


def test_a_gap_that_starts_before_known_records_explains_only_new_ones(journal: Journal) -> None:
    site = journal.add_site("site-1", 0.0)
    journal.append(site, batch_of([metric(i) for i in range(4)]), {})
    anew = batch_of([Record(0, 0.0, None, None, Gap(6, "damaged")), metric(6)])

    assert journal.append(site, anew, {"damaged": 6}) == 1

    report = journal.report().sites["site-1"]
    assert (report.journaled, report.missing, report.explained) == (5, 0, {"damaged": 2})


def two_sites(journal: Journal, rows: int) -> None:
    """Fill a journal with rows of ten records, the sites in turn."""
    sites = {name: journal.add_site(name, 0.0) for name in ("site-1", "site-2")}
    for i in range(rows):
        for name, stream in (("site-1", STREAM), ("site-2", OTHER)):
            records = [metric(10 * i + j, key="k" * 200) for j in range(10)]
            batch = batch_of(records)
            journal.append(sites[name], Batch(stream, *(getattr(batch, f) for f in Batch.__struct_fields__[1:])), {})


def test_repair_does_not_change_a_sound_journal(journal: Journal) -> None:
    two_sites(journal, 3)
    journal.close()
    before = journal.path.read_bytes()

    assert repair(journal.path) is False

    assert journal.path.read_bytes() == before
    assert not journal.path.with_name("trackhub.db.damaged").exists()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_repair_of_a_truncated_journal_keeps_readable_rows_and_all_positions(journal: Journal, share: float) -> None:
    two_sites(journal, 40)
    journal.close()
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[: int(len(content) * share)])

    assert repair(journal.path) is True

    assert journal.path.with_name("trackhub.db.damaged").read_bytes() == content[: int(len(content) * share)]
    assert read_journal_report(journal.path).sites["site-1"].journaled == 400
    again = Journal.open(journal.path, job="job-1", side="server")
    try:
        lost: Counter[int] = Counter()
        for site in again.sites():
            rows = again.read(site, 0, 1 << 30)
            spans = [(row.first_position, row.records) for row in rows]
            assert [first for first, _ in spans] == [sum(n for _, n in spans[:i]) for i in range(len(spans))]
            assert sum(n for _, n in spans) == 400
            lost[site] = sum(row.records - len(found(row)) for row in rows)
        assert 0 < lost.total() < 800
    finally:
        again.close()
    assert repair(journal.path) is False


def test_repair_refuses_a_journal_that_is_in_use(journal: Journal) -> None:
    two_sites(journal, 1)

    with pytest.raises(JournalError, match="in use by another process"):
        repair(journal.path)


def test_repair_of_a_file_that_is_no_journal_is_an_error_and_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "trackhub.db"
    path.write_bytes(b"something else" * 1000)

    with pytest.raises(JournalError, match="nothing in it can be read"):
        repair(path)

    assert path.read_bytes() == b"something else" * 1000
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(path).execute("SELECT 1 FROM sites")


def test_a_damaged_row_yields_no_more_records_than_it_has() -> None:
    """A page that was written to a wrong place may repeat frames of the row."""
    frames = [encode_frame(metric(i)) for i in (0, 1, 2, 3, 1, 2, 3, 4)]
    frames[1] = frames[1][:-1] + bytes([frames[1][-1] ^ 1])

    positions = [position for position, _ in found(row_of(b"".join(frames), 5))]

    assert positions == list(range(100, 105))
