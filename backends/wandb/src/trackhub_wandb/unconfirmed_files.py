# SPDX-License-Identifier: Apache-2.0
"""What belongs to rows of a run and travels beside them: media files, and the artifacts of tables.

`SdkRun` adds what it hands to the SDK. `OnlineRun` asks in ``flush`` what the server has, and leaves out the records
whose files are still on their way.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackhub.spi import PermanentError, TransientError
from trackhub_wandb.artifact_uploads import MAX_REFUSALS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trackhub_wandb.artifact_uploads import ArtifactUpload

__all__ = ["FilesOfRows"]

_AT_ONCE = 50
_POLL_S = 0.1
_POLL_MAX_S = 0.5
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _File:
    position: int
    size: int
    sent_at: float
    wait_s: float = 0.0


class FilesOfRows:
    """Files and artifacts that the SDK got and the server may not have yet, by the position of their record.

    Used by one thread at a time.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._files: dict[str, _File] = {}
        self._tables: dict[int, ArtifactUpload] = {}
        self._waited_for: set[int] = set()

    def add_file(self, position: int, path: str, size: int) -> None:
        """Note a media file that the SDK got.

        Args:
            position: the position of its record.
            path: its path below the run's files.
            size: its size in bytes.
        """
        self._files[path] = _File(position, size, time.monotonic())

    def add_table(self, position: int, upload: ArtifactUpload) -> None:
        """Note the artifact of a table that the SDK got."""
        self._tables[position] = upload

    def clear(self) -> None:
        """Forget all: they are stored."""
        self._files.clear()
        self._tables.clear()

    def positions(self) -> set[int]:
        """Return the positions of the records whose files or artifacts the server did not have when last asked."""
        return {file.position for file in self._files.values()} | self._tables.keys()

    def wait(
        self,
        sizes: Callable[[Sequence[str]], Mapping[str, int]],
        send_again: Callable[[str], None],
        patience_s: float,
        again_s: float,
    ) -> None:
        """Find out what the server has now. Wait only if an earlier call has not waited for the same records.

        Args:
            sizes: asks the server for the sizes of files, by path.
            send_again: hands a file to the SDK once more, since the SDK itself does not try again.
            patience_s: the longest wait, in seconds.
            again_s: after this many seconds, a file that has not arrived is sent again. The time doubles with each
                attempt.

        Raises:
            TransientError: the server cannot be asked.
            Exception: the SDK failed. Its errors have no common base class.
        """
        until = time.monotonic() + (patience_s if self.positions() - self._waited_for else 0.0)
        wait, pause_s = threading.Event().wait, _POLL_S
        while True:
            self._remove_stored(sizes)
            self._ask_for_tables()
            if not self.positions() or time.monotonic() + pause_s > until:
                break
            wait(pause_s)
            pause_s = min(2 * pause_s, _POLL_MAX_S)
        self._waited_for = self.positions()
        now = time.monotonic()
        for path, file in self._files.items():
            file.wait_s = file.wait_s or again_s
            if now - file.sent_at >= file.wait_s:
                file.sent_at, file.wait_s = now, 2 * file.wait_s
                send_again(path)

    def _remove_stored(self, sizes: Callable[[Sequence[str]], Mapping[str, int]]) -> None:
        names = list(self._files)
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            found = sizes(some)
            for name in some:
                if found.get(name) == self._files[name].size:
                    del self._files[name]

    def _ask_for_tables(self) -> None:
        """Remove the artifacts that the server has, and those that it refuses each time.

        A refused table is not lost: the server has its row, and its content as a file of the run.
        """
        for position, upload in list(self._tables.items()):
            try:
                upload.wait(0.0)
            except (TransientError, PermanentError) as error:
                if upload.refusals < MAX_REFUSALS:
                    continue
                _log.warning(
                    "%s. It belongs to the table of record %d, which W&B's pages will not show. The table's rows are "
                    "in the file media/table of the run", error, position,
                )  # fmt: skip
            del self._tables[position]
