# SPDX-License-Identifier: Apache-2.0
"""Learns how each call into a client ends, in a job that uses FLARE's Collab API. Written for nvflare 2.9.

Such a job has only two tasks, which prepare the clients. All work is done in calls, and FLARE fires no event for a
call. `trackhub.flare.current_round` calls this module, so that a client ends as failed if its last call raised.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor as Pool
from typing import Any

from nvflare.apis.executor import Executor
from nvflare.collab.runtime.defs import CallReplyKey
from nvflare.collab.runtime.executor import CollabExecutor

from trackhub.job_and_run_info import RunStatus

__all__ = ["watch_calls"]


def watch_calls(executor: Executor, end: Callable[[RunStatus], None]) -> None:
    """Report how each call into this client ends, before the reply leaves. Do not change other kinds of executors.

    Args:
        executor: one of the job's executors.
        end: called with how a call ended, in the thread that made it. It must not raise.
    """
    if isinstance(executor, CollabExecutor):
        # FLARE hands each call to this pool as a function. It returns a reply even if the client's function raises.
        pool: Pool = executor.inbound_executor
        pool.submit = _submit(pool.submit, end)  # type: ignore[method-assign]


def _submit(submit: Callable[..., Any], end: Callable[[RunStatus], None]) -> Callable[..., Any]:
    def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            reply = function(*args, **kwargs)
            end(_status(reply))
            return reply

        return submit(call)

    return watched


def _status(reply: Any) -> RunStatus:
    """Return how a call ended. FLARE names the error's type only if the client's own function raised it."""
    payload = getattr(reply, "payload", None)
    raised = isinstance(payload, dict) and payload.get(CallReplyKey.ERROR_TYPE)
    return RunStatus.FAILED if raised else RunStatus.FINISHED
