# SPDX-License-Identifier: Apache-2.0
"""A plugin is not type-checked: what it returns of a wrong type costs its own run, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import MemoryBackend
from tests.unit.rigs import SITE, Bench, failing, run_of
from trackhub.errors import TransientError
from trackhub.spi import Rejection, Results, WriteReport

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.mark.parametrize("said", ["https://there/run", Results(path=Path("/there")), Results(url=7)], ids=repr)  # type: ignore[arg-type]
def test_results_of_a_wrong_type_leave_the_report_readable(bench: Bench, said: Any) -> None:
    backend = MemoryBackend()
    backend.results = lambda info: said  # type: ignore[method-assign]
    for site in (SITE, "site-2"):
        bench.log(5, site)
    bench.lane(backend)

    report = bench.finish()

    for site in (SITE, "site-2"):
        run = run_of(report, site)
        assert (run.confirmed, run.state, run.results) == (5, "finished", None)


@pytest.mark.parametrize("rejected", [[0], [Rejection(0, 400, "bad")], [Rejection("0", "r", "d")]], ids=repr)  # type: ignore[arg-type]
def test_a_rejection_of_a_wrong_type_is_an_error_of_that_run_alone(bench: Bench, rejected: Any) -> None:
    def behave(method: str, argument: Any) -> WriteReport | None:
        return WriteReport(rejected) if method == "write" else None

    bench.log(5)
    bench.lane(MemoryBackend(behave))

    run = run_of(bench.finish(0.5))

    assert (run.confirmed, run.pending) == (0, 5)
    assert "expected a Rejection" in run.last_error


def test_a_wait_that_a_backend_asked_for_may_be_a_header_as_it_came(bench: Bench) -> None:
    waits = ["0.01", "Wed, 21 Oct 2026 07:28:00 GMT"]
    backend = MemoryBackend(failing(2, lambda: TransientError("429", retry_after_s=waits.pop()), "write"))  # type: ignore[arg-type]
    bench.log(5)
    bench.lane(backend)

    assert run_of(bench.finish()).confirmed == 5
