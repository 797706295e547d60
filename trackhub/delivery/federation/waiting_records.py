# SPDX-License-Identifier: Apache-2.0
"""The records of the federation run that were logged and are not in the journal yet.

`trackhub.delivery.federation.federation_run` fills it in FLARE's threads, which must not wait for the journal.
"""

from __future__ import annotations

import logging
import threading

from trackhub.delivery.check_received_batch import KnownKeys, RefusedRecordError
from trackhub.records import Record

__all__ = ["WaitingRecords"]

_MAX_WAITING = 10_000
_log = logging.getLogger(__name__)


class WaitingRecords:
    """The records that were logged and are not in the journal yet. Thread-safe.

    Attributes:
        dropped: how many records came too late, or found no room.
        is_closed: True if no further record is taken.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.dropped = 0
        self.is_closed = False
        self._records: list[Record] = []
        self._keys = KnownKeys()
        self._lock = threading.Lock()

    def check_key(self, key: str) -> None:
        """Check a key.

        Raises:
            RefusedRecordError: it cannot be a key.
        """
        with self._lock:
            self._keys.check((key,))

    def is_key(self, key: str) -> bool:
        """Return whether this text can be a key.

        A key contains names of sites, tasks and metrics, which other people choose. If a key is bad, the other values
        of its record must still be stored.
        """
        try:
            self.check_key(key)
        except RefusedRecordError as e:
            _log.debug("the federation run leaves out the key %r: %s", key[:80], e)
            return False
        return True

    def add(self, record: Record) -> bool:
        """Take a record. Return whether there was room."""
        with self._lock:
            if self.is_closed or len(self._records) >= _MAX_WAITING:
                self.dropped += 1
                return False
            self._records.append(record)
            return True

    def records(self) -> list[Record]:
        """Return the waiting records."""
        with self._lock:
            return list(self._records)

    def remove_first(self, count: int) -> None:
        """Remove the first waiting records: the journal has them now."""
        with self._lock:
            del self._records[:count]

    def close(self) -> None:
        """Take nothing more."""
        with self._lock:
            self.is_closed = True
