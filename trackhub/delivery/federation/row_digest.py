# SPDX-License-Identifier: Apache-2.0
"""What the aggregation must know of the metrics in one row of the journal: the last value of each key, and the round.

`check_received_batch` fills a `RowDigest` for each batch while it checks the batch's records. The aggregation then need
not read and decode the row again, which would take a tenth of the receiver's time or more.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence, Set

from trackhub.records import Record

__all__ = ["MAX_KEYS_OF_DIGEST", "KnownRows", "RowDigest", "is_step_its_round"]

MAX_KEYS_OF_DIGEST = 1000
"""How many keys a digest holds. A row with more is read from the journal."""

_MAX_ROWS = 1000
_MAX_KEYS = 100_000  # in all digests together


def is_step_its_round(record: Record) -> bool:
    """Return whether the step of the record is its round. A record without a round has none."""
    return record.round is not None and record.step == record.round


class RowDigest:
    """The metrics of one row, without those whose keys are ignored. Used by one thread at a time.

    Attributes:
        keys: the keys that are not ignored.
        values: key -> its last value, for these keys. It may hold ignored keys as well.
        rounds: the rounds of all records that have a key in ``keys``.
        steps_are_rounds: True if the step of each such record is the record's round.
        time: unix seconds of the row's last metrics.
    """

    __slots__ = ("_ignored", "keys", "rounds", "steps_are_rounds", "time", "values")

    def __init__(self, ignored: Set[str]) -> None:
        """Begin with no record.

        Args:
            ignored: keys that are not aggregated. The set may grow later.
        """
        self._ignored = ignored
        self.keys: set[str] = set()
        self.values: dict[str, float] = {}
        self.rounds: set[int | None] = set()
        self.steps_are_rounds = True
        self.time = 0.0

    def add(self, keys: Set[str], records: Sequence[Record]) -> None:
        """Take the row's next records.

        Args:
            keys: the keys of all these records.
            records: metrics; at least one.
        """
        self.time = records[-1].time
        wanted = keys - self._ignored
        if not wanted:
            return
        self.keys |= wanted
        if not self.is_usable():
            return
        if len(wanted) < len(keys):
            ignored = set(keys) - wanted
            records = [r for r in records if not ignored.issuperset(r.payload.values)]  # type: ignore[union-attr]
        rounds = {record.round for record in records}
        self.rounds |= rounds
        if self.steps_are_rounds:  # the first record is often enough to show that steps are not rounds
            first = records[0]
            self.steps_are_rounds = is_step_its_round(first) and {record.step for record in records} == rounds
        last: dict[str, float] = records[-1].payload.values  # type: ignore[union-attr, assignment]
        if last.keys() >= wanted:  # a loop that logs the same keys at each step
            self.values.update(last)
            return
        for record in records:
            self.values.update(record.payload.values)  # type: ignore[union-attr, arg-type]

    def is_usable(self) -> bool:
        """Return whether the digest is enough. If not, the row must be read."""
        return len(self.rounds) <= 1 and len(self.keys) <= MAX_KEYS_OF_DIGEST


class KnownRows:
    """The digests of rows that wait to be taken. Thread-safe."""

    def __init__(self) -> None:
        """Begin with none."""
        self._rows: dict[int, tuple[str, RowDigest]] = {}
        self._keys = 0
        self._lock = threading.Lock()

    def add(self, row: int, site: str, digest: RowDigest) -> bool:
        """Add a row's digest. Return whether there is room. If not, the row must be read.

        Args:
            row: the row's id in the journal.
            site: the site that logged its records.
            digest: the row's digest.
        """
        with self._lock:
            if len(self._rows) >= _MAX_ROWS or self._keys >= _MAX_KEYS:
                return False
            self._rows[row] = site, digest
            self._keys += len(digest.keys)
            return True

    def pop(self, row: int) -> tuple[str, RowDigest] | None:
        """Return site and digest of a row, and forget them. None if the row must be read."""
        with self._lock:
            found = self._rows.pop(row, None)
            if found is not None:
                self._keys -= len(found[1].keys)
            return found

    def forget_to(self, row: int) -> None:
        """Forget all rows up to this one: the rows were read before their digests were added."""
        with self._lock:
            late = [number for number in self._rows if number <= row]
        for number in late:
            self.pop(number)
