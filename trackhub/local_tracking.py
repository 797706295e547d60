# SPDX-License-Identifier: Apache-2.0
"""A writer with a receiver of its own in the same process, so that a training script runs outside FLARE as well.

`trackhub.local` calls `open_local`. It is a transport like any other, the shortest one: a plain call.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trackhub.delivery import (
    ChannelError,
    DeliveryReport,
    JobInfo,
    Limits,
    Receiver,
    RunStatus,
    Sender,
    Side,
    SpoolInfo,
    create_spool,
    set_process_spool,
    withdraw_process_spool,
)
from trackhub.errors import ConfigError, JournalError, PluginError, TrackhubError
from trackhub.run import path_component
from trackhub.writer.writer import Writer, plain_writer

__all__ = ["LocalWriter", "open_local"]

_CURSOR = "local"
_TRY_EVERY_S = 2.0
_log = logging.getLogger(__name__)


class _LateReceiver:
    """A run's receiver. If the disk has no room for its journal, it starts as soon as there is some.

    The script's thread calls ``start`` and ``finish``, the sender's thread ``channel``, but not at the same time.
    """

    def __init__(self, make: Callable[[], Receiver], site: str) -> None:
        """Start nothing yet.

        Args:
            make: makes a receiver that was not started.
            site: the site that sends to it.
        """
        self._make = make
        self._site = site
        self._receiver: Receiver | None = None
        self._try_at = 0.0

    def start(self) -> None:
        """Start the receiver, unless the disk is full.

        Raises:
            ConfigError, PluginError, JournalError: as ``Receiver.start``.
        """
        receiver = self._make()
        try:
            receiver.start()
        except BaseException as e:
            with contextlib.suppress(Exception):  # the first error says more
                if not isinstance(e, ConfigError | PluginError):  # after which it has closed what it had opened
                    receiver.finish(RunStatus.FAILED, deadline_s=0.0)
            if not (isinstance(e, JournalError) and _is_disk_full(e)):
                raise
            if self._try_at == 0.0:
                _log.warning("%s. Training goes on. What it logs is delivered once there is room", e)
            self._try_at = time.monotonic() + _TRY_EVERY_S
        else:
            self._receiver = receiver

    def channel(self, request: bytes, timeout_s: float) -> bytes:
        """Answer a request of the run's sender.

        Raises:
            ChannelError: the receiver cannot start yet.
        """
        if self._receiver is None and time.monotonic() >= self._try_at:
            try:
                self.start()
            except TrackhubError as e:
                self._try_at = math.inf  # a wrong configuration, which could not be seen earlier
                _log.error("%s. Nothing of this run is delivered; it stays in its folder", e)
                raise ChannelError(str(e)) from e
        if self._receiver is None:
            raise ChannelError("the disk has no room for the journal")
        return self._receiver.handle(self._site, request)

    def finish(self, status: RunStatus, *, deadline_s: float | None = None) -> DeliveryReport:
        """End the run, as ``Receiver.finish`` does.

        Args:
            status: how the run ended.
            deadline_s: the longest time for all backends together, in seconds; by default ``limits.deadline_s``.

        Raises:
            JournalError: the journal cannot be read, or there never was room for it.
        """
        if self._receiver is None:
            raise JournalError("the disk had no room for the journal")
        return self._receiver.finish(status, deadline_s=deadline_s)


def _is_disk_full(error: BaseException | None) -> bool:
    """Return whether a full disk is at the bottom of this error."""
    while error is not None:
        # SQLite reports a full disk also as an error of its shared memory or of its log.
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL" or name.startswith("SQLITE_IOERR"):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


class LocalWriter(Writer):
    """A `trackhub.Writer` that delivers by itself. Close it, or use it as a context manager, to deliver everything.

    Attributes:
        folder: the run's folder. Each backend's files are in the subfolder of its name.
        report: the delivery report; None until ``close``, and after it if the journal cannot be read.
    """

    report: DeliveryReport | None

    def __init__(self, folder: Path, spool: Path, receiver: _LateReceiver, sender: Sender, *, close_s: float) -> None:
        """Use `trackhub.local`, which calls this.

        Args:
            folder: the run's folder.
            spool: the spool's folder.
            receiver: the receiver, which was started.
            sender: the started sender, which sends the spool to the receiver.
            close_s: the longest time in seconds that ``close`` tries to bring the spool to the receiver.
        """
        super().__init__(spool)
        self.folder = folder
        self.report = None
        self._spool_dir = spool
        self._receiver = receiver
        self._sender = sender
        self._close_s = close_s
        self._pid = os.getpid()
        self._has_ended = False

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy logs into the same run, as a forked child does. It can end neither the run nor what it does not have.
        return plain_writer, (self._spool,)

    def set_round(self, value: int | None) -> None:
        """Set the round that is put on the records logged from now on; None for no round."""
        self._sender.set_round(value)

    def close(self, *, failed: bool = False) -> None:
        """Deliver what was logged, end the run, and make the report. Blocks up to the limits' deadline. Idempotent.

        Never raises. If the journal is damaged, or its disk is full, the log says so and there is no report.

        In a forked child it ends only what the child logs. The parent delivers that.

        Args:
            failed: end the run as failed.
        """
        super().close()
        if os.getpid() != self._pid or self._has_ended:
            return  # in a forked child, the sender and the receiver live in the parent
        self._has_ended = True
        withdraw_process_spool(self._spool_dir)
        self._sender.close(self._close_s, failed=failed)
        try:
            self.report = self._receiver.finish(RunStatus.FAILED if failed else RunStatus.FINISHED)
        except Exception as e:  # noqa: BLE001  # a damaged journal or a full disk; training has ended well
            _log.warning(
                "tracking could not end in order: %s: %s. What was logged is in %s; deliver it with `trackhub replay "
                "%s`",
                type(e).__name__, e, self.folder, self.folder,
            )  # fmt: skip

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=exc_type is not None)


def open_local(
    backends: Mapping[str, Mapping[str, Any]] | Iterable[str],
    *,
    folder: str | Path = "runs",
    job: str | None = None,
    name: str = "",
    notes: str = "",
    tags: Iterable[str] = (),
    site: str = "local",
    limits: Limits | None = None,
) -> LocalWriter:
    """Start a receiver in this process, and return a writer that delivers to it.

    Args:
        backends, folder, job, name, notes, tags, site: as for `trackhub.local`.
        limits: how much, how often and how long; by default as the environment says (``TRACKHUB_DEADLINE_S``, ...).

    Raises:
        ConfigError: a backend, an option or a limit is wrong, or a backend cannot be used as configured.
        PluginError: the plugin of a backend cannot be used.
        DeliveryError: the folder cannot be used. A full disk is no error: tracking begins once there is room.
    """
    if isinstance(backends, str):
        backends = [backends]
    options = backends if isinstance(backends, Mapping) else {name: {} for name in backends}
    limits = limits or Limits.from_mapping({}, environ=os.environ)
    job_info = JobInfo(job or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}", name, notes, tuple(tags))
    run_dir = Path(folder).absolute() / path_component(job_info.unique_name)
    receiver = _LateReceiver(
        lambda: Receiver(run_dir, job=job_info, side=Side.LOCAL, backends=options, limits=limits), site
    )
    receiver.start()  # first: with a wrong configuration no spool is made
    spool = run_dir / "trackhub" / "spool"
    try:
        create_spool(spool, SpoolInfo(site, job_info.id, (_CURSOR,), limits.spool_bytes))
        sender = Sender(spool, receiver.channel, cursor=_CURSOR, limits=limits)
    except BaseException:
        with contextlib.suppress(JournalError):  # the first error says more
            receiver.finish(RunStatus.FAILED, deadline_s=0.0)
        raise
    sender.start()
    set_process_spool(spool)
    return LocalWriter(run_dir, spool, receiver, sender, close_s=limits.deadline_s)
