# SPDX-License-Identifier: Apache-2.0
"""Shows a job until it has ended. ``trackhub watch`` and `show_job` call it.

`job_follower` reads what there is to show. On a terminal, `panel` draws it each second. Elsewhere, this module prints a
line when something has changed. How to look at the job's results is printed once, above the table or between the lines.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trackhub.watch.job_follower import JobFollower
from trackhub.watch.job_state import JobState
from trackhub.watch.panel import job_line, job_notes, job_panel

__all__ = ["follow"]

_DRAW_EVERY_S = 1.0
_LINE_EVERY_S = 5.0


def follow(
    follower: JobFollower,
    stop: threading.Event,
    *,
    has_begun: threading.Event | None = None,
    file: TextIO | None = None,
    log: Path | None = None,
) -> JobState:
    """Show a job until it has ended or ``stop`` is set, and return what was seen last. Blocks until then.

    Args:
        follower: looks at the job. If it looks for new jobs only, the show goes on until ``stop``.
        stop: ends the show.
        has_begun: is set once something is shown.
        file: where to write; stdout by default.
        log: the file that has FLARE's own lines; None if the caller does not know of one.
    """
    file = sys.stdout if file is None else file
    has_begun = has_begun or threading.Event()
    console = Console(file=file)
    if not file.isatty() or console.is_dumb_terminal:
        return _show(follower, _Lines(file).show, has_begun, stop, _LINE_EVERY_S)
    # Without the alternate screen, the last state stays on the terminal, above what is printed next. rich must not
    # redirect what the script prints: `show_job` has redirected the descriptors.
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        return _show(follower, _Screen(live, log).show, has_begun, stop, _DRAW_EVERY_S)


def _show(
    follower: JobFollower,
    show: Callable[[JobState], None],
    has_begun: threading.Event,
    stop: threading.Event,
    every_s: float,
) -> JobState:
    """Look and show, again and again.

    Args:
        follower: looks at the job.
        show: shows a state.
        has_begun, stop: as for `follow`.
        every_s: the pause between two looks, in seconds.
    """
    while True:
        is_last = stop.is_set()  # the job may have changed since the look before
        state = follower.look()
        show(state)
        has_begun.set()
        if is_last or (state.has_ended() and not follower.new_only):
            return state
        stop.wait(every_s)


class _Screen:
    """Draws a job on a terminal, always in the same place."""

    def __init__(self, live: Live, log: Path | None) -> None:
        self._live, self._log = live, log
        self._begin = time.monotonic()
        self._noted: set[str] = set()

    def show(self, state: JobState) -> None:
        for note in job_notes(state):
            if note not in self._noted:
                self._noted.add(note)
                # Above the table, and whole: a command that the table had broken into lines could not be copied.
                self._live.console.print(Text(f" {note}", "dim"), no_wrap=True, overflow="ignore", crop=False)
        self._live.update(job_panel(state, time.monotonic() - self._begin, self._log), refresh=True)


class _Lines:
    """Prints a job as plain lines, those that have not been printed before."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._line = ""
        self._noted: set[str] = set()

    def show(self, state: JobState) -> None:
        line, now = job_line(state), time.strftime("%H:%M:%S")
        new = [note for note in job_notes(state) if note not in self._noted]
        self._noted.update(new)
        for text in [*new, *([line] if line != self._line else [])]:
            self._file.write(_encodable(f"{now} {text}\n", self._file))
        self._file.flush()
        self._line = line


def _encodable(text: str, file: TextIO) -> str:
    """Return the text with an escape for each character that the file's encoding lacks."""
    encoding = file.encoding or "utf-8"  # a StringIO has none
    return text.encode(encoding, "backslashreplace").decode(encoding)
