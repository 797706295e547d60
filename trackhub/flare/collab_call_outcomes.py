# SPDX-License-Identifier: Apache-2.0
"""Learns how each call into a client ends, in a job that uses FLARE's Collab API. Written for nvflare 2.9.

Such a job has two tasks only, which make the clients ready. All work is done in calls, for which FLARE fires no event.
`trackhub.flare.round_watch` calls it, so that a client ends as failed if its last call raised.
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
    """Tell how each call into this client ends, before the reply leaves. Leave another kind of executor as it is.

    Args:
        executor: one of the job's executors.
        end: called with how a call ended, in the thread that made it. It must not raise.
    """
    if isinstance(executor, CollabExecutor):
        # FLARE hands each call to this pool: a function that returns the reply, whatever the client's function does.
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
