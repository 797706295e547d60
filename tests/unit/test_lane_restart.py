# SPDX-License-Identifier: Apache-2.0
"""What a lane does after a crash, a hang or a restart: everything there, as the backend declares it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import WAIT_S, MemoryBackend
from tests.unit.rigs import SITE, Bench, failing, run_of
from trackhub.delivery.lane.lane import Lane
from trackhub.delivery.report import DeliveryReport
from trackhub.errors import PermanentError, TransientError
from trackhub.spi import Entry, Redelivery

pytestmark = pytest.mark.usefixtures("quick_retries")


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
    bench = Bench(tmp_path / "receiver")
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
    bench = Bench(tmp_path / "receiver")
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
    again = Bench(tmp_path / "receiver")
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
        bench = Bench(tmp_path / "receiver")
        bench.counts = {SITE: 10 * day} if day else {}
        bench.log(10)
        backend = MemoryBackend(stored=stored)
        bench.lane(backend)
        report = bench.finish()
        assert backend.infos[0].resume_from == 10 * day
        assert run_of(report).confirmed == 10 * (day + 1)
    assert [e.position for e in stored[SITE]] == list(range(30))


def test_a_run_to_rebuild_that_a_lane_does_not_come_to_is_rebuilt_by_the_next(tmp_path: Path) -> None:
    """It was not finished; then a lane spent all its time on opening another run; then there was time."""
    bench = Bench(tmp_path / "receiver")
    rebuild: dict[str, Any] = {"redelivery": Redelivery.REBUILD, "late_steps": False}
    release, hangs = threading.Event(), threading.Event()

    def day(
        behave: Callable[[str, Any], None], timeout_s: float = WAIT_S
    ) -> tuple[MemoryBackend, DeliveryReport, Lane]:
        here = Bench(tmp_path / "receiver")
        here.counts = {SITE: 10, "site-2": 10}
        backend = MemoryBackend(behave, **rebuild)
        lane = here.lane(backend)
        return backend, here.finish(timeout_s), lane

    def hang(method: str, argument: Any) -> None:
        if method == "open":
            hangs.set()
            release.wait(WAIT_S)

    for site in (SITE, "site-2"):
        bench.log(10, site)
    bench.journal.close()
    day(failing(10**6, lambda: TransientError("not now"), "finish"), 0.5)
    _, between, lane = day(hang, 0.2)
    release.set()
    lane._thread.join(WAIT_S)

    backend, report, _ = day(lambda method, argument: None)

    for site in (SITE, "site-2"):
        assert run_of(between, site).pending == 10
        assert (run_of(report, site).confirmed, run_of(report, site).rejected) == (10, {})
        assert backend.positions(site) == list(range(10))


def test_a_run_that_is_finished_stays_so_when_a_later_lane_has_no_time_for_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "receiver")
    bench.log(5)
    bench.lane(MemoryBackend())
    assert run_of(bench.finish()).state == "finished"
    release = threading.Event()
    again = Bench(tmp_path / "receiver")
    again.counts = {SITE: 5}
    lane = again.lane(MemoryBackend(lambda method, argument: release.wait(WAIT_S) if method == "preflight" else None))

    run = run_of(again.finish(0.05))

    release.set()
    lane._thread.join(WAIT_S)
    assert (run.state, run.confirmed, run.last_error) == ("finished", 5, "")


def test_what_a_backend_stored_before_it_refused_a_record_counts_as_possible_duplicates(bench: Bench) -> None:
    """Of one that sends record by record: the ones before the refused one are handed over again."""
    backend = MemoryBackend(redelivery=Redelivery.AT_LEAST_ONCE)
    take = backend.take

    def one_by_one(site: str, batch: Any) -> None:
        for entry in batch:
            if entry.position == 5:
                raise PermanentError("400")
            take(site, [entry])

    backend.take = one_by_one  # type: ignore[method-assign]
    bench.log(10)
    bench.lane(backend)

    run = run_of(bench.finish())

    twice = len(backend.positions()) - len(set(backend.positions()))
    assert twice > 0
    assert run.possible_duplicates >= twice
    assert (run.confirmed, run.rejected) == (9, {"permanent_error": 1})


def test_after_two_crashes_all_that_the_first_life_handed_over_is_doubtful(tmp_path: Path) -> None:
    """The second life dies sooner: it has announced one row, of the three that the backend has."""
    can: dict[str, Any] = {"buffering": True, "redelivery": Redelivery.AT_LEAST_ONCE, "max_batch": 10}
    first = Bench(tmp_path / "receiver")
    backend = MemoryBackend(failing(10**6, lambda: TransientError("not durable"), "flush"), **can)
    first.log(10, rows=3)
    first.lane(backend)
    assert run_of(first.finish(0.3)).pending == 30
    second = Bench(tmp_path / "receiver")
    second.counts = {SITE: 30}
    dying = MemoryBackend(stored=dict(backend.stored), **can)
    crash = Crash(second, dying, "write", 1, after=False)
    second.lane(dying)
    second.finish()
    assert crash.snapshot is not None

    third = Bench(crash.folder)
    third.counts = {SITE: 30}
    backend = MemoryBackend(stored=crash.snapshot, **can)
    third.lane(backend)
    run = run_of(third.finish())

    assert len(backend.positions()) == 60
    assert (run.confirmed, run.possible_duplicates) == (30, 30)
