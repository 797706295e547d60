# SPDX-License-Identifier: Apache-2.0
"""A lane delivers every record once and in order, or says how many it did not and why, whatever a backend does."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import WAIT_S, MemoryBackend, metric
from tests.unit.rigs import SITE, Bench, Consuming, Odd, failing, poisoned, run_of
from trackhub.delivery.backoff import Backoff
from trackhub.delivery.lane.lane import Lane
from trackhub.delivery.wire import Batch
from trackhub.errors import PermanentError, TransientError
from trackhub.framing import encode_frame
from trackhub.job_and_run_info import RunStatus, Side
from trackhub.records import Gap, Metrics, Record, Text
from trackhub.spi import Kind, Redelivery, Rejection, WriteReport

pytestmark = pytest.mark.usefixtures("quick_retries")


def test_all_records_are_delivered_in_order_from_one_thread_and_the_run_is_finished(bench: Bench) -> None:
    backend = MemoryBackend()
    bench.lane(backend)
    for n in (1, 500, 2500):
        bench.log(n)
    report = bench.finish()

    assert backend.positions() == list(range(3001))
    assert [e.seq for e in backend.stored[SITE]] == list(range(3001))
    assert [e.time for e in backend.stored[SITE]] == [1000.0 + i for i in range(3001)]
    assert (run_of(report).confirmed, run_of(report).pending, run_of(report).state) == (3001, 0, "finished")
    assert backend.statuses == {SITE: RunStatus.FINISHED}
    assert len(backend.threads) == 1
    assert threading.get_ident() not in backend.threads
    assert (backend.calls["open"], backend.calls["finish"], backend.calls["close"]) == (1, 1, 1)
    info = backend.infos[0]
    assert (info.key, info.side, info.created, info.resume_from) == (("job-1", SITE), Side.SERVER, 1000.0, 0)


def test_a_finish_that_begins_while_the_lane_looks_for_work_is_not_missed(bench: Bench) -> None:
    """It may come between any two steps of the lane's loop. The lane clears its wake-up once in each turn."""
    lane = bench.lane(MemoryBackend())
    clear, begun = lane._wake.clear, threading.Event()

    def begin_and_clear() -> None:
        if not begun.is_set():
            begun.set()
            lane.begin_finish({}, RunStatus.FINISHED)
        clear()

    lane._wake.clear = begin_and_clear  # type: ignore[method-assign]
    lane._wake.set()  # a turn in which there is nothing to deliver

    lane._thread.join(WAIT_S)
    assert begun.is_set()
    assert not lane._thread.is_alive()


def test_no_write_is_larger_than_the_backend_can_take(bench: Bench) -> None:
    sizes: list[int] = []
    backend = MemoryBackend(lambda method, batch: sizes.append(len(batch)) if method == "write" else None, max_batch=7)
    bench.lane(backend)
    bench.log(100, rows=3)
    bench.finish()
    assert max(sizes) <= 7
    assert sum(sizes) == 300
    assert backend.positions() == list(range(300))


def test_records_that_arrive_while_the_lane_works_are_delivered(bench: Bench) -> None:
    backend = MemoryBackend()
    bench.lane(backend)
    for i in range(50):
        bench.log(3)
        if i % 10 == 0:
            assert backend.wait_for(SITE, 3 * (i + 1))
    bench.finish()
    assert backend.positions() == list(range(150))


