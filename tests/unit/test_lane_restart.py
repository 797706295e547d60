# SPDX-License-Identifier: Apache-2.0
"""What a lane does after a crash, a hang or a restart: everything there, as the backend declares it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.helpers import WAIT_S, MemoryBackend
from tests.unit.rigs import SITE, Bench, run_of
from trackhub.delivery import run_lane
from trackhub.delivery.retry import Backoff
from trackhub.errors import TransientError
from trackhub.spi import Entry, Redelivery


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lane, "Backoff", lambda: Backoff(0.001, 0.01))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "sink")
    yield bench
    bench.journal.close()


class Crash:
    """Keeps the journal as it lies on the disk at a given call, as if the process had been killed there."""

    def __init__(self, bench: Bench, backend: MemoryBackend, method: str, at: int, *, after: bool) -> None:
        self.bench = bench
        self.calls = 0
        self.snapshot: dict[str, list[Entry]] | None = None
        self.folder = bench.folder.parent / "crashed"
        backend.behave = self.behave
        if after:
            take = backend.take

            def take_then_crash(site: str, batch: Any) -> None:
                take(site, batch)
                self.keep(backend)

            backend.take = take_then_crash  # type: ignore[method-assign]
        self.backend, self.method, self.at, self.after = backend, method, at, after

    def behave(self, method: str, argument: Any) -> None:
        if method == self.method and not self.after:
            self.keep(self.backend)

    def keep(self, backend: MemoryBackend) -> None:
        self.calls += 1
        if self.calls == self.at:
            shutil.copytree(self.bench.folder, self.folder, ignore=shutil.ignore_patterns("*.lock", "*-shm"))
            self.snapshot = {site: list(entries) for site, entries in backend.stored.items()}


@pytest.mark.parametrize("redelivery", list(Redelivery))
@pytest.mark.parametrize("buffering", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 3, 6])
def test_after_a_crash_in_a_write_everything_is_there_as_the_backend_declares(
    tmp_path: Path, redelivery: Redelivery, buffering: bool, after: bool, at: int
) -> None:
    bench = Bench(tmp_path / "sink")
    backend = MemoryBackend(buffering=buffering, redelivery=redelivery, max_batch=10)
    crash = Crash(bench, backend, "write", at, after=after)
    bench.log(25, rows=3)
    bench.lane(backend, flush_s=0.0)
    bench.finish()
    assert crash.snapshot is not None

    again = Bench(crash.folder)
    again.counts = {SITE: 75}
    second = MemoryBackend(buffering=buffering, redelivery=redelivery, max_batch=10, stored=crash.snapshot)
    again.lane(second, flush_s=0.0)
    report = again.finish()

    run = run_of(report)
    assert (run.confirmed, run.pending, run.rejected) == (75, 0, {})
    found = second.positions()
    assert sorted(set(found)) == list(range(75))
    doubles = len(found) - 75
    if redelivery is Redelivery.AT_LEAST_ONCE:
        assert doubles <= run.possible_duplicates <= 50
    else:
        assert doubles == 0
        assert found == list(range(75))
        assert run.possible_duplicates == 0


def test_a_retried_batch_counts_once_as_possible_duplicates(bench: Bench) -> None:
    """Of a backend that stores and then fails, as one whose replies are lost."""
    backend = MemoryBackend(redelivery=Redelivery.AT_LEAST_ONCE)
    take, failures = backend.take, [4]

    def store_and_fail(site: str, batch: Any) -> None:
        take(site, batch)
        if failures[0]:
            failures[0] -= 1
            raise TransientError("the reply was lost")

    backend.take = store_and_fail  # type: ignore[method-assign]
    bench.log(10)
    bench.log(10)
    bench.lane(backend)
    run = run_of(bench.finish())
    assert (run.confirmed, run.pending) == (20, 0)
    assert run.possible_duplicates <= run.confirmed
    assert run.possible_duplicates >= 10
    assert sorted(set(backend.positions())) == list(range(20))


def test_a_hang_in_write_is_doubtful_after_a_restart(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "sink")
    release, hangs = threading.Event(), threading.Event()
    backend = MemoryBackend(redelivery=Redelivery.AT_LEAST_ONCE)
    take = backend.take

    def store_and_hang(site: str, batch: Any) -> None:
        take(site, batch)
        hangs.set()
        release.wait(WAIT_S)

    backend.take = store_and_hang  # type: ignore[method-assign]
    bench.log(10)
    lane = bench.lane(backend)
    assert hangs.wait(WAIT_S)
    assert run_of(bench.finish(0.05)).pending == 10
    again = Bench(tmp_path / "sink")
    again.counts = {SITE: 10}
    second = MemoryBackend(redelivery=Redelivery.AT_LEAST_ONCE, stored=dict(backend.stored))
    again.lane(second)
    run = run_of(again.finish())
    release.set()
    lane._thread.join(WAIT_S)
    assert len(second.positions()) == 20
    assert (run.confirmed, run.possible_duplicates) == (10, 10)


def test_a_lane_goes_on_in_a_new_process_where_it_stopped(tmp_path: Path) -> None:
    stored: dict[str, list[Entry]] = {}
    for day in range(3):
        bench = Bench(tmp_path / "sink")
        bench.counts = {SITE: 10 * day} if day else {}
        bench.log(10)
        backend = MemoryBackend(stored=stored)
        bench.lane(backend)
        report = bench.finish()
        assert backend.infos[0].resume_from == 10 * day
        assert run_of(report).confirmed == 10 * (day + 1)
    assert [e.position for e in stored[SITE]] == list(range(30))
