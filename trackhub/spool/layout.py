# SPDX-License-Identifier: Apache-2.0
"""The files of a spool folder, and how each is read and written. Both ends of the spool use it.

::

    spool.json                  site, job, limit and readers; written by the sender before trainers start
    round                       the current federated round (int64, -1 for none); mapped by every writer
    <stream>-<segment>.spool    an 8-byte header, then frames (trackhub.framing); a new segment every few MiB
    <stream>.ledger             the writer's counts: log calls, and drops by reason; mapped
    <n>.spare                   a reserved block of the disk, which becomes a ledger or cursor when the disk is full
    <stream>-<seq>.blob         the bytes of an image or artifact
    <random>.part               a blob that is being written
    <stream>.<cursor>.ack       how far one reader got in a stream; written by the reader
    <cursor>.turn               the stream whose records this reader handed out last
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import zlib
from pathlib import Path

import msgspec

from trackhub.errors import SpoolError
from trackhub.framing import FORMAT_VERSION

__all__ = [
    "DROP_REASONS",
    "SEGMENT_HEADER",
    "Ack",
    "Ledger",
    "RoundFile",
    "SpoolInfo",
    "blob_file",
    "close_spool",
    "create_spool",
    "has_streams",
    "ledger_file",
    "read_ack",
    "read_spool_info",
    "segment_name",
    "write_ack",
]

DEFAULT_SPOOL_BYTES = 1 << 30
_SPARES = 16  # a ledger and a cursor for each of eight ranks on one machine

SEGMENT_HEADER = struct.pack("<4sHH", b"THSP", *FORMAT_VERSION)
DROP_REASONS = ("spool_full", "disk_full", "io_error", "unconvertible")
"""Why a writer drops a record: the spool's limit is reached, the device has no space left, the file system failed
otherwise, or what another library logged cannot be converted into a record."""


class SpoolInfo(msgspec.Struct, frozen=True):
    """What ``spool.json`` says.

    Attributes:
        site: the site that logs here.
        job: the job that it logs for.
        cursors: the names of the readers. A segment is deleted when all of them have had it acknowledged.
        max_bytes: limit of all files together.
        open: False once the job has ended; no new writer may start then.
        format: version of the frames.
        name, notes, tags: what a person reads of the job, as in `trackhub.run.JobInfo`. A replay of this spool needs
            them where the receiver's journal is not at hand, or it would write to runs of another name.
    """

    site: str
    job: str
    cursors: tuple[str, ...]
    max_bytes: int = DEFAULT_SPOOL_BYTES
    open: bool = True
    format: tuple[int, int] = FORMAT_VERSION
    name: str = ""
    notes: str = ""
    tags: tuple[str, ...] = ()


def create_spool(folder: Path, info: SpoolInfo) -> None:
    """Create the spool folder. After a restart, use the existing one of the same site and job.

    Args:
        folder: where to create it.
        info: what its ``spool.json`` is to say.

    Raises:
        SpoolError: the folder cannot be written, or belongs to another site or job.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "spool.json").exists():
            old = read_spool_info(folder)
            if (old.site, old.job) != (info.site, info.job):
                raise SpoolError(
                    f"{folder} holds the spool of site {old.site!r}, job {old.job!r}, not of site {info.site!r}, "
                    f"job {info.job!r}; give each its own folder"
                )
            if old == info:
                return  # write nothing: the disk may be full by now
        partial = folder / f"spool.json.{threading.get_ident()}"  # a site's two senders may write at the same time
        partial.write_bytes(msgspec.json.encode(info))
        partial.replace(folder / "spool.json")
    except OSError as e:
        raise SpoolError(f"cannot create the spool in {folder}: {e}; check its permissions and free space") from e
    with contextlib.suppress(OSError):  # the disk is full already; without spares, nothing is lost either
        for i in range(_SPARES):
            (folder / f"{i}.spare").write_bytes(bytes(1))


def read_spool_info(folder: Path) -> SpoolInfo:
    """Return what ``spool.json`` in this folder says.

    Raises:
        SpoolError: there is no such file, or it cannot be read.
    """
    try:
        return msgspec.json.decode((folder / "spool.json").read_bytes(), type=SpoolInfo)
    except (OSError, ValueError, msgspec.DecodeError) as e:
        raise SpoolError(f"{folder} is not a spool: {e}") from e


def close_spool(folder: Path) -> None:
    """Mark the spool's job as ended, so that no new writer starts because of a leftover environment variable.

    Raises:
        SpoolError: the folder is not a spool, or cannot be written.
    """
    info = read_spool_info(folder)
    create_spool(folder, msgspec.structs.replace(info, open=False))


def has_streams(folder: Path) -> bool:
    """Return whether any process has logged to this spool."""
    return any(folder.glob("*.ledger"))


def segment_name(stream: str, segment: int) -> str:
    """Return the file name of a stream's segment, counted from 0."""
    return f"{stream}-{segment:06d}.spool"


def ledger_file(folder: Path, stream: str) -> Path:
    """Return the file that holds what a stream's writer counted."""
    return folder / f"{stream}.ledger"


def blob_file(folder: Path, name: str) -> Path:
    """Return the file that holds a blob's bytes until they are acknowledged."""
    return folder / f"{name}.blob"