def test_a_transient_error_is_tried_again_and_the_time_that_the_backend_asks_for_is_kept(bench: Bench) -> None:
    calls: list[float] = []

    def behave(method: str, argument: Any) -> None:
        if method == "write":
            calls.append(time.monotonic())
            if len(calls) <= 2:
                raise TransientError("busy", retry_after_s=0.15)

    backend = MemoryBackend(behave)
    bench.log(10)
    bench.lane(backend)
    report = bench.finish()  # also at the end of the job, a time that was asked for is kept
    assert backend.positions() == list(range(10))
    assert all(b - a >= 0.15 for a, b in pairwise(calls[:3]))
    assert run_of(report).confirmed == 10
    assert "busy" in run_of(report).last_error


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(bad=st.sets(st.integers(0, 59), max_size=6), size=st.sampled_from([1, 7, 1000]), permanent=st.booleans())
def test_only_the_records_that_cannot_be_stored_are_rejected(
    tmp_path_factory: pytest.TempPathFactory, bad: set[int], size: int, permanent: bool
) -> None:
    bench = Bench(tmp_path_factory.mktemp("receiver"))
    error: Callable[[], BaseException] = (lambda: PermanentError("no")) if permanent else (lambda: RuntimeError("bug"))
    backend = MemoryBackend(poisoned(bad, error), max_batch=size)
    bench.log(20, rows=3)
    bench.lane(backend)
    report = bench.finish()
    assert backend.positions() == [i for i in range(60) if i not in bad]
    reason = "permanent_error" if permanent else "backend_error"
    assert run_of(report).rejected == ({reason: len(bad)} if bad else {})
    assert run_of(report).confirmed == 60 - len(bad)


def test_a_backend_that_fails_with_every_record_loses_none_of_them(bench: Bench) -> None:
    backend = MemoryBackend(poisoned(set(range(100)), lambda: RuntimeError("all of it is broken")))
    bench.log(10)
    bench.lane(backend)
    report = bench.finish(0.3)
    assert (run_of(report).confirmed, run_of(report).pending, run_of(report).state) == (0, 10, "unfinished")
    assert "all of it is broken" in run_of(report).last_error


def test_a_broken_first_record_of_a_run_does_not_hold_up_the_rest(bench: Bench) -> None:
    """It comes alone, as params logged at the start do, and all that follows in other rows."""
    backend = MemoryBackend(poisoned({0, 1}, lambda: RuntimeError("bug")))
    bench.lane(backend)
    bench.log(1)
    bench.log(1)
    bench.log(10)
    assert backend.wait_for(SITE, 10)
    report = bench.finish()
    assert backend.positions() == list(range(2, 12))
    assert (run_of(report).rejected, run_of(report).confirmed) == ({"backend_error": 2}, 10)
    assert "bug" in run_of(report).last_error


@pytest.mark.parametrize("error", [RuntimeError("bug"), PermanentError("no")], ids=repr)
def test_a_record_that_is_rejected_last_is_counted_at_once(bench: Bench, error: Exception) -> None:
    backend = MemoryBackend(poisoned({5}, lambda: error), max_batch=1)
    bench.log(6)
    bench.lane(backend)
    run = run_of(bench.finish())
    assert (run.confirmed, sum(run.rejected.values()), run.pending) == (5, 1, 0)


def test_an_outage_does_not_make_a_single_odd_error_reject_a_record(bench: Bench) -> None:
    errors: list[Exception] = [TransientError("down")] * 6 + [RuntimeError("a reply that is no JSON")] * 2
    seen: list[int] = []

    def behave(method: str, batch: Any) -> None:
        if method == "write":
            seen.append(len(batch))
            if len(seen) > 1 and errors:
                raise errors.pop(0)

    backend = MemoryBackend(behave)
    bench.log(1)
    bench.log(1)
    bench.lane(backend)
    bench.lanes["memory"].notify(1)
    assert backend.wait_for(SITE, 1)
    bench.log(1)
    report = bench.finish()
    assert (run_of(report).rejected, run_of(report).confirmed) == ({}, 3)
    assert backend.positions() == [0, 1, 2]


def test_what_a_backend_rejects_itself_is_counted_by_its_reason(bench: Bench) -> None:
    def behave(method: str, batch: Any) -> Any:
        if method != "write":
            return None
        return WriteReport([Rejection(e.position, "odd") for e in batch if e.position % 2])

    bench.log(11)
    bench.lane(MemoryBackend(behave))
    report = bench.finish()
    assert (run_of(report).rejected, run_of(report).confirmed) == ({"odd": 5}, 6)


