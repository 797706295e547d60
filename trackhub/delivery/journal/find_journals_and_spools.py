# SPDX-License-Identifier: Apache-2.0
"""Finds what jobs left on a disk: their journals and spools, and the runs whose process died.

``trackhub status``, ``trackhub replay`` and `trackhub.local_tracking` call it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from trackhub.delivery.journal.journal import JOURNAL_NAME
from trackhub.delivery.journal.swap import is_journal_left
from trackhub.delivery.report import REPORT_NAME
from trackhub.errors import ConfigError, JournalError, SpoolError
from trackhub.process_lock import is_free
from trackhub.spool.layout import TEMPORARY_SPOOL, read_spool_info

__all__ = ["Found", "find", "find_all", "find_interrupted", "find_temporary_spools", "is_interrupted"]

_SPOOL_MARK = "spool.json"
"""The file that makes a folder a spool."""


class Found(NamedTuple):
    """The journal files and spool folders at or under a path, each sorted.

    Attributes:
        journals: the journal files.
        spools: the spool folders.
        unreadable: an error for each folder that is not looked into, and may hold more: one that this user may not
            read, or a symbolic link to a run.
    """

    journals: list[Path]
    spools: list[Path]
    unreadable: list[JournalError]


def find(path: Path) -> Found:
    """Return the journals and spools at this path: the file or folder itself, or all below it.

    If a repair of a journal was interrupted, the files that it left count as that journal. Symbolic links below the
    path are not followed: somebody else may have put them there, to have another folder changed.

    Args:
        path: a journal file, a spool folder, or any folder above, such as a job's or a whole workspace.

    Raises:
        ConfigError: there is no file or folder at this path, or it holds neither a journal nor a spool.
        JournalError: a folder may not be read, or is a link to a run, and nothing was found in the others.
    """
    failed: list[OSError] = []
    try:
        if path.is_file() or (path.name == JOURNAL_NAME and is_journal_left(path)):
            return Found([path], [], [])
        if not path.is_dir():
            raise ConfigError(f"there is no {path}; expected a job's folder, a {JOURNAL_NAME} or a spool folder")
    except OSError as e:
        failed.append(e)
    journals, spools = [], []
    unreadable: list[JournalError] = []
    for folder, _, names in os.walk(path, onerror=failed.append):
        if any(name.startswith(JOURNAL_NAME) for name in names):
            try:
                if is_journal_left(Path(folder, JOURNAL_NAME)):
                    journals.append(Path(folder, JOURNAL_NAME))
            except JournalError as e:  # this user may list the folder, and not search it
                unreadable.append(e)
        if _SPOOL_MARK in names:
            spools.append(Path(folder))
    unreadable += [
        JournalError(f"{link} is a symbolic link to a run's folder, and is not followed; give {link} itself")
        for link in sorted(_links_to_runs(path))
    ]
    unreadable += [
        JournalError(f"cannot look for journals: {error}; look as the user who owns it")
        for error in failed
        if isinstance(error, PermissionError)  # otherwise a job may have removed the folder just now
    ]
    if not journals and not spools:
        if unreadable:
            raise unreadable[0]
        raise ConfigError(
            f"there is no journal ({JOURNAL_NAME}) and no spool ({_SPOOL_MARK}) at or under {path}. FLARE archives the "
            f"folder of a finished job: download the job first, and give the folder that it was downloaded to"
        )
    return Found(sorted(journals), sorted(spools), unreadable)


def _links_to_runs(folder: Path) -> list[Path]:
    """Return the symbolic links in this folder that lead to a run's folder. Never raises."""
    names = glob.glob(f"*/trackhub/{JOURNAL_NAME}", root_dir=folder, include_hidden=True)
    return [link for link in (folder / Path(name).parts[0] for name in names) if os.path.islink(link)]


def find_all(paths: Iterable[Path]) -> Found:
    """Return what `find` finds at each of these paths, each journal and spool once, in the order of the paths.

    Raises:
        ConfigError, JournalError: as for `find`, of any path.
    """
    journals: dict[Path, Path] = {}
    spools: dict[Path, Path] = {}
    unreadable: list[JournalError] = []
    for path in paths:
        found = find(path)
        unreadable += found.unreadable
        for known, parts in ((journals, found.journals), (spools, found.spools)):
            for part in parts:
                known.setdefault(part.resolve(), part)  # one path may lie in another
    return Found([*journals.values()], [*spools.values()], unreadable)


def find_temporary_spools(jobs: Collection[str]) -> list[Path]:
    """Return the spools of these jobs that are in the temporary folder, since their own folder could not be used.

    Only this user's folders count: anybody may make one there. Never raises.
    """
    found = []
    for name in sorted(glob.glob(f"{TEMPORARY_SPOOL}*", root_dir=tempfile.gettempdir())):
        folder = Path(tempfile.gettempdir(), name)
        with contextlib.suppress(OSError, SpoolError):
            if folder.lstat().st_uid == os.geteuid() and read_spool_info(folder).job in jobs:
                found.append(folder)
    return found


def find_interrupted(folder: Path) -> list[Path]:
    """Return the run folders in this folder whose receiver died before it made its report, sorted.

    It looks at file names and locks only, since there may be thousands of runs. Never raises.

    Args:
        folder: the folder of the runs' folders.
    """
    runs = sorted(Path(folder, run) for run in glob.glob("*/", root_dir=folder, include_hidden=True))
    return [run for run in runs if is_interrupted(run / "trackhub" / JOURNAL_NAME)]


def is_interrupted(journal: Path) -> bool:
    """Return whether a journal's receiver died before it made its report. False if this is not known. Never raises."""
    # `Path.exists` would raise for a folder that this user may not search, such as another user's run.
    if os.path.exists(journal.with_name(REPORT_NAME)) or not os.path.exists(journal):
        return False
    return is_free(journal.with_suffix(".lock"))
