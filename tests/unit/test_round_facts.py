# SPDX-License-Identifier: Apache-2.0
"""A round says which sites took part and who waited for whom, whichever tasks its workflow hands out."""

from __future__ import annotations

import pytest

from trackhub.flare.read_task_events import HandedTask, ReturnedTask
from trackhub.flare.round_facts import Round

SITES = ("site-1", "site-2", "site-3")


class Workflow:
    """Hands out the tasks of one round at given times, in seconds since it began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("trackhub.flare.round_facts.time.monotonic", lambda: self.now)
        self.round = Round(0)

    def hand(self, at: float, task: str, site: str, targets: tuple[str, ...], *, is_relay: bool = False) -> None:
        self.now = 100.0 + at
        self.round.hand(HandedTask(f"{task} of {site}", task, task, site, targets, is_relay, 0, 8))

    def take(
        self, at: float, task: str, site: str, *, is_ok: bool = True, steps: float | None = None
    ) -> dict[str, float]:
        self.now = 100.0 + at
        taken = self.round.take(ReturnedTask(f"{task} of {site}", is_ok, steps, 8))
        assert taken is not None
        assert taken[0] == site
        return taken[1]


@pytest.fixture
def workflow(monkeypatch: pytest.MonkeyPatch) -> Workflow:
    return Workflow(monkeypatch)


def test_a_site_waits_for_one_that_got_the_same_task_later(workflow: Workflow) -> None:
    """The task of site-2 was there from the start; the site asked for it late."""
    workflow.hand(0, "train", "site-1", SITES[:2])
    workflow.take(1, "train", "site-1")
    workflow.hand(5, "train", "site-2", SITES[:2])
    workflow.take(7, "train", "site-2")

    assert workflow.round.waits() == {"site-1": 6, "site-2": 0}
    assert workflow.round.waited_for() == {"site-2": 6}


@pytest.mark.parametrize("is_one_task", [True, False])
def test_sites_that_work_one_after_another_do_not_wait(workflow: Workflow, is_one_task: bool) -> None:
    """So in both of FLARE's cyclic controllers: one relays a task, and one sends a task to each site."""
    for i, site in enumerate(SITES):
        task, targets = ("train", SITES) if is_one_task else (f"train {i}", (site,))
        workflow.hand(2 * i, task, site, targets, is_relay=is_one_task)
        workflow.take(2 * i + 2, task, site)

    assert workflow.round.waits() == dict.fromkeys(SITES, 0)
    assert workflow.round.waited_for() == {}
    assert workflow.round.row(6.0) == "| 0 | 6.0 | 3 | 3 | - | - | - |"
    facts = workflow.round.facts(6.0)
    assert [facts[f"fl/result_after_seconds/{site}"] for site in SITES] == [2, 4, 6]


def test_the_waits_of_two_tasks_in_a_round_add_up(workflow: Workflow) -> None:
    for begin, task, slow in ((0, "train", "site-1"), (10, "validate", "site-2")):
        for site in SITES:
            workflow.hand(begin, task, site, SITES)
        for site in sorted(SITES, key=lambda site: site == slow):
            workflow.take(begin + (5 if site == slow else 2), task, site)

    assert workflow.round.waits() == {"site-1": 3, "site-2": 3, "site-3": 6}
    assert workflow.round.waited_for() == {"site-1": 3, "site-2": 3}
    assert workflow.round.row(15.0) == "| 0 | 15.0 | 3 | 3 | - | - | site-1, 3.0 s; site-2, 3.0 s |"
    assert workflow.round.facts(15.0)["fl/result_after_seconds/site-3"] == 12


def test_a_site_that_never_gets_its_second_task_is_missing(workflow: Workflow) -> None:
    for site in SITES:
        workflow.hand(0, "train", site, SITES)
        workflow.take(1, "train", site)
    for site in SITES[:2]:
        workflow.hand(2, "validate", site, SITES)
    workflow.take(3, "validate", "site-1")

    facts = workflow.round.facts(9.0)
    counts = [facts[f"fl/sites_{what}"] for what in ("sampled", "reported", "missing", "failed")]
    assert counts == [3, 1, 2, 0]
    assert {key for key in facts if key.startswith("fl/missing/")} == {"fl/missing/site-2", "fl/missing/site-3"}
    assert {key for key in facts if key.startswith("fl/result_after")} == {"fl/result_after_seconds/site-1"}


def test_a_site_has_failed_once_and_its_steps_are_said_once(workflow: Workflow) -> None:
    said: list[dict[str, float]] = []
    for begin, task in ((0, "train"), (2, "validate")):
        workflow.hand(begin, task, "site-1", ("site-1",))
        said.append(workflow.take(begin + 1, task, "site-1", is_ok=False, steps=7.0))

    assert said == [
        {"fl/seconds/train/site-1": 1, "fl/failed/site-1": 1, "fl/steps/site-1": 7},
        {"fl/seconds/validate/site-1": 1},
    ]
    assert (workflow.round.missing(), workflow.round.reported()) == (set(), set())
