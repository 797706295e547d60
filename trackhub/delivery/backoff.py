# SPDX-License-Identifier: Apache-2.0
"""How long to wait before the next attempt. Senders ask it between requests, and lanes between calls of a backend."""

from __future__ import annotations

import random

__all__ = ["Backoff"]

_JITTER = random.Random()
"""A random generator that only trackhub uses. Training draws from Python's shared generator. If trackhub drew from it,
too, training would get other numbers, and the model would change."""


class Backoff:
    """Waits that double with each failure up to a limit. Each wait is multiplied by a random factor from 0.5 to 1.

    Without the random part, a thousand sites would return to a restarted server at the same moment.
    """

    def __init__(self, first_s: float = 0.2, max_s: float = 15.0) -> None:
        """Start with waits of up to ``first_s`` seconds, which grow to up to ``max_s`` seconds."""
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s
        self.failures = 0

    def next_wait_s(self, at_least_s: float | None = None) -> float:
        """Count a failure, and return how many seconds to wait: never less than ``at_least_s``."""
        self.failures += 1
        wait_s = self._next_s * _JITTER.uniform(0.5, 1.0)
        self._next_s = min(self._next_s * 2, self._max_s)
        return max(wait_s, at_least_s or 0.0)

    def reset(self) -> None:
        """Start again with the first wait, after a success."""
        self._next_s = self._first_s
        self.failures = 0
