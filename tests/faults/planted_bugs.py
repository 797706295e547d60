# SPDX-License-Identifier: Apache-2.0
"""Bugs that the suite plants in the product, to see whether its random faults find them.

`tests.faults.test_planted_bugs` asks for one. `install` adds it to the ``sitecustomize`` module of a job, so that the
job's senders, receivers and replays have it. Each bug changes one decision that a promise of docs/delivery.md needs.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["BUGS", "install", "plant"]

_LATE_S = 0.02
"""How long after the acknowledgement the journal's commit comes, where that bug is planted."""


def install(name: str, folder: Path) -> None:
    """Plant a bug in every Python process that has this folder in its ``PYTHONPATH``."""
    lines = f"\nfrom tests.faults.planted_bugs import plant\n\nplant({name!r})\n"
    with (folder / "sitecustomize.py").open("a") as file:
        file.write(lines)


def plant(name: str) -> None:
    """Plant a bug in this process."""
    BUGS[name]()


def _confirm_before_write() -> None:
    """Let a lane store its confirmed cursor before it hands the records over."""
    from trackhub.delivery.lane.cursor import Cursor
    from trackhub.delivery.lane.deliver_run import RunDelivery
    from trackhub.spi import Confirmation

    add, count = RunDelivery._add, Cursor.count_stored

    def add_and_confirm(self: Any, run: Any, entries: list[Any]) -> None:
        add(self, run, entries)
        count(self._cursor, entries)
        self._cursor.written = self._reader.upto
        self._cursor.confirm(self._reader.memory(), Confirmation.STORE)

    RunDelivery._add = add_and_confirm  # type: ignore[method-assign]
    Cursor.count_stored = lambda self, entries: None  # type: ignore[method-assign]


def _acknowledge_before_commit() -> None:
    """Let the receiver acknowledge a batch a moment before its journal has it."""
    from trackhub.delivery.journal.journal import Journal

    append = Journal.append
    waiting: queue.SimpleQueue[tuple[tuple[Any, ...], dict[str, Any]]] = queue.SimpleQueue()

    def commit() -> None:
        while True:
            arguments, options = waiting.get()
            threading.Event().wait(_LATE_S)
            append(*arguments, **options)

    def append_later(*arguments: Any, **options: Any) -> int:
        if waiting.empty():
            waiting.put((arguments, options))
            return int(arguments[2].records)
        return append(*arguments, **options)

    threading.Thread(target=commit, daemon=True).start()
    Journal.append = append_later  # type: ignore[method-assign]


def _forget_streams_at_restart() -> None:
    """Let a receiver that was started again not recognise the first batch of each stream that it has already."""
    from trackhub.delivery.journal.journal import Journal

    stream_of = Journal._stream
    seen: set[int] = set()

    def stream_anew(self: Any, db: Any, site: int, batch: Any) -> tuple[int, int]:
        stream, known = stream_of(self, db, site, batch)
        if stream not in seen:
            seen.add(stream)
            return stream, min(known, batch.first_seq)
        return stream, known

    Journal._stream = stream_anew  # type: ignore[method-assign]


def _free_segment_one_record_early() -> None:
    """Let the sender delete a segment while one record of it is not acknowledged."""
    from trackhub.framing import scan_frames
    from trackhub.spool.layout import segment_name
    from trackhub.spool.reading import SpoolReader

    delete = SpoolReader._delete_settled

    def delete_early(self: Any, batch: Any, old: Any) -> None:
        delete(self, batch, old)
        path = self.folder / segment_name(batch.stream, batch.segment)
        if batch.segment < self._streams[batch.stream].last_segment and path.is_file():
            rest = path.read_bytes()[batch.offset :]
            if len(list(scan_frames(rest, 0))) == 1:
                path.unlink(missing_ok=True)

    SpoolReader._delete_settled = delete_early  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    "confirm before write": _confirm_before_write,
    "acknowledge before commit": _acknowledge_before_commit,
    "forget streams at restart": _forget_streams_at_restart,
    "free a segment one record early": _free_segment_one_record_early,
}
"""The bugs by name."""
