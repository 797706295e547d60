# SPDX-License-Identifier: Apache-2.0
"""An outage rejects no record, and a record that the store always refuses holds up no other: one rule, from both sides.

A model of a store goes through phases: up, away, read-only, answering some requests. Some records it never stores. To
the lane both look the same: one error, with one text. Receivers end in between, and others go on.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import MemoryBackend
from tests.unit.rigs import SITE, Bench, delivery_on, poisoned, run_of
from trackhub.delivery.report import RunReport
from trackhub.errors import TransientError
from trackhub.job_and_run_info import RunStatus
from trackhub.spi import Redelivery

pytestmark = pytest.mark.usefixtures("quick_retries")

RUNS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Phase(NamedTuple):
    """How a store behaves for some writes.

    Attributes:
        writes: how many.
        share: how many of them fail: 0.0 is up, 1.0 is away.
        is_known: whether the backend raises the SPI's error, or one of its own.
    """

    writes: int
    share: float
    is_known: bool


phases = st.lists(
    st.builds(Phase, st.integers(1, 40), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()),
    max_size=8,
)


class Store:
    """What `MemoryBackend` calls before it stores."""

    def __init__(self, phases: Sequence[Phase], bad: set[int], seed: int) -> None:
        self.phases = list(phases)
        self.bad = bad
        self.chance = random.Random(seed)

    def __call__(self, method: str, argument: Any) -> None:
        if method not in ("write", "probe"):
            return
        while self.phases and self.phases[0].writes == 0:
            self.phases.pop(0)
        is_known = True
        if self.phases:
            writes, share, is_known = self.phases[0]
            self.phases[0] = Phase(writes - 1, share, is_known)
            if self.chance.random() < share:
                raise TransientError("HTTP 500") if is_known else RuntimeError("HTTP 500")
        if method == "write" and any(entry.position in self.bad for entry in argument):
            raise TransientError("HTTP 500") if is_known else RuntimeError("HTTP 500")


def deliver(bench: Bench, backend: MemoryBackend, turns: int) -> tuple[bool, RunReport]:
    """Deliver until all is done, or for so many turns, as one receiver. Return whether all is done, and the report."""
    site = bench.journal.add_site(SITE, 1000.0)
    run = delivery_on(bench, backend, flush_s=0.0)
    for _ in range(turns):
        if run.is_idle():
            break
        if not run.advance(flush_now=True):
            run._aside_timer.not_before = 0.0  # the waits are left out
    is_done = run.is_idle()
    if is_done:
        run.finish(RunStatus.FINISHED)
    if (end := run.unstored_end()) is not None:
        bench.journal.save_runs({("memory", site): end})
    report = run_of(bench.journal.report(["memory"]))
    assert report.confirmed + report.pending + sum(report.rejected.values()) == sum(bench.counts.values())
    return is_done, report


ORDERS = pytest.mark.parametrize(
    "can",
    [
        {"redelivery": Redelivery.IDEMPOTENT},
        {"redelivery": Redelivery.AT_LEAST_ONCE},
        {"redelivery": Redelivery.IDEMPOTENT, "any_order": False},
        {"redelivery": Redelivery.RESUMABLE},
        {"redelivery": Redelivery.RESUMABLE, "probe": True},
        {"redelivery": Redelivery.AT_LEAST_ONCE, "any_order": False, "probe": True},
    ],
    ids=["idempotent", "twice", "in order", "resumable", "resumable with probe", "twice in order with probe"],
)


@ORDERS
@RUNS
@given(
    phases=phases,
    rows=st.lists(st.integers(1, 30), max_size=6),
    max_batch=st.sampled_from([1, 7, 1000]),
    buffering=st.booleans(),
    seed=st.integers(0, 99),
)
def test_an_outage_rejects_no_record_and_afterwards_all_are_stored(
    tmp_path_factory: pytest.TempPathFactory,
    can: dict[str, Any],
    phases: list[Phase],
    rows: list[int],
    max_batch: int,
    buffering: bool,
    seed: int,
) -> None:
    """The last phase may be anything. After the phases the store is up."""
    bench = Bench(tmp_path_factory.mktemp("receiver"))
    for row in [*rows, 1]:
        bench.log(row)
    backend = MemoryBackend(Store(phases, set(), seed), max_batch=max_batch, buffering=buffering, **can)

    is_done, report = deliver(bench, backend, 3000)

    bench.journal.close()
    assert (is_done, report.rejected, report.pending, report.state) == (True, {}, 0, "finished")
    assert sorted(set(backend.positions())) == list(range(sum(rows) + 1))
    assert report.confirmed <= len(backend.positions())


@pytest.mark.parametrize(
    "can",
    [
        {"redelivery": Redelivery.IDEMPOTENT},
        {"redelivery": Redelivery.AT_LEAST_ONCE},
        {"redelivery": Redelivery.RESUMABLE, "probe": True},
        {"redelivery": Redelivery.AT_LEAST_ONCE, "any_order": False, "probe": True},
    ],
    ids=["idempotent", "twice", "resumable with probe", "twice in order with probe"],
)
@RUNS
@given(
    phases=phases,
    bad=st.sets(st.integers(0, 39), max_size=4),
    row=st.integers(1, 60),
    max_batch=st.sampled_from([1, 7, 1000]),
    ends=st.lists(st.integers(1, 60), max_size=3),
    seed=st.integers(0, 99),
)
def test_a_record_that_the_store_always_refuses_is_rejected_and_no_other(
    tmp_path_factory: pytest.TempPathFactory,
    can: dict[str, Any],
    phases: list[Phase],
    bad: set[int],
    row: int,
    max_batch: int,
    ends: list[int],
    seed: int,
) -> None:
    """Among outages, with good records behind it, while receivers end and others go on."""
    bench = Bench(tmp_path_factory.mktemp("receiver"))
    for _ in range(0, 300, row):
        bench.log(row)
    total = sum(bench.counts.values())
    store = Store(phases, bad, seed)
    held: dict[str, Any] = {}

    for turns in [*ends, 5000]:
        backend = MemoryBackend(store, max_batch=max_batch, stored=held, **can)
        is_done, report = deliver(bench, backend, turns)

    bench.journal.close()
    assert is_done
    assert report.rejected == ({"backend_error": len(bad)} if bad else {})
    assert (report.confirmed, report.pending) == (total - len(bad), 0)
    assert set(backend.positions()) == set(range(total)) - bad
    if "probe" in can:
        assert list(dict.fromkeys(backend.positions())) == sorted(set(backend.positions()))
    if can["redelivery"] is not Redelivery.AT_LEAST_ONCE:
        assert len(backend.positions()) == total - len(bad)
    else:  # the report counts records that may be there twice, and several receivers may hand over one record
        times = Counter(backend.positions())
        assert sum(times[position] > 1 for position in times) <= report.possible_duplicates


@pytest.mark.parametrize("error", [TransientError("HTTP 500"), RuntimeError("bug")], ids=repr)
def test_a_bad_record_without_neighbours_is_all_that_is_pending_and_a_replay_settles_it(
    bench: Bench, error: BaseException
) -> None:
    """No other record can show that the store is well. So it may be an outage. The others count as delivered."""
    backend = MemoryBackend(poisoned({0}, lambda: error), redelivery=Redelivery.AT_LEAST_ONCE)
    bench.log(3)

    first = deliver(bench, backend, 200)
    bench.log(60)
    second = deliver(bench, backend, 2000)

    assert (first[0], first[1].confirmed, first[1].pending) == (False, 2, 1)
    assert (second[0], second[1].confirmed, second[1].rejected) == (True, 62, {"backend_error": 1})
