# SPDX-License-Identifier: Apache-2.0
"""The isolation of bad records alone: which errors reject a record, and which keep it (docs/adr/0011)."""

from __future__ import annotations

import errno
import random
import sqlite3
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import MemoryBackend
from trackhub.delivery.lane.isolate_bad_record import Isolation
from trackhub.errors import PermanentError, TransientError
from trackhub.records import Artifact, Blob, Metrics, Payload, Tags
from trackhub.spi import Capabilities, Entry, Redelivery, Rejection

PERMANENT, TRANSIENT, UNKNOWN = PermanentError("no"), TransientError("down"), RuntimeError("bug")
CAN = MemoryBackend.capabilities
TWICE = msgspec.structs.replace(CAN, redelivery=Redelivery.AT_LEAST_ONCE)
ORDERED = msgspec.structs.replace(CAN, redelivery=Redelivery.RESUMABLE)
PROBED = msgspec.structs.replace(ORDERED, probe=True)
PROBED_TWICE = msgspec.structs.replace(TWICE, any_order=False, probe=True)
FILE = Artifact("model", Blob("b", 1, "0" * 64, "text/plain"), "model.bin")


def name_of(can: Capabilities) -> str:
    return f"{can.redelivery}{' with probe' * can.probe}"


def entry(position: int, payload: Payload | None = None) -> Entry:
    return Entry(position, 1000.0, position, None, payload or Metrics({"a": 1.0}), "stream", position)


def entries(*positions: int) -> list[Entry]:
    return [entry(p) for p in positions]


def isolation_of(*positions: int, max_batch: int = 1000, can: Capabilities = CAN) -> Isolation:
    isolation = Isolation(msgspec.structs.replace(can, max_batch=max_batch))
    isolation.add(entries(*positions))
    return isolation


class Store:
    """A store in front of an `Isolation`, driven as `RunDelivery` drives it.

    Attributes:
        fails: whether a write fails, given its number and its entries.
        stored: positions, in the order in which they were stored first.
        log: what each write held.
    """

    def __init__(self, fails: Callable[[int, list[Entry]], bool], error: BaseException) -> None:
        self.fails = fails
        self.error = error
        self.stored: list[int] = []
        self.rejected: list[Rejection] = []
        self.log: list[list[int]] = []

    def write(self, isolation: Isolation, batch: list[Entry]) -> bool:
        """Write a batch. Return whether the lane would wait then."""
        number = len(self.log)
        self.log.append([e.position for e in batch])
        is_probe = isolation.is_probe()
        if self.fails(number, [] if is_probe else batch):
            verdict = isolation.failed(self.error)
            self.rejected += [verdict.rejected] if verdict.rejected else []
            return verdict.wait
        if not is_probe:
            self.stored += [e.position for e in batch if e.position not in self.stored]
        self.rejected += isolation.succeeded(batch)
        return False

    def drive(self, isolation: Isolation, *, turns: int = 2000) -> None:
        """Write until nothing is left, or for so many turns. In each turn what is set aside is tried as well."""
        for _ in range(turns):
            while (batch := isolation.next()) is not None:
                if self.write(isolation, batch):
                    break
            else:
                if isolation.is_empty() and not isolation.aside():
                    return
            if (batch := isolation.next_aside()) is not None:
                self.write(isolation, batch)


def bad(*positions: int) -> Callable[[int, list[Entry]], bool]:
    return lambda number, batch: any(e.position in positions for e in batch)


def between(begin: int, end: int) -> Callable[[int, list[Entry]], bool]:
    return lambda number, batch: begin <= number < end


def always(number: int, batch: list[Entry]) -> bool:
    return True


def left(isolation: Isolation) -> list[int]:
    """Return what was neither stored nor rejected: write all of it into a store that is well."""
    store = Store(bad(), TRANSIENT)
    store.drive(isolation)
    return sorted(store.stored)


def test_entries_wait_in_their_order_in_batches_of_the_size_that_a_backend_takes() -> None:
    isolation = isolation_of(*range(7), max_batch=3)
    isolation.add(entries(7, 8))
    store = Store(bad(), TRANSIENT)

    store.drive(isolation)

    assert store.log == [[0, 1, 2], [3, 4, 5], [6], [7, 8]]


