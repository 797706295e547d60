# SPDX-License-Identifier: Apache-2.0
"""Every page of a journal in turn is bad: a replay delivers every record that the page does not hold.

What a page holds is found by looking for the records' bytes in the file, without any of trackhub's code.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.readers_and_bad_backends import batch_of, metric
from trackhub.delivery import wire
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.replay_journal_or_spool import replay_journal
from trackhub.delivery.report import Counted
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits

SITES = ("site-1", "site-2", "site-3")
ROWS, SMALL, LARGE = 12, 20, 150
PAGE = 4096
LIMITS = Limits(flush_s=0.01)
KEY = "k" * 60

Damage = Callable[[bytearray, int, random.Random], None]


def zeros(data: bytearray, start: int, chance: random.Random) -> None:
    data[start : start + PAGE] = bytes(PAGE)


def garbage(data: bytearray, start: int, chance: random.Random) -> None:
    data[start : start + PAGE] = chance.randbytes(PAGE)


def half(data: bytearray, start: int, chance: random.Random) -> None:
    """As a write of a sector that did not happen."""
    at = start + chance.choice([0, PAGE // 2])
    data[at : at + PAGE // 2] = bytes(PAGE // 2)


def bits(data: bytearray, start: int, chance: random.Random) -> None:
    for _ in range(20):
        data[start + chance.randrange(PAGE)] ^= 1 << chance.randrange(8)


class Job(NamedTuple):
    """A journal of a finished job whose backend got nothing yet.

    Attributes:
        folder: the job's folder.
        content: the journal's bytes.
        rows: for each row, its site, the positions of its records, and its frames.
    """

    folder: Path
    content: bytes
    rows: list[tuple[str, range, bytes]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    receiver = Receiver(folder, job=JobInfo("job-1"), side=Side.SERVER, backends={}, limits=LIMITS)
    receiver.start()
    next_seq = dict.fromkeys(SITES, 0)
    for row in range(ROWS):
        for number, site in enumerate(SITES):
            n = LARGE if (row + number) % 4 == 0 else SMALL  # large ones go on over several pages
            records = [metric(next_seq[site] + i, key=KEY) for i in range(n)]
            next_seq[site] += n
            batch = batch_of(records, stream=f"{number:032x}")
            assert receiver.handle(site, wire.encode(batch)) == wire.encode(wire.Accepted())
    for site in SITES:
        receiver.handle(site, wire.encode(wire.Final(wire.SiteCounts(logged=next_seq[site], acked=next_seq[site]))))
    receiver.wait_for_sites(SITES)
    receiver.finish(RunStatus.FINISHED)
    path = folder / "trackhub" / "trackhub.db"
    with sqlite3.connect(path) as db:
        query = "SELECT name, b.first_position, b.records, frames FROM batches b JOIN sites s ON s.id = b.site"
        rows = [(name, range(first, first + n), frames) for name, first, n, frames in db.execute(query)]
    db.close()
    return Job(folder, path.read_bytes(), rows)


def on_page(job: Job, start: int) -> set[tuple[str, int]]:
    """Return the records of the rows of which this page holds a part."""
    page = job.content[start : start + PAGE]
    held = set()
    for site, positions, frames in job.rows:
        goes_on = len(frames) > PAGE and frames.find(page[4:40]) >= 0
        if frames[:30] in page or goes_on:
            held |= {(site, position) for position in positions}
    return held


def replayed(job: Job, folder: Path, content: bytes) -> tuple[set[tuple[str, int]], dict[str, int]]:
    """Replay a journal with this content, and return what the backend holds and how many records were damaged."""
    journal = folder / "trackhub" / "trackhub.db"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(content)
    report = replay_journal(journal, backends={"jsonl": {}}, limits=LIMITS, timeout_s=30)
    held: set[tuple[str, int]] = set()
    damaged = {}
    for site in report.sites:
        path = folder / "jsonl" / "job-1" / f"{site}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found = [line["values"][KEY] for line in lines if line["kind"] != "end"]
        assert found == sorted(set(found)), "order, or a record twice"
        held |= {(site, int(seq)) for seq in found}
        run = report.lanes["jsonl"][site]
        assert set(run.rejected) <= {"damaged"}
        damaged[site] = run.rejected.get("damaged", 0)
        assert (run.confirmed, run.pending) == (len(found), 0)
        assert run.confirmed + damaged[site] == report.sites[site].journaled
    return held, damaged


def pages_of(kind: str) -> list[object]:
    """Return every page for the default run's kind of damage, and a few seeds of the others."""
    few = {"zeros": 100, "garbage": 100, "half": 200, "bits": 1000}
    return [
        pytest.param(kind, n, marks=[] if kind == "zeros" or n % 10 == 0 else pytest.mark.long)
        for n in range(few[kind])
    ]


