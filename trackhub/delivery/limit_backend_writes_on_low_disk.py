# SPDX-License-Identifier: Apache-2.0
"""Keeps the lanes from filling a disk with the records of one site.

`set_up_backend` puts a `DiskLimitedBackend` around each backend. A lane copies what the receiver accepted, such as
files, into a backend. The backend may write to the receiver's own disk, and trackhub does not know which backends do.
So each `DiskLimitedBackend` asks `DiskRoom` before each write.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from trackhub.delivery.share_last_disk_room import DiskRoom
from trackhub.errors import TransientError
from trackhub.job_and_run_info import RunStatus
from trackhub.records import Artifact, Image
from trackhub.spi import Backend, BackendRun, Confirmation, Entry, Results, RunInfo, WriteReport

__all__ = ["DiskLimitedBackend", "NotHandedOverError"]


class NotHandedOverError(TransientError):
    """The backend was not called, since its disk is nearly full. So it has none of the entries."""


class DiskLimitedBackend(Backend[Any]):
    """A backend whose runs write only while `DiskRoom` allows it. It passes all other calls on."""

    def __init__(self, backend: Backend[Any], room: DiskRoom) -> None:
        """Put this around a backend.

        Args:
            backend: the backend.
            room: knows how much each site has stored.
        """
        self.capabilities = backend.capabilities
        self._backend = backend
        self._room = room

    def preflight(self) -> None:
        """Call the backend's own check."""
        try:
            self._backend.preflight()
        finally:
            self.capabilities = self._backend.capabilities  # the check may have changed them

    def open_run(self, info: RunInfo) -> BackendRun:
        """Open the run at the backend."""
        return _DiskLimitedRun(self._backend.open_run(info), self._room, info.site)

    def results(self, info: RunInfo) -> Results | None:
        """Return the backend's results."""
        return self._backend.results(info)

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()


class _DiskLimitedRun(BackendRun):
    def __init__(self, run: BackendRun, room: DiskRoom, site: str) -> None:
        self._run = run
        self._room = room
        self._site = site

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        sizes = [entry.payload.blob.size for entry in batch if isinstance(entry.payload, Image | Artifact)]
        with self._room.hold(self._site, sum(sizes), len(sizes)) as may_write:
            if not may_write:
                # The cause says that the disk is full. So the lane waits, and never rejects a record for this error.
                raise NotHandedOverError(
                    f"the backends' disk is nearly full, and site {self._site} has stored more than the average of all "
                    "sites. Free space on the disk, or replay this journal later"
                ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._run.write(batch)

    def flush(self) -> Confirmation:
        return self._run.flush()

    def left_out(self) -> Sequence[Entry]:
        return self._run.left_out()

    def finish(self, status: RunStatus) -> None:
        self._run.finish(status)

    def probe(self, entry: Entry) -> None:
        self._run.probe(entry)

    def next_position(self) -> int:
        return self._run.next_position()
