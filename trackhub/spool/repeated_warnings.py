# SPDX-License-Identifier: Apache-2.0
"""Logs a repeated warning at most once a minute.

The sender and the reader of a spool look at the folder 20 times a second. If the folder is gone, they would otherwise
fill the log with the same warning.
"""

from __future__ import annotations

import logging
import math
import time

__all__ = ["RepeatedWarnings"]

_EVERY_S = 60.0


class RepeatedWarnings:
    """Remembers when it last warned about each subject. Use it from one thread."""

    def __init__(self, log: logging.Logger) -> None:
        """Start without an earlier warning.

        Args:
            log: where the warnings go.
        """
        self._log = log
        self._warned_at: dict[str, float] = {}

    def warn(self, about: str, message: str) -> None:
        """Log this message, unless one about the same subject was logged in the last minute.

        Args:
            about: the subject, such as the name of a stream. There must not be many subjects.
            message: what the log says.
        """
        now = time.monotonic()
        if now - self._warned_at.get(about, -math.inf) >= _EVERY_S:
            self._warned_at[about] = now
            self._log.warning("%s", message)
