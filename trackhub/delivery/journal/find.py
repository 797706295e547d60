# SPDX-License-Identifier: Apache-2.0
"""Finds the journals and spools that a job left on a disk, for ``trackhub status`` and ``trackhub replay``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from trackhub.delivery.journal.journal import JOURNAL_NAME
from trackhub.delivery.journal.swap import is_journal_left
from trackhub.errors import ConfigError

__all__ = ["Found", "find"]

_SPOOL_MARK = "spool.json"
"""The file that makes a folder a spool."""


class Found(NamedTuple):
    """The journal files and spool folders at or under a path, each sorted."""

    journals: list[Path]
    spools: list[Path]


def find(path: Path) -> Found:
    """Return the journals and spools at this path: the file or folder itself, or all below it.

    What an interrupted repair left of a journal is found as that journal.

    Args:
        path: a journal file, a spool folder, or any folder above, such as a job's or a whole workspace.

    Raises:
        ConfigError: there is nothing at this path, or no journal and no spool at or under it.
    """
    if path.is_file() or (path.name == JOURNAL_NAME and is_journal_left(path)):
        return Found([path], [])
    if not path.is_dir():
        raise ConfigError(f"there is no {path}; expected a job's folder, a {JOURNAL_NAME} or a spool folder")
    journals, spools = [], []
    for folder, _, names in os.walk(path):
        if any(name.startswith(JOURNAL_NAME) for name in names) and is_journal_left(Path(folder, JOURNAL_NAME)):
            journals.append(Path(folder, JOURNAL_NAME))
        if _SPOOL_MARK in names:
            spools.append(Path(folder))
    if not journals and not spools:
        raise ConfigError(
            f"there is no journal ({JOURNAL_NAME}) and no spool ({_SPOOL_MARK}) at or under {path}. FLARE archives the "
            f"folder of a finished job: download the job first, and give the folder that it was downloaded to"
        )
    return Found(sorted(journals), sorted(spools))
