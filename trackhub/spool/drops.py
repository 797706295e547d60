# SPDX-License-Identifier: Apache-2.0
"""Counts the records that a writer cannot store, keeps the gaps for the stream, and prepares a warning.

`Stream` calls it under the stream's lock. `Drops` stores the counts in the stream's ledger.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

from trackhub.fork_without_signals import FORK_LOCK
from trackhub.framing import encode_frame
from trackhub.records import Gap, Record
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.spool.writer_ledger import DROP_REASONS, LEFT_OUT_REASONS, Ledger

__all__ = ["CLOSED_FILES", "DropWarnings", "Drops"]

CLOSED_FILES = "closed files"
"""Reason of a warning: the script has closed the files of a stream, so a new stream begins."""

_WARN_EVERY_S = 60.0


class DropWarnings:
    """When a writer last warned of its drops. All its streams share this, so that it warns at most once a minute.

    Attributes:
        warned_at: when the writer last warned of a drop.
        closed_files_at: when the writer last warned that the script has closed a stream's files.
        dropped: how many records the writer's streams have dropped so far.
    """

    def __init__(self, warned_at: float = -math.inf) -> None:
        self.warned_at = warned_at
        self.closed_files_at = -math.inf
        self.dropped = 0


class Drops:
    """What one stream has dropped so far.

    Attributes:
        gaps: (``seq``, gap) for each gap that is not in the stream yet. The gaps are written just before the next
            record.
        ledger: the stream's ledger; None until it is first needed, or while the disk has no room for it.
        warning: what to warn about: reason and detail of a drop, and how many records the writer has dropped so far.
            None if no warning is due. The reason ``CLOSED_FILES`` does not mean a drop.
    """

    def __init__(self, ledger: Path, clock: Callable[[], float], warnings: DropWarnings) -> None:
        """Start with no drops.

        Args:
            ledger: the path of the stream's ledger.
            clock: a monotonic clock, in seconds.
            warnings: when the writer last warned, shared by its streams.
        """
        self.gaps: list[tuple[int, Gap]] = []
        self.ledger: Ledger | None = None
        self.warning: tuple[str, str, int] | None = None
        self._warnings = warnings
        self._path: Path | None = ledger
        self._clock = clock
        self._logged = 0
        self._counts = [0] * len(DROP_REASONS)
        self._left_out = [0] * len(LEFT_OUT_REASONS)

    @property
    def total(self) -> int:
        """How many records were dropped."""
        return sum(self._counts)

    def add(self, seq: int, reason: str, detail: str) -> None:
        """Count the record with this ``seq`` as dropped. Never raises.

        Args:
            seq: the number that the record would have had.
            reason: one of ``DROP_REASONS``.
            detail: what happened, for the warning. Empty for no warning.
        """
        self._counts[DROP_REASONS.index(reason)] += 1
        if self.gaps and self.gaps[-1][1].reason == reason:
            first, gap = self.gaps[-1]
            self.gaps[-1] = (first, Gap(gap.count + 1, reason))
        else:
            self.gaps.append((seq, Gap(1, reason)))
        try:
            self.open_ledger()
        except OSError as e:  # the disk is full; the gap in the stream counts this drop later
            raise_if_from_signal_handler(e)
        if self.ledger is not None:
            self.ledger.set(seq + 1, self._counts, self._left_out)
        self._logged = seq + 1
        warnings, now = self._warnings, self._clock()
        warnings.dropped += 1
        if detail and now - warnings.warned_at >= _WARN_EVERY_S:
            warnings.warned_at = now
            self.warning = reason, detail, warnings.dropped

    def leave_out(self, reason: str, values: int) -> None:
        """Count the values that were left out of a record. Its other values are stored. Never raises.

        Args:
            reason: one of ``LEFT_OUT_REASONS``.
            values: how many.
        """
        self._left_out[LEFT_OUT_REASONS.index(reason)] += values
        try:
            self.open_ledger()
        except OSError as e:  # the disk is full; the ledger gets the count later
            raise_if_from_signal_handler(e)
        if self.ledger is not None:
            self.ledger.set_left_out(self._left_out)

    def warn_of_closed_files(self, detail: str) -> None:
        """Prepare a warning that the script has closed the files of the previous stream."""
        warnings, now = self._warnings, self._clock()
        if now - warnings.closed_files_at >= _WARN_EVERY_S:
            warnings.closed_files_at = now
            self.warning = CLOSED_FILES, detail, warnings.dropped

    def open_ledger(self) -> Ledger:
        """Open the stream's ledger unless it is open, and return it.

        Raises:
            OSError: it cannot be written.
        """
        ledger = self.ledger
        if ledger is None:
            if self._path is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            # Allow no fork before ``self.ledger`` is set: `abandon` would not find the ledger, and the child would keep
            # it locked.
            with FORK_LOCK:
                ledger = Ledger(self._path)
                # The ledger is new, so store everything that was counted before.
                ledger.set(self._logged, self._counts, self._left_out)
                if self._path is None:  # a signal handler has forked during these lines, and this is the child
                    ledger.abandon()
                self.ledger = ledger
        return ledger

    def gap_frames(self, log_time: float, federated_round: int | None) -> bytes:
        """Return a frame for each gap that is not in the stream yet."""
        return b"".join(encode_frame(Record(seq, log_time, None, federated_round, gap)) for seq, gap in self.gaps)

    def close(self) -> None:
        """Close the ledger. Idempotent."""
        if self.ledger is not None:
            self.ledger.close()
            self.ledger = None

    def abandon(self) -> None:
        """Leave the ledger to the process that this one was forked from."""
        ledger, self.ledger, self._path = self.ledger, None, None
        if ledger is not None:
            ledger.abandon()
