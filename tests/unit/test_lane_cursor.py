# SPDX-License-Identifier: Apache-2.0
"""The cursor alone: what it counts, what it stores in the journal and when, and what it doubts after a crash."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.unit.rigs import SITE, Bench
from trackhub.delivery.journal.tables_and_rows import Shift
from trackhub.delivery.lane.cursor import Cursor
from trackhub.errors import JournalError, PermanentError
from trackhub.records import Metrics
from trackhub.spi import Entry, Redelivery, Rejection

LANE = "memory"


def entries(*positions: int) -> list[Entry]:
    return [Entry(p, 1000.0 + p, p, None, Metrics({"a": 1.0}), "stream", p) for p in positions]


def cursor_on(bench: Bench, redelivery: Redelivery = Redelivery.AT_LEAST_ONCE) -> Cursor:
    """Return a cursor as a lane takes it up, new or after a restart."""
    return Cursor(bench.journal, LANE, 1, SITE, redelivery)


def stored(bench: Bench) -> tuple[int, int]:
    """Return the written and the confirmed cursor that the journal holds."""
    return bench.journal.run_state(LANE, 1)[:2]


def test_a_new_run_stands_before_its_first_row(bench: Bench) -> None:
    bench.log(10, rows=2)

    cursor = cursor_on(bench)

    assert (cursor.written, cursor.confirmed, cursor.resume_from()) == (0, 0, 0)
    assert cursor.has_unconfirmed_rows()
    assert cursor.progress.state == "open"


def test_counts_become_progress_only_when_they_are_confirmed(bench: Bench) -> None:
    bench.log(10)
    cursor = cursor_on(bench)
    cursor.count_stored(entries(*range(6)))
    cursor.count_held(6)
    cursor.reject(Rejection(7, "late_step"))
    cursor.count_rejected("damaged", 2)
    cursor.count_altered(["key_escaped", "nonfinite_removed"])
    cursor.written = 1

    before = bench.journal.run_state(LANE, 1)
    cursor.confirm(b"memory")
    after = bench.journal.run_state(LANE, 1)

    assert (before.confirmed, before.progress.confirmed, before.progress.rejected) == (0, 0, {})
    assert (after.written, after.confirmed) == (1, 1)
    assert (after.progress.confirmed, after.progress.rejected) == (7, {"late_step": 1, "damaged": 2})
    assert after.progress.altered == {"key_escaped": 1, "nonfinite_removed": 1}
    assert (after.progress.memory, after.progress.stored_to) == (b"memory", 7)


def test_counts_of_two_confirmations_add_up_and_none_counts_twice(bench: Bench) -> None:
    bench.log(10, rows=2)
    cursor = cursor_on(bench)
    for row in (1, 2):
        cursor.count_stored(entries(row))
        cursor.reject(Rejection(0, "odd"))
        cursor.written = row
        cursor.confirm(b"")

    cursor.confirm(b"")

    assert (cursor.progress.confirmed, cursor.progress.rejected) == (2, {"odd": 2})


def test_a_later_lane_goes_on_after_the_last_confirmed_row(bench: Bench) -> None:
    bench.log(10, rows=3)
    cursor = cursor_on(bench)
    cursor.written = 2
    cursor.count_stored(entries(*range(20)))
    cursor.confirm(b"memory")

    later = cursor_on(bench)

    assert (later.confirmed, later.written, later.resume_from()) == (2, 2, 20)
    assert (later.progress.confirmed, later.progress.memory) == (20, b"memory")


@pytest.mark.parametrize(
    ("redelivery", "expected"),
    [
        (Redelivery.AT_LEAST_ONCE, 2),
        (Redelivery.RESUMABLE, 2),
        (Redelivery.IDEMPOTENT, 0),
        (Redelivery.REBUILD, 0),
    ],
)
def test_rows_are_announced_where_a_later_lane_must_know_of_them(
    bench: Bench, redelivery: Redelivery, expected: int
) -> None:
    bench.log(10, rows=3)

    cursor_on(bench, redelivery).announce(2)

    assert stored(bench) == (expected, 0)


def test_each_row_is_announced_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(bench.journal, "save_run", lambda lane, site, written, *rest: saved.append(written))
    bench.log(10, rows=3)
    cursor = cursor_on(bench)

    for row in (1, 1, 2, 2, 2):
        cursor.announce(row)

    assert saved == [1, 2]


def test_an_announcement_that_cannot_be_stored_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.log(10)
    cursor = cursor_on(bench)
    monkeypatch.setattr(bench.journal, "save_run", full_disk)

    with pytest.raises(JournalError, match="full"):
        cursor.announce(1)
    monkeypatch.undo()
    cursor.announce(1)

    assert stored(bench) == (1, 0)


def test_a_confirmation_that_cannot_be_stored_is_stored_with_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.log(10, rows=2)
    cursor = cursor_on(bench)
    monkeypatch.setattr(bench.journal, "save_run", full_disk)
    cursor.count_stored(entries(*range(10)))
    cursor.written = 1
    cursor.confirm(b"")
    monkeypatch.undo()

    cursor.count_stored(entries(*range(10, 20)))
    cursor.written = 2
    cursor.confirm(b"")

    assert stored(bench) == (2, 2)
    assert bench.journal.run_state(LANE, 1).progress.confirmed == 20


def full_disk(*args: Any) -> None:
    raise JournalError("the disk is full")


@pytest.mark.parametrize(("redelivery", "doubtful"), [(Redelivery.AT_LEAST_ONCE, 20), (Redelivery.IDEMPOTENT, 0)])
def test_what_an_earlier_lane_announced_counts_as_possible_duplicates(
    bench: Bench, redelivery: Redelivery, doubtful: int
) -> None:
    bench.log(10, rows=3)
    cursor_on(bench, redelivery).announce(2)

    later = cursor_on(bench, redelivery)
    later.doubt_earlier_lanes()
    later.count_stored(entries(*range(30)))
    later.written = 3
    later.confirm(b"")

    assert later.progress.possible_duplicates == doubtful


def test_a_second_crash_forgets_nothing_that_was_announced_before_the_first(bench: Bench) -> None:
    """The second lane announces fewer rows than the first one had, since it dies sooner."""
    bench.log(10, rows=3)
    cursor_on(bench).announce(3)
    cursor_on(bench).announce(1)

    third = cursor_on(bench)
    third.doubt_earlier_lanes()
    third.count_stored(entries(*range(30)))
    third.written = 3
    third.confirm(b"")

    assert third.progress.possible_duplicates == 30


def test_a_batch_that_failed_counts_as_possible_duplicates_when_it_is_stored(bench: Bench) -> None:
    bench.log(10)
    cursor = cursor_on(bench)

    cursor.doubt(entries(*range(5)))
    cursor.doubt(entries(0, 1))  # halved: the rest of it stays doubtful
    cursor.count_stored(entries(0, 1))
    cursor.count_stored(entries(*range(2, 10)))
    cursor.confirm(b"")

    assert cursor.progress.possible_duplicates == 5


def test_a_batch_of_which_nothing_was_stored_changes_no_count(bench: Bench) -> None:
    bench.log(10)
    cursor = cursor_on(bench)

    cursor.count_stored([])
    cursor.confirm(b"")

    assert (cursor.progress.confirmed, cursor.progress.stored_to) == (0, 0)


def test_a_run_to_rebuild_that_was_not_finished_has_nothing_confirmed(bench: Bench) -> None:
    bench.log(10)
    first = cursor_on(bench, Redelivery.REBUILD)
    first.count_stored(entries(*range(10)))
    first.written = 1
    first.note_error(RuntimeError("bug"))
    first.confirm(b"memory")

    later = cursor_on(bench, Redelivery.REBUILD)

    assert later.must_rebuild
    assert (later.confirmed, later.progress.confirmed, later.progress.memory) == (0, 0, b"")
    assert later.progress.last_error == "RuntimeError: bug"


def test_a_finished_run_to_rebuild_stays_confirmed_until_it_is_opened_again(bench: Bench) -> None:
    bench.log(10)
    first = cursor_on(bench, Redelivery.REBUILD)
    first.count_stored(entries(*range(10)))
    first.written = 1
    first.confirm(b"")
    first.end("finished")

    later = cursor_on(bench, Redelivery.REBUILD)
    kept = (later.must_rebuild, later.confirmed, later.progress.confirmed, later.progress.state)
    later.start_over()

    assert kept == (True, 1, 10, "finished")
    assert (later.must_rebuild, later.confirmed, later.progress.confirmed) == (False, 0, 0)
    assert stored(bench) == (1, 0)  # what was handed over stays known


def resumable(bench: Bench) -> Cursor:
    """Return the cursor of a run of which two of three rows were announced, one of them confirmed."""
    bench.log(10, rows=3)
    first = cursor_on(bench, Redelivery.RESUMABLE)
    first.count_stored(entries(*range(10)))
    first.written = 1
    first.confirm(b"")
    first.announce(2)
    return cursor_on(bench, Redelivery.RESUMABLE)


@pytest.mark.parametrize("position", [0, 10, 15, 20])
def test_a_run_may_hold_what_was_handed_over(bench: Bench, position: int) -> None:
    resumable(bench).check_held(position)


def test_a_run_with_records_of_a_journal_that_handed_over_none_is_refused(bench: Bench) -> None:
    bench.log(10)
    with pytest.raises(PermanentError, match=r"but this journal handed over only 0: another journal wrote to the run"):
        cursor_on(bench, Redelivery.RESUMABLE).check_held(10)


def test_what_a_run_holds_and_the_journal_lost_moves_the_positions_behind(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal handed over rows 1 and 2, with 20 records. The run holds 27, so the journal lost 7."""
    first = resumable(bench)
    first.check_held(27)
    first.check_held(27)  # nothing was handed over since: it is not counted again

    later = cursor_on(bench, Redelivery.RESUMABLE)
    later.check_held(27)
    later.written = 3
    later.count_stored(entries(*range(27, 37)))
    later.confirm(b"")

    assert [later.shift_of(row) for row in (1, 2, 3, 4)] == [0, 0, 7, 7]
    assert later.progress.shifts == [Shift(2, 7, 34)]
    assert later.progress.possible_duplicates == 7
    assert "it holds 27 records, but the journal" in caplog.text
    assert "handed over 20. The journal has lost 7" in caplog.text


