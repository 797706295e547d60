# SPDX-License-Identifier: Apache-2.0
"""The order in which the streams of a spool take turns, and a file that says which stream had the last turn.

`SpoolReader` asks it which stream to read next, and tells it when it hands out a stream's batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from trackhub.open_without_links import open_plain, read_plain

__all__ = ["Turns"]


class Turns:
    """The names of the streams in the order of their turns. Used by one thread."""

    def __init__(self, file: Path) -> None:
        """Know of no stream yet.

        Args:
            file: holds the name of the stream whose batch was handed out last.
        """
        self._file = file
        self._order: dict[str, None] = {}
        self._last = ""

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def begin(self, streams: Container[str]) -> None:
        """Give the first turn to the stream that had the last turn before a crash. Its last batch may have arrived."""
        with contextlib.suppress(OSError):
            self._last = read_plain(self._file).decode(errors="replace")
            if self._last in streams:
                self._order[self._last] = None

    def add(self, streams: Iterable[str]) -> None:
        """Add new streams behind the others."""
        for name in streams:
            self._order.setdefault(name)

    def remove(self, stream: str) -> None:
        """Forget a stream."""
        del self._order[stream]

    def take(self, stream: str) -> None:
        """Note that a batch of this stream is handed out, and move the stream behind the others.

        After a crash, the batch that may have arrived is sent again before all others. The receiver recognises this
        batch in any order. But a replay at the site numbers the records anew, and must give them the receiver's
        positions. So it needs the same order.
        """
        self._order[stream] = self._order.pop(stream, None)
        if stream != self._last:
            self._last = stream
            with (
                contextlib.suppress(OSError),  # a full disk must not stop delivery
                open(self._file, "w", encoding="utf-8", opener=open_plain) as file,
            ):
                file.write(stream)
