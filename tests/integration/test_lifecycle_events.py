# SPDX-License-Identifier: Apache-2.0
"""FLARE's lifecycle events count only when FLARE fired them in this process: any site can send one of any type.

And how a client's task ends, and which round its tasks give to records.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import EventScope, FLContextKey, ProcessType, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode

from tests.unit.readers_and_bad_backends import WAIT_S
from trackhub.delivery import Limits, Receiver, Side
from trackhub.delivery.journal.read_only import read_journal_meta
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.lane.lane import Lane
from trackhub.flare import flare_internals, receiver_widget, sender_widget
from trackhub.flare.current_round import ClientRounds
from trackhub.flare.receiver_widget import TrackhubReceiver
from trackhub.flare.records_made_by_trackhub import OwnRecords, SiteRecords
from trackhub.flare.sender_widget import TrackhubSender
from trackhub.job_and_run_info import JobInfo, RunStatus

LIFECYCLE = [
    EventType.ABOUT_TO_START_RUN, EventType.START_RUN, EventType.ABORT_TASK, EventType.ABOUT_TO_END_RUN,
    EventType.CHECK_END_RUN_READINESS, EventType.END_RUN, EventType.SWAP_OUT, EventType.FATAL_SYSTEM_ERROR,
]  # fmt: skip


def context(process: str, scope: str | None) -> FLContext:
    fl_ctx = FLContext()
    fl_ctx.set_prop(ReservedKey.IDENTITY_NAME, "site-2", private=True, sticky=False)
    fl_ctx.set_prop(FLContextKey.PROCESS_TYPE, process, private=True, sticky=False)
    if scope is not None:
        fl_ctx.set_prop(FLContextKey.EVENT_SCOPE, scope, private=True, sticky=False)
    return fl_ctx


def handled(component: FLComponent, parts: dict[str, Any], event: str, fl_ctx: FLContext) -> list[str]:
    """Return which of these methods the component calls at an event."""
    calls: list[str] = []
    for name, owner in parts.items():
        setattr(owner, name, lambda *args, name=name: calls.append(name))
    component.handle_event(event, fl_ctx)
    return calls


@pytest.mark.parametrize("event", LIFECYCLE)
def test_a_lifecycle_event_of_another_site_does_nothing_at_the_receiver(event: str) -> None:
    widget = TrackhubReceiver(backends={"jsonl": {}})
    tail = receiver_widget._EndOfRunHandler(widget)
    parts: dict[str, Any] = {"_on_server": widget, "finish": widget}
    sent, own = (context(ProcessType.SERVER_JOB, scope) for scope in (EventScope.FEDERATION, None))

    assert handled(widget, parts, event, sent) == handled(tail, parts, event, sent) == []
    assert handled(widget, parts, event, own) == ["_on_server"]
    assert handled(tail, parts, event, own) == ["finish"] * (event == EventType.END_RUN)


@pytest.mark.parametrize("event", LIFECYCLE)
def test_a_lifecycle_event_of_another_site_does_nothing_at_the_sender(event: str) -> None:
    widget = TrackhubSender(server_receiver="trackhub_receiver")
    tail = sender_widget._EndOfRunHandler(widget, SiteRecords(OwnRecords.of(None), widget))
    parts: dict[str, Any] = {"_handle": widget, "finish": widget, "pause": widget}
    sent, own = (context(ProcessType.CLIENT_JOB, scope) for scope in (EventScope.FEDERATION, None))

    assert handled(widget, parts, event, sent) == handled(tail, parts, event, sent) == []
    assert handled(widget, parts, event, own) == ["_handle"]
    ends = {EventType.END_RUN: ["finish"], EventType.SWAP_OUT: ["pause"]}
    assert handled(tail, parts, event, own) == ends.get(event, [])


def test_the_end_of_a_job_does_not_wait_for_a_locked_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """FLARE's server handles the event in the thread that ends the job."""
    widget = TrackhubReceiver(backends={"jsonl": {}})
    widget._core = Receiver(
        tmp_path, job="job-1", side=Side.SERVER, backends={"jsonl": {}}, limits=Limits(deadline_s=1)
    )
    widget._core.start()
    with closing(sqlite3.connect(widget._core.folder / "trackhub.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        for event in (EventType.FATAL_SYSTEM_ERROR, EventType.ABOUT_TO_END_RUN):
            widget.handle_event(event, context(ProcessType.SERVER_JOB, None))
        took_s = time.monotonic() - start
        other.execute("ROLLBACK")
    widget.close(RunStatus.FAILED)

    assert took_s < 5.0, "two waits of a quarter of a second"
    assert "tracking failed" not in caplog.text
    assert read_journal_report(tmp_path / "trackhub" / "trackhub.db").status == RunStatus.FAILED


@pytest.mark.parametrize("is_early", [True, False], ids=["before the start", "while a backend is checked"])
def test_the_journal_knows_an_abort_that_comes_before_the_receiver_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_early: bool
) -> None:
    """FLARE may kill the process ten seconds later, before anything else can tell how the job ended."""
    widget = TrackhubReceiver(backends={"jsonl": {}})
    fl_ctx, preflight, signal = context(ProcessType.SERVER_JOB, None), Lane._preflight, Signal()
    runner = SimpleNamespace(abort=lambda: None)
    monkeypatch.setattr(receiver_widget, "job_info", lambda *_: JobInfo("job-1"))
    monkeypatch.setattr(flare_internals, "run_dir", lambda _: tmp_path)
    monkeypatch.setattr(flare_internals, "operator_file", lambda _: None)
    monkeypatch.setattr(Lane, "_preflight", lambda lane: (is_early or runner.abort(), preflight(lane)))
    for key, value in ((FLContextKey.RUNNER, runner), (FLContextKey.RUN_ABORT_SIGNAL, signal)):
        fl_ctx.set_prop(key, value, private=True, sticky=False)
    if is_early:
        signal.trigger(True)

    widget._ending.watch(fl_ctx)
    widget.open(fl_ctx)
    known = read_journal_meta(tmp_path / "trackhub" / "trackhub.db")["status"]
    widget.close(RunStatus.ABORTED)

    assert known == RunStatus.ABORTED


class AnExecutor(Executor):  # type: ignore[misc]  # FLARE has no types
    code = ReturnCode.OK

    def work(self) -> None:
        """Do the task: nothing."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        self.work()
        if self.code == "raises":
            raise RuntimeError("an executor that raises")
        return make_reply(self.code)


@pytest.mark.parametrize(
    ("code", "is_cut_off", "status"),
    [
        (ReturnCode.OK, False, RunStatus.FINISHED),
        (ReturnCode.OK, True, RunStatus.FINISHED),
        (ReturnCode.EXECUTION_EXCEPTION, False, RunStatus.FAILED),
        (ReturnCode.EXECUTION_EXCEPTION, True, RunStatus.ABORTED),
        (ReturnCode.TASK_ABORTED, True, RunStatus.ABORTED),
        (ReturnCode.TASK_ABORTED, False, RunStatus.FAILED),  # FLARE's answer when a script in process raised
        ("raises", False, RunStatus.FAILED),
    ],
)
def test_a_task_that_nobody_cut_off_has_failed_or_finished(code: str, is_cut_off: bool, status: RunStatus) -> None:
    executor, signal, ends = AnExecutor(), Signal(), list[RunStatus]()
    executor.code = code
    ClientRounds(SimpleNamespace(handlers=[executor], add_handler=None), lambda number: None, ends.append)
    if is_cut_off:
        signal.trigger(True)

    with contextlib.suppress(RuntimeError):
        executor.execute("train", Shareable(), FLContext(), signal)

    assert ends == [status]


def task_of(current: int | None) -> Shareable:
    task = Shareable()
    if current is not None:
        task.set_header(AppConstants.CURRENT_ROUND, current)
    return task


class AScript(AnExecutor, ClientAPIExecutor):  # type: ignore[misc]
    """FLARE's executor for training scripts, without a script."""

    def __init__(self) -> None:
        ClientAPIExecutor.__init__(self, ExecutionMode.IN_PROCESS, task_script_path="client.py")


@pytest.mark.parametrize(("kind", "is_cut_off"), [(AScript, False), (AScript, True), (AnExecutor, True)])
def test_after_a_task_without_a_result_the_round_is_unknown_until_one_has_ended_well(
    kind: type[AnExecutor], is_cut_off: bool
) -> None:
    executor, rounds = kind(), list[int | None]()
    ClientRounds(SimpleNamespace(handlers=[executor], add_handler=None), rounds.append, lambda status: None)

    for number, executor.code in enumerate([ReturnCode.OK, ReturnCode.TASK_ABORTED, ReturnCode.OK, ReturnCode.OK]):
        signal = Signal()
        if is_cut_off and number == 1:
            signal.trigger(True)
        executor.execute("train", task_of(number), FLContext(), signal)

    assert rounds == [0, 1, None, 3]


@pytest.mark.parametrize("code", [ReturnCode.EXECUTION_EXCEPTION, ReturnCode.TASK_ABORTED, "raises"])
def test_after_a_task_that_failed_in_the_executor_itself_the_round_is_known(code: str) -> None:
    """The executor has returned, and nothing works on."""
    executor, rounds = AnExecutor(), list[int | None]()
    ClientRounds(SimpleNamespace(handlers=[executor], add_handler=None), rounds.append, lambda status: None)

    for number, executor.code in enumerate([ReturnCode.OK, code, code, ReturnCode.OK]):
        with contextlib.suppress(RuntimeError):
            executor.execute("train", task_of(number), FLContext(), Signal())

    assert rounds == [0, 1, 2, 3]


def test_while_a_task_runs_one_of_another_round_has_no_known_round() -> None:
    """A peer's task comes by an event. FLARE then cuts off the task that runs."""

    class Interrupted(AnExecutor):
        def work(self) -> None:
            for number in (0, 1):
                fl_ctx = context(ProcessType.CLIENT_JOB, None)
                fl_ctx.set_prop(FLContextKey.TASK_DATA, task_of(number), private=True, sticky=False)
                watch.handle_event(EventType.BEFORE_TASK_EXECUTION, fl_ctx)

    executor, rounds = Interrupted(), list[int | None]()
    engine = SimpleNamespace(handlers=[executor], add_handler=None)
    watch = ClientRounds(engine, rounds.append, lambda status: None)
    for number in (0, 1):
        executor.execute("train", task_of(number), FLContext(), Signal())

    assert rounds == [0, 0, None, 1, None, 1]


def test_a_task_without_a_round_beside_one_of_a_round_makes_the_round_unknown() -> None:
    """The trainer may work on either of them, until both have ended."""

    class Interrupted(AnExecutor):
        def work(self) -> None:
            other.execute("validate", task_of(None), FLContext(), Signal())
            fl_ctx = context(ProcessType.CLIENT_JOB, None)
            fl_ctx.set_prop(FLContextKey.TASK_DATA, task_of(3), private=True, sticky=False)
            watch.handle_event(EventType.BEFORE_TASK_EXECUTION, fl_ctx)

    executor, other, rounds = Interrupted(), AnExecutor(), list[int | None]()
    engine = SimpleNamespace(handlers=[executor, other], add_handler=None)
    watch = ClientRounds(engine, rounds.append, lambda status: None)
    executor.execute("train", task_of(3), FLContext(), Signal())

    assert rounds == [3, None, None]


def test_of_two_tasks_that_come_at_once_the_second_has_no_known_round() -> None:
    """While the round of the first is being set, the second waits."""
    second, rounds = threading.Thread(), list[int | None]()

    class AtWork(AnExecutor):
        def work(self) -> None:
            both.wait(WAIT_S)

    def set_round(number: int | None) -> None:
        nonlocal second
        if second.ident is None:
            second = threading.Thread(target=others.execute, args=("train", task_of(2), FLContext(), Signal()))
            second.start()
            second.join(0.2)  # it would have set its round by then
        rounds.append(number)

    both = threading.Barrier(2)
    executor, others = AtWork(), AtWork()
    ClientRounds(SimpleNamespace(handlers=[executor, others], add_handler=None), set_round, lambda status: None)
    executor.execute("train", task_of(1), FLContext(), Signal())
    second.join(WAIT_S)

    assert rounds == [1, None]
