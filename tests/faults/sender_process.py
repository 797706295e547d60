# SPDX-License-Identifier: Apache-2.0
"""A site's sender in a process of its own, with a failing channel: ``python -m tests.faults.sender_process PLAN``.

`tests.faults.job_processes` starts it and sends commands to stdin: ``flush [SECONDS]``, ``close SECONDS``,
``requests``. Each answer is a line of JSON on stdout. The end of stdin ends the process.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import msgspec

from tests.faults import unix_socket
from trackhub.delivery.channel import ChannelError
from trackhub.delivery.sender import Sender
from trackhub.limits import Limits
from trackhub.spool.layout import SpoolInfo, create_spool

__all__ = ["SenderPlan"]


class SenderPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a sender does, and what its channel does to it.

    Attributes:
        spool, spool_bytes, site, job, limits: arguments of the spool and of `trackhub.delivery.sender.Sender`.
        socket: where the receiver listens.
        seed: seed of the channel's random faults.
        request_loss: the share of requests that never arrive.
        ack_loss: the share of replies that never come back.
        again: the share of requests after which a copy of an earlier request arrives, as a late retransmission.
        delay_s: the longest time that a reply takes.
        silent_from, silent_s: from the request with this number on, the channel is silent for so long.
    """

    spool: str
    site: str
    job: str
    socket: str
    limits: dict[str, float | str] = {}
    seed: int = 0
    request_loss: float = 0.0
    ack_loss: float = 0.0
    again: float = 0.0
    delay_s: float = 0.0
    spool_bytes: int = 1 << 30
    silent_from: int = -1
    silent_s: float = 0.0


class Channel:
    """A channel to the receiver that fails as the plan says."""

    def __init__(self, plan: SenderPlan) -> None:
        self._plan = plan
        self._socket = Path(plan.socket)
        self._chance = random.Random(plan.seed)
        self._earlier: list[bytes] = []
        self._silent_until = 0.0
        self.requests = 0

    def __call__(self, request: bytes, timeout_s: float) -> bytes:
        plan, chance = self._plan, self._chance.random
        self.requests += 1
        if self.requests == plan.silent_from:
            self._silent_until = time.monotonic() + plan.silent_s
        if time.monotonic() < self._silent_until:
            time.sleep(min(timeout_s, self._silent_until - time.monotonic()))
            raise ChannelError("the channel is silent")
        if chance() < plan.request_loss:
            raise ChannelError("the request was lost")
        try:
            reply = unix_socket.request(self._socket, plan.site, request, timeout_s)
            if chance() < plan.again:
                self._earlier.append(request)
                unix_socket.request(self._socket, plan.site, self._chance.choice(self._earlier), timeout_s)
        except OSError as e:
            raise ChannelError(str(e)) from e
        time.sleep(chance() * plan.delay_s)
        if chance() < plan.ack_loss:
            raise ChannelError("the reply was lost")
        return reply


def main() -> int:
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=SenderPlan)
    limits = Limits.from_mapping(plan.limits)
    create_spool(Path(plan.spool), SpoolInfo(plan.site, plan.job, ("server",), plan.spool_bytes))
    channel = Channel(plan)
    sender = Sender(Path(plan.spool), channel, limits=limits)
    sender.start()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        answer: object = channel.requests
        if command == "flush":
            answer = sender.flush(*map(float, arguments))
        elif command == "close":
            answer = msgspec.to_builtins(sender.close(float(arguments[0])))
        print(json.dumps(answer), flush=True)
        if command == "close":
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
