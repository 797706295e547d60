# SPDX-License-Identifier: Apache-2.0
"""Puts a repaired journal into the place of the damaged one, so that a kill at any moment leaves one of the two.

`repair` calls it, and `Journal.open` finishes what was interrupted. The files, beside ``trackhub.db``::

    trackhub.db.new             the repaired journal while it is being written; worthless after a kill
    trackhub.db.damaged         the damaged journal, kept; with its write-ahead log as trackhub.db.damaged-wal
    trackhub.db.repaired        the whole repaired journal, while the log of the damaged one is being removed

Once ``trackhub.db.repaired`` is there, it is the journal.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

__all__ = ["current_file", "finish_swap", "is_journal_left", "partial_file", "swap"]

_log = logging.getLogger(__name__)


def partial_file(path: Path) -> Path:
    """Return the file that a repaired journal is written to."""
    return _beside(path, ".new")


def swap(path: Path) -> Path:
    """Put the whole file at `partial_file` into the place of a journal, and return where the damaged one is kept.

    The caller holds the journal's lock, and no connection to either file.

    Raises:
        OSError: a file cannot be copied or renamed. `finish_swap` goes on where this stopped.
    """
    damaged = _beside(path, ".damaged")
    _keep(path, damaged)
    _keep(_beside(path, "-wal"), _beside(damaged, "-wal"))
    partial_file(path).replace(_beside(path, ".repaired"))
    finish_swap(path)
    return damaged


def finish_swap(path: Path) -> None:
    """Finish what a killed process left of a repair, if it left something. The caller holds the journal's lock.

    Raises:
        OSError: a file cannot be removed or renamed.
    """
    repaired, damaged = _beside(path, ".repaired"), _beside(path, ".damaged")
    if repaired.exists():
        # What they held was read with the damaged file. Left beside the repaired one, SQLite would apply them to it.
        for suffix in ("-wal", "-shm"):
            _beside(path, suffix).unlink(missing_ok=True)
        repaired.replace(path)
    elif damaged.exists() and not path.exists():
        _log.warning("%s is missing; the damaged journal %s is repaired again", path, damaged)
        _keep(_beside(damaged, "-wal"), _beside(path, "-wal"))
        _keep(damaged, path)


def current_file(path: Path) -> Path:
    """Return the file that holds a journal now: another one while a repair is being finished."""
    repaired = _beside(path, ".repaired")
    return repaired if repaired.exists() else path


def is_journal_left(path: Path) -> bool:
    """Return whether a journal is here, or what an interrupted repair left of one."""
    return any(_beside(path, suffix).exists() for suffix in ("", ".repaired", ".damaged"))


def _keep(source: Path, target: Path) -> None:
    """Make a second name or a copy of a file, in place of what is there. Remove that if there is no such file."""
    if not source.exists():
        target.unlink(missing_ok=True)
        return
    if target.exists() and target.samefile(source):
        return
    part = _beside(target, ".part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:  # a file system without links
        shutil.copyfile(source, part)
    part.replace(target)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
