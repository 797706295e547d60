# SPDX-License-Identifier: Apache-2.0
"""One sender's session with its receiver: makes the messages that name the sender. `Sender` has one."""

from __future__ import annotations

import itertools
import uuid

from trackhub.delivery.wire import Final, Hello, KeepAlive, SiteCounts

__all__ = ["Session"]


class Session:
    """What a sender says of itself to its receiver, and what the receiver has said. Used by the sender's thread.

    Attributes:
        name: names the sender, for the receiver.
        is_greeted: the receiver has replied to a hello.
        may_ask: the receiver can say what it has of a stream, as far as is known.
        is_unsure: it could not say it, and the first records of a stream are not in the spool: delivered, or lost.
    """

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.is_greeted = False
        self.may_ask = True
        self.is_unsure = False
        self._numbers = itertools.count(1)

    def hello(self, streams: tuple[str, ...] = ()) -> Hello:
        """Return the first message, or one that asks what the receiver has of these streams."""
        return Hello(session=self.name, streams=streams)

    def keep_alive(self, counts: SiteCounts) -> KeepAlive:
        """Return a sign of life."""
        return KeepAlive(counts, self.name, next(self._numbers))

    def final(self, counts: SiteCounts, *, failed: bool) -> Final:
        """Return the last message."""
        return Final(counts, failed, self.name, next(self._numbers))
