# SPDX-License-Identifier: Apache-2.0
"""Records that a confirmation leaves out, since their files are on their way, are pending alone until these arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import MemoryBackend
from tests.unit.rigs import SITE, Bench, run_of
from tests.unit.test_lane_outages import deliver
from trackhub.spi import Entry, Redelivery

pytestmark = pytest.mark.usefixtures("quick_retries")


class SlowFiles:
    """What `MemoryBackend` calls. The files of some records are on their way until ``late`` is emptied."""

    def __init__(self, *late: int) -> None:
        self.late = set(late)
        self.backend: MemoryBackend | None = None

    def __call__(self, method: str, argument: Any) -> Sequence[Entry] | None:
        if method != "left_out" or self.backend is None:
            return None
        held = {entry.position: entry for entry in self.backend.stored.get(argument, ())}
        return [held[position] for position in sorted(self.late & held.keys())]

    def serve(self, stored: dict[str, list[Entry]] | None = None, **can: Any) -> MemoryBackend:
        can = {"redelivery": Redelivery.IDEMPOTENT, "any_order": False, **can}
        self.backend = MemoryBackend(self, buffering=True, stored=stored, **can)
        return self.backend


def test_all_other_records_are_confirmed_while_one_is_left_out(bench: Bench) -> None:
    files = SlowFiles(3)
    bench.log(10)

    waiting = deliver(bench, files.serve(), 50)
    bench.log(5)
    files.late.clear()
    settled = deliver(bench, files.serve(files.backend.stored if files.backend else None), 50)

    assert (waiting[0], waiting[1].confirmed, waiting[1].pending) == (False, 9, 1)
    assert (settled[0], settled[1].confirmed, settled[1].pending) == (True, 15, 0)


@pytest.mark.parametrize("redelivery", [Redelivery.IDEMPOTENT, Redelivery.AT_LEAST_ONCE])
def test_a_record_that_was_left_out_is_handed_over_again_after_a_crash(bench: Bench, redelivery: Redelivery) -> None:
    files = SlowFiles(0, 7)
    bench.log(10)
    first = files.serve(redelivery=redelivery)
    _, waiting = deliver(bench, first, 50)

    files.late = {7}
    _, still = deliver(bench, files.serve(first.stored, redelivery=redelivery), 50)
    files.late = set()
    last = files.serve(first.stored, redelivery=redelivery)
    is_done, settled = deliver(bench, last, 50)

    twice = redelivery is Redelivery.AT_LEAST_ONCE
    assert [(run.confirmed, run.pending) for run in (waiting, still, settled)] == [(8, 2), (9, 1), (10, 0)]
    assert (is_done, settled.possible_duplicates) == (True, 2 * twice)
    assert sorted(last.positions()) == sorted([*range(10), *[0, 7, 7] * twice])


def test_the_end_of_a_job_asks_for_a_late_record_now_and_then_and_ends_in_time(bench: Bench) -> None:
    files = SlowFiles(2)
    backend = files.serve()
    bench.log(5)
    bench.lane(backend)
    assert backend.wait_for(SITE, 5)

    run = run_of(bench.finish(timeout_s=1.0))

    assert (run.confirmed, run.pending, run.state) == (4, 1, "unfinished")
    assert backend.calls["flush"] < 20


def test_while_too_many_records_are_late_none_is_confirmed(bench: Bench) -> None:
    """The journal would store all of the late ones with each confirmation."""
    files = SlowFiles(*range(1000))
    backend = files.serve(max_batch=10)
    bench.log(300)
    bench.lane(backend)
    assert backend.wait_for(SITE, 300)

    run = run_of(bench.finish(timeout_s=0.5))

    assert (run.confirmed, run.pending) == (0, 300)
    assert "records that are still on their way; expected 64 at most" in run.last_error


def test_an_answer_of_a_wrong_type_harms_its_own_run_only(bench: Bench) -> None:
    backend = MemoryBackend(lambda method, argument: True if method == "left_out" else None, buffering=True)
    bench.log(5)
    bench.lane(backend)
    assert backend.wait_for(SITE, 5)

    run = run_of(bench.finish(timeout_s=0.5))

    assert (run.confirmed, run.pending) == (0, 5)
    assert "expected a list of entries" in run.last_error
