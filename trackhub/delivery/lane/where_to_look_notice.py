# SPDX-License-Identifier: Apache-2.0
"""Says how to look at the results of a running job, as soon as its first runs are open at a backend.

A lane calls it. It says only a few lines, even for a job of a thousand sites.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from trackhub.printable import printable
from trackhub.runnable_commands import command_for
from trackhub.spi import Results

__all__ = ["OpeningNotice"]

_MAX_SAID = 3
_log = logging.getLogger(__name__)


class OpeningNotice:
    """Says the first commands, URLs or paths that open runs of one backend. Used by the lane's thread alone."""

    def __init__(
        self, backend: str, run_folder: Path, is_running: Callable[[], bool], say: Callable[[str], None] | None = None
    ) -> None:
        """Say nothing yet.

        Args:
            backend: the backend's name.
            run_folder: the job's run folder, to which results are relative.
            is_running: returns whether the job still runs. If it ends, its report says the same next, so that the
                notice says nothing.
            say: gets each text. None logs it.
        """
        self._backend = backend
        self._run_folder = run_folder
        self._is_running = is_running
        self._say = say or _log.info
        self._sites: set[int] = set()
        self._said: set[str] = set()

    def note(self, site_id: int, results: Results | None) -> None:
        """Say how to open a run, unless that was said before, or the job ends.

        Args:
            site_id: the site's id in the journal.
            results: where a person can see the run, as the backend says. None if the run is not open or cannot be
                shown.
        """
        if results is None or site_id in self._sites or not self._is_running():
            return
        self._sites.add(site_id)
        for opening in results.resolved(self._run_folder).openings():
            if opening not in self._said and len(self._said) <= _MAX_SAID:
                self._say_new(opening)

    def _say_new(self, opening: str) -> None:
        self._said.add(opening)
        if len(self._said) > _MAX_SAID:
            opening = f"`{command_for('trackhub status', self._run_folder)}` names the other runs"
        self._say(f"look at this job in {self._backend}, while it runs:\n  {printable(opening)}")
