# SPDX-License-Identifier: Apache-2.0
"""Learns from Flower's replies whether the client app of a site raised. Written for nvflare 2.9 and flwr 1.32 to 1.34.

FLARE does not look into Flower's messages, and its job ends as finished even if every client app raised.
`trackhub.flare.current_round` calls it, so that such a site ends as failed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from nvflare.apis.executor import Executor

from trackhub.job_and_run_info import RunStatus

__all__ = ["watch_replies"]

_FLOWER = "nvflare.app_opt.flower.executor"
_PUSH = "PushMessagesRequest"
_MOST_BYTES = 16 << 20  # a reply that reports an error holds no model, so it is smaller
_log = logging.getLogger(__name__)


def watch_replies(executor: Executor, end: Callable[[RunStatus], None]) -> None:
    """Report how the client app answers each message, before the reply leaves. Do not change other kinds of executors.

    Flower asks a client to train and to evaluate. The app has failed if its last reply to either kind of request is an
    error.

    Args:
        executor: one of the job's executors.
        end: called after each reply with the app's status so far, in a thread of FLARE's gRPC server. It must not
            raise.
    """
    flower = sys.modules.get(_FLOWER)
    if flower is not None and isinstance(executor, flower.FlowerExecutor):
        get_connector = executor.get_connector

        def watched(*args: Any) -> Any:
            connector = get_connector(*args)
            connector.SendReceive = _send_receive(connector.SendReceive, end)
            return connector

        executor.get_connector = watched


def _send_receive(send_receive: Callable[..., Any], end: Callable[[RunStatus], None]) -> Callable[..., Any]:
    failed: set[str] = set()

    def watched(request: Any, context: Any) -> Any:
        try:
            replies = _replies(request)
        except Exception as e:  # another flwr may have other messages
            _log.debug("trackhub cannot read a message of Flower: %r", e)
            replies = []
        for kind, has_error in replies:
            (failed.add if has_error else failed.discard)(kind)
        if replies:
            end(RunStatus.FAILED if failed else RunStatus.FINISHED)
        return send_receive(request, context)

    return watched


def _replies(request: Any) -> list[tuple[str, bool]]:
    """Return the kind of each reply that is in this message of Flower, and whether the reply is an error."""
    if request.grpc_message_name != _PUSH or len(request.grpc_message_content) > _MOST_BYTES:
        return []
    from flwr.proto.fleet_pb2 import PushMessagesRequest  # loaded by now: FLARE's connector has imported flwr

    pushed = PushMessagesRequest.FromString(request.grpc_message_content)
    return [(message.metadata.message_type, message.HasField("error")) for message in pushed.messages_list]
