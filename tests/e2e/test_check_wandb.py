# SPDX-License-Identifier: Apache-2.0
"""The check that somebody runs by hand against wandb.ai, here against the emulator, which has no public API."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest

from tests.by_hand.check_wandb import Held, compare, main, points_of
from tests.support.wandb_emulator import Emulator

KEY = "k" * 40


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    with Emulator(KEY) as emulator:
        monkeypatch.setenv("WANDB_BASE_URL", emulator.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield emulator
    assert emulator.violations == []


class Reading:
    """Reads the emulator's state in place of the public API; it may lose the last rows."""

    def __init__(self, server: Emulator, lost: int = 0) -> None:
        self.server = server
        self.lost = lost

    def __call__(self, project: str, group: str) -> Mapping[str, Held]:
        found = {}
        for run in self.server.state.runs.values():
            if (run.project, run.fields.get("groupName")) == (project, group):
                rows = run.history()[: len(run.rows) - self.lost]
                points = [point for row in rows for point in points_of(row)]
                found[run.params()["trackhub"]["site"]] = Held(run.state, points, len(run.rows))
        return found


@pytest.mark.long
def test_a_job_whose_points_are_all_at_the_server_passes(server: Emulator, capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["--project", "check"], read=Reading(server), index_s=1.0)

    printed = capfd.readouterr().out
    assert status == 0, printed
    assert "Everything that was logged is in W&B, once." in printed
    assert "client_confirmed': 0" in printed


@pytest.mark.long
def test_points_that_the_server_lacks_are_named(server: Emulator, capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["--project", "check"], read=Reading(server, lost=1), index_s=0.0)

    printed = capfd.readouterr().out
    assert status == 1, printed
    assert re.search(r"FAULT: site-1: \d points missing, such as \[\('(train|val)/", printed)
    assert "Please report all of the lines above." in printed


def test_points_that_are_missing_doubled_or_foreign_are_told_apart() -> None:
    wanted = [("a", 0, 1.0), ("a", 1, float("nan")), ("a", 2, 0.0), ("b", 0, 2.0)]
    found = [("a", 0, 1.0), ("a", 0, 1.0), ("a", 1, float("nan")), ("a", 2, -0.0), ("c", 0, 2.0)]

    faults = compare(wanted, found)

    assert [fault.split(",")[0] for fault in faults] == [
        "1 points missing",
        "1 points there twice",
        "1 points not logged",
    ]
    assert compare(wanted, wanted) == []
