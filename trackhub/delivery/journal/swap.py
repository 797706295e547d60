# SPDX-License-Identifier: Apache-2.0
"""Puts a repaired journal into the place of the damaged one. A kill at any moment leaves one of the two.

`repair` calls it, and `Journal.open` finishes an interrupted swap. These are the files beside ``trackhub.db``::

    trackhub.db.new             the repaired journal while it is being written; useless after a kill
    trackhub.db.damaged         the damaged journal, which is kept; its write-ahead log is trackhub.db.damaged-wal
    trackhub.db.repaired        the complete repaired journal, until the damaged journal's log is removed

Once ``trackhub.db.repaired`` exists, it is the journal.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from trackhub.errors import JournalError

__all__ = ["check_file_types", "current_file", "finish_swap", "is_journal_left", "partial_file", "swap"]

_log = logging.getLogger(__name__)


def partial_file(path: Path) -> Path:
    """Return the file that a repaired journal is written to."""
    return _beside(path, ".new")


def swap(path: Path) -> Path:
    """Put the complete file at `partial_file` in the place of a journal. Return where the damaged journal is kept.

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
    """Finish a repair that was killed, if there is one. The caller holds the journal's lock.

    Raises:
        OSError: a file cannot be removed or renamed.
    """
    repaired, damaged = _beside(path, ".repaired"), _beside(path, ".damaged")
    if repaired.exists():
        # These files belong to the damaged journal, and were read with it. If they stayed, SQLite would apply them to
        # the repaired journal.
        for suffix in ("-wal", "-shm"):
            _beside(path, suffix).unlink(missing_ok=True)
        repaired.replace(path)
    elif damaged.exists() and not path.exists():
        _log.warning("%s is missing; the damaged journal %s is repaired again", path, damaged)
        _keep(_beside(damaged, "-wal"), _beside(path, "-wal"))
        _keep(damaged, path)


def current_file(path: Path) -> Path:
    """Return the file that holds a journal now: the repaired one, while a swap is not finished.

    Raises:
        JournalError: its folder cannot be read.
    """
    repaired = _beside(path, ".repaired")
    return repaired if _exists(repaired) else path


def is_journal_left(path: Path) -> bool:
    """Return whether there is a journal here, or files of an interrupted repair.

    Raises:
        JournalError: its folder cannot be read.
    """
    return any(_exists(_beside(path, suffix)) for suffix in ("", ".repaired", ".damaged"))


def check_file_types(path: Path) -> None:
    """Check that a journal and SQLite's files beside it are ordinary files. A missing file is accepted.

    Call it before you open a journal whose folder others may have made. SQLite would wait for ever for a FIFO.

    Raises:
        JournalError: one of them is not an ordinary file, or their folder cannot be read.
    """
    for file in (path, *(_beside(path, suffix) for suffix in ("-wal", "-shm", "-journal"))):
        if _exists(file) and not file.is_file():
            raise JournalError(f"cannot read the journal {path}: {file} is not an ordinary file; remove it")


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError as e:
        raise JournalError(f"cannot read the journal {file}: {e}; look at it as the user who owns it") from e


def _keep(source: Path, target: Path) -> None:
    """Make ``target`` a second name, or a copy, of a file. If there is no such file, remove ``target``."""
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
