# SPDX-License-Identifier: Apache-2.0
"""Knows the current federated round of this process, and tells it to the code that puts the round on records.

Each widget makes one: `ClientRounds` or `ServerRounds`. It gets FLARE's events before all other components, so that
what a component logs in an event already carries the right round. A task without a round ends the current round, so
that later records do not carry it. Two keep their round: a client that controls its workflow, and a server whose
workflow says itself when a round starts.

A workflow can cut off a slow client: FLARE then hands over the next task while the script still works on the old one.
Nothing tells trackhub when the script takes the new model. So records get no round until a task has ended well, with no
other task open, and the next task begins. If a task failed in an executor without such a script, nothing works on it,
and the next task's round is certain.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal

from trackhub.flare import flare_internals
from trackhub.flare.collab_call_outcomes import watch_calls
from trackhub.flare.flower_reply_outcomes import watch_replies
from trackhub.job_and_run_info import RunStatus

__all__ = ["ClientRounds", "ServerRounds"]


class _OpenTasks:
    """Keeps the tasks that a client's trainers may still work on, and sets the client's round. Thread-safe."""

    def __init__(self, set_round: Callable[[int | None], None]) -> None:
        self._lock = threading.Lock()
        self._set_round = set_round
        self._rounds: list[int | None] = []  # of the tasks whose executor has not returned
        self._may_lag = False  # True if a trainer may work on a task of an earlier round, or on one without a result

    def announce(self, current: int | None) -> None:
        """Set the round of a task that comes now. Set none if a trainer may still work on a task of another round."""
        # The round is set under the lock. Otherwise two tasks at once could set their rounds in the wrong order.
        with self._lock:
            self._set_round(current if self._has_only(current) else None)

    def begin(self, current: int | None) -> None:
        """Do what `announce` does, and note that an executor gets the task."""
        with self._lock:
            self._may_lag = not self._has_only(current)
            self._rounds.append(current)
            self._set_round(None if self._may_lag else current)

    def _has_only(self, current: int | None) -> bool:
        """Return whether every task that a trainer may still work on is of this round."""
        return not self._may_lag and all(number == current for number in self._rounds)

    def end(self, current: int | None, *, well: bool, may_go_on: bool) -> None:
        """Note that an executor has returned.

        Args:
            current: the round that ``begin`` got.
            well: it returned a result.
            may_go_on: if it returned none, a trainer may go on working on the task.
        """
        with self._lock:
            self._rounds.remove(current)
            if not well:
                self._may_lag = self._may_lag or may_go_on
            elif not self._rounds:
                self._may_lag = False


class ClientRounds(FLComponent):  # type: ignore[misc]  # FLARE has no types
    """The round of a client: the round of its executor's current task, or of the last one.

    On a client that controls the workflow, FLARE's event ROUND_STARTED sets it as well. There is no round while a
    trainer may still work on an earlier task than the current one.
    """

    def __init__(
        self,
        engine: Any,
        set_round: Callable[[int | None], None],
        end: Callable[[RunStatus], None],
        take_result: Callable[[Any, Any], None] | None = None,
    ) -> None:
        """Watch this client's executors and events from now on.

        Args:
            engine: FLARE's engine in this process.
            set_round: called with the round whenever it may have changed. It must not raise.
            end: called with a status when a task or a call of the Collab API has ended, and at each reply of a Flower
                app. It must not raise.
            take_result: called with a task's data and what ``execute`` returned, also if that says that the task
                failed. Not called if ``execute`` raised. It must not raise. None calls nothing.
        """
        super().__init__()
        self._end = end
        self._take_result = take_result
        self._controls_workflow = False
        self._tasks = _OpenTasks(set_round)
        for executor in flare_internals.executors(engine):
            if flare_internals.controls_workflow(executor):
                self._controls_workflow = True
            else:
                executor.execute = self._watched(executor.execute, flare_internals.has_trainer(executor))
                watch_calls(executor, end)
                watch_replies(executor, end)
        flare_internals.add_first_handler(engine, self)

    def _watched(self, execute: Callable[..., Any], has_trainer: bool) -> Callable[..., Any]:
        """Wrap an executor's ``execute``: set the round before it, and report the result and the status after it.

        Every workflow hands over a task by calling ``execute``. A client that controls its workflow fires no event
        then.
        """

        def watched(task_name: str, shareable: Any, fl_ctx: FLContext, abort_signal: Signal) -> Any:
            current = flare_internals.round_of_task(shareable)
            self._tasks.begin(current)
            status = RunStatus.FAILED
            try:
                result = execute(task_name, shareable, fl_ctx, abort_signal)
                status = flare_internals.task_status(result)
                if self._take_result is not None:
                    self._take_result(shareable, result)
            finally:
                well = status is RunStatus.FINISHED
                self._tasks.end(current, well=well, may_go_on=has_trainer or abort_signal.triggered)
                # Only the signal says whether the task was cut off. The return code "aborted" is no proof: FLARE's
                # executor for in-process trainers also returns it when the script raises.
                if not well:
                    status = RunStatus.ABORTED if abort_signal.triggered else RunStatus.FAILED
                self._end(status)
            return result

        return watched

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Handle one of FLARE's events."""
        if flare_internals.is_from_another_process(fl_ctx):
            return
        if event_type == EventType.BEFORE_TASK_EXECUTION:
            current = flare_internals.round_of_task(fl_ctx.get_prop(FLContextKey.TASK_DATA))
            # The tasks that configure and start a workflow carry no round. A client that controls the workflow may get
            # such a task while its own thread is in a round.
            if current is not None or not self._controls_workflow:
                self._tasks.announce(current)
        elif event_type == flare_internals.ROUND_STARTED:
            self._tasks.announce(flare_internals.round_of_context(fl_ctx))


class ServerRounds(FLComponent):  # type: ignore[misc]  # FLARE has no types
    """The round of the server: the round of its workflow."""

    def __init__(self, engine: Any, set_round: Callable[[int | None], None]) -> None:
        """Watch the server's events from now on.

        Args:
            engine: FLARE's engine in this process.
            set_round: called with the round whenever it may have changed. It must not raise.
        """
        super().__init__()
        self._set_round = set_round
        self._workflow_tells = False  # True once the workflow fired ROUND_STARTED. Its tasks are not asked then
        flare_internals.add_first_handler(engine, self)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Handle one of FLARE's events."""
        if flare_internals.is_from_another_process(fl_ctx):
            return
        if event_type in (EventType.START_WORKFLOW, EventType.END_WORKFLOW):
            self._workflow_tells = False
            self._set_round(None)
        elif event_type == flare_internals.ROUND_STARTED:
            self._workflow_tells = True
            self._set_round(flare_internals.round_of_context(fl_ctx))
        elif event_type == EventType.BEFORE_TASK_DATA_FILTER and not self._workflow_tells:
            # The cyclic workflow of the server fires no event for a round. Its tasks carry it.
            self._set_round(flare_internals.round_of_task(fl_ctx.get_prop(FLContextKey.TASK_DATA)))