def test_nothing_to_add_leaves_nothing_to_write() -> None:
    assert isolation_of().next() is None


@pytest.mark.parametrize("error", [TRANSIENT, UNKNOWN], ids=repr)
@pytest.mark.parametrize("can", [CAN, TWICE, ORDERED, PROBED, PROBED_TWICE], ids=name_of)
def test_a_store_that_fails_with_every_record_loses_none(can: Capabilities, error: BaseException) -> None:
    isolation, store = isolation_of(*range(40), max_batch=7, can=can), Store(always, error)

    store.drive(isolation, turns=500)

    assert (store.stored, store.rejected) == ([], [])
    assert left(isolation) == list(range(40))


def test_a_store_that_keeps_the_order_gets_all_records_before_the_refused_one() -> None:
    isolation, store = isolation_of(*range(100), can=ORDERED), Store(bad(61), TRANSIENT)

    store.drive(isolation, turns=100)

    assert (store.stored, store.rejected) == (list(range(61)), [])
    assert store.log[-1] == [61]


@pytest.mark.parametrize("error", [TRANSIENT, UNKNOWN], ids=repr)
@pytest.mark.parametrize("pattern", ["always", "every second request", "nine of ten at random", "longer and longer"])
@pytest.mark.parametrize("can", [ORDERED, PROBED, PROBED_TWICE], ids=["no probe", "probe", "twice"])
def test_an_outage_changes_no_order_in_a_resumable_store(pattern: str, error: BaseException, can: Capabilities) -> None:
    """It would take a record that comes late for one that it holds, and that record would be lost."""
    for seed in range(30):
        away = (lambda number: True) if pattern == "always" else PATTERNS[pattern](random.Random(seed))
        isolation = isolation_of(*range(30), max_batch=random.Random(seed).choice([1, 4, 1000]), can=can)

        def fails(number: int, batch: list[Entry], away: Callable[[int], bool] = away) -> bool:
            return number < 200 and away(number)

        store = Store(fails, error)

        store.drive(isolation)

        assert store.rejected == []
        assert store.stored == list(range(30)), f"seed {seed}"


def test_a_permanent_error_halves_the_batch_at_once() -> None:
    isolation, store = isolation_of(*range(5)), Store(bad(3), PERMANENT)

    store.drive(isolation)

    assert store.log == [[0, 1, 2, 3, 4], [0, 1], [2, 3, 4], [2], [3, 4], [3], [4]]
    assert store.rejected == [Rejection(3, "permanent_error", "metrics 'a': PermanentError: no")]


@pytest.mark.parametrize("error", [TRANSIENT, UNKNOWN], ids=repr)
def test_a_record_that_is_always_refused_is_rejected_with_its_error(error: BaseException) -> None:
    isolation, store = isolation_of(*range(1000)), Store(bad(700), error)

    store.drive(isolation)

    assert store.rejected == [Rejection(700, "backend_error", f"metrics 'a': {type(error).__name__}: {error}")]
    assert store.stored == [i for i in range(1000) if i != 700]
    assert len(store.log) < 120


@pytest.mark.parametrize("can", [CAN, TWICE], ids=lambda can: str(can.redelivery))
def test_a_bad_first_record_is_rejected_once_later_ones_are_stored(can: Capabilities) -> None:
    isolation, store = isolation_of(*range(60), can=can), Store(bad(0), TRANSIENT)

    store.drive(isolation)

    assert [r.position for r in store.rejected] == [0]
    assert sorted(store.stored) == list(range(1, 60))
    if can is TWICE:
        assert all(sum(p in batch for batch in store.log) <= 5 for p in store.stored)


def test_a_bad_record_without_neighbours_stays_and_holds_up_no_other() -> None:
    isolation = isolation_of(0, 1, 2, can=TWICE)
    store = Store(bad(0), TRANSIENT)

    store.drive(isolation, turns=100)

    assert (store.stored, store.rejected) == ([1, 2], [])
    assert [e.position for e in isolation.aside()] == [0]


