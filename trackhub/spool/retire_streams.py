# SPDX-License-Identifier: Apache-2.0
"""Retires streams that have ended and were read: deletes their files, and keeps their counts in one file.

`SpoolReader` calls it. Without it, the files of every ended process would stay until the job ends. They would take room
in the spool, and make each look at the folder slower.

For each reader, a stream goes through these states. It skips ``freed`` if another reader still needs the files:

    read        The writer has ended, and this reader is past the last record. The last segment is still there.
    freed       All readers are past the last record: segments and blobs are deleted.
    retired     The reader's ``.retired`` file has the counts, and names the stream. Its ``.ack`` is deleted.
    gone        All readers have retired the stream: its remaining files are deleted, and its name is forgotten.

After a crash between two states, the next reader goes on from the earlier state. The ``.retired`` file names the
streams whose counts it already includes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from trackhub.spool.acks import Ack, Retired, ack_file, read_ack, read_retired, write_retired
from trackhub.spool.counts import StreamCount, add_up, count_retired
from trackhub.spool.layout import ledger_file

__all__ = ["Retirement"]

_ID_CHARS = 32


class Retirement:
    """The streams of a spool that one reader has retired.

    Attributes:
        total: the counts of these streams, added up.
    """

    def __init__(self, folder: Path, cursor: str, cursors: Iterable[str]) -> None:
        """Read what an earlier reader with this cursor has retired.

        Args:
            folder: the spool's folder.
            cursor: the reader's name.
            cursors: the names of all readers of the spool.
        """
        self._folder = folder
        self._cursor = cursor
        self._others = [other for other in cursors if other != cursor]
        self.total = read_retired(folder, cursor)
        self._names = set(self.total.names)

    def has(self, stream: str) -> bool:
        """Return whether this stream is retired and may still have files."""
        return stream in self._names

    def free(self, streams: Mapping[str, Ack]) -> None:
        """Delete the segments and blobs of these streams, except for streams that another reader still needs.

        Args:
            streams: stream -> its end. This reader has read these streams to their ends.

        Raises:
            OSError: the folder cannot be read, or a file cannot be deleted.
        """
        retired = {other: set(read_retired(self._folder, other).names) for other in self._others}
        freed = {
            stream
            for stream, ack in streams.items()
            if all(stream in retired[other] or self._is_past(stream, other, ack) for other in self._others)
        }
        self._delete(freed)

    def _is_past(self, stream: str, other: str, ack: Ack) -> bool:
        reached = read_ack(self._folder, stream, other)
        return (reached.segment, reached.offset) >= (ack.segment, ack.offset)

    def retire(self, streams: Mapping[str, StreamCount]) -> None:
        """Add up the counts of these streams, and delete the files that no reader needs any more.

        Args:
            streams: stream -> its counts. This reader has read these streams to their ends.

        Raises:
            OSError: the counts cannot be stored, or a file cannot be deleted. Nothing is lost then.
        """
        total = add_up([count_retired(self.total), *streams.values()])
        left = {name for name in self._names if ledger_file(self._folder, name).exists()}
        retired = Retired(
            streams=self.total.streams + len(streams),
            logged=total.logged,
            withheld=total.withheld,
            acked=total.acked,
            dropped=total.dropped,
            refused=total.refused,
            names=tuple(sorted(left | streams.keys())),
            altered=total.altered,
            withheld_by_rule=total.withheld_by_rule,
            altered_by_rule=total.altered_by_rule,
        )
        write_retired(self._folder, self._cursor, retired)
        self.total, self._names = retired, set(retired.names)
        self.clean_up()

    def clean_up(self) -> None:
        """Delete the files of retired streams that no reader needs any more.

        Raises:
            OSError: the folder cannot be read, or a file cannot be deleted.
        """
        if not self._names:
            return
        for name in self._names:
            ack_file(self._folder, name, self._cursor).unlink(missing_ok=True)
        gone = set(self._names)
        for other in self._others:
            gone &= set(read_retired(self._folder, other).names)
        self._delete(gone)
        for name in gone:  # delete the ledger last: it shows that the stream may still have files
            ledger_file(self._folder, name).unlink(missing_ok=True)

    def _delete(self, streams: set[str]) -> None:
        """Delete the segments, blobs and parts of blobs of these streams."""
        if not streams:
            return
        with os.scandir(self._folder) as entries:
            names = [entry.name for entry in entries if entry.name[:_ID_CHARS] in streams]
        for name in names:
            if name.endswith((".spool", ".blob", ".part")):
                with contextlib.suppress(FileNotFoundError):  # another reader was quicker
                    (self._folder / name).unlink()
