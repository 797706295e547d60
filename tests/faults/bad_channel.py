# SPDX-License-Identifier: Apache-2.0
"""A FLARE client's sender with a failing channel. `tests.faults.training` puts it into its jobs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from trackhub.delivery.channel import ChannelError
from trackhub.flare.sender_widget import TrackhubSender

__all__ = ["BadChannelSender"]


class BadChannelSender(TrackhubSender):
    """A sender that loses a share of the replies, or is cut off for a while after some requests."""

    def __init__(
        self, ack_loss: float = 0.0, silent_from: int = -1, silent_s: float = 0.0, limits: dict[str, Any] | None = None
    ) -> None:
        super().__init__(limits=limits)
        self.ack_loss = ack_loss
        self.silent_from = silent_from
        self.silent_s = silent_s

    def _server_channel(self, engine: Any, receiver: str) -> Callable[[bytes, float], bytes]:
        send = super()._server_channel(engine, receiver)
        chance = random.Random(0)
        requests, silent_until = 0, 0.0

        def send_badly(request: bytes, timeout_s: float) -> bytes:
            nonlocal requests, silent_until
            requests += 1
            if requests == self.silent_from:
                silent_until = time.monotonic() + self.silent_s
            if time.monotonic() < silent_until:
                time.sleep(min(timeout_s, silent_until - time.monotonic()))
                raise ChannelError("the channel is silent")
            reply = send(request, timeout_s)
            if chance.random() < self.ack_loss:
                raise ChannelError("the reply is lost")
            return reply

        return send_badly