def test_a_journal_may_lose_records_twice(bench: Bench) -> None:
    first = resumable(bench)
    first.check_held(27)
    first.announce(3)

    later = cursor_on(bench, Redelivery.RESUMABLE)
    later.check_held(37)  # all that was handed over
    later.check_held(40)
    bench.journal.rewind(LANE)

    assert [later.shift_of(row) for row in (2, 3, 4)] == [0, 7, 10]
    assert [cursor_on(bench, Redelivery.RESUMABLE).shift_of(row) for row in (2, 3, 4)] == [0, 7, 10]


def test_a_run_that_ends_within_the_records_of_the_servers_journal_waits_for_those(bench: Bench) -> None:
    bench.journal.continue_site(SITE, 1000.0, 50)
    bench.log(10)
    cursor = cursor_on(bench, Redelivery.RESUMABLE)

    cursor.check_held(0)
    cursor.check_held(50)
    cursor.check_held(60)  # the first batch may be in both journals
    with pytest.raises(PermanentError, match=r"before position 50 .* Replay that journal first"):
        cursor.check_held(49)
    with pytest.raises(PermanentError, match="another journal wrote to the run"):
        cursor.check_held(61)
    cursor.announce(1)
    with pytest.raises(PermanentError, match="another journal wrote to the run"):
        cursor.check_held(61)  # the rows that were handed over tell more than a guess


def test_a_run_that_lacks_what_it_had_confirmed_is_noticed(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    cursor = resumable(bench)

    assert not cursor.is_missing_confirmed(10)
    assert not caplog.records
    assert cursor.is_missing_confirmed(9)
    assert "it holds 9 records, but it had confirmed 10" in caplog.text


def test_only_the_first_record_of_each_reason_is_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.log(10)
    cursor = cursor_on(bench)
    with caplog.at_level(logging.WARNING):
        for position in range(3):
            cursor.reject(Rejection(position, "odd", "not round"))
        cursor.confirm(b"")
        cursor.reject(Rejection(3, "odd", "not round"))
        cursor.reject(Rejection(4, "late_step"))

    assert [("odd" in r.getMessage(), "late_step" in r.getMessage()) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]


def test_the_end_of_a_run_is_stored_with_its_last_error(bench: Bench) -> None:
    bench.log(10)
    cursor = cursor_on(bench)

    cursor.note_error(ValueError("no such project"))
    cursor.end("stopped")

    progress = bench.journal.run_state(LANE, 1).progress
    assert (progress.state, progress.last_error) == ("stopped", "ValueError: no such project")
