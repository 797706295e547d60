# SPDX-License-Identifier: Apache-2.0
"""Names the files of a spool, and reads and writes ``spool.json``, which makes a folder a spool. Both ends use it.

::

    spool.json                    site, job, limit and readers; written by the sender before trainers start
    round                         the current federated round (int64, -1 for none); mapped by every writer
    <stream>-<segment>.spool      an 8-byte header, then frames (trackhub.framing); a new segment every few MiB
    <stream>.ledger               the writer's counts; mapped, and locked while its writer lives (see writer_ledger)
    <n>.spare                     a reserved block of the disk, which becomes a ledger or cursor when the disk is full
    <stream>-<seq>.blob           the bytes of an image or artifact
    <stream>-<size>-<random>.part a blob that is being written, with the size that it is going to have
    <stream>.<cursor>.ack         how far one reader got in a stream; written by the reader (trackhub.spool.acks)
    <cursor>.turn                 the stream whose records this reader handed out last
    <cursor>.retired              the counts of the streams whose files this reader does not need any more
    <name>.logger                 another logger that a process of the site has used (trackhub.flare.trainer)
    usage                         how much of the spool was used when a writer last measured it
    <cursor>.lock                 locked by the process that owns this end of the spool: a sender, or a replay
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import tempfile
import threading
from pathlib import Path
from typing import Any

import msgspec

from trackhub.errors import SpoolError
from trackhub.framing import FORMAT_VERSION
from trackhub.open_without_links import make_private_folder, read_plain
from trackhub.plain_values_to_structs import prepare
from trackhub.process_lock import ProcessLock
from trackhub.runnable_commands import command_for
from trackhub.spool.round_file import RoundFile
from trackhub.spool.write_on_full_disk import SPARES, make_spare, reason_of, write_start

__all__ = [
    "SEGMENT_HEADER",
    "TEMPORARY_SPOOL",
    "SpoolInfo",
    "blob_file",
    "close_spool",
    "create_expected",
    "create_spool",
    "create_spool_anywhere",
    "expect_spool",
    "expected_spool",
    "has_streams",
    "ledger_file",
    "lock_cursor",
    "read_spool_info",
    "segment_name",
    "set_policy",
    "spool_info",
]

DEFAULT_SPOOL_BYTES = 1 << 30

SEGMENT_HEADER = struct.pack("<4sHH", b"THSP", *FORMAT_VERSION)

TEMPORARY_SPOOL = "trackhub-spool-"
"""How the name of a spool begins that `create_spool_anywhere` made in the temporary folder."""

_NEVER_A_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
_log = logging.getLogger(__name__)


class SpoolInfo(msgspec.Struct, frozen=True):
    """What ``spool.json`` says.

    Attributes:
        site: the site that logs here.
        job: the job that it logs for.
        cursors: the names of the readers. A segment is deleted when the receivers of all readers have acknowledged it.
        max_bytes: the limit of all files together.
        open: False once the job has ended. Then no new writer may start.
        format: version of the frames.
        name, notes, tags: what a person reads about the job, as in `trackhub.job_and_run_info.JobInfo`. A replay
            without the receiver's journal needs them to write to runs of the same names.
        policy: the rules for what may leave the site, as `trackhub.policy.SiteRules.plain` returns them. The spool's
            reader applies it.
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
    policy: dict[str, Any] = {}


prepare(SpoolInfo)

_known: dict[str, SpoolInfo] = {}
"""Folder -> what this process has stored in ``spool.json``, or will store as soon as it can."""

_expected: dict[str, str] = {}
"""Folder whose ``spool.json`` could not be stored yet -> why, one of `writer_ledger.DROP_REASONS`."""