@pytest.mark.parametrize("error", [TRANSIENT, UNKNOWN], ids=repr)
@pytest.mark.parametrize("can", [PROBED, PROBED_TWICE], ids=["resumable", "twice"])
@pytest.mark.parametrize("positions", [{0}, {61}, {99}, {0, 1, 61, 62, 99}], ids=str)
def test_where_the_order_is_kept_the_plugins_own_test_tells(
    positions: set[int], can: Capabilities, error: BaseException
) -> None:
    """The last record, too, which has no later one as a neighbour."""
    isolation, store = isolation_of(*range(100), can=can), Store(bad(*positions), error)

    store.drive(isolation)

    assert {r.position for r in store.rejected} == positions
    assert store.stored == [i for i in range(100) if i not in positions]


def test_a_test_of_the_store_says_nothing_about_a_file() -> None:
    isolation = Isolation(PROBED)
    isolation.add([entry(0, FILE), *entries(*range(1, 9))])
    store = Store(bad(0), TRANSIENT)

    store.drive(isolation, turns=200)

    assert (store.stored, store.rejected) == ([], [])


def test_records_of_another_sort_say_nothing_about_a_record() -> None:
    """A database may be away alone, and so may the place for files."""
    isolation = Isolation(CAN)
    isolation.add([entry(0, Tags({"a": "b"})), *(entry(i, FILE) for i in range(1, 60))])
    store = Store(bad(0), TRANSIENT)

    store.drive(isolation, turns=100)

    assert store.rejected == []
    assert sorted(store.stored) == list(range(1, 60))


def test_a_file_that_always_fails_is_never_rejected_and_holds_up_no_other() -> None:
    """The way to the store may be too slow for it, and fast enough for everything else."""
    isolation = Isolation(CAN)
    isolation.add([entry(0, FILE), *entries(*range(1, 100))])
    store = Store(bad(0), UNKNOWN)

    store.drive(isolation, turns=200)

    assert (sorted(store.stored), store.rejected) == (list(range(1, 100)), [])
    assert [e.position for e in isolation.aside()] == [0]


def test_a_later_value_of_a_tag_waits_for_an_earlier_one_that_is_set_aside() -> None:
    isolation = Isolation(TWICE, toss=lambda: False)  # always the neighbour, which is never enough to judge
    tags = [entry(0, Tags({"a": "first"})), entry(1, Tags({"a": "second"})), entry(2, Tags({"b": "other"}))]
    isolation.add([*tags, *entries(*range(3, 10))])
    away = Store(bad(0), TRANSIENT)

    away.drive(isolation, turns=20)
    before = (list(away.stored), [e.position for e in isolation.aside()])
    away.fails = bad()
    away.drive(isolation)

    assert before == ([2, *range(3, 10)], [0, 1])
    assert away.stored[-2:] == [0, 1]


def test_entries_that_were_held_back_are_no_larger_write_than_a_backend_takes() -> None:
    isolation = Isolation(msgspec.structs.replace(TWICE, max_batch=2), toss=lambda: False)
    isolation.add([entry(i, Tags({"a": str(i)})) for i in range(6)])
    isolation.add(entries(6, 7))
    store = Store(bad(0), TRANSIENT)
    store.drive(isolation, turns=20)
    held = [e.position for e in isolation.aside()]

    store.error = PERMANENT
    store.drive(isolation)

    assert held == [0, 1, 2, 3, 4, 5]
    assert ([one.position for one in store.rejected], sorted(store.stored)) == ([0], [1, 2, 3, 4, 5, 6, 7])
    assert max(map(len, store.log)) == 2


def chained(cause: BaseException) -> TransientError:
    error = TransientError("cannot be stored now")
    error.__cause__ = cause
    return error


class Sqlite(sqlite3.OperationalError):
    sqlite_errorcode = sqlite3.SQLITE_FULL


