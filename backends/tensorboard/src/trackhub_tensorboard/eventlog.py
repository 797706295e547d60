# SPDX-License-Identifier: Apache-2.0
"""The event files of one run: appended to by one ``write(2)`` per batch, and continued after any kind of end.

Each batch ends in a *mark*, an event that TensorBoard ignores, with the position after the batch's last record. A batch
without its mark was torn (by SIGKILL, or a full disk): whoever opens the run next cuts it off, and it is written again.

A continued run gets another file, so that a TensorBoard that has read a part of what was cut off, and goes on reading
where it stopped, never finds itself in the middle of an event. Files are named by the position at which they begin,
which is the order in which TensorBoard reads them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from trackhub_tensorboard.frames import FOOTER, HEADER, frame, frames

__all__ = ["EventLog", "NewTag", "first_event"]

_PATTERN = "events.out.tfevents.*.trackhub"
_PREFIX = "trackhub/1 "
_MARK_FIELD_AT = 9
_MARK_FIELD = 0x3A  # what protobuf writes before an Event's session_log, after the 9 bytes of its wall_time


class NewTag(msgspec.Struct, frozen=True, array_like=True):
    """The first use of a tag.

    Attributes:
        kind: of the records that use it.
        key: what they call it.
        tag: what TensorBoard calls it.
    """

    kind: str
    key: str
    tag: str


class _Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a mark says: the position after the batch's last record, and which tags it was the first to use."""

    next_position: int
    tags: Sequence[NewTag] = ()


class EventLog:
    """A run's event files. All methods raise OSError; no file stays open between calls.

    Attributes:
        next_position: position after that of the last record in the files.
        tags: those in the files when they were opened.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files in this folder, which is made if need be."""
        self._folder = folder
        self._path: Path | None = None
        self._torn = False
        self.next_position = 0
        self.tags: list[NewTag] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._recover()

    def append(self, events: list[bytes], next_position: int, tags: Sequence[NewTag], time: float) -> None:
        """Append frames and their mark: all of it, or nothing when it raises.

        Args:
            events: the frames.
            next_position: position after that of their last record.
            tags: those that these events are the first to use.
            time: of the last record.
        """
        if self._torn:
            self._recover()
        content = b"".join((*events, _mark(_Mark(next_position, tags), time)))
        try:
            if self._path is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                path = self._folder / f"events.out.tfevents.{self.next_position:012d}.trackhub"
                _append(path, first_event(time) + content, os.O_CREAT | os.O_EXCL)
                self._path = path
            else:
                _append(self._path, content)
        except OSError:
            self._path = None  # the next write begins another file: see the module's docstring for why
            self._torn = True
            with contextlib.suppress(OSError):  # then it is tried again before the next write
                self._recover()
            raise
        self.next_position = next_position

    def sync(self) -> None:
        """Return when what was appended survives a power cut, too."""
        if self._path is not None:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def _recover(self) -> None:
        """Cut off what follows the last mark of each file, and learn from the marks where the run stands."""
        self.tags = []
        for path in sorted(self._folder.glob(_PATTERN)):
            end = 0
            for end, mark in _marks(path):  # noqa: B007  # the last one counts
                self.next_position = mark.next_position
                self.tags += mark.tags
            if end == 0:
                path.unlink()
            elif end < path.stat().st_size:
                os.truncate(path, end)
        self._torn = False


def _append(path: Path, content: bytes, flags: int = 0) -> None:
    """Append by one ``write(2)``."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | flags, 0o666)
    try:
        written = os.write(file, content)
    finally:
        os.close(file)
    if written != len(content):
        raise OSError(f"only {written} of {len(content)} bytes could be written to {path}")


def first_event(time: float) -> bytes:
    """Return the frame that a file starts with.

    By its version, TensorBoard keeps late steps: in older ones it takes them for a restart and purges what they pass.
    """
    return frame(Event(wall_time=time, file_version="brain.Event:2").SerializeToString())


def _mark(mark: _Mark, time: float) -> bytes:
    message = _PREFIX + msgspec.json.encode(mark).decode()
    log = SessionLog(status=SessionLog.CHECKPOINT, msg=message)
    return frame(Event(wall_time=time or 1.0, session_log=log).SerializeToString())  # a time of 0 would not be written


def _marks(path: Path) -> Iterator[tuple[int, _Mark]]:
    """Yield each mark in a file with the end of its frame. Quick: other events are passed over undecoded."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for start, end in frames(content):
            if end - start <= _MARK_FIELD_AT or content[start + _MARK_FIELD_AT] != _MARK_FIELD:
                continue
            payload = content[start:end]
            if frame(payload) != content[start - HEADER : end + FOOTER]:
                return
            message = Event.FromString(payload).session_log.msg
            if message.startswith(_PREFIX):
                yield end + FOOTER, msgspec.json.decode(message[len(_PREFIX) :], type=_Mark)
