# SPDX-License-Identifier: Apache-2.0
"""How the kit makes the store of a backend unavailable, and available again.

A contract class returns an `Outage` from its hook ``outage``. The checks in ``checks/delivery.py`` begin and end it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

__all__ = ["FolderOutage", "Outage"]


class Outage(Protocol):
    """An outage of the real store that a backend writes to: a server, a service, a folder."""

    def begin(self) -> None:
        """Make the store unavailable: from now on it stores nothing. Block until that is so."""

    def end(self) -> None:
        """Make the store available again, at the same address and with the data that it had."""


class FolderOutage:
    """The outage of a folder that a backend keeps its files in. Meanwhile a file stands in the folder's place."""

    def __init__(self, folder: Path) -> None:
        """Prepare the outage of this folder, which must exist when it begins."""
        self._folder = folder
        self._away = folder.with_name(f"{folder.name}.away")

    def begin(self) -> None:
        """Move the folder away."""
        self._folder.rename(self._away)
        self._folder.write_bytes(b"")

    def end(self) -> None:
        """Move the folder back."""
        if self._away.exists():
            self._folder.unlink()
            self._away.rename(self._folder)
