# SPDX-License-Identifier: Apache-2.0
"""The waits before another attempt."""

from __future__ import annotations

import random

import pytest

from trackhub.delivery.backoff import Backoff


def test_waits_double_up_to_their_limit_and_start_again_after_a_reset() -> None:
    backoff = Backoff(first_s=1.0, max_s=4.0)

    waits = [backoff.next_wait_s() for _ in range(5)]

    assert [0.5 * full <= wait <= full for wait, full in zip(waits, (1, 2, 4, 4, 4), strict=True)] == [True] * 5
    assert backoff.failures == 5
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.next_wait_s() <= 1.0


@pytest.mark.parametrize("asked_s", [3.0, 60.0])
def test_a_wait_is_never_shorter_than_the_minimum_asked_for(asked_s: float) -> None:
    assert Backoff(first_s=0.1).next_wait_s(asked_s) == asked_s


def test_a_wait_does_not_draw_from_the_shared_random_generator() -> None:
    before = random.getstate()

    Backoff().next_wait_s()

    assert random.getstate() == before
