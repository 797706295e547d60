# SPDX-License-Identifier: Apache-2.0
"""How long to wait before trying again."""

from __future__ import annotations

import random

__all__ = ["Backoff"]

_JITTER = random.Random()
"""Ours alone: a draw from the generator that training uses would change the model whenever a receiver is slow to answer."""


class Backoff:
    """Exponential waits with jitter: each at most twice the last, at random between half of that and all of it.

    Jitter keeps a thousand sites from returning to a restarted server in one moment.
    """

    def __init__(self, first_s: float = 0.2, max_s: float = 15.0) -> None:
        """Start with waits of about ``first_s``, growing to about ``max_s``."""
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s
        self.failures = 0

    def next_wait_s(self, at_least_s: float | None = None) -> float:
        """Count a failure and return how long to wait, in seconds; never less than the peer asked for."""
        self.failures += 1
        wait_s = self._next_s * _JITTER.uniform(0.5, 1.0)
        self._next_s = min(self._next_s * 2, self._max_s)
        return max(wait_s, at_least_s or 0.0)

    def reset(self) -> None:
        """Forget the failures: it worked."""
        self._next_s = self._first_s
        self.failures = 0
