# SPDX-License-Identifier: Apache-2.0
"""A backend whose ``flush`` never succeeds: the job ends at its deadline. The report names what is pending, and why."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import MemoryBackend
from tests.unit.rigs import SITE, Bench, run_of
from trackhub.errors import TransientError

DEADLINE_S = 0.5


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda: _raise(TransientError("no room in the store")), "TransientError: no room in the store"),
        (lambda: _raise(RuntimeError("bug")), "RuntimeError: bug"),
    ],
    ids=["down", "bug"],
)
def test_records_that_no_flush_confirms_are_pending_with_the_reason_at_the_deadline(
    bench: Bench, end: Callable[[], None], reason: str
) -> None:
    def behave(method: str, argument: Any) -> None:
        if method == "flush":
            end()

    backend = MemoryBackend(behave, buffering=True)
    bench.log(5)
    bench.lane(backend)
    assert backend.wait_for(SITE, 5)
    began = time.monotonic()

    report = bench.finish(DEADLINE_S)

    run = run_of(report)
    assert (run.confirmed, run.pending, run.state) == (0, 5, "unfinished")
    assert reason in (run.last_error or "")
    assert reason in run.trouble()
    assert time.monotonic() - began < 15  # it does not wait for a flush that will not succeed
    later = Bench(bench.folder)
    later.counts = {SITE: 5}
    later.lane(MemoryBackend(buffering=True))
    assert (run_of(later.finish()).confirmed, run_of(report).pending) == (5, 5)


def test_a_flush_that_hangs_holds_the_end_up_to_the_deadline_only(bench: Bench) -> None:
    is_over = threading.Event()

    def behave(method: str, argument: Any) -> None:
        if method == "flush":
            is_over.wait(60)

    backend = MemoryBackend(behave, buffering=True)
    bench.log(5)
    bench.lane(backend)
    assert backend.wait_for(SITE, 5)
    began = time.monotonic()

    try:
        run = run_of(bench.finish(DEADLINE_S))
    finally:
        is_over.set()

    assert (run.confirmed, run.pending, run.state) == (0, 5, "unfinished")
    assert time.monotonic() - began < 15
