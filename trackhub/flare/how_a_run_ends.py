# SPDX-License-Identifier: Apache-2.0
"""Finds out how a run ends, on the server and at a client.

`trackhub.flare.receiver_widget` and `trackhub.flare.sender_widget` pass FLARE's events. For an abort on the
server, FLARE has no event. So `ServerEnding` wraps the method with which FLARE aborts a run.

On both sides, an abort and a fatal error can follow each other, and the first one is the cause. FLARE aborts a run
after a fatal error. After an abort, a workflow may report a fatal error, for example because the clients have gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext

from trackhub.job_and_run_info import RunStatus

__all__ = ["ClientEnding", "ServerEnding"]


class ServerEnding:
    """How the job ends, as the server sees it. If an abort and a fatal error both come, the first one decides.

    Attributes:
        status: how it ends. It is `RunStatus.FINISHED` until FLARE tells something else.
    """

    def __init__(self, note: Callable[[RunStatus], None]) -> None:
        """Begin with the status finished, since FLARE has told nothing else yet.

        Args:
            note: called with the new status after an abort or a fatal error, whichever comes first, and again when the
                status is settled. After an abort, it is called once FLARE's ``abort`` has returned.
        """
        self.status = RunStatus.FINISHED
        self._note = note
        self._lock = threading.Lock()
        self._is_decided = False

    def watch(self, fl_ctx: FLContext) -> None:
        """Learn of an abort when FLARE gets it. Call it at START_RUN.

        FLARE kills the process 10 seconds after an abort, and may need most of that time to end the workflow. The abort
        signal is no proof of an abort: some workflows trigger it themselves when they are done
        (``xgboost/histogram_based_v2/controller.py``, ``tie/controller.py``).
        """
        runner = fl_ctx.get_prop(FLContextKey.RUNNER)
        abort = runner.abort

        def watched(*args: Any, **kwargs: Any) -> Any:
            is_news = self._tell(RunStatus.ABORTED)  # before the workflow can report an error because of the abort
            try:
                return abort(*args, **kwargs)
            finally:
                if is_news:
                    self._note(RunStatus.ABORTED)

        runner.abort = watched
        signal = fl_ctx.get_run_abort_signal()
        if signal is not None and signal.triggered:  # no workflow has run yet, so FLARE triggered it for an abort
            self._tell(RunStatus.ABORTED)

    def take_fatal_error(self) -> None:
        """Take FATAL_SYSTEM_ERROR.

        FLARE's runner gets this event after all other components, and only then aborts the run.
        """
        if self._tell(RunStatus.FAILED):
            self._note(RunStatus.FAILED)

    def decide(self) -> None:
        """Settle the status, at ABOUT_TO_END_RUN. An abort that comes later does not change it."""
        self._is_decided = True
        self._note(self.status)

    def _tell(self, status: RunStatus) -> bool:
        """Set the status, unless it is set or this is an abort after `decide`. Return whether it was set."""
        with self._lock:
            if self.status is not RunStatus.FINISHED or (self._is_decided and status is RunStatus.ABORTED):
                return False
            self.status = status
            return True


@dataclass
class ClientEnding:
    """How the job ends at this client.

    Attributes:
        panicked: True if FLARE reported a fatal error before anybody stopped the job.
        task: how the last task ended.
        status: what the run gets. It is `RunStatus.FINISHED` until the end is decided.
    """

    panicked: bool = False
    task: RunStatus = RunStatus.FINISHED
    status: RunStatus = RunStatus.FINISHED

    def take_fatal_error(self, fl_ctx: FLContext) -> None:
        """Take FATAL_SYSTEM_ERROR.

        FLARE's runner gets this event after this call. If the runner knows of an abort now, the abort came first.
        """
        if not fl_ctx.get_prop(FLContextKey.RUNNER)._run_abort_requested:
            self.panicked = True

    def decide(self, fl_ctx: FLContext) -> None:
        """Settle the status, at ABOUT_TO_END_RUN.

        An aborted task does not mean that the site failed: swarm aborts a slow site's task, and the job may end well.
        """
        # The abort signal is no proof: FLARE triggers it at a normal end, too.
        aborted = bool(fl_ctx.get_prop(FLContextKey.RUN_ABORT_REQUESTED, False))
        failed = self.panicked or (self.task is RunStatus.FAILED and not aborted)
        self.status = RunStatus.FAILED if failed else RunStatus.ABORTED if aborted else RunStatus.FINISHED
