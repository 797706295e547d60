# SPDX-License-Identifier: Apache-2.0
"""The lag of a backend is how long the journal has had the oldest record that the backend has not confirmed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.rigs import Bench
from trackhub.delivery.federation.delivery_health import Arrivals, DeliveryHealth
from trackhub.delivery.journal.tables_and_rows import Progress

LANES = ("fast", "slow")


class Clock:
    """Shows the time that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.journal.close()


def lags(health: DeliveryHealth) -> dict[str, float]:
    prefix = "fl/delivery/lag_seconds/"
    return {key.removeprefix(prefix): value for key, value in health.values().items() if key.startswith(prefix)}


def test_the_lag_is_the_age_of_the_oldest_row_that_is_not_confirmed(bench: Bench) -> None:
    clock = Clock()
    health = DeliveryHealth(bench.journal, LANES, clock)
    assert lags(health) == {"fast": 0, "slow": 0}
    for row, site in enumerate(("site-1", "site-2", "site-1"), start=1):  # rows 1, 2, 3, ten seconds apart
        clock.now += 10
        bench.log(5, site)
        health.note_stored(row)
    ids = {name: number for number, (name, _) in bench.journal.sites().items()}
    clock.now += 1

    assert lags(health) == {"fast": 21, "slow": 21}
    bench.journal.save_run("fast", ids["site-1"], 3, 1, Progress(confirmed=5))
    assert lags(health) == {"fast": 11, "slow": 21}  # row 2, of a site that the lane has not begun
    bench.journal.save_run("fast", ids["site-2"], 2, 2, Progress(confirmed=5))
    assert lags(health) == {"fast": 1, "slow": 21}
    bench.journal.save_run("fast", ids["site-1"], 3, 3, Progress(confirmed=10))
    assert lags(health) == {"fast": 0, "slow": 21}
    assert health.values()["fl/delivery/pending/slow"] == 15


def test_rows_of_an_earlier_receiver_count_from_the_start_of_this_one(bench: Bench) -> None:
    bench.log(5)
    clock = Clock()
    health = DeliveryHealth(bench.journal, LANES, clock)
    clock.now += 7

    assert lags(health) == {"fast": 7, "slow": 7}


@pytest.mark.parametrize("seed", range(3))
def test_the_age_of_any_row_is_right_to_a_tenth_of_a_second(seed: int) -> None:
    dice = random.Random(seed)
    arrivals, now = Arrivals(0.0), 0.0
    stored: dict[int, float] = {}
    while len(stored) < 3000:
        now += dice.choice([0.001, 0.05, 3.0])
        rows = [len(stored) + 1, len(stored) + 2]
        for row in dice.sample(rows, 2):  # two threads store rows at a time, and say so in any order
            arrivals.note(row, now)
            stored[row] = now

    for row, at in stored.items():
        assert -1e-9 <= arrivals.age_s(row, now) - (now - at) <= 0.1 + 1e-9


def test_many_moments_take_little_memory_and_stay_nearly_right() -> None:
    arrivals = Arrivals(0.0)
    for row in range(1, 50_000):
        arrivals.note(row, float(row))

    assert len(arrivals._rows) <= 10_000
    for row in (1, 25_000, 49_999):
        assert 0 <= arrivals.age_s(row, 50_000.0) - (50_000 - row) <= 32
