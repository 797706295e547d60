# SPDX-License-Identifier: Apache-2.0
"""A slow channel that buffers: what was sent arrives in the end, also after the sender has given up waiting."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from trackhub.delivery.channel import ChannelError

__all__ = ["SlowChannel"]


class SlowChannel:
    """Carries one request after another at a given rate. Call ``close`` at the end.

    Attributes:
        is_cut: requests are lost.
    """

    def __init__(self, handle: Callable[[bytes], bytes], bytes_per_s: float) -> None:
        self.is_cut = False
        self._handle = handle
        self._bytes_per_s = bytes_per_s
        self._queue: queue.SimpleQueue[tuple[bytes, Future[bytes]] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def __call__(self, data: bytes, timeout_s: float) -> bytes:
        if self.is_cut:
            raise ChannelError("the channel is cut")
        reply: Future[bytes] = Future()
        self._queue.put((data, reply))
        try:
            return reply.result(timeout_s)
        except TimeoutError:
            raise ChannelError(f"no reply within {timeout_s:g} s") from None

    def close(self) -> None:
        """Lose the requests that are still on their way."""
        self._closed.set()
        self._queue.put(None)
        self._thread.join()

    def _carry(self) -> None:
        while (item := self._queue.get()) is not None:
            data, reply = item
            if self._closed.wait(len(data) / self._bytes_per_s):
                return
            reply.set_result(self._handle(data))
