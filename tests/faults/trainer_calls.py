# SPDX-License-Identifier: Apache-2.0
"""What a trainer of the fault suite logs, and the notes that it takes of it.

Call ``i`` of a writer depends on the writer's name and on ``i`` alone. So one number for each writer says everything
that was logged: how many of its calls returned. The trainer notes this number, and the clock before and after each
call, in a mapped file. The file survives SIGKILL, and no part of trackhub touches it.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

from trackhub import Writer

__all__ = ["Notes", "Seen", "call", "content", "expected", "files_last"]

_COUNT = struct.Struct("<q")
_TIMES = struct.Struct("<dd")


class Seen(NamedTuple):
    """One record, as logged or as read back. ``value`` is a number, a text, or the digest of a file's bytes."""

    key: str
    step: int | None
    value: float | str


class Notes:
    """How many calls of one writer returned, and when it made each."""

    def __init__(self, path: Path, capacity: int = 0) -> None:
        """Create the file for ``capacity`` calls, or open an existing one if that is 0."""
        if capacity:
            path.write_bytes(bytes(_COUNT.size + capacity * _TIMES.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def add(self, i: int, before: float, after: float) -> None:
        """Note that call ``i`` returned."""
        _TIMES.pack_into(self._map, _COUNT.size + i * _TIMES.size, before, after)
        _COUNT.pack_into(self._map, 0, i + 1)

    def count(self) -> int:
        """Return how many calls returned."""
        return int(_COUNT.unpack_from(self._map)[0])

    def times(self, i: int) -> tuple[float, float]:
        """Return the clock's readings before and after call ``i``."""
        before, after = _TIMES.unpack_from(self._map, _COUNT.size + i * _TIMES.size)
        return before, after


def content(name: str, i: int) -> bytes:
    """Return the bytes of the file that call ``i`` logs. They take more than one message."""
    return hashlib.sha256(f"{name} {i}".encode()).digest() * 1000


def expected(name: str, i: int, *, files: bool) -> Seen:
    """Return the record that call ``i`` of this writer logs."""
    if files and i % 100 == 60:
        return Seen(f"{name}/file-{i}", None, hashlib.sha256(content(name, i)).hexdigest())
    if i % 25 == 10:
        return Seen(f"{name}/note", i, f"note {i} of {name}")
    return Seen(f"{name}/loss", i, i + 0.25)


def files_last(records: list[Seen]) -> list[Seen]:
    """Return a writer's records, those without files before the files. Each of the two parts keeps its order."""
    return sorted(records, key=lambda seen: "/file-" in seen.key)


def call(writer: Writer, name: str, i: int, folder: Path, *, files: bool) -> None:
    """Make call ``i`` of a writer.

    Args:
        writer: what to log to.
        name: the writer's name.
        i: the call's number.
        folder: where the file of an artifact is made; it is removed after the call.
        files: whether some of the calls log artifacts.
    """
    record = expected(name, i, files=files)
    if isinstance(record.value, float):
        writer.log({record.key: record.value}, record.step)
    elif record.step is not None:
        writer.log_text(record.key, record.value, record.step)
    else:
        source = folder / f"{name}-{i}.bin"
        source.write_bytes(content(name, i))
        writer.log_artifact(source, record.key)
        source.unlink()
