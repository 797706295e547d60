# SPDX-License-Identifier: Apache-2.0
"""Shows a job while a script runs it. On a terminal, FLARE's many log lines go to a file meanwhile.

The script that makes a job calls `show_job`. On a terminal, `show_until_end` draws the job's state. Elsewhere, it
prints plain lines between those of FLARE.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from trackhub.open_without_links import open_plain
from trackhub.printable import printable
from trackhub.watch.job_follower import JobFollower
from trackhub.watch.show_until_end import follow

__all__ = ["Show", "show_job"]

_BEGIN_S = 5.0
_END_S = 5.0
_LAST_LINES = 8
_log = logging.getLogger(__name__)
_ERROR = re.compile(r"\b(ERROR|CRITICAL|[A-Z]\w*(Error|Exception))\b")


@dataclass
class Show:
    """What `show_job` has seen.

    Attributes:
        log: the file in which the lines of the job are; None if they went to stdout as usual.
        was_interrupted: whether the user pressed Ctrl-C. FLARE then kills the job, and does not say why it ended.
    """

    log: Path | None = None
    was_interrupted: bool = False

    def last_lines(self) -> list[str]:
        """Return the lines of the log that say what went wrong: its last errors; without errors, its last lines."""
        if self.log is None:
            return []
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if _ERROR.search(line)]
        return [printable(line) for line in list(dict.fromkeys(errors))[-_LAST_LINES:] or lines[-_LAST_LINES:]]


@contextmanager
def show_job(folder: Path, log: Path) -> Iterator[Show]:
    """Show the job that the ``with`` block runs. Call it in the main thread.

    A job that is in the folder already is not shown, even if it runs, unless it begins again.

    If stdout is a terminal, all that this process and its children write to stdout and stderr meanwhile goes to a file.
    Elsewhere, nothing is redirected, and a line is printed when something has changed, every 5 s at most.

    Args:
        folder: a folder in which the job's journals will be, at any depth.
        log: the file for what is written meanwhile. It is replaced.
    """
    folder, log = folder.absolute(), log.absolute()  # FLARE's simulator goes to another folder
    show = Show(log if sys.stdout.isatty() else None)
    earlier = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        show.was_interrupted = True
        if callable(earlier):
            earlier(number, frame)

    # None is the handler of a C library. Python could not set it again, so it stays, and Ctrl-C is not noted.
    if earlier is not None:
        signal.signal(signal.SIGINT, note)
    try:
        if show.log is None:
            with _shown(folder, sys.stdout, None):
                yield show
        else:
            with _on_terminal(folder, show.log):
                yield show
    finally:
        if earlier is not None:
            signal.signal(signal.SIGINT, earlier)


@contextmanager
def _on_terminal(folder: Path, log: Path) -> Iterator[None]:
    sys.stdout.flush()
    sys.stderr.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    # Redirect the descriptors, not sys.stdout: FLARE runs the job in other processes, which inherit the descriptors.
    encoding = sys.stdout.encoding or "utf-8"
    with (
        open(log, "wb", buffering=0, opener=open_plain) as target,
        os.fdopen(os.dup(1), "w", encoding=encoding, errors="backslashreplace") as screen,
        os.fdopen(os.dup(2), "wb", buffering=0) as errors,
    ):
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
        try:
            with _shown(folder, screen, log):
                yield
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:  # also if the log's disk is full
                os.dup2(screen.fileno(), 1)
                os.dup2(errors.fileno(), 2)


@contextmanager
def _shown(folder: Path, file: TextIO, log: Path | None) -> Iterator[None]:
    """Show the job in a thread of its own.

    Args:
        folder: a folder in which the job's journals will be.
        file: where to show it.
        log: the file that has FLARE's own lines; None if they go to ``file`` as well.
    """
    stop, has_begun = threading.Event(), threading.Event()

    def show() -> None:
        try:
            follow(JobFollower(folder, new_only=True), stop, has_begun=has_begun, file=file, log=log)
        except Exception as error:  # noqa: BLE001  # the job must run on
            if not isinstance(error, BrokenPipeError) and not file.closed:  # else nobody reads any more: `| head`
                _log.warning("the job runs on, but is not shown any more", exc_info=True)
        finally:
            has_begun.set()

    shower = threading.Thread(target=show, name="trackhub-show", daemon=True)
    shower.start()
    # Wait until the thread has looked once. Otherwise it could take the block's own job for an earlier one.
    # And its first line could come into the middle of a line of the block: Python writes a line and its end one after
    # the other.
    has_begun.wait(_BEGIN_S)
    try:
        yield
    finally:
        stop.set()
        shower.join(_END_S)
