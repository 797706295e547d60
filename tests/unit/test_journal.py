# SPDX-License-Identifier: Apache-2.0
"""The journal keeps each record once, whatever is sent twice and whichever process is killed."""

from __future__ import annotations

import os
import sqlite3
import struct
import subprocess
import sys
import textwrap
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import STREAM, batch_of, metric
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.read_only import open_read_only
from trackhub.delivery.journal.report_builder import build_report, read_journal_report
from trackhub.delivery.journal.tables_and_rows import Progress
from trackhub.delivery.wire import Batch, Final, KeepAlive, SiteCounts
from trackhub.errors import JournalError
from trackhub.framing import decode_body, scan_frames
from trackhub.records import Gap, Kind, Record


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = open_journal(tmp_path)
    yield journal
    journal.close()


def open_journal(folder: Path, **options: Any) -> Journal:
    return Journal.open(folder / "trackhub.db", job="job-1", side="server", **options)


def seqs(journal: Journal, site: int) -> list[int]:
    """Return the numbers of the stored records, checking that their positions are consecutive."""
    found, position = [], None
    for row in journal.read(site, 0, 1 << 30):
        assert position in (None, row.first_position)
        records = [decode_body(row.frames[f.body : f.end]) for f in scan_frames(row.frames) if f.kind != Kind.GAP]
        assert len(records) == row.records
        position = row.first_position + row.records
        found += [r.seq for r in records]
    return found


def gap(seq: int, count: int, reason: str = "spool_full") -> Record:
    return Record(seq, 1000.0, None, None, Gap(count, reason))


def test_a_batch_that_is_sent_twice_is_stored_once(journal: Journal) -> None:
    site = journal.add_site("a", 0.0)
    batch = batch_of([metric(i) for i in range(5)])

    assert journal.append(site, batch, {}) == 5
    assert journal.append(site, batch, {}) == 0

    assert seqs(journal, site) == [0, 1, 2, 3, 4]
    found = journal.report().sites["a"]
    assert (found.received, found.duplicates, found.journaled, found.missing) == (10, 5, 5, 0)


def test_only_the_new_part_of_an_overlapping_batch_is_stored(journal: Journal) -> None:
    site = journal.add_site("a", 0.0)
    journal.append(site, batch_of([metric(i) for i in range(5)]), {})

    assert journal.append(site, batch_of([metric(i) for i in range(2, 9)]), {}) == 4

    assert seqs(journal, site) == list(range(9))
    assert journal.report().sites["a"].duplicates == 3


@pytest.mark.parametrize("known", range(1, 9))
def test_gaps_in_an_overlapping_batch_are_explained_once(journal: Journal, known: int) -> None:
    site = journal.add_site("a", 0.0)
    whole = [metric(0), gap(1, 3), metric(4), gap(5, 1, "disk_full"), metric(6), metric(7)]
    ends = [1, 4, 5, 6, 7, 8]
    if known in ends:
        first = whole[: ends.index(known) + 1]
        journal.append(site, batch_of(first), reasons(first))
    else:
        pytest.skip("no batch ends within a gap")

    journal.append(site, batch_of(whole), reasons(whole))

    assert seqs(journal, site) == [0, 4, 6, 7]
    found = journal.report().sites["a"]
    assert found.explained == {"spool_full": 3, "disk_full": 1}
    assert found.missing == 0


def reasons(records: list[Record]) -> dict[str, int]:
    return {r.payload.reason: r.payload.count for r in records if isinstance(r.payload, Gap)}


def test_records_of_an_unknown_kind_are_kept_when_batches_overlap(journal: Journal) -> None:
    def newer(seq: int) -> bytes:
        body = msgspec.msgpack.encode([seq, 1.0, None, None, [42, 1]])
        head = struct.pack("<IB", len(body), 42)
        return struct.pack("<I", zlib.crc32(head + body)) + head + body

    site = journal.add_site("a", 0.0)
    journal.append(site, Batch(STREAM, 0, 2, 2, newer(0) + newer(1)), {})
    assert journal.append(site, Batch(STREAM, 0, 4, 4, b"".join(map(newer, range(4)))), {}) == 2
    rows = journal.read(site, 0, 1 << 30)
    assert b"".join(row.frames for row in rows) == b"".join(map(newer, range(4)))


def test_records_skipped_without_a_reason_are_counted_as_missing(journal: Journal) -> None:
    site = journal.add_site("a", 0.0)
    journal.append(site, batch_of([metric(0)]), {})
    journal.append(site, batch_of([metric(5)]), {})
    assert journal.report().sites["a"].missing == 4


