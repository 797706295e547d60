# SPDX-License-Identifier: Apache-2.0
"""Finding the one record that a backend cannot store, so that it does not hold up later records.

`RunDelivery` puts batches in, writes the first one, and says here what came of it. The rule by which an error rejects
a record stands in `Isolation` and nowhere else; docs/adr/0002 gives the reasons.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from trackhub.errors import PermanentError, TransientError
from trackhub.spi import Entry, Rejection

__all__ = ["Isolation", "Verdict"]

_HALVE_AFTER = 3  # failures of one batch with an error that the SPI does not know
_MAX_SUSPECTS = 8


class Verdict(NamedTuple):
    """What to do after a batch failed.

    Attributes:
        wait: wait before the next attempt.
        narrowed: the failing batch was halved, or its only record rejected. The next attempt is a new one, which does
            not wait longer because of the earlier ones.
        rejected: the record that can never be stored.
    """

    wait: bool
    narrowed: bool = False
    rejected: Rejection | None = None


class Isolation:
    """The batches that wait to be written to one run, halved where they fail. Used by one thread.

    The rule, by the error of a write:

    - `TransientError`: the backend is not available. The batch stays first, however often it fails.
    - `PermanentError`: something in the batch can never be stored. The batch is halved at once. A record that fails
      alone is rejected as ``permanent_error``.
    - Any other error may come from a record or from an outage. After three failures of the first batch it is halved. A
      record that fails alone is rejected as ``backend_error`` if the backend has stored another batch of this run.
      Otherwise it is a suspect: the backend may fail with every record. Up to eight suspects are set aside. If
      a later record is stored, the suspects are bad and are rejected. Otherwise the backend is down, and they are tried
      again in their order.

    The halves, and with them all batches, stay in the order of their positions.
    """

    def __init__(self) -> None:
        """Start with nothing to write."""
        self._batches: deque[list[Entry]] = deque()
        self._suspects: list[tuple[Entry, Rejection]] = []
        self._unknown_errors = 0  # since the last success, the last transient error and the last halving
        self._has_stored = False

    def add(self, entries: Sequence[Entry], max_batch: int) -> None:
        """Append entries to what waits to be written, in batches of up to ``max_batch``."""
        self._batches.extend(list(entries[i : i + max_batch]) for i in range(0, len(entries), max_batch))

    def first(self) -> list[Entry] | None:
        """Return the batch to write next, None if there is none."""
        return self._batches[0] if self._batches else None

    def has_suspects(self) -> bool:
        """Return whether records are set aside."""
        return bool(self._suspects)

    def succeeded(self) -> list[Rejection]:
        """Remove the first batch, which the backend took. Return the suspects, which are bad since it is not down."""
        self._batches.popleft()
        self._unknown_errors = 0
        self._has_stored = True
        bad = [rejection for _, rejection in self._suspects]
        self._suspects.clear()
        return bad

    def failed(self, error: BaseException) -> Verdict:
        """Apply the rule to the error with which writing the first batch failed, and return what to do now."""
        if isinstance(error, TransientError):
            self._unknown_errors = 0
            return Verdict(wait=True)
        if isinstance(error, PermanentError):
            return self._narrow(error, "permanent_error", wait=False)
        self._unknown_errors += 1
        if self._unknown_errors < _HALVE_AFTER:
            return Verdict(wait=True)
        if len(self._batches[0]) == 1 and not self._has_stored:
            # The count stays: as long as nothing is stored, one failure is enough to suspect the next record.
            (entry,) = self._batches.popleft()
            self._suspects.append((entry, _rejection(entry, "backend_error", error)))
            return Verdict(wait=True)
        return self._narrow(error, "backend_error", wait=True)

    def may_look_further(self) -> bool:
        """Return whether later records may be tried while the suspects are set aside."""
        return len(self._suspects) < _MAX_SUSPECTS

    def retry_suspects(self) -> None:
        """Put the suspects back to the front: no later record was stored, so they may be good."""
        self._batches.extendleft([entry] for entry, _ in reversed(self._suspects))
        self._suspects.clear()

    def _narrow(self, error: BaseException, reason: str, *, wait: bool) -> Verdict:
        batch = self._batches.popleft()
        self._unknown_errors = 0
        if len(batch) == 1:
            return Verdict(wait, narrowed=True, rejected=_rejection(batch[0], reason, error))
        middle = len(batch) // 2
        self._batches.appendleft(batch[middle:])
        self._batches.appendleft(batch[:middle])
        return Verdict(wait, narrowed=True)


def _rejection(entry: Entry, reason: str, error: BaseException) -> Rejection:
    return Rejection(entry.position, reason, f"{type(error).__name__}: {error}")
