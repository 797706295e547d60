# SPDX-License-Identifier: Apache-2.0
"""Another process locks the journal, or its disk stalls: the receiver says so at once, and training does not notice.

FLARE calls `Receiver.handle` in a pool of 64 threads that serves the whole job. Threads that wait for a journal there
stop the rounds of every site.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoReplyError
from pathlib import Path
from typing import Any

import msgspec
import pytest

import trackhub
from tests.faults.independent_readers import read_store
from tests.faults.process import wait_for
from tests.faults.stalls import Stalls
from trackhub import Writer, registry
from trackhub.delivery.channel import Channel, ChannelError
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.lane.lanes_of_receiver import Lanes
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import RUNNING
from trackhub.delivery.sender import Sender
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.spool.layout import SpoolInfo, create_spool

SITES = [f"site-{i}" for i in range(8)]
POOL_THREADS = 64
LIMITS = Limits(
    batch_records=50, poll_s=0.01, linger_s=0, keepalive_s=0.2, silence_s=2, request_s=1, flush_s=0.05, sites_s=20
)
HANDLE_MAX_S = 1.5
"""The longest that one call may take. The receiver waits 0.25 s at most."""

Connect = Callable[..., sqlite3.Connection]


class Pool:
    """Calls `Receiver.handle` as FLARE does: in threads of one pool, and the site waits for the reply in its own.

    Attributes:
        calls: when each call began and ended.
        most: the most threads that were in a call at one time.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._threads = ThreadPoolExecutor(POOL_THREADS)
        self._lock = threading.Lock()
        self._inside = 0
        self.calls: list[tuple[float, float]] = []
        self.most = 0

    def channel(self, site: str) -> Channel:
        def send(request: bytes, timeout_s: float) -> bytes:
            reply: Future[bytes] = self._threads.submit(self._handle, site, request)
            try:
                return reply.result(timeout_s)
            except NoReplyError:
                raise ChannelError("no reply in time") from None

        return send

    def _handle(self, site: str, request: bytes) -> bytes:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
        start = time.monotonic()
        try:
            return self._receiver.handle(site, request)
        finally:
            with self._lock:
                self._inside -= 1
                self.calls.append((start, time.monotonic()))

    def slowest_s(self, stalls: Stalls) -> float:
        """Return how long the slowest call took."""
        return max(stalls.took_s(start, end) for start, end in self.calls)

    def close(self) -> None:
        self._threads.shutdown()


class Job:
    """A receiver and eight sites with a sender and a writer each, in one process."""

    def __init__(self, folder: Path, backends: tuple[str, ...] = ("jsonl",)) -> None:
        self.folder = folder
        self.receiver = Receiver(
            folder / "server", job=JobInfo("job-1"), side=Side.SERVER, backends={name: {} for name in backends},
            limits=LIMITS,
        )  # fmt: skip
        self.receiver.start()
        self.pool = Pool(self.receiver)
        self.logged: Counter[str] = Counter()
        self.log_calls: list[tuple[float, float]] = []
        self.senders: dict[str, Sender] = {}
        self.writers: dict[str, Writer] = {}
        for site in SITES:
            spool = folder / site / "spool"
            create_spool(spool, SpoolInfo(site, "job-1", ("server",)))
            self.senders[site] = Sender(spool, self.pool.channel(site), limits=LIMITS)
            self.senders[site].start()
            self.writers[site] = Writer(spool)

    def log(self, n: int = 20) -> None:
        """Log some steps at each site, and note how long each call took."""
        for site, writer in self.writers.items():
            for _ in range(n):
                start = time.monotonic()
                writer.log({"loss": float(self.logged[site])}, self.logged[site])
                self.log_calls.append((start, time.monotonic()))
                self.logged[site] += 1

    def close_senders(self, timeout_s: float) -> None:
        for writer in self.writers.values():
            writer.close()
        ends = [threading.Thread(target=s.close, args=(timeout_s,)) for s in self.senders.values()]
        for end in ends:
            end.start()
        for end in ends:
            end.join()

    def stored(self, site: str) -> list[int | None]:
        return [seen.step for seen in read_store(self.folder / "server" / "jsonl" / "job-1" / f"{site}.jsonl")]


