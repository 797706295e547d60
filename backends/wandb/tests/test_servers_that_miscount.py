# SPDX-License-Identifier: Apache-2.0
"""Servers that do not count rows as wandb.ai does. Their acknowledgements to the SDK then confirm records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from trackhub_wandb import WandBBackend

from backends.wandb.tests.conftest import JOB, Rig, entry, losses
from tests.support.wandb_emulator import Emulator, Fault
from tests.support.wandb_emulator.state import Counting
from tests.unit.rigs import SITE, Bench, run_of
from trackhub.spi import Confirmation, Params, RunStatus, Tags, Text, TransientError

COUNTINGS = get_args(Counting)
ODD = COUNTINGS[1:]


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """A server that counts in one of the odd ways."""
    with Emulator(counting=request.param) as server:
        yield server
    assert server.violations == []


def backend_on(server: Emulator, rig: Rig, **options: object) -> WandBBackend:
    given = {"mode": "online", "base_url": server.url, "api_key": server.state.api_key, "upload_interval_s": 1.0}
    return rig.backend(**{**given, **options})


def test_rows_that_the_server_acknowledged_are_confirmed_by_the_clients_word(odd: Emulator, rig: Rig) -> None:
    run = backend_on(odd, rig).open_run(rig.info())
    run.write([entry(0, Params({"lr": 0.1})), entry(1, Tags({"a": "b"})), entry(2, Text("note", "x"))])
    run.write(losses(range(3, 60)))
    started = time.monotonic()
    first = run.flush()
    run.write(losses(range(60, 80)))
    second = run.flush()
    took_s = time.monotonic() - started
    run.finish(RunStatus.FINISHED)

    held = odd.state.run(rig.info().run_id)
    assert (first, second) == (Confirmation.CLIENT, Confirmation.CLIENT)
    assert [row["_step"] for row in held.history()] == list(range(2, 80))
    assert (held.state, held.params()["lr"]) == ("finished", 0.1)
    assert took_s < 25


def test_a_server_that_counts_right_is_believed(rig: Rig, emulator: Emulator) -> None:
    run = backend_on(emulator, rig).open_run(rig.info())
    run.write(losses(range(20)))

    assert run.flush() is Confirmation.STORE


def test_rows_that_were_not_acknowledged_are_not_confirmed(odd: Emulator, rig: Rig) -> None:
    """Neither while the server fails, nor after the SDK gave up the upload."""
    run = backend_on(odd, rig, flush_timeout_s=3.0).open_run(rig.info())
    odd.fail(Fault("file_stream", status=500, times=100))
    run.write(losses(range(20)))
    with pytest.raises(TransientError, match="did not confirm"):
        run.flush()
    with odd.state.lock:
        odd._faults.clear()
    odd.fail(Fault("file_stream", status=400))

    flushes: list[Confirmation] = []
    deadline = time.monotonic() + 60
    while not flushes and time.monotonic() < deadline:
        try:
            flushes.append(run.flush())
        except TransientError:
            time.sleep(0.1)

    rows = {row["_step"] for row in odd.state.run(rig.info().run_id).history()}
    assert (flushes, rows) == ([Confirmation.CLIENT], set(range(20)))


def test_the_job_ends_in_time_and_the_report_says_whose_word_it_is(odd: Emulator, rig: Rig, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "bench", JOB.id)
    bench.lane(backend_on(odd, rig), flush_s=0.1)
    bench.log(50, rows=2)
    bench.log(30, "site-2")
    started = time.monotonic()
    report = bench.finish(30.0)
    took_s = time.monotonic() - started

    found = {site: run_of(report, site) for site in (SITE, "site-2")}
    assert {site: (run.confirmed, run.client_confirmed, run.pending) for site, run in found.items()} == {
        SITE: (100, 100, 0),
        "site-2": (30, 30, 0),
    }
    assert {run.state for run in found.values()} == {"finished"}
    assert sorted(run.state for run in odd.state.runs.values()) == ["finished", "finished"]
    assert took_s < 25


def test_after_a_client_confirmation_records_that_come_again_count_as_possible_duplicates(
    odd: Emulator, rig: Rig, tmp_path: Path
) -> None:
    """The class claims that the store recognises records. Nobody knows whether this one does."""
    bench = Bench(tmp_path / "bench", JOB.id)
    first = backend_on(odd, rig)
    lane = bench.lane(first, flush_s=0.1)
    bench.log(20)
    deadline = time.monotonic() + 30
    while bench.journal.run_state("memory", 1).progress.client_confirmed < 20:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    odd.fail(Fault("file_stream", status=500, times=1000))
    bench.log(10)
    while bench.journal.run_state("memory", 1).written < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lane.join(0.0)
    with odd.state.lock:
        odd._faults.clear()
    bench.lanes.clear()
    bench.lane(backend_on(odd, rig), flush_s=0.1)
    report = run_of(bench.finish(10.0 if odd.state.counting == "too high" else 60.0))

    if odd.state.counting == "too high":  # the SDK would lose records on such a server, so they wait
        assert (report.confirmed, report.pending) == (20, 10)
        assert "The SDK would lose records 20 to 26" in report.last_error
        return
    assert (report.confirmed, report.pending, report.possible_duplicates) == (30, 0, 10)
    rows = [row["_step"] for row in odd.state.run(next(iter(odd.state.runs))).history()]
    assert set(rows) == set(range(30))
    assert len(rows) - 30 <= report.possible_duplicates
