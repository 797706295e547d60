# SPDX-License-Identifier: Apache-2.0
"""Files are written beside metrics, and runs are ended with their status whether they are delivered or not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.unit.readers_and_bad_backends import STREAM, WAIT_S, MemoryBackend
from tests.unit.rigs import SITE, Bench, run_of
from trackhub.delivery.lane import lane
from trackhub.errors import PermanentError, TransientError
from trackhub.job_and_run_info import RunStatus
from trackhub.records import Artifact, Blob, Kind, Metrics, Record
from trackhub.spi import Redelivery, Rejection, WriteReport

pytestmark = pytest.mark.usefixtures("quick_retries")

REDELIVERIES = pytest.mark.parametrize("redelivery", [Redelivery.IDEMPOTENT, Redelivery.AT_LEAST_ONCE])


def artifact(seq: int) -> Record:
    blob = Blob(f"{STREAM}-{seq}", 1 << 20, "0" * 64, "application/octet-stream")
    return Record(seq, 1000.0 + seq, seq, None, Artifact("model", blob, "model.bin"))


def mixed(*kinds: str) -> list[Record]:
    """Return a record for each letter: "f" is a file, "m" a metric."""
    return [
        artifact(i) if kind == "f" else Record(i, 1000.0 + i, i, None, Metrics({"loss": float(i)}))
        for i, kind in enumerate("".join(kinds))
    ]


def is_upload(method: str, batch: Any) -> bool:
    return method == "write" and isinstance(batch[0].payload, Artifact)


class Gate:
    """Holds up each file until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, method: str, batch: Any) -> None:
        if is_upload(method, batch):
            self.reached.set()
            assert self.opened.wait(WAIT_S)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


FILES = frozenset({Kind.IMAGE, Kind.ARTIFACT})


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def confirmed(bench: Bench) -> int:
    return run_of(bench.journal.report(["memory"])).confirmed


@pytest.mark.parametrize("buffering", [False, True], ids=["write confirms", "flush confirms"])
def test_metrics_are_confirmed_while_a_file_is_being_written(bench: Bench, gate: Gate, buffering: bool) -> None:
    backend = MemoryBackend(gate, files_beside=FILES, buffering=buffering)
    bench.lane(backend)
    bench.add(mixed("mmmmmfmmmmm"))
    assert gate.reached.wait(WAIT_S)
    wait_until(lambda: confirmed(bench) == 10)
    report = run_of(bench.journal.report(["memory"]))
    during = (report.confirmed, report.pending)
    gate.opened.set()
    final = run_of(bench.finish())

    assert during == (10, 1)
    assert (final.confirmed, final.pending, final.state) == (11, 0, "finished")
    assert sorted(backend.positions()) == list(range(11))


@REDELIVERIES
def test_at_the_end_only_the_file_is_pending_and_the_run_is_ended_with_its_status(
    bench: Bench, gate: Gate, redelivery: Redelivery, tmp_path: Path
) -> None:
    """A later receiver delivers the file, and nothing else again."""
    backend = MemoryBackend(gate, files_beside=FILES, redelivery=redelivery)
    bench.lane(backend)
    bench.add(mixed("mmfmm"))
    assert gate.reached.wait(WAIT_S)

    first = run_of(bench.finish(1.0, RunStatus.FAILED))
    again = Bench(bench.folder)
    again.counts = dict(bench.counts)
    second = MemoryBackend(files_beside=FILES, redelivery=redelivery, stored=dict(backend.stored))
    again.lane(second)
    last = run_of(again.finish(WAIT_S, RunStatus.FAILED))

    assert (first.confirmed, first.pending, first.state) == (4, 1, "unfinished")
    assert backend.statuses == {SITE: RunStatus.FAILED}
    assert (last.confirmed, last.pending, last.state) == (5, 0, "finished")
    assert sorted(second.positions()) == [0, 1, 2, 3, 4]
    assert last.possible_duplicates == (1 if redelivery is Redelivery.AT_LEAST_ONCE else 0)


