# SPDX-License-Identifier: Apache-2.0
"""A workflow that fires no event for a round: its tasks alone say which round it is in."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from tests.unit.readers_and_bad_backends import WAIT_S
from trackhub.flare import flare_internals, read_task_events
from trackhub.flare.federation_facts import FederationFacts
from trackhub.flare.model_updates import ModelUpdates

SITES = ("site-1", "site-2")
SECONDS = itertools.count(1000.0)


class Server:
    """Hands out tasks as FLARE's server does, and keeps what the federation run is told."""

    def __init__(self, *, update_statistics: bool = False) -> None:
        self.logged: list[tuple[str, int, float]] = []
        federation: Any = SimpleNamespace(log=self._log, log_text=lambda key, text, number: None)
        engine = SimpleNamespace(run_manager=SimpleNamespace(handlers=[]))
        self.watch = FederationFacts(engine, federation, update_statistics=update_statistics)

    def _log(self, values: dict[str, float], number: int) -> None:
        self.logged += [(key, number, value) for key, value in values.items()]

    def of(self, key: str) -> list[tuple[int, float]]:
        """Round and value of each fact of this key, in their order."""
        return [(number, value) for name, number, value in self.logged if name == key]

    def make(self, number: int) -> Task:
        """Make a task for all sites."""
        data = DXO(DataKind.WEIGHTS, data={"w": np.zeros(2)}).to_shareable()
        data.set_header(AppConstants.CURRENT_ROUND, number)
        task = Task(name="train", data=data)
        task.targets, task.schedule_time = [*SITES], next(SECONDS)
        return task

    def context(self, task: Task, site: str) -> FLContext:
        entry = ClientTask(Client(site, token=""), task)
        communicator = SimpleNamespace(process_task_check=lambda task_id, fl_ctx: entry)
        runner = SimpleNamespace(current_wf=SimpleNamespace(controller=SimpleNamespace(communicator=communicator)))
        fl_ctx = FLContext()
        fl_ctx.set_prop(FLContextKey.RUNNER, runner)
        fl_ctx.set_prop(FLContextKey.TASK_ID, f"{site} {task.schedule_time}")
        fl_ctx.set_prop(FLContextKey.TASK_DATA, task.data)
        return fl_ctx

    def hand(self, task: Task, site: str) -> None:
        self.watch.handle_event(EventType.BEFORE_TASK_DATA_FILTER, self.context(task, site))

    def answer(self, task: Task, site: str) -> None:
        result: Shareable = DXO(
            DataKind.WEIGHTS, data={"w": np.ones(2)}, meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: 5}
        ).to_shareable()
        fl_ctx = self.context(task, site)
        fl_ctx.set_prop(FLContextKey.TASK_RESULT, result)
        self.watch.handle_event(EventType.BEFORE_PROCESS_SUBMISSION, fl_ctx)

    def play(self, number: int) -> None:
        """Let all sites do a task of this round."""
        task = self.make(number)
        for site in SITES:
            self.hand(task, site)
        for site in SITES:
            self.answer(task, site)

    def end(self) -> None:
        self.watch.handle_event(EventType.ABOUT_TO_END_RUN, FLContext())


def test_a_workflow_that_counts_its_rounds_again_begins_them_again() -> None:
    server, numbers = Server(), [0, 1, 2, 0, 1]
    for number in numbers:
        server.play(number)
    server.end()

    assert server.of("fl/rounds_started") == [(number, i + 1.0) for i, number in enumerate(numbers)]
    assert server.of("fl/sites_reported") == [(number, 2) for number in numbers]
    assert server.of("fl/steps/site-2") == [(number, 5.0) for number in numbers]


def test_a_late_task_of_an_earlier_round_begins_no_round() -> None:
    server, late = Server(), None
    for number in range(3):
        task = server.make(number)
        server.hand(task, "site-1")
        late = late or task
        server.hand(late, "site-2")
    server.end()

    assert [number for number, _ in server.of("fl/rounds_started")] == [0, 1, 2]


def test_a_workflow_that_tells_its_rounds_begins_none_by_a_task_of_a_lower_round() -> None:
    server = Server()
    for number in range(2):
        fl_ctx = FLContext()
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number)
        server.watch.handle_event(flare_internals.ROUND_STARTED, fl_ctx)
        server.play(number)
    server.play(0)
    server.end()

    assert [number for number, _ in server.of("fl/rounds_started")] == [0, 1]


def test_a_round_begins_once_however_many_sites_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sites changed in the round before is still worked out when the next site asks."""
    server, is_in_end, may_go_on = Server(update_statistics=True), threading.Event(), threading.Event()
    end = ModelUpdates.end

    def slow_end(updates: ModelUpdates) -> dict[str, float]:
        is_in_end.set()
        may_go_on.wait(WAIT_S)
        return end(updates)

    server.play(0)
    monkeypatch.setattr(ModelUpdates, "end", slow_end)
    task = server.make(1)
    first = threading.Thread(target=server.hand, args=(task, "site-1"))
    first.start()
    assert is_in_end.wait(WAIT_S)
    second = threading.Thread(target=server.hand, args=(task, "site-2"))
    second.start()
    second.join(WAIT_S)
    server.answer(task, "site-2")
    may_go_on.set()
    first.join(WAIT_S)
    server.answer(task, "site-1")
    server.end()

    assert server.of("fl/rounds_started") == [(0, 1.0), (1, 2.0)]
    assert server.of("fl/sites_reported") == [(0, 2), (1, 2)]
    for site in SITES:
        assert dict(server.of(f"fl/update_norm/{site}")) == pytest.approx({0: np.sqrt(2), 1: np.sqrt(2)})
        assert dict(server.of(f"fl/update_cosine/{site}")) == pytest.approx({0: 1, 1: 1})


def test_the_best_model_so_far_is_logged_when_flare_says_it() -> None:
    """A server that is killed sees no end of the job."""
    server = Server()
    for number, accuracy in ((0, 0.5), (3, 0.75)):
        fl_ctx = FLContext()
        info = {"best_round": number, "best_metrics": {"accuracy": accuracy}}
        fl_ctx.set_prop(AppConstants.METRICS_SELECTION_INFO, info)
        server.watch.handle_event(read_task_events.BEST_MODEL, fl_ctx)

    assert server.of("fl/best_round") == [(0, 0), (3, 3)]
    assert server.of("fl/best/accuracy") == [(0, 0.5), (3, 0.75)]
