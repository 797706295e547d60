# SPDX-License-Identifier: Apache-2.0
"""No wait for a journal is without a limit, no thread waits behind another one's wait, and nothing is left open."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import WAIT_S, batch_of, metric
from trackhub.delivery import wire
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.lock import is_journal_locked
from trackhub.delivery.journal.tables_and_rows import Progress, RunState
from trackhub.delivery.receiver import Receiver
from trackhub.errors import JournalError
from trackhub.job_and_run_info import JobInfo, RunStatus, Side


def open_journal(folder: Path) -> Journal:
    return Journal.open(folder / "trackhub.db", job="job-1", side="server")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = open_journal(tmp_path)
    yield journal
    journal.close()


@pytest.fixture
def locker(journal: Journal) -> Iterator[sqlite3.Connection]:
    """Another program that has the journal locked."""
    other = sqlite3.connect(journal.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    yield other
    if other.in_transaction:
        other.execute("ROLLBACK")
    other.close()


def timed(work: Any) -> tuple[float, BaseException | None]:
    start = time.monotonic()
    try:
        work()
    except JournalError as e:
        return time.monotonic() - start, e
    return time.monotonic() - start, None


def test_a_thread_that_waits_for_the_file_holds_up_no_other(journal: Journal, locker: sqlite3.Connection) -> None:
    with ThreadPoolExecutor() as pool:
        patient = pool.submit(timed, lambda: journal.set_meta("a", "b"))
        time.sleep(0.05)

        took_s, error = timed(lambda: journal.add_site("a", 0.0, wait_s=0.1))
        locker.execute("ROLLBACK")

        assert isinstance(error, JournalError)
        assert took_s < 1.0
        assert patient.result()[1] is None
    assert journal.meta()["a"] == "b"


def test_all_waits_end_at_the_moment_that_was_set_also_those_that_had_begun(
    journal: Journal, locker: sqlite3.Connection
) -> None:
    site = 1
    with ThreadPoolExecutor() as pool:
        begun = pool.submit(timed, lambda: journal.set_meta("a", "b"))
        time.sleep(0.05)
        journal.limit_waits(time.monotonic() + 0.2)
        later = [timed(lambda: journal.save_run("lane", site, 1, 1, Progress())) for _ in range(20)]
        took_s, error = begun.result()

    assert isinstance(error, JournalError)
    assert took_s < 2.0
    assert all(isinstance(error, JournalError) for _, error in later)
    assert sum(took_s for took_s, _ in later) < 2.0


def test_several_runs_are_saved_at_once_or_not_at_all(journal: Journal) -> None:
    states = {("a", 1): RunState(3, 2, Progress(confirmed=5)), ("b", 1): RunState(1, 1, Progress(state="finished"))}
    journal.save_runs(states)
    with pytest.raises(JournalError):
        journal.save_runs({("a", 1): RunState(9, 9, Progress()), ("b", None): RunState(1, 1, Progress())})  # type: ignore[dict-item]

    assert {key: journal.run_state(*key) for key in states} == states


class Stalling(sqlite3.Connection):
    """A connection on a disk that does not answer: its commits wait."""

    stalled = threading.Event()
    go_on = threading.Event()
    stalls = False

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql == "COMMIT" and Stalling.stalls:
            Stalling.stalled.set()
            assert Stalling.go_on.wait(WAIT_S)
        return super().execute(sql, *arguments)


def test_a_disk_that_does_not_answer_costs_one_thread_of_the_receiver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **rest: connect(*args, factory=Stalling, **rest))
    receiver = Receiver(tmp_path, job=JobInfo("job-1"), side=Side.SERVER, backends={})
    receiver.start()

    def ask(site: str, first: int) -> wire.Reply:
        batch = batch_of([metric(i) for i in range(first, first + 5)])
        return wire.decode_reply(receiver.handle(site, wire.encode(batch)))

    sites = [f"site-{i}" for i in range(8)]
    for site in sites:
        assert ask(site, 0) == wire.Accepted()
    with ThreadPoolExecutor(1) as pool:
        Stalling.stalls = True
        stuck = pool.submit(ask, sites[0], 5)
        assert Stalling.stalled.wait(WAIT_S)

        start = time.monotonic()
        replies = [ask(site, 5) for site in sites]
        took_s = time.monotonic() - start
        Stalling.stalls = False
        Stalling.go_on.set()

        assert all(isinstance(reply, wire.Busy) for reply in replies)
        assert took_s < 8 * 0.5
        assert stuck.result() == wire.Accepted()
    assert [ask(site, 5) for site in sites] == [wire.Accepted()] * 8
    report = receiver.finish(RunStatus.FINISHED, deadline_s=1)
    assert {site.journaled for site in report.sites.values()} == {10}


def test_threads_that_are_gone_leave_no_connection(tmp_path: Path) -> None:
    """FLARE's pool ends threads that are idle and starts new ones, for as long as the job runs."""
    journal = open_journal(tmp_path)
    site = journal.add_site("a", 0.0)

    def use(seq: int) -> None:
        journal.append(site, batch_of([metric(seq)]), {})
        journal.read(site, 0, 1 << 20)

    for seq in range(50):
        thread = threading.Thread(target=use, args=(seq,))
        thread.start()
        thread.join()

    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit() and _is_open(fd)]
    journal.close()

    assert sum(name == str(tmp_path / "trackhub.db") for name in names) <= 2


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


OWNER = """
    import os, sys, time
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    from trackhub.delivery.journal.journal import Journal
    journal = Journal.open(Path(sys.argv[1]), job="job-1", side="server")
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # by now, it has let go of what it must not hold
    time.sleep(60)
"""


def test_a_forked_child_that_outlives_its_parent_does_not_hold_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "trackhub.db"
    command = [sys.executable, "-c", textwrap.dedent(OWNER), str(path), os.getcwd()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert is_journal_locked(path)
            parent.kill()
            parent.wait()

            assert not is_journal_locked(path)
            open_journal(tmp_path).close()
        finally:
            os.kill(child, signal.SIGKILL)


def test_asking_whether_a_journal_is_locked_disturbs_nobody(tmp_path: Path) -> None:
    path = tmp_path / "trackhub.db"
    assert not is_journal_locked(path)
    assert list(tmp_path.iterdir()) == []
    open_journal(tmp_path).close()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            is_journal_locked(path)

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            for _ in range(50):
                journal = open_journal(tmp_path)
                assert is_journal_locked(path)
                journal.close()
        finally:
            stop.set()
        for each in asking:
            each.result()


def test_a_journal_that_is_closed_while_a_thread_reads_ends_no_process(tmp_path: Path) -> None:
    """SQLite's library crashes if a connection is closed under a query. A lane that hangs may come back at any time."""
    for _ in range(50):
        journal = open_journal(tmp_path)
        site = journal.add_site("a", 0.0)
        journal.append(site, batch_of([metric(i) for i in range(200)]), {})
        read_once = threading.Event()

        def read(journal: Journal = journal, site: int = site, read_once: threading.Event = read_once) -> None:
            with pytest.raises(JournalError):
                while True:
                    journal.read(site, 0, 1 << 20)
                    journal.sites()
                    read_once.set()

        with ThreadPoolExecutor() as pool:
            readers = [pool.submit(read) for _ in range(3)]
            assert read_once.wait(WAIT_S)
            journal.close()
            for reader in readers:
                reader.result()
        assert not (tmp_path / "trackhub.db-wal").exists()
        (tmp_path / "trackhub.db").unlink()
