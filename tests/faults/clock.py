# SPDX-License-Identifier: Apache-2.0
"""A clock that the fault suite moves while a job runs.

`tests.faults.random_faults` makes a `Clock` and moves it. Every Python process of the job follows it from its start:
`Clock.install` writes a ``sitecustomize`` module, which calls `follow`.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

__all__ = ["Clock", "follow"]

_OFFSET = struct.Struct("<d")


class Clock:
    """How far the clock of a job's processes is off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(_OFFSET.pack(0.0))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def install(self, folder: Path) -> None:
        """Let every Python process follow the clock that has this folder in its ``PYTHONPATH``."""
        lines = f"from tests.faults.clock import follow\n\nfollow({str(self._path)!r})\n"
        (folder / "sitecustomize.py").write_text(lines)

    def set(self, offset_s: float) -> None:
        """Move the clock. The offset counts from the true time."""
        _OFFSET.pack_into(self._map, 0, offset_s)


def follow(path: str) -> None:
    """Replace `time.time` in this process by the moved clock."""
    with open(path, "rb") as file:
        offset = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    true = time.time
    time.time = lambda: true() + float(_OFFSET.unpack_from(offset)[0])