@pytest.mark.parametrize(("kind", "seed"), [p for kind in ("zeros", "garbage", "half", "bits") for p in pages_of(kind)])
def test_one_bad_page_costs_at_most_the_records_on_it(job: Job, tmp_path: Path, kind: str, seed: int) -> None:
    pages = len(job.content) // PAGE
    if kind in ("zeros", "garbage") and seed >= pages:
        pytest.skip("the journal has no more pages")
    start = seed % pages * PAGE
    data = bytearray(job.content)
    {"zeros": zeros, "garbage": garbage, "half": half, "bits": bits}[kind](data, start, random.Random(seed))

    held, damaged = replayed(job, tmp_path, bytes(data))

    logged = {(site, position) for site, positions, _ in job.rows for position in positions}
    lost = logged - held
    assert held <= logged
    assert lost <= on_page(job, start)
    assert sum(damaged.values()) == len(lost)
    report = read_journal_report(tmp_path / "trackhub" / "trackhub.db")
    assert (report.job, report.side, report.status) == ("job-1", "server", "finished")
    assert report.adds_up
    for site in report.sites.values():
        assert site.counted in (Counted.FINAL, Counted.INCOMPLETE)
        assert report.balanced == all(site.counted is Counted.FINAL for site in report.sites.values())
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("table", ["sites", "streams"])
def test_a_changed_bit_in_an_id_costs_no_record(job: Job, tmp_path: Path, table: str) -> None:
    """The indexes have the name with the right id. Two rows with one name would not fit into the new journal."""
    content = bytearray(job.content)
    name = SITES[0] if table == "sites" else f"{0:032x}"
    with sqlite3.connect(job.folder / "trackhub" / "trackhub.db") as db:
        (i,) = db.execute(f"SELECT id FROM {table} WHERE name = ?", (name,)).fetchone()
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    db.close()
    start = (page - 1) * PAGE
    (at,) = [
        at
        for n in range(int.from_bytes(content[start + 3 : start + 5]))
        for cell in [start + int.from_bytes(content[start + 8 + 2 * n : start + 10 + 2 * n])]
        for at in [cell + (2 if content[cell] & 0x80 else 1)]
        if content[at] == i
    ]  # https://www.sqlite.org/fileformat.html, 1.6: a cell begins with its size, one or two bytes, and the row's id
    content[at] ^= 64

    held, damaged = replayed(job, tmp_path, bytes(content))

    assert held == {(site, position) for site, positions, _ in job.rows for position in positions}
    assert not any(damaged.values())


@pytest.mark.parametrize("first_lost", [1, 8, 11, 15, 20])
def test_a_lane_goes_on_right_behind_rows_that_are_lost(tmp_path: Path, first_lost: int) -> None:
    """The backend has ten rows of twenty, all rows from one on are lost, and two more arrive after the repair."""

    def send(first_row: int, row_count: int, backends: Sequence[str] = ("jsonl",)) -> None:
        receiver = Receiver(
            tmp_path, job=JobInfo("job-1"), side=Side.SERVER, backends={name: {} for name in backends}, limits=LIMITS
        )
        receiver.start()
        for row in range(first_row, first_row + row_count):
            batch = batch_of([metric(row * SMALL + i, key=KEY) for i in range(SMALL)])
            assert receiver.handle(SITES[0], wire.encode(batch)) == wire.encode(wire.Accepted())
        receiver.finish(RunStatus.FINISHED, deadline_s=30)

    send(0, 10)
    send(10, 10, [])
    journal = tmp_path / "trackhub" / "trackhub.db"
    lose_rows(journal, first_lost)

    replayed = replay_journal(journal, limits=LIMITS, timeout_s=30)
    send(20, 2)
    report = read_journal_report(journal)

    lines = [json.loads(line) for line in (tmp_path / "jsonl" / "job-1" / f"{SITES[0]}.jsonl").read_text().splitlines()]
    held = [int(line["values"][KEY]) for line in lines if line["kind"] != "end"]
    assert held == sorted(set(held)), "order, or a record twice"
    assert {*range(10 * SMALL), *range(20 * SMALL, 22 * SMALL)} <= set(held)
    before, after = (each.lanes["jsonl"][SITES[0]] for each in (replayed, report))
    assert before.rejected["damaged"] == 22 * SMALL - len(held)
    assert (before.pending, before.confirmed + before.rejected["damaged"]) == (0, 20 * SMALL)
    assert (after.pending, after.confirmed) == (0, len(held))


def lose_rows(journal: Path, first: int) -> None:
    """Overwrite every page that holds a part of the rows from this one on, and perhaps of others."""
    with sqlite3.connect(journal) as db:
        rows = [frames for (frames,) in db.execute("SELECT frames FROM batches WHERE id >= ?", (first,))]
    db.close()
    data = bytearray(journal.read_bytes())
    for frames in rows:
        for at in range(0, len(frames) - 64, 64):
            if (found := data.find(frames[at : at + 64])) >= 0:
                zeros(data, found // PAGE * PAGE, random.Random(0))
    journal.write_bytes(data)
