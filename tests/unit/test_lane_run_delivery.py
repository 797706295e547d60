# SPDX-License-Identifier: Apache-2.0
"""The delivery of one run alone, without a lane's thread: its states, and what leads from one to the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import STREAM, WAIT_S, MemoryBackend, metric
from tests.unit.rigs import SITE, Bench, delivery_on, failing, run_of
from trackhub.delivery.journal.tables_and_rows import Progress
from trackhub.delivery.lane.deliver_run import RunDelivery
from trackhub.delivery.share_last_disk_room import DiskRoom
from trackhub.errors import JournalError, PermanentError, TransientError
from trackhub.job_and_run_info import RunStatus
from trackhub.records import Artifact, Blob, Kind, Metrics, Record
from trackhub.spi import Entry, Redelivery, Results

pytestmark = pytest.mark.usefixtures("quick_retries")


def store_end(bench: Bench, delivery: RunDelivery) -> None:
    """Store how a run ended, as its lane does. There must be something to store."""
    end = delivery.unstored_end()
    assert end is not None
    bench.journal.save_runs({("memory", delivery.site_id): end})
    delivery.note_end_stored()
    assert delivery.unstored_end() is None


def progress(bench: Bench) -> Progress:
    return bench.journal.run_state("memory", 1).progress


def test_a_run_without_records_is_finished_without_being_opened(bench: Bench) -> None:
    backend = MemoryBackend()
    delivery = delivery_on(bench, backend)

    moved = delivery.advance(flush_now=True)
    delivery.finish(RunStatus.FINISHED)
    store_end(bench, delivery)

    assert not moved
    assert delivery.is_over()
    assert (progress(bench).state, backend.calls["open"], backend.calls["finish"]) == ("finished", 0, 0)


def test_a_run_is_opened_then_written_then_finished(bench: Bench) -> None:
    backend = MemoryBackend()
    bench.log(5)
    delivery = delivery_on(bench, backend)

    opened = (delivery.advance(flush_now=False), backend.calls["open"], backend.calls["write"])
    written = (delivery.advance(flush_now=False), backend.positions(), delivery.is_idle())
    nothing = delivery.advance(flush_now=False)
    delivery.finish(RunStatus.FAILED)
    store_end(bench, delivery)

    assert opened == (True, 1, 0)
    assert written == (True, [0, 1, 2, 3, 4], True)
    assert not nothing
    assert backend.statuses == {SITE: RunStatus.FAILED}
    assert (progress(bench).state, progress(bench).confirmed, delivery.is_over()) == ("finished", 5, True)


@pytest.mark.parametrize(("delivered", "last"), [(True, "ended"), (False, "open")])
def test_a_run_that_a_replay_continues_is_shown_as_while_it_was_open(bench: Bench, delivered: bool, last: str) -> None:
    """Its backend must not name a command that is safe only after the last record, such as an upload."""
    backend = MemoryBackend()
    backend.results = lambda info: Results(path="ended" if backend.statuses else "open")  # type: ignore[method-assign]
    bench.log(5)
    delivery = delivery_on(bench, backend)

    delivery.advance(flush_now=False)
    opened = delivery.results
    if delivered:
        delivery.advance(flush_now=False)
    delivery.finish(RunStatus.FINISHED)

    assert backend.statuses == {SITE: RunStatus.FINISHED}
    assert (opened, delivery.results) == (Results(path="open"), Results(path=last))


def test_a_run_that_cannot_be_opened_now_stays_closed(bench: Bench) -> None:
    backend = MemoryBackend(failing(1, lambda: TransientError("down"), "open"))
    bench.log(5)
    delivery = delivery_on(bench, backend)

    first = (delivery.advance(flush_now=False), delivery.is_over(), delivery.is_idle())
    second = delivery.advance(flush_now=False)

    assert first == (False, False, False)
    assert delivery.due() == delivery.timer.not_before > 0
    assert (second, backend.calls["open"]) == (True, 2)


def test_a_run_that_can_never_be_opened_is_stopped(bench: Bench) -> None:
    backend = MemoryBackend(failing(99, lambda: PermanentError("no such project"), "open"))
    bench.log(5)
    delivery = delivery_on(bench, backend)

    delivery.advance(flush_now=False)

    assert (delivery.is_over(), delivery.is_idle(), delivery.advance(flush_now=True)) == (True, True, False)
    assert (progress(bench).state, progress(bench).confirmed) == ("stopped", 0)
    assert backend.calls["open"] == 1


def test_a_run_that_another_journal_wrote_is_stopped(bench: Bench) -> None:
    held = [Entry(98, 1000.0, 98, None, Metrics({"a": 1.0}), "stream", 98)]
    backend = MemoryBackend(redelivery=Redelivery.RESUMABLE, stored={SITE: held})
    bench.log(5)
    delivery = delivery_on(bench, backend)

    delivery.advance(flush_now=False)

    assert (delivery.is_over(), progress(bench).state, backend.calls["write"]) == (True, "stopped", 0)
    assert "holds 99 records" in progress(bench).last_error


@pytest.mark.parametrize("method", ["write", "flush"])
@pytest.mark.parametrize("redelivery", list(Redelivery))
def test_a_running_job_shows_an_error_as_long_as_the_backend_fails(
    bench: Bench, method: str, redelivery: Redelivery
) -> None:
    """Nearly always some records are pending. So these do not tell whether an error is one of the past."""
    backend = MemoryBackend(buffering=method == "flush", redelivery=redelivery)
    delivery = delivery_on(bench, backend, flush_s=0.0)
    found = []
    for outage in ("away", "", "away again", ""):
        bench.log(5)
        backend.behave = failing(99 if outage else 0, lambda text=outage: TransientError(text), method)  # type: ignore[misc]
        for _ in range(5):
            delivery.advance(flush_now=True)
        bench.log(5)
        run = run_of(bench.journal.report(["memory"]))
        assert run.pending > 0
        found.append(run.trouble())

    assert found == ["TransientError: away", "", "TransientError: away again", ""]


def test_a_buffering_run_is_confirmed_by_its_flush_when_that_is_due(bench: Bench) -> None:
    backend = MemoryBackend(buffering=True)
    bench.log(5)
    delivery = delivery_on(bench, backend)
    delivery.advance(flush_now=False)

    delivery.advance(flush_now=False)
    written = (backend.positions(), progress(bench).confirmed, delivery.is_idle(), delivery.advance(flush_now=False))
    due_in_s = delivery.due() - time.monotonic()
    confirmed = (delivery.advance(flush_now=True), progress(bench).confirmed, delivery.is_idle())

    assert written == ([0, 1, 2, 3, 4], 0, False, False)
    assert 3500 < due_in_s <= 3600
    assert confirmed == (True, 5, True)
    assert backend.calls["flush"] == 1


def test_a_flush_that_fails_is_repeated_and_nothing_is_written_twice(bench: Bench) -> None:
    backend = MemoryBackend(failing(2, lambda: TransientError("down"), "flush"), buffering=True)
    bench.log(5)
    delivery = delivery_on(bench, backend)

    moved = [delivery.advance(flush_now=True) for _ in range(5)]

    assert moved == [True, True, False, False, True]
    assert (backend.calls["write"], backend.calls["flush"], progress(bench).confirmed) == (1, 3, 5)


def test_a_run_whose_finish_fails_for_now_stays_open(bench: Bench) -> None:
    backend = MemoryBackend(failing(1, lambda: TransientError("down"), "finish"))
    bench.log(5)
    delivery = delivery_on(bench, backend)
    while delivery.advance(flush_now=True):
        pass

    delivery.finish(RunStatus.FINISHED)
    before = (delivery.is_over(), progress(bench).state, delivery.unstored_end())
    delivery.finish(RunStatus.FINISHED)
    store_end(bench, delivery)

    assert before == (False, "open", None)
    assert (delivery.is_over(), progress(bench).state) == (True, "finished")


def test_a_run_whose_finish_breaks_is_unfinished(bench: Bench) -> None:
    backend = MemoryBackend(failing(1, lambda: RuntimeError("bug"), "finish"))
    bench.log(5)
    delivery = delivery_on(bench, backend)
    while delivery.advance(flush_now=True):
        pass

    delivery.finish(RunStatus.FINISHED)
    store_end(bench, delivery)

    assert (delivery.is_over(), progress(bench).state, progress(bench).last_error) == (
        True,
        "unfinished",
        "RuntimeError: bug",
    )


@pytest.mark.parametrize("opened", [False, True])
def test_a_run_that_is_given_up_is_unfinished_with_the_reason(bench: Bench, opened: bool) -> None:
    bench.log(5)
    delivery = delivery_on(bench, MemoryBackend())
    if opened:
        delivery.advance(flush_now=False)

    delivery.give_up("the backend has not returned")
    store_end(bench, delivery)

    assert (delivery.is_over(), progress(bench).state) == (True, "unfinished")
    assert progress(bench).last_error == "the backend has not returned"


@pytest.mark.parametrize("end", [lambda d: d.give_up("late"), lambda d: d.finish(RunStatus.FAILED)], ids=["up", "end"])
def test_a_run_that_an_earlier_receiver_finished_stays_finished(
    bench: Bench, end: Callable[[RunDelivery], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.log(5)
    first = delivery_on(bench, MemoryBackend())
    while first.advance(flush_now=True):
        pass
    first.finish(RunStatus.FINISHED)
    store_end(bench, first)
    later = delivery_on(bench, MemoryBackend())
    monkeypatch.setattr(bench.journal, "save_run", no_writing)

    end(later)

    assert later.unstored_end() is None
    assert (later.is_over(), progress(bench).state, progress(bench).last_error) == (True, "finished", "")


def no_writing(*args: Any) -> None:
    raise AssertionError("there is nothing to store")


def test_entries_that_cannot_be_announced_are_not_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: Any) -> None:
        raise JournalError("the disk is full")

    backend = MemoryBackend(redelivery=Redelivery.AT_LEAST_ONCE)
    bench.log(5)
    delivery = delivery_on(bench, backend)
    delivery.advance(flush_now=False)
    monkeypatch.setattr(bench.journal, "save_run", full_disk)

    refused = (delivery.advance(flush_now=False), backend.calls["write"])
    monkeypatch.undo()
    again = (delivery.advance(flush_now=False), backend.positions())

    assert refused == (False, 0)
    assert again == (True, [0, 1, 2, 3, 4])


def test_nothing_more_is_written_once_the_lane_is_stopped(bench: Bench) -> None:
    backend = MemoryBackend(max_batch=2)
    bench.log(5)
    delivery = delivery_on(bench, backend)
    backend.behave = lambda method, argument: delivery._stop.set() if method == "write" else None
    delivery.advance(flush_now=False)

    moved = delivery.advance(flush_now=False)

    assert (moved, backend.positions(), progress(bench).confirmed) == (False, [0, 1], 0)


def test_a_run_that_lost_what_it_had_confirmed_is_written_again_from_the_start(bench: Bench) -> None:
    backend = MemoryBackend(redelivery=Redelivery.RESUMABLE)
    bench.log(5)
    first = delivery_on(bench, backend)
    while first.advance(flush_now=True):
        pass
    backend.stored.clear()
    bench.log(5)
    later = delivery_on(bench, backend)

    while later.advance(flush_now=True):
        pass

    assert backend.positions() == list(range(10))
    assert progress(bench).confirmed == 10


def test_a_halved_batch_does_not_wait_longer_for_the_failures_of_the_whole(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """The first failure in a row is logged: there is one for the whole batch, and one for its first half."""
    backend = MemoryBackend(failing(4, lambda: RuntimeError("bug")))
    bench.log(2)
    delivery = delivery_on(bench, backend)
    delivery.advance(flush_now=False)

    moved = [delivery.advance(flush_now=False) for _ in range(5)]

    assert moved == [False, False, False, False, True]
    assert backend.positions() == [0, 1]
    assert caplog.text.count("RuntimeError: bug; the records stay in the journal, and the lane tries again") == 2


def test_a_wait_may_be_cut_short_again_after_a_confirmation(bench: Bench) -> None:
    backend = MemoryBackend(failing(1, lambda: TransientError("down")))
    bench.log(5)
    delivery = delivery_on(bench, backend)
    delivery.advance(flush_now=True)
    first = (delivery.advance(flush_now=True), delivery.timer.hurry(), delivery.timer.hurry())
    confirmed = (delivery.advance(flush_now=True), progress(bench).confirmed)

    backend.behave = failing(1, lambda: TransientError("down"))
    bench.log(5)
    second = (delivery.advance(flush_now=True), delivery.timer.hurry(), delivery.timer.hurry())

    assert confirmed == (True, 5)
    assert first == second == (False, True, False)


@pytest.mark.parametrize("redelivery", [Redelivery.AT_LEAST_ONCE, Redelivery.RESUMABLE])
def test_records_that_wait_for_room_on_a_disk_are_not_handed_over_in_the_journal_either(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, redelivery: Redelivery
) -> None:
    """A later lane must not count them as possible duplicates, or take another journal's records for them."""
    backend = MemoryBackend(redelivery=redelivery)
    bench.log(20)
    with monkeypatch.context() as patch:
        patch.setattr(DiskRoom, "_may_write", lambda *_: False)
        waiting = delivery_on(bench, backend)
        for _ in range(10):
            waiting.advance(flush_now=False)
        waiting.give_up("")
        store_end(bench, waiting)
    assert "the backends' disk is nearly full" in progress(bench).last_error
    assert (backend.positions(), bench.journal.run_state("memory", 1).written) == ([], 0)

    later = delivery_on(bench, backend)
    while not later.is_idle():
        later.advance(flush_now=True)

    assert backend.positions() == list(range(20))
    assert (progress(bench).confirmed, progress(bench).possible_duplicates) == (20, 0)


def test_files_that_wait_for_room_on_a_disk_are_no_possible_duplicates(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = list[bool]()

    def has_room_later(room: DiskRoom, site: str, size: int, files: float) -> bool:
        looks.append(len(looks) > 10)
        return looks[-1] or size == 0

    monkeypatch.setattr(DiskRoom, "_may_write", has_room_later)
    backend = MemoryBackend(redelivery=Redelivery.AT_LEAST_ONCE, files_beside=frozenset({Kind.ARTIFACT}))
    file = Artifact("model", Blob(f"{STREAM}-1", 1, "0" * 64, "text/plain"), "model.bin")
    bench.add([metric(0), Record(1, 1000.0, 1, None, file)])
    lane = bench.lane(backend)
    lane.wait_for_preflight(WAIT_S)

    run = run_of(bench.finish())

    assert (run.confirmed, run.possible_duplicates, run.rejected) == (2, 0, {})
    assert len(looks) > 10