def create_spool(folder: Path, info: SpoolInfo) -> bool:
    """Create the spool folder. After a restart, use the existing one of the same site and job.

    If the disk is full or the folder cannot be written, a warning is logged and the spool is *expected*. Training may
    start, and its writers count what they drop. Writers and the sender create the spool as soon as possible.

    Args:
        folder: where to create it.
        info: the content of its ``spool.json``.

    Returns:
        True if the spool exists now; False if it is expected.

    Raises:
        SpoolError: the folder holds the spool of another site or job, or its path cannot be a folder's path.
    """
    try:
        _create(folder, info)
        return True
    except OSError as e:
        if e.errno in _NEVER_A_FOLDER:
            raise SpoolError(f"cannot create the spool in {folder}: {e}; give another folder") from e
        expect_spool(folder, info, reason_of(e))
        _log.warning(
            "the spool of site %s cannot be created in %s: %s. Training goes on. Until the spool is created, records "
            "are dropped and counted. Free space on this disk, or make the folder writable", info.site, folder, e,
        )  # fmt: skip
        return False


def create_spool_anywhere(folder: Path, info: SpoolInfo) -> Path:
    """Create a spool in this folder or, if that is not possible, in a temporary one. Return where it is.

    If it cannot be created there either, it is expected in ``folder``, as `create_spool` says.

    Args:
        folder: where to create it.
        info: the content of its ``spool.json``.

    Raises:
        SpoolError: the folder holds the spool of another site or job, and there is no temporary folder.
    """
    problem: SpoolError | None = None
    try:
        if create_spool(folder, info):
            return folder
    except SpoolError as e:
        problem = e
    with contextlib.suppress(OSError):
        elsewhere = Path(tempfile.mkdtemp(prefix=TEMPORARY_SPOOL))
        if create_spool(elsewhere, info):
            _log.error(
                "the spool of site %s is in %s instead. After the job, `%s` delivers what is left. %s",
                info.site, elsewhere, command_for("trackhub replay", elsewhere), problem or "",
            )  # fmt: skip
            return elsewhere
        _expected.pop(_key(elsewhere), None)
        elsewhere.rmdir()
    if problem is not None:
        raise problem
    return folder


def _create(folder: Path, info: SpoolInfo) -> None:
    make_private_folder(folder)
    old = _stored(folder)
    if old is not None and (old.site, old.job) != (info.site, info.job):
        raise SpoolError(
            f"{folder} holds the spool of site {old.site!r}, job {old.job!r}, not of site {info.site!r}, "
            f"job {info.job!r}; give each its own folder"
        )
    if old != info:  # otherwise write nothing: the disk may be full by now
        _store(folder, info)
    _known[_key(folder)] = info
    _expected.pop(_key(folder), None)
    RoundFile(folder, sets=True).close()
    with contextlib.suppress(OSError):  # the disk is full; the spool also works without spares
        for number in range(SPARES):
            make_spare(folder, number)


def _stored(folder: Path) -> SpoolInfo | None:
    try:
        return read_spool_info(folder)
    except SpoolError as e:
        if isinstance(e.__cause__, FileNotFoundError):
            return None
        if isinstance(e.__cause__, OSError):
            raise e.__cause__ from None
        raise


def _store(folder: Path, info: SpoolInfo) -> None:
    # Two senders of a site may write at the same time, so each writes to its own file.
    partial = folder / f"spool.json.{os.getpid()}.{threading.get_ident()}"
    try:
        os.close(write_start(partial, msgspec.json.encode(info), 0o644))  # trainers of other users read it
        partial.replace(folder / "spool.json")
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def expect_spool(folder: Path, info: SpoolInfo, reason: str) -> None:
    """Remember a spool that cannot be created yet, for the writers and senders of this process.

    Args:
        folder: the spool's folder.
        info: the content of its ``spool.json``.
        reason: why it cannot be created, one of ``DROP_REASONS``. Until it is created, records are dropped for this
            reason.
    """
    _known[_key(folder)] = info
    _expected[_key(folder)] = reason


def expected_spool(folder: Path) -> tuple[SpoolInfo, str] | None:
    """Return the info of the spool that is expected here, and why it could not be created. None if none is expected."""
    reason = _expected.get(_key(folder))
    return None if reason is None else (_known[_key(folder)], reason)


