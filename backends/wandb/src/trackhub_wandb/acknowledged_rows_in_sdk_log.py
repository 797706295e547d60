# SPDX-License-Identifier: Apache-2.0
"""Follows the log of the SDK's service, to learn which rows of an open run the server has acknowledged.

`online` calls it if the server's own count of rows cannot be used. The SDK does not tell its caller about uploads. But
its service logs each request in ``debug-internal.log``, with one JSON object in each line. The line ``filestream:
sending request`` has the number of rows. ``filestream: request sent`` follows with the server's status (wandb 0.31).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["UploadLog"]

_SENDING = "filestream: sending request"
_SENT = "filestream: request sent"
_FATAL = "filestream: fatal error"


class UploadLog:
    """Reads what was appended to the log since the last call. The service sends one request at a time.

    Attributes:
        has_given_up: the service stopped the upload of rows for good.
    """

    def __init__(self, path: Path) -> None:
        """Start at the first line. The file need not exist yet."""
        self.has_given_up = False
        self._path = path
        self._read_to = 0
        self._rows = 0
        self._sending = 0

    def rows(self) -> int:
        """Return how many rows the server has acknowledged since the run was opened, as the service says."""
        for line in self._new_lines():
            said = str(line.get("msg", ""))
            if said == _SENDING:
                self._sending = int(line.get("history_lines", 0))
            elif said == _SENT and str(line.get("status", "")).startswith("2"):
                self._rows += self._sending
                self._sending = 0
            elif said.startswith(_FATAL):
                self.has_given_up = True
        return self._rows

    def _new_lines(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_to)
                data = file.read()
        except OSError:
            return []  # the service has not written it yet
        whole = data[: data.rfind(b"\n") + 1]
        self._read_to += len(whole)
        lines = []
        for line in whole.splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue  # lines of another form do not count
            if isinstance(found, dict):
                lines.append(found)
        return lines