@pytest.fixture(params=["wal", "delete"])
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Open a journal as another program does, on a file system with or without a write-ahead log."""
    plain: Connect = sqlite3.connect

    def without_shared_memory(path: Any, **options: Any) -> sqlite3.Connection:
        if options.pop("uri", False):
            return plain(f"{path}&vfs=unix-dotfile", uri=True, **options)
        return plain(f"{Path(path).absolute().as_uri()}?vfs=unix-dotfile", uri=True, **options)

    if request.param == "delete":
        monkeypatch.setattr(sqlite3, "connect", without_shared_memory)
    return sqlite3.connect


@pytest.fixture(autouse=True)
def every_backend_is_jsonl(monkeypatch: pytest.MonkeyPatch) -> None:
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda name: load("jsonl"))


@pytest.fixture
def stalls() -> Iterator[Stalls]:
    """Measure how long the machine keeps this process waiting."""
    with Stalls() as stalls:
        yield stalls


def lock_journal_of(job: Job, connect: Connect) -> sqlite3.Connection:
    return lock_journal(job.receiver.folder, connect)


def lock_journal(folder: Path, connect: Connect) -> sqlite3.Connection:
    other = connect(folder / "trackhub.db", isolation_level=None, timeout=20, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    return other


def has_delivered(job: Job, lanes: int) -> bool:
    """Return whether each of so many lanes has stored in the journal that all records are confirmed."""
    runs = read_journal_report(job.receiver.folder / "trackhub.db").lanes
    done = [name for name, sites in runs.items() if {s: run.confirmed for s, run in sites.items()} == job.logged]
    return len(done) == lanes


def test_a_locked_journal_blocks_neither_the_receivers_threads_nor_training(
    tmp_path: Path, connect: Connect, stalls: Stalls
) -> None:
    job = Job(tmp_path)
    job.log()
    wait_for(lambda: len(job.stored(SITES[-1])) == 20, "the first records")
    other = lock_journal_of(job, connect)
    locked_at = time.monotonic()
    while time.monotonic() < locked_at + 5.0:
        job.log(5)
        threading.Event().wait(0.02)
    other.execute("ROLLBACK")
    other.close()
    job.log()

    job.close_senders(20)
    silent = job.receiver.wait_for_sites(SITES)
    report = job.receiver.finish(RunStatus.FINISHED, deadline_s=20)
    job.pool.close()

    assert job.pool.slowest_s(stalls) < HANDLE_MAX_S
    assert job.pool.most <= len(SITES) + 2, "requests pile up"
    assert max(stalls.took_s(start, end) for start, end in job.log_calls) < 1.0
    assert silent == set()
    for site in SITES:
        assert job.stored(site) == list(range(job.logged[site]))
    assert report.balanced
    assert report.lost() == report.undelivered() == 0


def test_a_job_ends_at_its_deadline_though_its_journal_is_locked(
    tmp_path: Path, connect: Connect, stalls: Stalls, caplog: pytest.LogCaptureFixture
) -> None:
    """With several sites and backends: no run and no lane waits for the lock behind another one."""
    job = Job(tmp_path, ("jsonl", "second", "third"))
    job.log()
    wait_for(lambda: len(job.stored(SITES[-1])) == 20, "the first records")
    other = lock_journal_of(job, connect)
    job.log()
    job.close_senders(0.5)

    start = time.monotonic()
    job.receiver.note_status(RunStatus.FINISHED)
    report = job.receiver.finish(RunStatus.FINISHED, deadline_s=2)
    end = time.monotonic()
    job.pool.close()
    other.execute("ROLLBACK")
    other.close()

    assert stalls.took_s(start, end) < 4.75
    assert not report.balanced, "the sites' last counts are not known"
    assert job.pool.slowest_s(stalls) < HANDLE_MAX_S
    assert "hangs" not in caplog.text, "the journal is locked, and no backend is to blame"


def test_a_script_ends_at_its_deadline_though_its_journal_is_locked(
    tmp_path: Path, connect: Connect, stalls: Stalls
) -> None:
    """It tries for the deadline to hand over the rest, then for the deadline to deliver it, then 2 s more."""
    writer = trackhub.local(["jsonl"], folder=tmp_path, job="j", limits=msgspec.structs.replace(LIMITS, deadline_s=2))
    writer.log({"a": 1.0}, 0)
    file = tmp_path / "j" / "jsonl" / "j" / "local.jsonl"
    wait_for(lambda: file.exists() and len(read_store(file)) == 1, "the first record")
    other = lock_journal(tmp_path / "j" / "trackhub", connect)
    writer.log({"a": 2.0}, 1)

    start = time.monotonic()
    writer.close()
    end = time.monotonic()
    other.execute("ROLLBACK")
    other.close()

    assert stalls.took_s(start, end) < 2 + 2 + 2 + HANDLE_MAX_S


def test_a_status_that_a_locked_journal_does_not_take_is_stored_at_the_end(tmp_path: Path) -> None:
    job = Job(tmp_path)
    other = lock_journal_of(job, sqlite3.connect)
    job.receiver.note_status(RunStatus.ABORTED)
    other.execute("ROLLBACK")
    other.close()
    assert read_journal_report(job.receiver.folder / "trackhub.db").status == RUNNING

    job.close_senders(20)
    job.receiver.finish(RunStatus.ABORTED)
    job.pool.close()

    assert {sender.job_status for sender in job.senders.values()} == {RunStatus.ABORTED}
    assert read_journal_report(job.receiver.folder / "trackhub.db").status == RunStatus.ABORTED


def test_runs_that_ended_while_the_journal_was_locked_are_stored_when_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, ("jsonl", "second"))
    job.log()
    wait_for(lambda: len(job.stored(SITES[-1])) == 20, "the first records")
    job.close_senders(20)
    wait_for(lambda: has_delivered(job, 2), "all records to be delivered, so that only the ends are left to store")
    other = lock_journal_of(job, sqlite3.connect)
    free = threading.Timer(0.2, other.execute, ("ROLLBACK",))
    store = Lanes._store_ends

    def freed_soon(lanes: Lanes) -> None:
        free.start()
        store(lanes)

    monkeypatch.setattr(Lanes, "_store_ends", freed_soon)

    report = job.receiver.finish(RunStatus.FINISHED, deadline_s=0.5)
    job.pool.close()
    free.join()
    other.close()

    assert {run.state for runs in report.lanes.values() for run in runs.values()} == {"finished"}
    assert report.balanced
    assert read_journal_report(job.receiver.folder / "trackhub.db").lanes == report.lanes