def create_expected(folder: Path) -> None:
    """Create the spool that is expected in this folder, if that is possible now. Never raises."""
    if (expected := expected_spool(folder)) is not None:
        try:
            _create(folder, expected[0])
            _log.info("the spool in %s is there now", folder)
        except (OSError, SpoolError) as e:
            _log.debug("the spool in %s cannot be created yet: %s", folder, e)


def spool_info(folder: Path) -> SpoolInfo:
    """Return the info of the spool in this folder, or of the spool that this process expects there.

    Raises:
        SpoolError: there is no spool in this folder, and none is expected.
    """
    if (expected := expected_spool(folder)) is not None:
        return expected[0]
    try:
        return read_spool_info(folder)
    except SpoolError as e:
        known = _known.get(_key(folder))
        # The file may be unreadable for a moment, for example if this process has no free descriptor. Writers then
        # count what they drop, and store records again later.
        if known is not None and isinstance(e.__cause__, OSError) and e.__cause__.errno != errno.ENOENT:
            return known
        raise


def read_spool_info(folder: Path) -> SpoolInfo:
    """Return what ``spool.json`` in this folder says.

    Raises:
        SpoolError: there is no such file, or it cannot be read.
    """
    try:
        return msgspec.json.decode(read_plain(folder / "spool.json"), type=SpoolInfo)
    except (OSError, ValueError, msgspec.DecodeError) as e:
        raise SpoolError(
            f"{folder} is not a spool, or its spool.json cannot be read: {e}; give the folder that has this file, and "
            "make the file readable"
        ) from e


def close_spool(folder: Path) -> None:
    """Mark the spool's job as ended, so that no new writer starts because of a leftover environment variable.

    Raises:
        SpoolError: the folder is not a spool, or cannot be written.
    """
    _known.pop(_key(folder), None)
    _expected.pop(_key(folder), None)
    info = read_spool_info(folder)
    if info.open:
        try:
            _store(folder, msgspec.structs.replace(info, open=False))
        except OSError as e:
            raise SpoolError(
                f"cannot mark the spool in {folder} as closed: {e}; start no more writers, and make the folder writable"
            ) from e


def set_policy(folder: Path, policy: dict[str, Any]) -> None:
    """Replace the spool's rules for what may leave the site.

    Args:
        folder: the spool's folder.
        policy: as in `SpoolInfo`.

    Raises:
        SpoolError: the folder is not a spool.
        OSError: it cannot be written.
    """
    _store(folder, msgspec.structs.replace(read_spool_info(folder), policy=policy))


def lock_cursor(folder: Path, cursor: str) -> ProcessLock:
    """Lock one reader's end of a spool for this process. A killed process leaves no lock.

    The sender of a running job or a replay holds this lock. Without it, two senders would send the same records.

    Args:
        folder: the spool's folder.
        cursor: the reader's name.

    Raises:
        BlockingIOError: another sender or a replay has it.
        OSError: the file ``<cursor>.lock`` cannot be opened.
    """
    return ProcessLock.open(folder / f"{cursor}.lock")


def has_streams(folder: Path) -> bool:
    """Return whether any process has logged to this spool. False if the folder cannot be read."""
    try:
        return any(name.endswith((".ledger", ".retired")) for name in os.listdir(folder))
    except OSError:
        return False


def segment_name(stream: str, segment: int) -> str:
    """Return the file name of a stream's segment, counted from 0."""
    return f"{stream}-{segment:06d}.spool"


def ledger_file(folder: Path, stream: str) -> Path:
    """Return the file that holds what a stream's writer counted."""
    return folder / f"{stream}.ledger"


def blob_file(folder: Path, name: str) -> Path:
    """Return the file that holds a blob's bytes until they are acknowledged."""
    return folder / f"{name}.blob"


def _key(folder: Path) -> str:
    return os.path.abspath(folder)