def test_without_a_second_thread_the_lane_writes_the_files_itself(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may have too many threads, and Python 3.12.0 to 3.12.2 start none when the script has ended."""

    def refuse(*_: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(lane, "FileUploads", refuse)
    backend = MemoryBackend(files_beside=FILES)
    bench.lane(backend)
    bench.add(mixed("mfmf"))
    report = run_of(bench.finish())

    assert (report.confirmed, report.pending, report.state) == (4, 0, "finished")
    assert sorted(backend.positions()) == [0, 1, 2, 3]


def test_a_file_that_fails_is_tried_again_behind_the_others(bench: Bench) -> None:
    failures = [TransientError("slow"), RuntimeError("bug"), TransientError("slow")]

    def behave(method: str, batch: Any) -> None:
        if is_upload(method, batch) and batch[0].position == 0 and failures:
            raise failures.pop(0)

    backend = MemoryBackend(behave, files_beside=FILES)
    bench.lane(backend)
    bench.add(mixed("fff"))
    report = run_of(bench.finish())

    assert (report.confirmed, report.pending, report.rejected) == (3, 0, {})
    assert backend.positions()[-1] == 0


def test_a_file_that_fails_is_shown_until_it_is_stored_while_metrics_are_confirmed(bench: Bench) -> None:
    is_away = True

    def behave(method: str, batch: Any) -> None:
        if is_upload(method, batch) and is_away:
            raise TransientError("no room for files")

    def trouble() -> str:
        return run_of(bench.journal.report(["memory"])).trouble()

    bench.lane(MemoryBackend(behave, files_beside=FILES))
    bench.add(mixed("fmm"))
    wait_until(lambda: bool(trouble()))
    bench.add([Record(3, 1003.0, 3, None, Metrics({"loss": 3.0}))])
    wait_until(lambda: confirmed(bench) == 3)
    during = trouble()
    is_away = False
    wait_until(lambda: confirmed(bench) == 4)

    assert (during, trouble()) == ("TransientError: no room for files", "")


def test_files_that_can_never_be_stored_are_rejected_and_counted(bench: Bench) -> None:
    def behave(method: str, batch: Any) -> Any:
        if is_upload(method, batch) and batch[0].position == 0:
            raise PermanentError("too large")
        if is_upload(method, batch) and batch[0].position == 1:
            return WriteReport([Rejection(1, "odd")])
        return None

    class Backend(MemoryBackend):
        def take(self, site: str, batch: Any) -> None:
            super().take(site, [entry for entry in batch if entry.position != 1])

    bench.lane(Backend(behave, files_beside=FILES))
    bench.add(mixed("ffmf"))
    report = run_of(bench.finish())

    assert (report.rejected, report.confirmed, report.pending) == ({"permanent_error": 1, "odd": 1}, 2, 0)


def test_more_files_than_may_wait_are_all_written(bench: Bench) -> None:
    backend = MemoryBackend(files_beside=FILES)
    bench.lane(backend)
    bench.add(mixed("f" * 300, "m" * 10))
    bench.add(mixed("m" * 10 + "f" * 100), "site-2")
    report = bench.finish()

    assert {site: run_of(report, site).confirmed for site in (SITE, "site-2")} == {SITE: 310, "site-2": 110}


def test_without_the_claim_files_keep_their_place(bench: Bench) -> None:
    backend = MemoryBackend()
    bench.lane(backend)
    bench.add(mixed("mfmfm"))
    bench.finish()

    assert backend.positions() == [0, 1, 2, 3, 4]
    assert len(backend.threads) == 1


@pytest.mark.parametrize("method", ["write", "flush"])
def test_a_run_that_cannot_be_delivered_is_ended_with_its_status(bench: Bench, method: str) -> None:
    def behave(called: str, argument: Any) -> None:
        if called == method:
            raise TransientError("the server counts nothing")

    backend = MemoryBackend(behave, buffering=True)
    bench.lane(backend)
    bench.log(5)
    started = time.monotonic()
    report = run_of(bench.finish(1.0, RunStatus.ABORTED))
    took_s = time.monotonic() - started

    assert backend.statuses == {SITE: RunStatus.ABORTED}
    assert (report.state, report.confirmed, report.pending) == ("unfinished", 0, 5)
    assert took_s < 2.5


def test_a_run_that_was_never_opened_is_not_ended(bench: Bench) -> None:
    def behave(called: str, argument: Any) -> None:
        if called == "open":
            raise TransientError("away")

    backend = MemoryBackend(behave)
    bench.lane(backend)
    bench.log(5)
    report = run_of(bench.finish(0.5))

    assert (backend.statuses, report.state, report.pending) == ({}, "unfinished", 5)


def test_at_the_end_all_files_that_wait_are_tried_once_more(bench: Bench) -> None:
    """The store asked for a minute before the next attempt. The job ends sooner."""
    failed: set[int] = set()

    def fail_once(method: str, batch: Any) -> None:
        if is_upload(method, batch) and batch[0].position not in failed:
            failed.add(batch[0].position)
            raise TransientError("busy", retry_after_s=60)

    bench.lane(MemoryBackend(fail_once, files_beside=FILES))
    bench.add(mixed("mfff"))
    wait_until(lambda: len(failed) == 3)

    report = run_of(bench.finish(WAIT_S))

    assert (report.confirmed, report.pending, report.state) == (4, 0, "finished")