@pytest.mark.parametrize(
    "error",
    [TransientError("busy", retry_after_s=0.0), chained(OSError(errno.ENOSPC, "full")), chained(Sqlite("full"))],
    ids=["asks for a wait", "no room", "no room for SQLite"],
)
def test_an_error_that_speaks_of_the_store_itself_rejects_nothing(error: BaseException) -> None:
    """A full disk takes small records longer than large ones."""
    isolation, store = isolation_of(*range(60), max_batch=1), Store(bad(20), error)

    store.drive(isolation, turns=200)

    assert (store.stored, store.rejected) == (list(range(20)), [])


@pytest.mark.parametrize("busy", [TransientError("busy", retry_after_s=0.0), chained(OSError(errno.ENOSPC, "full"))])
def test_an_error_that_speaks_of_the_store_itself_counts_against_no_record(busy: TransientError) -> None:
    """Otherwise the first other error would name a record that holds up all others."""
    isolation = isolation_of(0, can=ORDERED)
    for _ in range(20):
        isolation.next()
        isolation.failed(busy)

    isolation.next()

    assert not isolation.failed(TRANSIENT).blocks


@given(
    st.sets(st.integers(0, 39), max_size=7),
    st.integers(1, 50),
    st.sampled_from([PERMANENT, TRANSIENT, UNKNOWN]),
    st.sampled_from([CAN, TWICE]),
)
def test_exactly_the_bad_records_are_rejected_and_all_others_stored(
    positions: set[int], max_batch: int, error: BaseException, can: Capabilities
) -> None:
    """There are enough good ones behind them to tell."""
    isolation, store = isolation_of(*range(300), max_batch=max_batch, can=can), Store(bad(*positions), error)

    store.drive(isolation)

    assert sorted(r.position for r in store.rejected) == sorted(positions)
    assert sorted(store.stored) == [i for i in range(300) if i not in positions]
    if can is CAN and not {0, 1} & positions:
        assert store.stored == sorted(store.stored)


PATTERNS: dict[str, Callable[[random.Random], Callable[[int], bool]]] = {
    "every second request": lambda draw: lambda number: number % 2 == 0,
    "every third request": lambda draw: lambda number: number % 3 == 0,
    "two of three requests": lambda draw: lambda number: number % 3 != 0,
    "two of four requests": lambda draw: lambda number: number % 4 < 2,
    "half of all at random": lambda draw: lambda number: draw.random() < 0.5,
    "nine of ten at random": lambda draw: lambda number: draw.random() < 0.9,
    "longer and longer": lambda draw: lambda number: number.bit_length() % 2 == 0,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("can", [CAN, TWICE, ORDERED, PROBED, PROBED_TWICE], ids=name_of)
@pytest.mark.parametrize("error", [TRANSIENT, UNKNOWN], ids=repr)
def test_no_pattern_of_an_outage_rejects_a_record(pattern: str, can: Capabilities, error: BaseException) -> None:
    """The store goes by the number of a request, and knows nothing of what the request holds."""
    for seed in range(30):
        draw = random.Random(seed)
        away = PATTERNS[pattern](draw)
        isolation = isolation_of(*range(30), max_batch=draw.choice([1, 4, 1000]), can=can)

        def fails(number: int, batch: list[Entry], away: Callable[[int], bool] = away) -> bool:
            return number < 2000 and away(number)

        store = Store(fails, error)

        store.drive(isolation)

        assert (store.rejected, sorted(store.stored)) == ([], list(range(30))), f"seed {seed}"


@pytest.mark.parametrize("can", [CAN, TWICE, ORDERED, PROBED, PROBED_TWICE], ids=name_of)
@pytest.mark.parametrize("error", [TRANSIENT, UNKNOWN], ids=repr)
def test_an_outage_that_begins_and_ends_at_any_moment_rejects_nothing(can: Capabilities, error: BaseException) -> None:
    for begin in range(8):
        for end in range(begin, 50):
            isolation = isolation_of(*range(12), max_batch=4, can=can)
            store = Store(between(begin, end), error)

            store.drive(isolation)

            assert (store.rejected, sorted(store.stored)) == ([], list(range(12))), f"{begin} to {end}"
