# SPDX-License-Identifier: Apache-2.0
"""How a job ends, by the order of FLARE's events, on the server and at a client. FLARE's own runners take part."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ProcessType
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.signal import Signal
from nvflare.private.event import fire_event
from nvflare.private.fed.client.client_app_runner import ClientAppRunner
from nvflare.private.fed.client.client_runner import ClientRunner
from nvflare.private.fed.server.fed_server import FederatedServer
from nvflare.private.fed.server.server_commands import AbortCommand
from nvflare.private.fed.server.server_runner import ServerRunner

from trackhub.flare.how_a_run_ends import ClientEnding, ServerEnding
from trackhub.flare.receiver_widget import TrackhubReceiver
from trackhub.flare.sender_widget import TrackhubSender
from trackhub.job_and_run_info import RunStatus

FINISHED, FAILED, ABORTED = RunStatus.FINISHED, RunStatus.FAILED, RunStatus.ABORTED


class Server(ServerRunner):  # type: ignore[misc]  # FLARE has no types
    """FLARE's runner after the start of a run, with a receiver before it in the list of handlers, as FLARE has them."""

    def __init__(self) -> None:
        FLComponent.__init__(self)
        self.abort_signal = Signal()
        self.receiver = TrackhubReceiver(backends={"jsonl": {}})
        self.told: list[RunStatus] = []
        self.receiver._core = SimpleNamespace(note_status=self.told.append)  # type: ignore[assignment]
        self.contexts = _contexts(ProcessType.SERVER_JOB, self, self.abort_signal)
        self.receiver._ending.watch(self.contexts.new_context())

    def do(self, what: str) -> None:
        """Do what FLARE does: fire an event, abort the run, or trigger the signal as a workflow does that is done."""
        if what == "abort":
            self.abort(fl_ctx=self.contexts.new_context(), turn_to_cold=False)
        elif what == "signal":
            self.abort_signal.trigger(True)
        else:
            fire_event(what, [self.receiver, self], self.contexts.new_context())


class Client(ClientRunner):  # type: ignore[misc]  # FLARE has no types
    """FLARE's runner, with a sender before it in the list of handlers, as FLARE has them."""

    def __init__(self) -> None:
        FLComponent.__init__(self)
        self._run_abort_requested = False
        self.run_abort_signal = Signal()
        self.sender = TrackhubSender()
        self.engine = _contexts(ProcessType.CLIENT_JOB, self, self.run_abort_signal)

    def do(self, what: str) -> None:
        """Do what FLARE does: fire an event, abort the run, or end it as the server asks."""
        fl_ctx = self.engine.new_context()
        if what == "abort":
            self.abort()
        elif what == "end":
            self._handle_end_run("", {}, fl_ctx)
        else:
            if what == EventType.ABOUT_TO_END_RUN and self._run_abort_requested:
                fl_ctx.set_prop(FLContextKey.RUN_ABORT_REQUESTED, True, private=True, sticky=False)
            fire_event(what, [self.sender, self], fl_ctx)


def _contexts(process: str, runner: Any, signal: Signal) -> FLContextManager:
    private = {
        FLContextKey.PROCESS_TYPE: process, FLContextKey.RUNNER: runner, FLContextKey.RUN_ABORT_SIGNAL: signal,
    }  # fmt: skip
    return FLContextManager(
        engine=SimpleNamespace(fire_event=lambda *_: None), identity_name="site-1", job_id="j", public_stickers={},
        private_stickers=private,
    )  # fmt: skip


START, END = EventType.START_WORKFLOW, EventType.END_WORKFLOW
ERROR, LAST = EventType.FATAL_SYSTEM_ERROR, EventType.ABOUT_TO_END_RUN


@pytest.mark.parametrize(
    ("happens", "status", "told_at"),
    [
        ([START, END, LAST], FINISHED, LAST),
        ([START, ERROR, END, LAST], FAILED, ERROR),
        ([ERROR, START, END, LAST], FAILED, ERROR),
        ([START, "abort", END, LAST], ABORTED, "abort"),
        (["abort", START, END, LAST], ABORTED, "abort"),
        ([START, "abort", ERROR, END, LAST], ABORTED, "abort"),  # swarm, which cannot reach the clients any more
        ([START, "abort", END, ERROR, LAST], ABORTED, "abort"),
        ([START, ERROR, ERROR, END, LAST], FAILED, ERROR),
        ([START, ERROR, "abort", ERROR, END, LAST], FAILED, ERROR),
        ([START, "signal", END, LAST], FINISHED, LAST),  # XGBoost
        ([START, "signal", ERROR, END, LAST], FAILED, ERROR),
        ([START, END, LAST, ERROR], FAILED, LAST),
        ([START, END, LAST, "abort"], FINISHED, LAST),  # the simulator, while the server waits for the sites
    ],
)
def test_the_first_of_abort_and_error_is_how_the_job_ends(happens: list[str], status: RunStatus, told_at: str) -> None:
    """The receiver knows as early as it can: FLARE kills an aborted job's process 10 seconds after the abort."""
    server, first = Server(), ""

    for what in happens:
        server.do(what)
        first = first or (what if server.told else "")

    assert server.receiver._ending.status is status
    assert server.told[-1] is status
    assert set(server.told) <= {status, FINISHED}
    assert first == told_at


def test_a_job_that_was_aborted_before_its_start_is_aborted() -> None:
    server = Server()
    server.receiver._ending = ServerEnding(lambda status: None)
    server.abort_signal.trigger(True)

    server.receiver._ending.watch(server.contexts.new_context())
    server.do(ERROR)
    server.do(LAST)

    assert server.receiver._ending.status is ABORTED


@pytest.mark.parametrize(
    ("happens", "status"),
    [
        (["end", LAST], FINISHED),
        (["abort", LAST], ABORTED),
        ([ERROR, LAST], FAILED),
        (["abort", ERROR, LAST], ABORTED),
        ([ERROR, "abort", ERROR, LAST], FAILED),
        (["end", ERROR, LAST], FAILED),
    ],
)
def test_a_site_whose_error_follows_an_abort_was_aborted(happens: list[str], status: RunStatus) -> None:
    client = Client()

    for what in happens:
        client.do(what)

    assert client.sender._ending.status is status


@pytest.mark.parametrize(
    ("panicked", "task", "aborted", "status"),
    [
        (False, FINISHED, False, FINISHED),
        (False, FINISHED, True, ABORTED),
        (False, ABORTED, True, ABORTED),
        (False, ABORTED, False, FINISHED),  # the workflow cut off a slow site, and ended well
        (False, FAILED, False, FAILED),
        (False, FAILED, True, ABORTED),
        (True, FINISHED, True, FAILED),  # FLARE aborts after an error
    ],
)
def test_the_end_of_a_site_is_that_of_the_job_or_of_its_last_task(
    panicked: bool, task: RunStatus, aborted: bool, status: RunStatus
) -> None:
    ending, fl_ctx = ClientEnding(panicked, task), FLContext()
    fl_ctx.set_prop(FLContextKey.RUN_ABORT_REQUESTED, aborted, private=True, sticky=False)

    ending.decide(fl_ctx)

    assert ending.status is status


def test_flare_s_runners_get_each_event_after_the_components_and_are_told_of_aborts() -> None:
    for start in (FederatedServer.start_run, ClientAppRunner.create_client_runner):
        source = inspect.getsource(start)
        assert source.index("create_run_manager(") < source.index("_runner)")
        assert "add_handler(" in source
    assert "server_runner.abort(" in inspect.getsource(AbortCommand.process)
    assert "self.abort(" in inspect.getsource(ServerRunner.handle_event)