def test_rejections_of_records_that_were_not_handed_over_or_twice_are_not_counted(bench: Bench) -> None:
    def behave(method: str, batch: Any) -> Any:
        if method != "write":
            return None
        return WriteReport([Rejection(p, "odd") for p in (1, 1, 1, 99, -5)])

    bench.log(3)
    bench.lane(MemoryBackend(behave))
    report = bench.finish()
    assert (run_of(report).rejected, run_of(report).confirmed) == ({"odd": 1}, 2)


def test_what_a_backend_does_with_its_list_changes_no_count(bench: Bench) -> None:
    backend = Consuming()
    bench.log(30)
    bench.lane(backend)
    report = bench.finish()
    assert backend.positions() == list(range(30))
    assert (run_of(report).confirmed, run_of(report).pending) == (30, 0)


def test_a_backend_that_returns_something_else_is_told_so_and_stops_nothing(bench: Bench) -> None:
    bench.log(3)
    bench.lane(Odd())
    other = MemoryBackend()
    bench.lane(other, "other")
    report = bench.finish(0.5)
    run = run_of(report)
    assert "bool" in run.last_error
    assert "WriteReport" in run.last_error
    assert other.positions() == [0, 1, 2]


@pytest.mark.parametrize(
    "error", [TransientError("t"), RuntimeError("r"), SystemExit(3), KeyboardInterrupt()], ids=repr
)
def test_open_run_is_tried_again(bench: Bench, error: BaseException) -> None:
    backend = MemoryBackend(failing(3, lambda: error, "open"))
    bench.log(5)
    bench.lane(backend)
    report = bench.finish()
    assert backend.calls["open"] == 4
    assert (run_of(report).confirmed, run_of(report).state) == (5, "finished")


def test_open_run_that_fails_for_good_leaves_the_records_pending_and_says_why(bench: Bench) -> None:
    backend = MemoryBackend(failing(99, lambda: PermanentError("no such project"), "open"))
    bench.log(5)
    bench.lane(backend)
    report = bench.finish()
    run = run_of(report)
    assert (backend.calls["open"], run.pending, run.state) == (1, 5, "stopped")
    assert "no such project" in run.last_error


@pytest.mark.parametrize("method", ["open", "write", "flush", "finish", "preflight"])
def test_a_call_that_leaves_the_interpreter_ends_neither_the_lane_nor_the_job(bench: Bench, method: str) -> None:
    backend = MemoryBackend(failing(1, lambda: SystemExit(1), method), buffering=True)
    bench.log(5)
    bench.lane(backend)
    report = bench.finish()
    assert backend.positions() == list(range(5))
    assert (run_of(report).confirmed, run_of(report).pending) == (5, 0)
    assert run_of(report).state == ("unfinished" if method == "finish" else "finished")
    assert backend.calls["close"] == 1


@pytest.mark.parametrize("method", ["preflight", "open", "write", "flush", "finish"])
def test_a_backend_that_hangs_is_left_behind_and_the_report_says_so(bench: Bench, method: str) -> None:
    release, hangs = threading.Event(), threading.Event()

    def behave(called: str, argument: Any) -> None:
        if called == method:
            hangs.set()
            release.wait(WAIT_S)

    backend, other = MemoryBackend(behave, buffering=True), MemoryBackend()
    for site in (SITE, "site-2"):
        bench.log(5, site)
    bench.lane(other, "other")
    lane = bench.lane(backend)
    for each in bench.lanes.values():
        each.begin_finish({}, RunStatus.FINISHED)
    assert hangs.wait(WAIT_S)
    start = time.monotonic()
    report = bench.finish(0.2)

    assert time.monotonic() - start < 5
    for site in (SITE, "site-2"):
        run = run_of(report, site)
        assert run.confirmed + run.pending == 5
        if run.state != "finished":
            assert run.state == "unfinished"
            assert "has not returned" in run.last_error
        assert run_of(report, site, "other").confirmed == 5
    assert "unfinished" in {run_of(report, site).state for site in (SITE, "site-2")}
    release.set()
    lane._thread.join(WAIT_S)  # it ends by itself when the backend comes back, and hurts nobody
    assert not lane._thread.is_alive()
    assert backend.calls["close"] == 1