def test_streams_and_sites_are_numbered_independently(journal: Journal) -> None:
    sites = [journal.add_site(name, 0.0) for name in ("a", "b")]
    assert journal.add_site("a", 99.0) == sites[0]
    for site in sites:
        for stream in ("s1", "s2"):
            journal.append(site, batch_of([metric(0), metric(1)], stream), {})
    assert [seqs(journal, site) for site in sites] == [[0, 1, 0, 1]] * 2
    assert journal.sites() == {sites[0]: ("a", 0.0), sites[1]: ("b", 0.0)}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_each_record_is_stored_once_and_in_order_whatever_is_repeated(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / os.urandom(6).hex()
    journal = open_journal(folder)
    site = journal.add_site("a", 0.0)
    sent = 0  # how far the sender got; it goes back when it loses its cursor
    high, received = 0, 0
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["next", "next", "again", "reopen"])):
            case "next":
                n = data.draw(st.integers(1, 6))
                new = journal.append(site, batch_of([metric(i) for i in range(sent, sent + n)]), {})
                received += n
                sent += n
                assert new == max(0, sent - high)
                high = max(high, sent)
            case "again":
                sent = data.draw(st.integers(0, sent))
            case "reopen":
                journal.close()
                journal = open_journal(folder)
    assert seqs(journal, site) == list(range(high))
    found = journal.report().sites["a"] if high else None
    if found:
        assert (found.journaled, found.received, found.duplicates) == (high, received, received - high)
        assert found.is_balanced()
    journal.close()


APPENDER = """
    import os, sys
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    from trackhub.delivery.journal.journal import Journal
    from tests.unit.readers_and_bad_backends import batch_of, metric
    journal = Journal.open(Path(sys.argv[1]), job="job-1", side="server")
    site = journal.add_site("a", 0.0)
    seq = 0
    while True:
        journal.append(site, batch_of([metric(i) for i in range(seq, seq + 10)]), {})
        seq += 10
        os.write(1, b"%d\\n" % seq)
"""


@pytest.mark.parametrize("after", [5, 200])
def test_an_appended_batch_survives_sigkill_during_the_next_append(tmp_path: Path, after: int) -> None:
    command = [sys.executable, "-c", textwrap.dedent(APPENDER), str(tmp_path / "trackhub.db"), os.getcwd()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(after)]
        process.kill()
        lines += process.stdout.readlines()
    acked = max(int(line) for line in lines if line.endswith(b"\n"))

    journal = open_journal(tmp_path)
    site = journal.add_site("a", 0.0)
    found = seqs(journal, site)

    assert found == list(range(len(found)))
    assert len(found) in (acked, acked + 10)
    assert journal.append(site, batch_of([metric(i) for i in range(acked, acked + 10)]), {}) == acked + 10 - len(found)
    journal.close()
    db = sqlite3.connect(tmp_path / "trackhub.db")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_only_one_process_may_write(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(APPENDER), str(tmp_path / "trackhub.db"), os.getcwd()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(JournalError, match="in use by another process"):
            open_journal(tmp_path)
        report = read_journal_report(tmp_path / "trackhub.db")  # reading needs no lock
        assert report.sites["a"].journaled > 0
        process.kill()
    open_journal(tmp_path).close()


def test_a_journal_that_is_closed_may_be_opened_again_in_the_same_process(tmp_path: Path) -> None:
    first = open_journal(tmp_path)
    with pytest.raises(JournalError, match="in use"):
        open_journal(tmp_path)
    first.close()
    first.close()
    open_journal(tmp_path).close()


def test_a_closed_journal_is_one_file_and_stays_so(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    site = journal.add_site("a", 0.0)
    journal.append(site, batch_of([metric(0)]), {})
    reader = threading.Thread(target=journal.read, args=(site, 0, 100))
    reader.start()
    reader.join()
    journal.close()

    def files() -> list[str]:
        return sorted(f.name for f in tmp_path.iterdir() if f.suffix != ".lock")

    assert files() == ["trackhub.db"]
    for use in (
        lambda: journal.append(site, batch_of([metric(1)]), {}),
        lambda: journal.read(site, 0, 100),
        lambda: journal.sites(),
        lambda: journal.save_run("x", site, 0, 0, Progress()),
    ):
        with pytest.raises(JournalError):
            use()
        # A thread that has no connection yet, as of a lane that comes back after the end.
        with ThreadPoolExecutor() as pool:
            assert isinstance(pool.submit(use).exception(), JournalError)
    assert files() == ["trackhub.db"]


@pytest.mark.parametrize(("job", "side"), [("job-2", "server"), ("job-1", "client")])
def test_a_journal_belongs_to_one_job_and_side(tmp_path: Path, job: str, side: str) -> None:
    open_journal(tmp_path).close()
    with pytest.raises(JournalError, match="expected"):
        Journal.open(tmp_path / "trackhub.db", job=job, side=side)
    open_journal(tmp_path).close()  # and the attempt left no lock


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 500])
def test_opening_a_file_that_is_no_journal_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trackhub.db").write_bytes(content)
    with pytest.raises(JournalError, match=r"trackhub\.db"):
        open_journal(tmp_path)
    (tmp_path / "trackhub.db").unlink()
    open_journal(tmp_path).close()


def test_a_journal_that_cannot_be_created_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match="file"):
        open_journal(tmp_path / "file")


