# SPDX-License-Identifier: Apache-2.0
"""The isolation of bad records alone: which errors reject a record, and which keep it (docs/adr/0002)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackhub.delivery.lane.isolation import Isolation
from trackhub.errors import PermanentError, TransientError
from trackhub.records import Metrics
from trackhub.spi import Entry, Rejection

PERMANENT, TRANSIENT, UNKNOWN = PermanentError("no"), TransientError("down"), RuntimeError("bug")


def entries(*positions: int) -> list[Entry]:
    return [Entry(p, 1000.0, p, None, Metrics({"a": 1.0}), "stream", p) for p in positions]


def isolation_of(*positions: int, max_batch: int = 1000) -> Isolation:
    isolation = Isolation()
    isolation.add(entries(*positions), max_batch)
    return isolation


def first(isolation: Isolation) -> list[int] | None:
    batch = isolation.first()
    return None if batch is None else [e.position for e in batch]


def waiting(isolation: Isolation) -> list[list[int]]:
    """Take everything out, in order."""
    batches = []
    while (batch := first(isolation)) is not None:
        batches.append(batch)
        isolation.succeeded()
    return batches


def test_entries_wait_in_their_order_in_batches_of_the_size_that_a_backend_takes() -> None:
    isolation = isolation_of(*range(7), max_batch=3)
    isolation.add(entries(7, 8), 3)

    assert waiting(isolation) == [[0, 1, 2], [3, 4, 5], [6], [7, 8]]


def test_nothing_to_add_leaves_nothing_to_write() -> None:
    assert isolation_of().first() is None


def test_a_transient_error_keeps_the_batch_however_often_it_comes() -> None:
    isolation = isolation_of(0, 1)

    for _ in range(100):
        assert isolation.failed(TRANSIENT) == (True, False, None)

    assert waiting(isolation) == [[0, 1]]


def test_a_permanent_error_halves_the_batch_at_once() -> None:
    isolation = isolation_of(*range(5))

    assert isolation.failed(PERMANENT) == (False, True, None)

    assert waiting(isolation) == [[0, 1], [2, 3, 4]]


def test_a_permanent_error_about_one_record_rejects_it() -> None:
    isolation = isolation_of(4)

    verdict = isolation.failed(PERMANENT)

    assert verdict == (False, True, Rejection(4, "permanent_error", "PermanentError: no"))
    assert isolation.first() is None


def test_an_unknown_error_halves_the_batch_the_third_time() -> None:
    isolation = isolation_of(0, 1)

    verdicts = [isolation.failed(UNKNOWN) for _ in range(3)]

    assert verdicts == [(True, False, None), (True, False, None), (True, True, None)]
    assert waiting(isolation) == [[0], [1]]


@pytest.mark.parametrize("between", ["transient error", "success"])
def test_unknown_errors_count_only_if_nothing_else_comes_between(between: str) -> None:
    isolation = isolation_of(0, 1, 2, 3, max_batch=2)

    isolation.failed(UNKNOWN)
    isolation.failed(UNKNOWN)
    if between == "success":
        isolation.succeeded()
    else:
        isolation.failed(TRANSIENT)

    assert not isolation.failed(UNKNOWN).narrowed
    assert not isolation.failed(UNKNOWN).narrowed
    assert isolation.failed(UNKNOWN).narrowed


def test_each_half_has_three_attempts_of_its_own() -> None:
    isolation = isolation_of(0, 1, 2, 3)
    for _ in range(3):
        isolation.failed(UNKNOWN)

    assert [isolation.failed(UNKNOWN).narrowed for _ in range(3)] == [False, False, True]
    assert waiting(isolation) == [[0], [1], [2, 3]]


def test_a_record_that_fails_alone_is_rejected_once_the_backend_has_stored_another() -> None:
    isolation = isolation_of(0, 1, max_batch=1)
    isolation.succeeded()

    verdicts = [isolation.failed(UNKNOWN) for _ in range(3)]

    assert [v.rejected for v in verdicts] == [None, None, Rejection(1, "backend_error", "RuntimeError: bug")]
    assert not isolation.has_suspects()


def test_the_first_record_that_fails_is_a_suspect_until_a_later_one_is_stored() -> None:
    isolation = isolation_of(0, 1, max_batch=1)

    verdicts = [isolation.failed(UNKNOWN) for _ in range(3)]
    suspected = isolation.has_suspects()
    rejections = isolation.succeeded()

    assert all(v.rejected is None and v.wait for v in verdicts)
    assert suspected
    assert rejections == [Rejection(0, "backend_error", "RuntimeError: bug")]
    assert not isolation.has_suspects()


def test_each_suspect_is_rejected_with_its_own_error() -> None:
    isolation = isolation_of(0, 1, 2, max_batch=1)
    for error in (ValueError("a"), ValueError("a"), ValueError("a"), KeyError("b")):
        isolation.failed(error)

    assert [r.detail for r in isolation.succeeded()] == ["ValueError: a", "KeyError: 'b'"]


def test_after_the_first_suspect_one_failure_makes_another() -> None:
    isolation = isolation_of(0, 1, 2, max_batch=1)

    for _ in range(3):
        isolation.failed(UNKNOWN)
    isolation.failed(UNKNOWN)

    assert first(isolation) == [2]


def test_no_more_than_eight_records_are_suspects() -> None:
    isolation = isolation_of(*range(20), max_batch=1)
    for _ in range(2 + 7):
        isolation.failed(UNKNOWN)

    assert isolation.may_look_further()
    isolation.failed(UNKNOWN)
    assert not isolation.may_look_further()


def test_suspects_are_tried_again_first_and_in_their_order() -> None:
    isolation = isolation_of(*range(5), max_batch=1)
    for _ in range(2 + 3):
        isolation.failed(UNKNOWN)

    isolation.retry_suspects()

    assert not isolation.has_suspects()
    assert waiting(isolation) == [[0], [1], [2], [3], [4]]


def test_a_permanent_error_says_nothing_about_the_suspects() -> None:
    isolation = isolation_of(0, 1, 2, max_batch=1)
    for _ in range(3):
        isolation.failed(UNKNOWN)

    verdict = isolation.failed(PERMANENT)

    assert verdict.rejected is not None
    assert verdict.rejected.position == 1
    assert isolation.has_suspects()


class Store:
    """A store that fails on some records, driven through an `Isolation` as `RunDelivery` does it."""

    def __init__(self, bad: set[int], error: BaseException) -> None:
        self.bad = bad
        self.error = error
        self.stored: list[int] = []
        self.rejected: list[int] = []
        self.writes = 0

    def take(self, isolation: Isolation, more: Callable[[], bool]) -> bool:
        """Write everything; return False if the store is down for all that can be tried."""
        while True:
            while (batch := first(isolation)) is not None:
                self.writes += 1
                assert self.writes < 10_000
                if self.bad.isdisjoint(batch):
                    self.stored += batch
                    self.rejected += [r.position for r in isolation.succeeded()]
                elif (rejected := isolation.failed(self.error).rejected) is not None:
                    self.rejected.append(rejected.position)
            if not isolation.has_suspects():
                return True
            if not (isolation.may_look_further() and more()):
                isolation.retry_suspects()
                return False


@given(
    st.sets(st.integers(0, 39), max_size=7),
    st.integers(1, 50),
    st.sampled_from([PERMANENT, UNKNOWN]),
    st.integers(1, 40),
)
def test_exactly_the_bad_records_are_rejected_and_all_others_stored_in_order(
    bad: set[int], max_batch: int, error: BaseException, read_at_once: int
) -> None:
    isolation, store = Isolation(), Store(bad, error)
    left = list(range(41))  # the last one is good

    def more() -> bool:
        isolation.add(entries(*left[:read_at_once]), max_batch)
        taken = bool(left[:read_at_once])
        del left[:read_at_once]
        return taken

    while more():
        assert store.take(isolation, more)

    assert store.stored == [i for i in range(41) if i not in bad]
    assert sorted(store.rejected) == sorted(bad)


@given(st.integers(1, 30), st.integers(1, 10))
def test_a_store_that_fails_with_every_record_loses_none(count: int, max_batch: int) -> None:
    isolation, store = isolation_of(*range(count), max_batch=max_batch), Store(set(range(count)), UNKNOWN)

    assert not store.take(isolation, lambda: False)

    assert store.rejected == []
    assert [position for batch in waiting(isolation) for position in batch] == list(range(count))
