# SPDX-License-Identifier: Apache-2.0
"""The event files of one run: one ``write(2)`` per batch, and a clean continuation after a crash.

`backend` appends batches here. Each batch ends in a *mark*: an event that TensorBoard ignores, with the position after
the batch's last record. SIGKILL or a full disk can leave a batch without its mark. The next process that opens the run
cuts such a batch off, and the lane writes it again.

A run that is continued writes to a new file. A running TensorBoard remembers its place in the old file. If that file
were cut and then grew, TensorBoard would continue in the middle of an event. The position at which a file begins is in
its name, so TensorBoard reads the files in the right order.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from trackhub.spi import make_folder, open_file
from trackhub_tensorboard.tfrecord import FOOTER, HEADER, frame, frames

__all__ = ["EventFiles", "NewTag", "first_event"]

_PATTERN = "events.out.tfevents.*.trackhub"
_PREFIX = "trackhub/1 "
_PROBE = "probe.trackhub"
_PROBE_BYTES = 1 << 16
_MARK_FIELD_AT = 9
_MARK_FIELD = 0x3A  # the byte that protobuf writes before an Event's session_log, after the 9 bytes of its wall_time


class NewTag(msgspec.Struct, frozen=True, array_like=True):
    """The first use of a TensorBoard tag.

    Attributes:
        kind: the kind of the records that use it.
        key: the key of these records.
        tag: the name that TensorBoard shows.
    """

    kind: str
    key: str
    tag: str


class _Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a mark says: the position after the batch's last record, and the tags that the batch is the first to use."""

    next_position: int
    tags: Sequence[NewTag] = ()


# Made at import: two threads that decode a Struct for the first time at once crash the process (msgspec 0.22).
_decode_mark = msgspec.json.Decoder(_Mark).decode


class EventFiles:
    """A run's event files. Its methods raise OSError. No file stays open between calls.

    Attributes:
        next_position: the position after the last record in the files.
        tags: the tags that were in the files when this object opened them.
    """

    def __init__(self, folder: Path) -> None:
        """Make the folder if it is missing. Read from the files how far the run got.

        Raises:
            OSError: the file system refuses.
        """
        self._folder = folder
        self._path: Path | None = None
        self._torn = False
        self.next_position = 0
        self.tags: list[NewTag] = []
        make_folder(folder)
        (folder / _PROBE).unlink(missing_ok=True)  # of a process that was killed
        self._recover()

    def append(self, events: list[bytes], next_position: int, tags: Sequence[NewTag], time: float) -> None:
        """Append frames and their mark. If this raises, none of them is stored.

        Args:
            events: the frames of the events.
            next_position: the position after their last record.
            tags: the tags that these events are the first to use.
            time: unix seconds of the last record.

        Raises:
            OSError: the file system refuses.
        """
        if self._torn:
            self._recover()
        content = b"".join((*events, _mark(_Mark(next_position, tags), time)))
        try:
            if self._path is None:
                make_folder(self._folder)
                path = self._folder / f"events.out.tfevents.{self.next_position:012d}.trackhub"
                _append(path, first_event(time) + content, os.O_CREAT | os.O_EXCL)
                self._path = path
            else:
                _append(self._path, content)
        except OSError:
            self._path = None  # the next write begins a new file (see the module's docstring)
            self._torn = True
            with contextlib.suppress(OSError):  # the next write tries again
                self._recover()
            raise
        self.next_position = next_position

    def probe(self) -> None:
        """Write another file beside the event files, and delete it. TensorBoard does not look at a file of this name.

        Raises:
            OSError: the file system refuses.
        """
        make_folder(self._folder)
        path = self._folder / _PROBE
        try:
            _append(path, bytes(_PROBE_BYTES), os.O_CREAT | os.O_TRUNC)
        finally:
            path.unlink(missing_ok=True)

    def sync(self) -> None:
        """Block until the appended events survive a power cut.

        Raises:
            OSError: the file system refuses.
        """
        if self._path is not None:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def _recover(self) -> None:
        """Cut off what follows the last mark of each file. Read from the marks which records the files have."""
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
    """Append by one ``write(2)``, and refuse a symbolic link, which somebody else may have put into a shared folder."""
    file = open_file(path, os.O_WRONLY | os.O_APPEND | flags)
    try:
        written = os.write(file, content)
    finally:
        os.close(file)
    if written != len(content):
        only = f"only {written} of {len(content)} bytes could be written to {path}; free space on its disk"
        raise OSError(errno.ENOSPC, only)


def first_event(time: float) -> bytes:
    """Return the frame that a file starts with.

    Its version makes TensorBoard keep late steps. With an older version, TensorBoard takes a late step for a restart
    and purges the later steps before it.

    Args:
        time: unix seconds of the file's first record.
    """
    return frame(Event(wall_time=time, file_version="brain.Event:2").SerializeToString())


def _mark(mark: _Mark, time: float) -> bytes:
    message = _PREFIX + msgspec.json.encode(mark).decode()
    log = SessionLog(status=SessionLog.CHECKPOINT, msg=message)
    return frame(Event(wall_time=time or 1.0, session_log=log).SerializeToString())  # protobuf leaves out a time of 0


def _marks(path: Path) -> Iterator[tuple[int, _Mark]]:
    """Yield each mark in a file with the end of its frame. It is quick, since it decodes no other event."""
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
                yield end + FOOTER, _decode_mark(message[len(_PREFIX) :])
