# SPDX-License-Identifier: Apache-2.0
"""The retry timer alone: when a backend may be called again, and which waits the end of a job cuts short."""

from __future__ import annotations

import time

import pytest

from trackhub.delivery.lane.retry_timer import RetryTimer
from trackhub.errors import JournalError, TransientError


def wait_s(timer: RetryTimer) -> float:
    return timer.not_before - time.monotonic()


def test_nothing_has_to_wait_before_the_first_failure() -> None:
    assert wait_s(RetryTimer()) < 0


def test_waits_grow_until_something_succeeds() -> None:
    timer = RetryTimer()
    firsts = [timer.failed(RuntimeError("bug")) for _ in range(10)]
    long = wait_s(timer)

    timer.succeeded()
    again = timer.failed(RuntimeError("bug"))

    assert firsts == [True] + [False] * 9
    assert long > 5
    assert again
    assert wait_s(timer) <= 0.2


@pytest.mark.parametrize("asked", [30.0, 30, "30"], ids=repr)
def test_a_wait_that_the_backend_asks_for_is_kept_at_the_end_of_the_job(asked: object) -> None:
    timer = RetryTimer()

    timer.failed(TransientError("429", retry_after_s=asked))  # type: ignore[arg-type]  # as a plugin may pass a header on

    assert not timer.hurry()
    assert 29 < wait_s(timer) <= 30


@pytest.mark.parametrize("asked", ["Wed, 21 Oct 2026 07:28:00 GMT", "soon", ["5"], -5.0], ids=str)
def test_a_wait_that_cannot_be_kept_is_the_usual_one(asked: object) -> None:
    timer = RetryTimer()

    timer.failed(TransientError("429", retry_after_s=asked))  # type: ignore[arg-type]  # plugins are not type-checked

    assert 0 < wait_s(timer) <= 0.2


def test_the_end_of_the_job_cuts_a_wait_short_once_until_something_is_confirmed() -> None:
    timer = RetryTimer()
    timer.failed(TransientError("down"))

    hurried = [timer.hurry()]
    hurried.append(timer.not_before == 0.0)
    timer.failed(TransientError("down"))
    hurried.append(timer.hurry())
    timer.allow_hurry()
    hurried.append(timer.hurry())

    assert hurried == [True, True, False, True]


def test_an_error_that_names_no_wait_may_be_hurried_after_one_that_did() -> None:
    timer = RetryTimer()

    timer.failed(TransientError("429", retry_after_s=30.0))
    timer.failed(JournalError("the disk is full"))

    assert timer.hurry()
