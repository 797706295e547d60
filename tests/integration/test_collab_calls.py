# SPDX-License-Identifier: Apache-2.0
"""How each call of FLARE's Collab API into a client ended, with FLARE's own executor, application and dispatch."""

from __future__ import annotations

from nvflare.collab import collab
from nvflare.collab.api.app import ClientApp
from nvflare.collab.runtime import dispatch
from nvflare.collab.runtime.defs import CallHeaderKey
from nvflare.collab.runtime.executor import CollabExecutor
from nvflare.fuel.f3.cellnet.utils import new_cell_message

from trackhub.flare.collab_call_outcomes import watch_calls
from trackhub.job_and_run_info import RunStatus


class Published:
    @collab.publish  # type: ignore[untyped-decorator]  # FLARE has no types
    def works(self) -> str:
        return "result"

    @collab.publish  # type: ignore[untyped-decorator]
    def raises(self) -> None:
        raise ValueError("a call that raises")


def test_each_collab_call_tells_how_it_ended_before_its_reply_is_there() -> None:
    """A call of a function that a client does not publish is the caller's error."""
    executor, ends = CollabExecutor("client"), list[RunStatus]()
    app = ClientApp(Published())
    app.name = "site-1"
    watch_calls(executor, ends.append)

    seen = []
    for method in ("works", "raises", "not_there"):
        header = {CallHeaderKey.TARGET_NAME: "site-1.client", CallHeaderKey.METHOD_NAME: method}
        request = new_cell_message({**header, CallHeaderKey.AUTHENTICATED_CALLER: "server"}, {})
        reply = dispatch._submit_app_method(request, app, executor.logger, executor.inbound_executor).result(30)
        seen.append((reply.payload.get("result"), reply.payload.get("error_type"), ends[-1]))

    assert seen == [
        ("result", None, RunStatus.FINISHED),
        (None, "ValueError", RunStatus.FAILED),
        (None, None, RunStatus.FINISHED),
    ]
