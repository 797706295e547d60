# SPDX-License-Identifier: Apache-2.0
"""When a lane may call a backend again for one run, after a call failed.

`RunDelivery` tells the timer of failures and successes; `Lane` asks it when to come back. The waits are those of
`backoff.Backoff`, or longer where the backend asks for it.
"""

from __future__ import annotations

import time

from trackhub.delivery.backoff import Backoff
from trackhub.delivery.lane.checked_answers import checked_wait_s

__all__ = ["RetryTimer"]


class RetryTimer:
    """The time of the next attempt. Used by one thread.

    Attributes:
        not_before: no attempt before this time on the monotonic clock.
    """

    def __init__(self) -> None:
        """Start without a wait."""
        self.not_before = 0.0
        self._backoff = Backoff()
        self._backend_asked = False
        self._hurried = False

    def failed(self, error: BaseException) -> bool:
        """Set the time of the next attempt. Return whether this is the first failure after a success.

        If the error names a wait as ``retry_after_s``, that wait is kept. It may be a number or a raw header.
        """
        # Look at every type of error: an SDK's own error that names a wait may come through open_run and flush.
        asked = getattr(error, "retry_after_s", None)
        self._backend_asked = asked is not None
        self.not_before = time.monotonic() + self._backoff.next_wait_s(checked_wait_s(asked))
        return self._backoff.failures == 1

    def succeeded(self) -> None:
        """Let the next failure start with a short wait again."""
        self._backoff.reset()

    def hurry(self) -> bool:
        """Cut the wait short, for the end of the job. Return False if it must be kept.

        A time that the backend asked for is kept. Any other wait is cut short only once, until `allow_hurry` is called.
        Otherwise the end of the job would call a dead backend again and again without a pause.
        """
        if self._backend_asked or self._hurried:
            return False
        self._hurried = True
        self.not_before = 0.0
        return True

    def allow_hurry(self) -> None:
        """Let `hurry` cut a wait short once more: the backend confirmed something in between."""
        self._hurried = False