def test_a_journal_works_on_a_file_system_without_a_write_ahead_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connect = sqlite3.connect

    def without_shared_memory(path: Path, **options: Any) -> Any:
        return connect(f"{path.absolute().as_uri()}?vfs=unix-dotfile", uri=True, **options)

    monkeypatch.setattr(sqlite3, "connect", without_shared_memory)
    journal = open_journal(tmp_path)
    assert "no write-ahead log" in caplog.text
    site = journal.add_site("a", 0.0)
    journal.append(site, batch_of([metric(0)]), {})

    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            journal.read(site, 0, 1 << 20)
            journal.report()

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        for i in range(1, 30):
            journal.append(site, batch_of([metric(i)]), {})
            journal.save_run("lane", site, i, i, Progress(confirmed=i))
        stop.set()
        reader.result()
    assert seqs(journal, site) == list(range(30))
    journal.close()


def test_readers_do_not_wait_for_the_writer(journal: Journal) -> None:
    site = journal.add_site("a", 0.0)
    stop = threading.Event()
    found: list[list[int]] = []

    def read() -> None:
        while not stop.is_set():
            found.append(seqs(journal, site))

    thread = threading.Thread(target=read)
    thread.start()
    for i in range(200):
        journal.append(site, batch_of([metric(i)]), {})
    stop.set()
    thread.join()
    assert found
    assert all(s == list(range(len(s))) for s in found)


def test_reading_stops_at_max_bytes_and_goes_on_from_there(journal: Journal) -> None:
    site = journal.add_site("a", 0.0)
    for i in range(10):
        journal.append(site, batch_of([metric(i)]), {})
    size = len(batch_of([metric(0)]).frames)
    first = journal.read(site, 0, size * 3)
    assert [r.first_position for r in first] == [0, 1, 2]
    assert [r.first_position for r in journal.read(site, first[-1].id, 1)] == [3]
    assert journal.read(site, journal.read(site, 0, 1 << 30)[-1].id, 1) == []


def test_the_cursors_and_counts_of_a_lane_survive_a_restart(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    site = journal.add_site("a", 0.0)
    journal.append(site, batch_of([metric(i) for i in range(10)]), {})
    journal.note_counts(site, Final(SiteCounts(logged=10, acked=10)))
    progress = Progress(confirmed=7, rejected={"late_step": 2}, altered={"x": 1}, memory=b"m", last_error="e")
    journal.save_run("lane", site, 5, 3, progress)
    journal.close()

    journal = open_journal(tmp_path)
    assert journal.run_state("lane", site) == (5, 3, progress)
    assert journal.run_state("other", site) == (0, 0, Progress())
    report = journal.report(["lane", "other"])
    run = report.lanes["lane"]["a"]
    assert (run.confirmed, run.rejected, run.pending) == (7, {"late_step": 2}, 1)
    assert report.lanes["other"]["a"].pending == 10
    assert report.sites["a"].final
    assert report.balanced
    journal.close()
    assert read_journal_report(tmp_path / "trackhub.db").lanes["lane"] == report.lanes["lane"]


def test_a_keep_alive_after_the_final_message_does_not_replace_the_last_counts(journal: Journal) -> None:
    site = journal.add_site("a", 0.0)
    last, begun_anew = SiteCounts(logged=5, acked=5), SiteCounts(logged=7, acked=5, spooled=2)
    journal.note_counts(site, Final(last))

    journal.note_counts(site, KeepAlive(SiteCounts(logged=5, acked=2, spooled=3)))
    after_late = journal.report([]).sites["a"].at_site
    journal.note_counts(site, KeepAlive(begun_anew))

    assert after_late == last
    assert journal.report([]).sites["a"].at_site == begun_anew


def test_a_journal_that_claims_more_outcomes_than_records_is_not_balanced(journal: Journal) -> None:
    site = journal.add_site("a", 0.0)
    journal.append(site, batch_of([metric(0)]), {})
    journal.save_run("lane", site, 1, 1, Progress(confirmed=2))
    assert not journal.report().balanced


def test_a_report_is_balanced_though_a_lane_confirms_while_it_is_made(journal: Journal) -> None:
    """A lane that confirmed between two queries of the report had more outcomes than records."""
    site = journal.add_site("a", 0.0)
    journal.append(site, batch_of([metric(0)]), {})
    journal.save_run("lane", site, 1, 1, Progress(confirmed=1))
    stored: list[str] = []

    def store_meanwhile(sql: str) -> None:
        if "FROM runs" in sql and not stored:
            stored.append(sql)
            journal.append(site, batch_of([metric(1)]), {})
            journal.save_run("lane", site, 2, 2, Progress(confirmed=2))

    with open_read_only(journal.path) as db:
        db.set_trace_callback(store_meanwhile)
        report = build_report(db)

    assert stored
    assert report.balanced
    assert (report.sites["a"].journaled, report.lanes["lane"]["a"].confirmed) == (1, 1)


def test_full_durability_sets_sqlite_to_full_synchronisation(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, durability="full")
    assert journal._connections._db.execute("PRAGMA synchronous").fetchone() == (2,)
    journal.close()
