# SPDX-License-Identifier: Apache-2.0
"""Exchanges requests for replies: repeats each request over the channel until the receiver replies to it.

`Sender` and `FileSender` make their requests through an `Exchange`. `Exchange` gives up only when the sender is closing
and the deadline has passed. Its `BatchPace` says how large a batch may be, and how long to wait for the reply.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

import msgspec

from trackhub.delivery.backoff import Backoff
from trackhub.delivery.batch_size_and_timeout import BatchPace
from trackhub.delivery.channel import Channel, ChannelError
from trackhub.delivery.wire import Batch, Busy, Reply, Request, decode_reply, encode

__all__ = ["Exchange"]

_CLOSING_PAUSE_S = 0.5  # longest pause while closing; a backoff of seconds could use up the time that is left
_MIN_TIMEOUT_S = 0.1
_log = logging.getLogger(__name__)


class Exchange:
    """Asks one receiver, one request at a time. Used by the sender's thread, except where a method says otherwise.

    Attributes:
        replies: how many replies have come. `Busy` does not count.
        retries: how many requests had to be sent again.
        timeout_s: the longest wait for one reply, in seconds. One large record on a slow channel may wait longer.
        pace: how large the next batch may be.
    """

    def __init__(self, channel: Channel, *, site: str, timeout_s: float, longest_s: float, max_bytes: int) -> None:
        """Prepare to ask.

        Args:
            channel: carries the requests.
            site: whose requests they are, for log messages.
            timeout_s: the longest wait for one reply, in seconds.
            longest_s: the longest wait for the reply to a single large record, in seconds.
            max_bytes: the most bytes of a batch.
        """
        self.replies = 0
        self.retries = 0
        self.timeout_s = timeout_s
        self.pace = BatchPace(max_bytes, timeout_s, longest_s)
        self._reply_by = 0.0
        self._channel = channel
        self._site = site
        self._closing = threading.Event()
        self._deadline: float | None = None
        self._last_deadline = 0.0
        self._progress_at = -math.inf
        self._never = threading.Event()
        self._last_warning = ""

    def close_by(self, deadline: float, last: float = 0.0) -> None:
        """Set the deadline at which requests are given up. Any thread may call it.

        From now on, the pauses between attempts are short.

        Args:
            deadline: the deadline, on the monotonic clock.
            last: the latest deadline. While a file progresses, the deadline moves on, but not beyond this moment.
        """
        self._deadline = deadline
        self._last_deadline = last
        self._move_deadline()
        self._closing.set()

    def note_progress(self) -> None:
        """Note that more of a file has arrived.

        The deadline moves, so that the next piece has the time of two requests.
        """
        self._progress_at = time.monotonic()
        self._move_deadline()

    def _move_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline = max(self._deadline, min(self._last_deadline, self._progress_at + 2 * self.timeout_s))

    def is_closing(self) -> bool:
        """Return whether ``close_by`` was called."""
        return self._closing.is_set()

    def is_late(self) -> bool:
        """Return whether the deadline has passed."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def left_s(self) -> float:
        """Return how many seconds are left until the deadline; 0 if it has passed, or if there is no deadline."""
        deadline = self._deadline
        return 0.0 if deadline is None else max(0.0, deadline - time.monotonic())

    def ask(self, request: Request, shorten: Callable[[], Batch] | None = None) -> Reply | None:
        """Make a request until the receiver replies. Return None if the deadline passes first.

        Args:
            request: what to send first.
            shorten: called when no reply came in time. It returns the first records of the batch, as many as ``pace``
                allows, and these are sent instead. The receiver recognises the records that it already has.
        """
        # Keep the waits short. A restarted receiver soon counts a site as silent, so the site must call before that.
        backoff = Backoff(first_s=0.1, max_s=5.0)
        while True:
            batch = request if isinstance(request, Batch) else None
            wait_s = self.timeout_s if batch is None else self.pace.wait_s
            began = time.monotonic()
            reply = self._send(encode(request), wait_s)
            took_s = time.monotonic() - began
            if reply is not None and not isinstance(reply, Busy):
                if batch is not None:
                    self.pace.arrived(len(batch.frames), took_s)
                return reply
            if self.is_late():
                return None
            if reply is None and batch is not None and took_s >= wait_s:
                self.pace.timed_out(len(batch.frames), is_single=batch.records <= 1)
                request = shorten() if shorten is not None else request
            self.pause(backoff.next_wait_s())
            self.retries += 1

    def in_flight_s(self) -> float:
        """Return for how many seconds the thread may still wait for a reply. Any thread may call it."""
        return max(0.0, self._reply_by - time.monotonic())

    def ask_once(self, request: Request) -> Reply | None:
        """Make a request once. Return None if no reply came."""
        return self._send(encode(request), self.timeout_s)

    def pause(self, wait_s: float) -> None:
        """Wait before the next attempt. ``close_by`` ends the wait; afterwards a wait takes at most half a second."""
        if self._closing.is_set():
            self._never.wait(min(wait_s, _CLOSING_PAUSE_S))
        else:
            self._closing.wait(wait_s)

    def _send(self, data: bytes, timeout_s: float) -> Reply | None:
        if self._deadline is not None:
            timeout_s = max(_MIN_TIMEOUT_S, min(timeout_s, self._deadline - time.monotonic()))
        self._reply_by = time.monotonic() + timeout_s
        try:
            reply = decode_reply(self._channel(data, timeout_s))
        except ChannelError as e:
            _log.debug("site %s: no reply from the receiver: %s", self._site, e)
            return None
        except msgspec.DecodeError as e:
            _log.warning("site %s: the receiver's reply cannot be decoded: %s; trying again", self._site, e)
            return None
        except Exception as e:
            # A defect of the channel must not end the sender. The records stay in the spool, and the next attempt may
            # work.
            self._warn_once(f"the channel to the receiver failed: {type(e).__name__}: {e}")
            return None
        if not isinstance(reply, Busy):
            self.replies += 1
        return reply

    def _warn_once(self, message: str) -> None:
        if message != self._last_warning:
            self._last_warning = message
            _log.warning("site %s: %s; trying again", self._site, message)
