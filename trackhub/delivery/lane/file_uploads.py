# SPDX-License-Identifier: Apache-2.0
"""Writes images and artifacts in a second thread, so that a large or refused file does not delay metrics.

`Lane` has one `FileUploads`, if its backend declares ``files_beside``. Each `RunDelivery` gives it the files of its run
through a `FileQueue`, and gets the outcome of each file back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from trackhub.delivery.backoff import Backoff
from trackhub.delivery.lane.checked_answers import checked_report, checked_wait_s
from trackhub.delivery.lane.describe_record import named_rejection
from trackhub.delivery.lane.wait_for_disk_room import RunDiskRoom
from trackhub.errors import PermanentError
from trackhub.mark_own_threads import OwnThread
from trackhub.records import KIND_OF, Artifact, Image, Kind
from trackhub.spi import BackendRun, Entry, Rejection

__all__ = ["FileOutcome", "FileQueue", "FileUploads", "is_file"]

_MAX_WAITING = 64
_IDLE_S = 3600.0


def is_file(entry: Entry, kinds: frozenset[Kind]) -> bool:
    """Return whether an entry has its content in a file of its own, and is of one of these kinds."""
    return isinstance(entry.payload, Image | Artifact) and KIND_OF[type(entry.payload)] in kinds


class FileOutcome(NamedTuple):
    """The outcome of one attempt to write a file.

    Attributes:
        entry: the image or artifact.
        rejected: why it will never be stored, None if it was stored or is tried again.
        error: why it was not stored, None if it was stored or the backend reported it as rejected.
        is_first: True if it is the first failure of this file.
        is_handed_over: False if the backend was not called, for want of room on its disk.
    """

    entry: Entry
    rejected: Rejection | None = None
    error: BaseException | None = None
    is_first: bool = False
    is_handed_over: bool = True

    @property
    def is_settled(self) -> bool:
        """Whether it was stored or rejected. Otherwise it is tried again."""
        return self.error is None or self.rejected is not None


@dataclass(slots=True)
class _Waiting:
    entry: Entry
    not_before: float = 0.0
    backoff: Backoff = field(default_factory=lambda: Backoff())


class FileQueue:
    """The files of one run that are not settled. `RunDelivery` and the thread of `FileUploads` share it."""

    def __init__(self, uploads: FileUploads, site_id: int, room: RunDiskRoom) -> None:
        """Start empty.

        Args:
            uploads: writes the files.
            site_id: the site's id in the journal.
            room: is asked before a file is written.
        """
        self.site_id = site_id
        self._uploads = uploads
        self._room = room
        self._lock = threading.Lock()
        self._run: BackendRun | None = None
        self._waiting: deque[_Waiting] = deque()
        self._outcomes: deque[FileOutcome] = deque()
        self._unsettled: dict[int, Entry] = {}
        self._failed: set[int] = set()

    def add(self, run: BackendRun, entries: list[Entry]) -> None:
        """Queue files of this run for writing. Does not block."""
        with self._lock:
            self._run = run
            self._waiting.extend(map(_Waiting, entries))
            self._unsettled.update((entry.position, entry) for entry in entries)
        if entries:
            self._uploads.begin(self)

    def is_full(self) -> bool:
        """Return whether no more files may be added. Each confirmation stores all unsettled files in the journal."""
        return len(self._unsettled) >= _MAX_WAITING

    def unsettled(self) -> list[Entry]:
        """Return the files that are neither stored nor rejected, as of the last call of `collect`."""
        return list(self._unsettled.values())

    def has_failures(self) -> bool:
        """Return whether the last attempt of an unsettled file failed, as of the last call of `collect`."""
        return bool(self._failed)

    def collect(self) -> list[FileOutcome]:
        """Return the outcomes since the last call."""
        with self._lock:
            found = list(self._outcomes)
            self._outcomes.clear()
        for outcome in found:
            position = outcome.entry.position
            if outcome.is_settled:
                self._unsettled.pop(position, None)
                self._failed.discard(position)
            else:
                self._failed.add(position)
        return found

    def next_due(self) -> float | None:
        """Return when the next file is to be tried, on the monotonic clock; None if there is none."""
        with self._lock:
            return min((waiting.not_before for waiting in self._waiting), default=None)

    def hurry(self) -> None:
        """Make every file due that waits for its next attempt."""
        with self._lock:
            for waiting in self._waiting:
                waiting.not_before = 0.0

    def write_next(self) -> None:
        """Write the next file that is due. Blocks as the backend does."""
        with self._lock:
            now = time.monotonic()
            due = next((waiting for waiting in self._waiting if waiting.not_before <= now), None)
            if due is None or self._run is None:
                return
            self._waiting.remove(due)
            run = self._run
        with self._room.hold([due.entry]) as refusal:
            if refusal is None:
                outcome = _write(run, due.entry)
            else:
                outcome = FileOutcome(due.entry, error=refusal, is_handed_over=False)
        with self._lock:
            if not outcome.is_settled:
                # Move this file behind the other files, so that it does not delay them.
                wait_s = checked_wait_s(getattr(outcome.error, "retry_after_s", None))
                outcome = outcome._replace(is_first=due.backoff.failures == 0)
                due.not_before = time.monotonic() + due.backoff.next_wait_s(wait_s)
                self._waiting.append(due)
            self._outcomes.append(outcome)


class FileUploads:
    """One thread that writes the files of all runs of a lane, one at a time, in turn."""

    def __init__(self, lane: str, on_outcome: Callable[[int], None]) -> None:
        """Start the thread. It calls ``on_outcome`` with a site's id after each attempt to write a file.

        It starts before there is a file: when a script ends, Python 3.12.0 to 3.12.2 start no new threads.

        Raises:
            RuntimeError: no thread can be started now.
        """
        self._on_outcome = on_outcome
        self._queues: dict[int, FileQueue] = {}
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._has_hurried = False
        self._thread = OwnThread(target=self._main, name=f"trackhub-lane-{lane}-files", daemon=True)
        self._thread.start()

    def begin(self, queue: FileQueue) -> None:
        """Look at this queue, since it has new files."""
        self._queues[queue.site_id] = queue
        self._wake.set()

    def hurry(self) -> None:
        """Try all waiting files at once, since the job ends. Later calls do nothing."""
        if not self._has_hurried:
            self._has_hurried = True
            for queue in list(self._queues.values()):
                queue.hurry()
            self._wake.set()

    def stop(self, timeout_s: float) -> bool:
        """Start no further file. Return whether the thread has ended. If not, it is still writing a file."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            due = time.monotonic() + _IDLE_S
            for queue in list(self._queues.values()):
                first = queue.next_due()
                if first is None or self._stop.is_set():
                    continue
                if first <= time.monotonic():
                    queue.write_next()
                    self._on_outcome(queue.site_id)
                following = queue.next_due()
                due = due if following is None else min(due, following)
            self._wake.wait(max(0.0, due - time.monotonic()))


def _write(run: BackendRun, entry: Entry) -> FileOutcome:
    try:
        report = checked_report(run.write([entry]))
    except PermanentError as e:
        rejection = Rejection(entry.position, "permanent_error", f"{type(e).__name__}: {e}")
        return FileOutcome(entry, named_rejection(entry.payload, rejection), e)
    except BaseException as e:  # also SystemExit, which an SDK may raise: no error of a plugin ends the thread
        return FileOutcome(entry, error=e)
    rejected = [r for r in report.rejected if r.position == entry.position] if report is not None else []
    return FileOutcome(entry, named_rejection(entry.payload, rejected[0]) if rejected else None)
