# SPDX-License-Identifier: Apache-2.0
"""Collects the evidence that one record is bad, or that the store is down.

`Isolation` keeps one `Evidence` for the record that it suspects. It asks the `Evidence` what to write next, and tells
it whether that was stored.
"""

from __future__ import annotations

import errno
import random
import sqlite3
from collections.abc import Callable

from trackhub.records import KEYED, Artifact, Image
from trackhub.spi import Entry

__all__ = ["Evidence", "group_of", "says_busy_or_full", "share_keys"]

_TRIALS = 24
_EACH = 4
_FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
_MAX_CAUSES = 10

# Only trackhub uses this generator. If it drew from Python's shared one, training would get other random numbers.
_chance = random.Random()


def _toss() -> bool:
    return _chance.random() < 0.5


class Evidence:
    """Tells a bad record from an outage in 24 trials. In each trial, a coin chooses what is written.

    The coin chooses the suspect or a neighbour: another record, or the plugin's test of its store. A trial is evidence
    against the suspect if the neighbour is stored, or if the suspect fails. Any other outcome begins a new series.
    After 24 trials of evidence in a row, at least four of each choice, the record is bad.

    An outage of any pattern hardly ever looks like a bad record, since the store cannot know the coin. Whether the
    store takes the next request or fails, only one side of the coin gives evidence. So the chance that an outage gives
    evidence 24 times in a row is below one in ten million. A bad record gives evidence every time while the store
    works.
    """

    def __init__(self, toss: Callable[[], bool] | None = None) -> None:
        """Start with no evidence. ``toss`` is the coin: True chooses the suspect."""
        self._toss = toss or _toss
        self._stored = 0
        self._failed = 0

    def chooses_suspect(self) -> bool:
        """Toss the coin. Return True if the suspect is to be written, False for the neighbour."""
        return self._toss()

    def note_neighbour_stored(self) -> None:
        """Count a trial in which the neighbour was stored."""
        self._stored += 1

    def note_suspect_failed(self) -> None:
        """Count a trial in which the suspect failed."""
        self._failed += 1

    def begin_again(self) -> None:
        """Begin a new series: the last result proves nothing about the suspect, or the suspect is another record."""
        self._stored = self._failed = 0

    def is_enough(self) -> bool:
        """Return whether the record is bad."""
        return self._stored + self._failed >= _TRIALS and min(self._stored, self._failed) >= _EACH


def group_of(entry: Entry) -> str | None:
    """Return the group of an entry: values or documents. None if no neighbour can be evidence for it.

    Only neighbours of the same group can be evidence. Stores often keep values in a database and everything else in
    files, and one of the two may be down alone. The network may also be too slow for a large file and fast enough for
    everything else.
    """
    if isinstance(entry.payload, Image | Artifact):
        return None
    return "values" if isinstance(entry.payload, KEYED) else "documents"


def share_keys(one: Entry, other: Entry) -> bool:
    """Return whether two entries are of one kind and share a key, so that their order may matter."""
    return type(one.payload) is type(other.payload) and not _keys(one).isdisjoint(_keys(other))


def _keys(entry: Entry) -> set[str]:
    payload = entry.payload
    if isinstance(payload, KEYED):
        return set(payload.values)
    return {payload.key}  # type: ignore[union-attr]  # every other kind has one; gaps never come here


def says_busy_or_full(error: BaseException) -> bool:
    """Return whether an error itself says that the store is busy or full.

    A full disk may still take small records. Then it looks as if a large record were bad.
    """
    if getattr(error, "retry_after_s", None) is not None:
        return True
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if cause is None:
            return False
        if isinstance(cause, OSError) and cause.errno in _FULL_DISK:
            return True
        if isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", None) in _SQLITE_FULL:
            return True
        cause = cause.__cause__ or cause.__context__ or getattr(cause, "orig", None)
    return False


_SQLITE_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY})
