# SPDX-License-Identifier: Apache-2.0
"""What a backend writes to, made to fail and to heal."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

__all__ = ["FolderPeer", "Peer"]


class Peer(Protocol):
    """The real thing that a backend writes to: a server, a service, a folder."""

    def fail(self) -> None:
        """Make it unavailable: nothing that is written from now on is stored."""

    def heal(self) -> None:
        """Make it available again, at the same address and with the data that it had."""


class FolderPeer:
    """A folder that a backend keeps its files in. While it fails, a file stands in its place."""

    def __init__(self, folder: Path) -> None:
        """Stand for this folder."""
        self._folder = folder
        self._away = folder.with_name(f"{folder.name}.away")

    def fail(self) -> None:
        """Move the folder away."""
        self._folder.rename(self._away)
        self._folder.write_bytes(b"")

    def heal(self) -> None:
        """Move the folder back."""
        if self._away.exists():
            self._folder.unlink()
            self._away.rename(self._folder)
