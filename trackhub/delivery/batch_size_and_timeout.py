# SPDX-License-Identifier: Apache-2.0
"""Adapts the size of a sender's batches, and the time limit for a reply, to the speed of the channel.

`Exchange` has a `BatchPace`, and tells it how long each batch took. `Sender` asks it how large the next batch may be.
"""

from __future__ import annotations

__all__ = ["BatchPace"]

_SLOWEST_BYTES_PER_S = 16 << 10
"""The slowest channel that is expected. The longest wait for the reply to a single large record follows from it."""


class BatchPace:
    """Makes batches smaller when no reply comes in time, and larger again when replies come fast.

    Without this, a batch that takes longer than the time limit of a request would be sent again for ever. A reply that
    comes in time never makes batches smaller: some receivers take a second for each request, whatever its size.

    Attributes:
        max_bytes: the most bytes of the next batch. A batch always has at least one record.
        wait_s: the longest wait for the reply to the next attempt, in seconds.
    """

    def __init__(self, max_bytes: int, timeout_s: float, longest_s: float) -> None:
        """Start with the largest batches.

        Args:
            max_bytes: the most bytes of a batch.
            timeout_s: the longest wait for a reply, in seconds.
            longest_s: the longest wait for the reply to a single large record, in seconds.
        """
        self._most_bytes = max_bytes
        self._timeout_s = timeout_s
        self._longest_s = longest_s
        self.max_bytes = max_bytes
        self.wait_s = timeout_s

    def timed_out(self, size: int, *, is_single: bool) -> None:
        """Note that no reply came in time.

        Args:
            size: how many bytes the batch had.
            is_single: True if the batch had one record, so that it cannot be made smaller.
        """
        self.max_bytes = max(1, min(self.max_bytes, size) // 2)
        if is_single:
            # Do not wait longer for a small record: a lost reply must not delay the next attempt.
            longest_s = min(self._longest_s, size / _SLOWEST_BYTES_PER_S)
            self.wait_s = max(self._timeout_s, min(2 * self.wait_s, longest_s))

    def arrived(self, size: int, took_s: float) -> None:
        """Note that the reply to a batch of ``size`` bytes came after ``took_s`` seconds."""
        self.wait_s = self._timeout_s
        if took_s < self._timeout_s / 4:
            self._grow(2 * size)
        elif took_s < self._timeout_s / 2:
            self._grow(size + size // 4)

    def _grow(self, size: int) -> None:
        self.max_bytes = min(self._most_bytes, max(self.max_bytes, size))
