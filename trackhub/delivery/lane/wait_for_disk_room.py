# SPDX-License-Identifier: Apache-2.0
"""Keeps a lane from filling a disk with the records of one site.

A lane copies what the receiver accepted, such as files, into a backend. The backend may write to the receiver's own
disk, and trackhub does not know which backends do. So `RunDelivery` and `FileQueue` ask `RunDiskRoom` first: before
they note in the journal that records are handed over, and before they hand them over.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trackhub.delivery.share_last_disk_room import DiskRoom
from trackhub.errors import TransientError
from trackhub.records import Artifact, Image
from trackhub.spi import Entry

__all__ = ["RunDiskRoom"]


class RunDiskRoom:
    """The room on the backends' disk for one run. Thread-safe."""

    def __init__(self, room: DiskRoom, site: str) -> None:
        """Ask ``room`` for the run of this site."""
        self._room = room
        self._site = site

    @contextmanager
    def hold(self, batch: Sequence[Entry]) -> Iterator[TransientError | None]:
        """Hold room while a batch is written. Yield None, or why the backend must not be called now."""
        sizes = [entry.payload.blob.size for entry in batch if isinstance(entry.payload, Image | Artifact)]
        with self._room.hold(self._site, sum(sizes), len(sizes)) as may_write:
            yield None if may_write else self._refusal()

    def _refusal(self) -> TransientError:
        refusal = TransientError(
            f"the backends' disk is nearly full, and site {self._site} has stored more than the average of "
            "all sites. Free space on it, or run `trackhub replay` later"
        )
        # By this cause, `bad_record_or_outage.says_busy_or_full` knows that no record is to blame.
        refusal.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return refusal