class RoundFile:
    """The current federated round. The sender sets it, and all writers of the site read it.

    It is safe between processes, since it is one aligned 8-byte value.
    """

    _FORMAT = struct.Struct("=q")

    def __init__(self, folder: Path) -> None:
        """Map the file, and create it if need be.

        Raises:
            OSError: it cannot be opened or created.
        """
        path = folder / "round"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(fd).st_size != self._FORMAT.size:
                os.pwrite(fd, self._FORMAT.pack(-1), 0)
            # Every log call reads the round. A view of the mapped integer takes a third of the time of unpacking bytes.
            self._value = memoryview(mmap.mmap(fd, self._FORMAT.size)).cast("q")
        finally:
            os.close(fd)

    def get(self) -> int | None:
        """Return the current round; None outside rounds."""
        value: int = self._value[0]
        return value if value >= 0 else None

    def set(self, value: int | None) -> None:
        """Set the round that writers put into their records from now on. None ends the round."""
        self._value[0] = -1 if value is None else value

    def close(self) -> None:
        """Unmap the file."""
        self._value.release()


class Ledger:
    """A stream's counts in a mapped file: log calls that returned, and drops by reason.

    Counting goes on while the disk is full, since the file is mapped and has its block.
    """

    _FORMAT = struct.Struct(f"={1 + len(DROP_REASONS)}Q")
    EMPTY = bytes(_FORMAT.size)

    def __init__(self, path: Path, *, create: bool) -> None:
        """Map the file.

        Args:
            path: the file.
            create: create it with zeros.

        Raises:
            OSError: it cannot be opened or created.
        """
        # The zeros are written, since a file that is only given a size gets its block later, when the disk may be full.
        fd = _write_start(path, self.EMPTY) if create else os.open(path, os.O_RDWR)
        try:
            self._counts = memoryview(mmap.mmap(fd, self._FORMAT.size)).cast("Q")
        finally:
            os.close(fd)

    @classmethod
    def read(cls, path: Path) -> tuple[int, dict[str, int]]:
        """Return how many calls a ledger file counts, and its drops by reason. A missing or short file counts zero."""
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        logged, *dropped = cls._FORMAT.unpack(data[: cls._FORMAT.size].ljust(cls._FORMAT.size, b"\0"))
        return logged, {reason: n for reason, n in zip(DROP_REASONS, dropped, strict=True) if n}

    def set(self, logged: int, dropped: list[int]) -> None:
        """Store how many calls there were, and the drops in the order of ``DROP_REASONS``."""
        self._FORMAT.pack_into(self._counts, 0, logged, *dropped)

    def set_logged(self, logged: int) -> None:
        """Store how many calls there were. The drops stay as they are."""
        self._counts[0] = logged

    def close(self) -> None:
        """Unmap the file."""
        self._counts.release()


class Ack(msgspec.Struct, array_like=True):
    """How far one reader got in one stream.

    Attributes:
        segment: the segment of the next unacknowledged frame.
        offset: where that frame starts in the segment.
        next_seq: the ``seq`` of the next record to be acknowledged.
        acked: records that the receiver acknowledged.
        refused: records that the receiver refused, by reason.
        explained: records in gaps and in damaged places, by reason.
    """

    segment: int = 0
    offset: int = len(SEGMENT_HEADER)
    next_seq: int = 0
    acked: int = 0
    refused: dict[str, int] = {}
    explained: dict[str, int] = {}


_ACK_HEADER = struct.Struct("<II")


def _ack_path(folder: Path, stream: str, cursor: str) -> Path:
    return folder / f"{stream}.{cursor}.ack"


def read_ack(folder: Path, stream: str, cursor: str) -> Ack:
    """Return how far this reader got. Return the stream's beginning if the file is missing or damaged.

    To begin anew is safe: the receiver recognises records that it has.

    Args:
        folder: the spool's folder.
        stream: the stream's id.
        cursor: the reader's name.
    """
    try:
        data = _ack_path(folder, stream, cursor).read_bytes()
        size, crc = _ACK_HEADER.unpack_from(data)
        body = data[_ACK_HEADER.size : _ACK_HEADER.size + size]
        if len(body) == size and zlib.crc32(body) == crc:
            return msgspec.msgpack.decode(body, type=Ack)
    except (OSError, struct.error, msgspec.DecodeError):
        pass
    return Ack()


def write_ack(folder: Path, stream: str, cursor: str, ack: Ack) -> None:
    """Store how far this reader got. One ``pwrite`` does it, so that a killed reader leaves the old or the new state.

    Args:
        folder: the spool's folder.
        stream: the stream's id.
        cursor: the reader's name.
        ack: how far it got.

    Raises:
        OSError: the file cannot be written.
    """
    body = msgspec.msgpack.encode(ack)
    os.close(_write_start(_ack_path(folder, stream, cursor), _ACK_HEADER.pack(len(body), zlib.crc32(body)) + body))


def _write_start(path: Path, data: bytes) -> int:
    """Write a few bytes at the start of a file and return its descriptor. On a full disk, a spare becomes the file.

    Counting and deleting what is acknowledged must go on when the disk is full, and each needs a file per stream.

    Raises:
        OSError: the file cannot be written, and there is no spare.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(fd, data, 0)
        return fd
    except OSError:
        os.close(fd)
        for spare in path.parent.glob("*.spare"):
            with contextlib.suppress(FileNotFoundError):  # another process took it
                spare.replace(path)
                return _write_start(path, data)
        raise
