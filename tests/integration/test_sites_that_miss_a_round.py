# SPDX-License-Identifier: Apache-2.0
"""A site that FLARE passes over is missing in that round of the federation run, and in no other."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.seq_relay_manager import SequentialRelayTaskManager
from nvflare.apis.impl.task_manager import TaskCheckStatus
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from trackhub.flare.federation_facts import FederationFacts

SITES = ("site-1", "site-2")
TIMEOUT_S = 10


class Relay:
    """One round of the cyclic workflow, whose task FLARE's own manager hands out, watched by trackhub."""

    def __init__(self, watch: FederationFacts, number: int, *, age_s: float = 0) -> None:
        self.watch, self.number = watch, number
        data = Shareable()
        data.set_header(AppConstants.CURRENT_ROUND, number)
        self.task = Task(name="train", data=data)
        self.task.targets = [*SITES]
        self.task.schedule_time = time.time() - age_s
        self.manager = SequentialRelayTaskManager(self.task, TIMEOUT_S, None, dynamic_targets=False)
        self.task.props["___mgr"] = self.manager  # as FLARE's communicator does

    def ask(self, site: str) -> bool:
        """Let a site ask for the task, and return its result if it gets it. Return whether it got it."""
        entry = ClientTask(Client(site, token=""), self.task)
        fl_ctx = FLContext()
        if self.manager.check_task_send(entry, fl_ctx) != TaskCheckStatus.SEND:
            return False
        self.task.last_client_task_map[site] = entry
        communicator = SimpleNamespace(process_task_check=lambda task_id, fl_ctx: entry)
        runner = SimpleNamespace(current_wf=SimpleNamespace(controller=SimpleNamespace(communicator=communicator)))
        fl_ctx.set_prop(FLContextKey.RUNNER, runner)
        fl_ctx.set_prop(FLContextKey.TASK_ID, f"{site} in round {self.number}")
        fl_ctx.set_prop(FLContextKey.TASK_DATA, self.task.data)
        self.watch.handle_event(EventType.BEFORE_TASK_DATA_FILTER, fl_ctx)
        entry.result_received_time = time.time()
        fl_ctx.set_prop(FLContextKey.TASK_RESULT, Shareable())
        self.watch.handle_event(EventType.BEFORE_PROCESS_SUBMISSION, fl_ctx)
        return True


def test_a_site_that_the_cyclic_workflow_passed_over_is_missing_then() -> None:
    found: dict[str, dict[int, float]] = {}

    def log(values: dict[str, float], number: int) -> None:
        for key, value in values.items():
            found.setdefault(key, {})[number] = value

    federation: Any = SimpleNamespace(log=log, log_text=lambda key, text, number: None)
    watch = FederationFacts(SimpleNamespace(run_manager=SimpleNamespace(handlers=[])), federation)

    waits = Relay(watch, 0)
    assert not waits.ask("site-2"), "it is the turn of site-1"
    first = Relay(watch, 0, age_s=TIMEOUT_S + 1)
    assert first.ask("site-2"), "FLARE passes over site-1, which has not asked"
    assert not first.ask("site-1"), "its turn is over"
    second = Relay(watch, 1)
    assert [second.ask(site) for site in SITES] == [True, True]
    watch.handle_event(EventType.ABOUT_TO_END_RUN, FLContext())

    assert found["fl/sites_sampled"] == {0: 2, 1: 2}
    assert found["fl/sites_reported"] == {0: 1, 1: 2}
    assert found["fl/sites_missing"] == {0: 1, 1: 0}
    assert {key: rounds for key, rounds in found.items() if key.startswith("fl/missing/")} == {
        "fl/missing/site-1": {0: 1}
    }
