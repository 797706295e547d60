# SPDX-License-Identifier: Apache-2.0
"""One sender's session with its receiver: makes the messages that name the sender. `Sender` has one."""

from __future__ import annotations

import itertools
import uuid

from trackhub.delivery.wire import Final, Hello, KeepAlive, SiteCounts

__all__ = ["Session"]


class Session:
    """Makes the sender's messages, and remembers what the receiver said. Used by the sender's thread.

    Attributes:
        name: the unique name of this sender, by which the receiver can tell two senders apart.
        is_greeted: True if the receiver has replied to a hello.
        may_ask: False once the receiver could not say what it has of a stream.
        is_unsure: True if a stream's first records may be delivered or lost. The spool does not have them, and the
            receiver could not say whether it has them.
    """

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.is_greeted = False
        self.may_ask = True
        self.is_unsure = False
        self._numbers = itertools.count(1)

    def hello(self, streams: tuple[str, ...] = ()) -> Hello:
        """Return the first message, or a message that asks what the receiver has of these streams."""
        return Hello(session=self.name, streams=streams)

    def keep_alive(self, counts: SiteCounts) -> KeepAlive:
        """Return the message that says that the site still runs."""
        return KeepAlive(counts, self.name, next(self._numbers))

    def final(self, counts: SiteCounts, *, failed: bool) -> Final:
        """Return the last message."""
        return Final(counts, failed, self.name, next(self._numbers))