def test_a_slow_backend_stops_at_the_deadline_between_two_calls(bench: Bench) -> None:
    def behave(method: str, argument: Any) -> None:
        if method == "write":
            time.sleep(0.02)

    backend = MemoryBackend(behave, max_batch=1)
    bench.log(2000)
    lane = bench.lane(backend)
    assert backend.wait_for(SITE, 2)
    start = time.monotonic()
    report = bench.finish(0.2)
    assert time.monotonic() - start < 2
    assert not lane._thread.is_alive()
    assert 0 < len(backend.positions()) < 2000
    assert run_of(report).state == "unfinished"
    assert run_of(report).pending > 0


def test_a_site_that_cannot_be_stored_does_not_hold_up_the_others(bench: Bench) -> None:
    def behave(method: str, argument: Any) -> None:
        if method == "open" and argument.key.site == SITE:
            raise TransientError("not this one", retry_after_s=60)

    backend = MemoryBackend(behave)
    bench.lane(backend)
    bench.log(5)
    bench.log(5, "site-2")
    assert backend.wait_for("site-2", 5)
    report = bench.finish(0.3)
    assert (run_of(report).pending, run_of(report).state) == (5, "unfinished")
    assert (run_of(report, "site-2").confirmed, run_of(report, "site-2").state) == (5, "finished")


def test_a_dead_backend_delays_no_other(bench: Bench) -> None:
    dead, good = MemoryBackend(failing(10**6, lambda: TransientError("down"))), MemoryBackend()
    bench.lane(dead, "dead")
    bench.lane(good, "good")
    bench.log(1000)
    assert good.wait_for(SITE, 1000)
    report = bench.finish(0.2)
    assert run_of(report, lane="dead").pending == 1000
    assert run_of(report, lane="good").confirmed == 1000


def test_finish_is_tried_again_until_the_deadline(bench: Bench) -> None:
    backend = MemoryBackend(failing(3, lambda: TransientError("not yet"), "finish"))
    bench.log(5)
    bench.lane(backend)
    report = bench.finish(status=RunStatus.ABORTED)
    assert backend.calls["finish"] == 4
    assert backend.statuses == {SITE: RunStatus.ABORTED}
    assert run_of(report).state == "finished"


def test_finish_that_never_works_is_reported_although_all_is_confirmed(bench: Bench) -> None:
    bench.log(5)
    bench.lane(MemoryBackend(failing(9999, lambda: RuntimeError("cannot end"), "finish")))
    run = run_of(bench.finish())
    assert (run.confirmed, run.pending, run.state) == (5, 0, "unfinished")
    assert "cannot end" in run.last_error


def test_only_a_flush_confirms_what_a_buffering_backend_was_handed(bench: Bench) -> None:
    may_flush = threading.Event()

    def behave(method: str, argument: Any) -> None:
        if method == "flush" and not may_flush.is_set():
            raise TransientError("not durable yet")

    backend = MemoryBackend(behave, buffering=True)
    bench.lane(backend)
    bench.log(10)
    assert backend.wait_for(SITE, 10)
    assert bench.journal.run_state("memory", 1).progress.confirmed == 0
    may_flush.set()
    report = bench.finish()
    assert run_of(report).confirmed == 10
    assert backend.positions() == list(range(10))


