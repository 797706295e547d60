# SPDX-License-Identifier: Apache-2.0
"""A repair of a journal that dies, or meets a full disk: a later replay finds what it left and delivers everything."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.independent_readers import count_receiver
from tests.faults.process import ROOT
from tests.unit.readers_and_bad_backends import batch_of, metric, small_disk
from trackhub.delivery import wire
from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.replay_journal_or_spool import replay_journal
from trackhub.errors import JournalError
from trackhub.job_and_run_info import JobInfo, RunStatus, Side

SITE = "site-1"
BATCHES, EACH = 30, 50


class Damaged(NamedTuple):
    """A folder with a damaged journal whose write-ahead log holds its last batches.

    Attributes:
        folder: the receiver's folder.
        readable: how many records can be read.
    """

    folder: Path
    readable: int


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    """The first page of the file is lost. SQLite reads nothing of it."""
    run = tmp_path_factory.mktemp("run")
    receiver = Receiver(run, job=JobInfo("job-1"), side=Side.SERVER, backends={})
    receiver.start()

    def log(first: int, last: int) -> None:
        for number in range(first, last):
            batch = batch_of([metric(number * EACH + i) for i in range(EACH)])
            assert receiver.handle(SITE, wire.encode(batch)) == wire.encode(wire.Accepted())

    log(0, BATCHES - 5)
    with sqlite3.connect(receiver.folder / "trackhub.db") as other:
        other.execute("PRAGMA wal_checkpoint")
    other.close()
    log(BATCHES - 5, BATCHES)
    folder = tmp_path_factory.mktemp("killed") / "trackhub"
    folder.mkdir()
    for name in ("trackhub.db", "trackhub.db-wal"):  # as a killed receiver leaves them
        shutil.copyfile(receiver.folder / name, folder / name)
    receiver.finish(RunStatus.FINISHED, deadline_s=0)
    log_size = (folder / "trackhub.db-wal").stat().st_size
    assert log_size > 0
    with (folder / "trackhub.db").open("r+b") as file:
        file.seek(2 * 4096)
        file.write(bytes(4096))  # the root of a table or an index
    return Damaged(folder, BATCHES * EACH)


def copy_of(damaged: Damaged, tmp_path: Path) -> Path:
    shutil.copytree(damaged.folder, tmp_path / "run" / "trackhub")
    return tmp_path / "run" / "trackhub" / "trackhub.db"


def repair_until(journal: Path, step: int, *flags: str) -> int | None:
    """Repair in another process. Return its number of steps, or None if it died at this one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.repair_process", str(journal), str(step), *flags],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    if done.returncode == -9:
        return None
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def check_all_delivered(journal: Path, records: int) -> None:
    (found,) = find(journal.parent).journals
    report = replay_journal(found, backends={"jsonl": {}}, timeout_s=30)
    lines = (journal.parent.parent / "jsonl" / "job-1" / f"{SITE}.jsonl").read_text().splitlines()
    seqs = [json.loads(line)["seq"] for line in lines[:-1]]
    assert seqs == list(range(records))
    assert report.lanes["jsonl"][SITE].confirmed == records
    left = {path.name for path in journal.parent.iterdir()}
    assert left >= {"trackhub.db", "trackhub.db.damaged"}
    assert left.isdisjoint({"trackhub.db.new", "trackhub.db.repaired", "trackhub.db-wal", "trackhub.db-shm"})


@pytest.mark.parametrize("flags", [(), ("without-links",)])
def test_a_repair_that_is_killed_at_any_step_leaves_a_journal_that_a_replay_delivers(
    damaged: Damaged, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    step, steps = 0, None
    while steps is None:
        journal = copy_of(damaged, tmp_path / str(step))
        steps = repair_until(journal, step, *flags)
        (found,) = find(journal.parent).journals
        assert found == journal
        check_all_delivered(journal, damaged.readable)
        step += 1
    assert steps >= 6


def test_what_is_killed_once_more_during_the_next_repair_is_not_lost_either(damaged: Damaged, tmp_path: Path) -> None:
    for first in range(0, 10, 3):
        journal = copy_of(damaged, tmp_path / str(first))
        for step in (first, 2, 4, 1):
            repair_until(journal, step)
        check_all_delivered(journal, damaged.readable)


def test_a_receiver_that_starts_on_an_interrupted_repair_goes_on_with_the_repaired_journal(
    damaged: Damaged, tmp_path: Path
) -> None:
    step = 0
    while True:
        journal = copy_of(damaged, tmp_path / str(step))
        ended = repair_until(journal, step)
        if journal.with_name("trackhub.db.repaired").exists():
            break
        assert ended is None
        step += 1
    assert read_journal_report(journal).sites[SITE].journaled == damaged.readable

    receiver = Receiver(journal.parent.parent, job=JobInfo("job-1"), side=Side.SERVER, backends={"jsonl": {}})
    receiver.start()
    batch = batch_of([metric(damaged.readable)])
    assert receiver.handle(SITE, wire.encode(batch)) == wire.encode(wire.Accepted())
    report = receiver.finish(RunStatus.FINISHED)

    assert report.sites[SITE].journaled == damaged.readable + 1
    check_all_delivered(journal, damaged.readable + 1)


def test_a_damaged_journal_that_was_moved_aside_is_found_and_repaired(damaged: Damaged, tmp_path: Path) -> None:
    journal = copy_of(damaged, tmp_path)
    journal.rename(journal.with_name("trackhub.db.damaged"))
    journal.with_name("trackhub.db-wal").rename(journal.with_name("trackhub.db.damaged-wal"))

    check_all_delivered(journal, damaged.readable)


def test_a_repair_on_a_full_disk_says_so_and_works_when_there_is_room(damaged: Damaged, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in damaged.folder.iterdir())
    with small_disk(tmp_path / "disk", size * 2 + (64 << 10)) as disk:
        journal = copy_of(damaged, disk)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        filler.write_bytes(bytes(max(0, filler.stat().st_size - (32 << 10))))  # room for a part of the new one

        with pytest.raises(JournalError, match="cannot be written beside it") as error:
            replay_journal(journal, backends={"jsonl": {}}, timeout_s=5)
        assert "space" in str(error.value)
        assert not journal.with_name("trackhub.db.new").exists()

        filler.unlink()
        replay_journal(journal, backends={"jsonl": {"path": str(tmp_path / "jsonl")}}, timeout_s=30)
        assert count_receiver(journal)[SITE].journaled == damaged.readable


def test_a_journal_that_another_program_has_locked_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = Receiver(tmp_path, job=JobInfo("job-1"), side=Side.SERVER, backends={})
    receiver.start()
    receiver.handle(SITE, wire.encode(batch_of([metric(0)])))
    receiver.finish(RunStatus.FINISHED, deadline_s=0)
    journal = receiver.folder / "trackhub.db"
    with sqlite3.connect(journal) as db:
        db.execute("PRAGMA journal_mode=DELETE")
    db.close()
    monkeypatch.setattr("trackhub.delivery.journal.repair._BUSY_S", 0.1)
    other = sqlite3.connect(journal, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")

    with pytest.raises(JournalError, match="locked"):
        replay_journal(journal, backends={"jsonl": {}}, timeout_s=5)
    other.close()

    assert sorted(path.name for path in journal.parent.iterdir() if "db." in path.name) == []
