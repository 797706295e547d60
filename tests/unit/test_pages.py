# SPDX-License-Identifier: Apache-2.0
"""The reader of single pages finds the rows that SQLite finds, and never raises on what is no page."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import batch_of, metric
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.read_damaged_pages import Cell, PageReader
from trackhub.delivery.journal.tables_and_rows import Progress
from trackhub.delivery.wire import KeepAlive, SiteCounts


def cells_of(path: Path) -> list[Cell]:
    with PageReader(path) as reader:
        found = [reader.read(*place) for place in reader.places()]
    return [cell for cell in found if cell is not None]


def rows_of(cells: list[Cell], columns: int) -> list[list[Any]]:
    """Return the rows of the table with ids that has so many columns, the id first, as SQLite gives them."""
    rows = [[cell.rowid, *cell.values[1:]] for cell in cells if cell.rowid is not None and len(cell.values) == columns]
    return sorted(rows, key=lambda row: row[0])


def sql(path: Path, query: str) -> list[list[Any]]:
    db = sqlite3.connect(path)
    try:
        return [list(row) for row in db.execute(query)]
    finally:
        db.close()


@pytest.fixture(params=[(2, 3, 5), (3, 4, 400), (150, 6, 20)], ids=["small", "large rows", "many sites"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    """A journal that is open: a part of it is in the write-ahead log alone."""
    sites, rows, records = request.param
    journal = Journal.open(tmp_path / "trackhub.db", job="job-1", side="server")
    for number in range(sites):
        site = journal.add_site(f"site-{number}", 1000.5)
        for row in range(rows):
            batch = batch_of([metric(row * records + i) for i in range(records)], stream=f"{number:032x}")
            journal.append(site, batch, {"damaged": 3} if row == 0 else {})
        journal.note_counts(site, KeepAlive(SiteCounts(logged=rows * records, dropped={"x": number})))
        journal.save_run("jsonl", site, row, row, Progress(confirmed=7, last_error="e" * (number * 10)))
    yield journal
    journal.close()


@pytest.mark.parametrize("closed", [False, True])
def test_each_page_read_for_itself_gives_the_rows_that_sqlite_gives(
    journal: Journal, tmp_path: Path, closed: bool
) -> None:
    if closed:
        journal.close()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tmp_path.glob("trackhub.db*"):
        shutil.copyfile(path, copy / path.name)
    cells = cells_of(copy / "trackhub.db")  # before SQLite folds the log in

    file = copy / "trackhub.db"
    for table, columns in (("batches", 6), ("sites", 16), ("streams", 4)):
        assert rows_of(cells, columns) == sql(file, f"SELECT * FROM {table} ORDER BY id")
    entries = [cell.values for cell in cells if cell.rowid is None]
    runs = [entry for entry in entries if len(entry) == 5 and isinstance(entry[1], int)]
    assert sorted(runs, key=lambda row: row[:2]) == sql(file, "SELECT * FROM runs ORDER BY lane, site")
    assert sorted(c.values for c in cells if c.rowid is not None and len(c.values) == 2) == sql(
        file, "SELECT key, value FROM meta ORDER BY key"
    )
    copies = sql(file, "SELECT name, counts, last, ended, id FROM sites")
    found = [entry for entry in entries if len(entry) == 5 and not isinstance(entry[1], int)]
    assert sorted(map(repr, found)) == sorted(map(repr, copies))


def test_a_log_that_is_cut_gives_what_was_committed_before(journal: Journal, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tmp_path.glob("trackhub.db*"):
        shutil.copyfile(path, copy / path.name)
    log = copy / "trackhub.db-wal"
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size * 2 // 3)

    cells = cells_of(copy / "trackhub.db")

    assert rows_of(cells, 6) == sql(copy / "trackhub.db", "SELECT * FROM batches ORDER BY id")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(seed=st.integers(0, 2**32), kinds=st.lists(st.sampled_from([0x0D, 0x0A, 0x02, 0x05, 0]), min_size=1, max_size=5))
def test_pages_of_garbage_give_nothing_that_is_no_cell_and_never_raise(
    tmp_path: Path, seed: int, kinds: list[int]
) -> None:
    chance = random.Random(seed)
    path = tmp_path / os.urandom(6).hex()
    pages = [bytes([kind]) + chance.randbytes(4095) for kind in kinds]
    path.write_bytes(b"SQLite format 3\0\x10\x00" + chance.randbytes(82) + pages[0][100:] + b"".join(pages[1:]))

    for cell in cells_of(path):
        assert isinstance(cell.values, list)


def test_pages_that_are_not_in_use_give_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, b TEXT)")
    db.executemany("INSERT INTO t VALUES (?, ?, ?)", [(i, "x" * 500, "y") for i in range(200)])
    db.execute("DELETE FROM t WHERE id > 20")
    db.close()

    assert [row[0] for row in rows_of(cells_of(path), 3)] == list(range(21))