def test_what_the_core_refuses_for_the_backend_is_counted_and_positions_skip_it(bench: Bench) -> None:
    backend = MemoryBackend(kinds=frozenset({Kind.METRICS}), late_steps=False, nonfinite=False)
    bench.add(
        [
            metric(0, step=5),
            Record(1, 1.0, 1, None, Text("t", "x")),
            metric(2, step=4),
            Record(3, 1.0, 9, None, Metrics({"a": float("nan")})),
            Record(4, 1.0, 9, None, Metrics({"a": float("inf"), "b": 1.0})),
        ]
    )
    bench.lane(backend)
    run = run_of(bench.finish())
    assert backend.positions() == [0, 4]
    assert run.rejected == {"unsupported_kind": 1, "late_step": 1, "nonfinite": 1}
    assert (run.confirmed, run.altered) == (2, {"nonfinite_removed": 1})


def test_an_error_of_the_journal_ends_no_lane(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is full for a while."""
    from trackhub.errors import JournalError

    save, failures = bench.journal.save_run, [5]

    def save_run(*args: Any) -> None:
        if failures[0]:
            failures[0] -= 1
            raise JournalError("database or disk is full")
        save(*args)

    monkeypatch.setattr(bench.journal, "save_run", save_run)
    backend = MemoryBackend(redelivery=Redelivery.AT_LEAST_ONCE)
    bench.lane(backend)
    bench.log(10)
    bench.log(10)
    run = run_of(bench.finish())
    assert backend.positions() == list(range(20))
    assert run.confirmed == 20


def test_a_defect_of_the_lane_itself_is_in_the_report(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a bug in trackhub")

    monkeypatch.setattr(Lane, "_advance_runs", broken)
    bench.log(5)
    bench.lane(MemoryBackend())
    run = run_of(bench.finish(0.5))
    assert (run.pending, run.state) == (5, "unfinished")
    assert "a bug in trackhub" in run.last_error


@pytest.mark.parametrize("at_least_s", [None, 0.5, 30.0])
def test_waits_grow_stay_within_bounds_and_keep_what_the_peer_asked_for(at_least_s: float | None) -> None:
    backoff = Backoff(0.2, 15.0)
    waits = [backoff.next_wait_s(at_least_s) for _ in range(20)]
    for i, wait in enumerate(waits):
        bound = min(0.2 * 2**i, 15.0)
        assert max(at_least_s or 0.0, bound / 2) <= wait <= max(at_least_s or 0.0, bound)
    backoff.reset()
    assert backoff.next_wait_s() <= 0.2


def test_records_that_cannot_be_understood_are_counted_by_reason_and_cost_no_other(bench: Bench) -> None:
    backend = MemoryBackend()
    sound = [encode_frame(metric(i)) for i in range(2)]
    gap = msgspec.msgpack.encode(Record(1, 1000.0, None, None, Gap(1, "damaged")))
    strange = [reframed(Kind.METRICS, gap), reframed(42, gap), reframed(Kind.METRICS, b"\xc1")]

    site = bench.journal.add_site(SITE, 1000.0)
    bench.journal.append(site, Batch(SITE, 0, 5, 5, b"".join([sound[0], *strange, sound[1]])), {})
    bench.counts[SITE] = 5
    bench.lane(backend)
    report = bench.finish()

    assert backend.positions() == [0, 4]
    assert run_of(report).rejected == {"wrong_kind": 1, "unknown_kind": 1, "undecodable": 1}


def reframed(kind: int, body: bytes) -> bytes:
    """Return a sound frame, whatever its body is."""
    checked = struct.pack("<IB", len(body), kind) + body
    return struct.pack("<I", zlib.crc32(checked)) + checked


def test_runs_of_sites_that_the_receiver_does_not_know_end_as_it_says(bench: Bench) -> None:
    backend = MemoryBackend()
    bench.log(5)
    bench.lane(backend)

    bench.finish(status=RunStatus.FAILED)

    assert backend.statuses == {SITE: RunStatus.FAILED}
