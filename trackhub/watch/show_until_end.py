# SPDX-License-Identifier: Apache-2.0
"""Shows a job until it has ended. ``trackhub watch`` and `show_job` call it.

`job_state` reads what there is to show. On a terminal, `panel` draws it each second. Elsewhere, this module prints a
line when something has changed.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live

from trackhub.delivery.report import RUNNING
from trackhub.watch.job_state import JobFollower, JobState
from trackhub.watch.panel import job_line, job_panel

__all__ = ["follow"]

_DRAW_EVERY_S = 1.0
_LINE_EVERY_S = 10.0


def follow(folder: Path, stop: threading.Event, *, file: TextIO | None = None, log: Path | None = None) -> JobState:
    """Show a job until it has ended or ``stop`` is set, and return what was seen last. Blocks until then.

    Args:
        folder: the job's folder, or any above. It need not exist yet.
        stop: ends the show.
        file: where to write; stdout by default.
        log: the file that has FLARE's own lines; None if the caller does not know of one.
    """
    file = sys.stdout if file is None else file
    console = Console(file=file)
    follower, begin = JobFollower(folder), time.monotonic()
    if not console.is_terminal:
        return _write_lines(follower, stop, file)
    # Without the alternate screen, the last state stays on the terminal, above what is printed next. rich must not
    # redirect what the script prints: `show_job` has redirected the descriptors.
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        while True:
            state = follower.look()
            live.update(job_panel(state, time.monotonic() - begin, log), refresh=True)
            if state.status != RUNNING or stop.wait(_DRAW_EVERY_S):
                break
        state = follower.look()  # it may have changed during the wait
        live.update(job_panel(state, time.monotonic() - begin, log), refresh=True)
    return state


def _write_lines(follower: JobFollower, stop: threading.Event, file: TextIO) -> JobState:
    said = ""
    while True:
        state = follower.look()
        line = job_line(state)
        if line != said:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
            file.flush()
            said = line
        if state.status != RUNNING:
            return state
        if stop.wait(_LINE_EVERY_S):
            return follower.look()
