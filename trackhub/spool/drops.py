# SPDX-License-Identifier: Apache-2.0
"""Counts the records that a stream cannot store, keeps the gaps for the stream, and prepares a warning.

`trackhub.spool.stream_writer` calls it while it holds the stream's lock. It stores the counts in the stream's ledger.
While there is no ledger, the counts belong to the process (`trackhub.spool.process_drops`), and the stream is empty.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from trackhub.framing import encode_frame
from trackhub.process_lock import FORK_LOCK
from trackhub.records import Gap, Record
from trackhub.spool.process_drops import ProcessDrops
from trackhub.spool.writer_ledger import DROP_REASONS, LEFT_OUT_REASONS, Ledger

__all__ = ["CLOSED_FILES", "Drops"]

CLOSED_FILES = "closed files"
"""Reason of a warning: the script has closed the previous stream's files, so this stream replaces that stream."""

_WARN_EVERY_S = 60.0


class Drops:
    """What one stream has dropped so far.

    Attributes:
        gaps: (``seq``, gap) for each gap that is not in the stream yet. The gaps are written just before the next
            record.
        ledger: the stream's ledger; None until it is first needed, or while the disk has no room for it.
        warning: what to warn about: reason and detail of the last drop, and how many records the process has dropped so
            far. None if no warning is due. The reason ``CLOSED_FILES`` does not mean a drop.
    """

    def __init__(self, ledger: Path, clock: Callable[[], float], process: ProcessDrops) -> None:
        """Start with no drops.

        Args:
            ledger: the path of the stream's ledger.
            clock: seconds that only grow.
            process: what the process has dropped in this spool.
        """
        self.gaps: list[tuple[int, Gap]] = []
        self.ledger: Ledger | None = None
        self.warning: tuple[str, str, int] | None = None
        self._process = process
        self._path: Path | None = ledger
        self._clock = clock
        self._counts = [0] * len(DROP_REASONS)
        self._left_out = [0] * len(LEFT_OUT_REASONS)

    @property
    def total(self) -> int:
        """How many records were dropped that the stream's ledger counts."""
        return sum(self._counts)

    def add(self, seq: int, reason: str) -> None:
        """Count the record with this ``seq`` as dropped. Never raises.

        Args:
            seq: the number that the record would have had.
            reason: one of ``DROP_REASONS``.
        """
        self._counts[DROP_REASONS.index(reason)] += 1
        if self.gaps and self.gaps[-1][1].reason == reason:
            first, gap = self.gaps[-1]
            self.gaps[-1] = (first, Gap(gap.count + 1, reason))
        else:
            self.gaps.append((seq, Gap(1, reason)))
        if self.ledger is not None:
            self.ledger.set(seq + 1, self._counts, self._left_out)

    def warn_of_drop(self, reason: str, detail: str) -> None:
        """Count a drop of the process, and prepare a warning unless the process has warned within the last minute.

        Args:
            reason: one of ``DROP_REASONS``.
            detail: what happened. Empty for no warning.
        """
        process, now = self._process, self._clock()
        process.dropped += 1
        if detail and now - process.warned_at >= _WARN_EVERY_S:
            process.warned_at = now
            self.warning = reason, detail, process.dropped

    def leave_out(self, reason: str, values: int) -> None:
        """Count the values that were left out of a record. Its other values are stored. Never raises.

        Args:
            reason: one of ``LEFT_OUT_REASONS``.
            values: how many.
        """
        self._left_out[LEFT_OUT_REASONS.index(reason)] += values
        if self.ledger is not None:
            self.ledger.set_left_out(self._left_out)

    def warn_of_closed_files(self, detail: str) -> None:
        """Prepare a warning that the script has closed the files of the previous stream."""
        process, now = self._process, self._clock()
        if now - process.closed_files_at >= _WARN_EVERY_S:
            process.closed_files_at = now
            self.warning = CLOSED_FILES, detail, process.dropped

    def open_ledger(self) -> Ledger:
        """Open the stream's ledger unless it is open, and return it.

        Raises:
            OSError: it cannot be written, or was closed or abandoned.
        """
        ledger = self.ledger
        if ledger is None:
            if self._path is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            # Allow no fork before ``self.ledger`` is set: `abandon` would not find the ledger, and the child would keep
            # it locked.
            with FORK_LOCK:
                ledger = Ledger(self._path)
                if self._path is None:  # a signal handler has forked during these lines, and this is the child
                    ledger.abandon()
                self.ledger = ledger
        return ledger

    def gap_frames(self, log_time: float, federated_round: int | None) -> bytes:
        """Return a frame for each gap that is not in the stream yet."""
        return b"".join(encode_frame(Record(seq, log_time, None, federated_round, gap)) for seq, gap in self.gaps)

    def close(self) -> None:
        """Close the ledger, and open it no more. Idempotent."""
        self._path = None
        if self.ledger is not None:
            self.ledger.close()
            self.ledger = None

    def abandon(self) -> None:
        """Leave the ledger to the process that this one was forked from."""
        ledger, self.ledger, self._path = self.ledger, None, None
        if ledger is not None:
            ledger.abandon()
