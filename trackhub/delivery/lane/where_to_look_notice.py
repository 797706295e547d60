# SPDX-License-Identifier: Apache-2.0
"""Says how to look at the results of a job that runs, once its first runs are open at a backend.

A lane calls it. A job of a thousand sites gets a few lines, and not a thousand.
"""

from __future__ import annotations

import logging
from pathlib import Path

from trackhub.printable import printable
from trackhub.spi import Results

__all__ = ["OpeningNotice"]

_MAX_SAID = 3
_log = logging.getLogger(__name__)


class OpeningNotice:
    """Logs each command, URL or path that opens runs of one backend, once. Used by the lane's thread alone."""

    def __init__(self, backend: str, run_folder: Path) -> None:
        """Log nothing yet.

        Args:
            backend: the backend's name.
            run_folder: the job's run folder, to which results are relative.
        """
        self._backend = backend
        self._run_folder = run_folder
        self._sites: set[int] = set()
        self._said: set[str] = set()

    def note(self, site_id: int, results: Results | None) -> None:
        """Log how to open a run, unless that was logged before. None means that the run is not open, or has nothing.

        Args:
            site_id: the site's id in the journal.
            results: what the backend says of the run.
        """
        if results is None or site_id in self._sites:
            return
        self._sites.add(site_id)
        there = results.resolved(self._run_folder)
        opening = there.command or there.url or there.path
        if opening is None or opening in self._said or len(self._said) > _MAX_SAID:
            return
        self._said.add(opening)
        if len(self._said) > _MAX_SAID:
            opening = f"`trackhub status {self._run_folder}` names the other runs"
        _log.info("look at this job in %s, while it runs:\n  %s", self._backend, printable(opening))
