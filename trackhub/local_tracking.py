# SPDX-License-Identifier: Apache-2.0
"""A writer with a receiver of its own in the same process, so that a training script runs outside FLARE as well.

`trackhub.local` calls `open_local`. It is a transport like any other, the shortest one: a plain call.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trackhub.delivery import (
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
from trackhub.errors import SpoolError
from trackhub.run import path_component
from trackhub.writer.writer import Writer

__all__ = ["LocalWriter", "open_local"]

_CURSOR = "local"


class LocalWriter(Writer):
    """A `trackhub.Writer` that delivers by itself. Close it, or use it as a context manager, to deliver everything.

    Attributes:
        folder: the run's folder. Each backend's files are in the subfolder of its name.
        report: the delivery report; None until ``close``.
    """

    report: DeliveryReport | None

    def __init__(self, folder: Path, spool: Path, receiver: Receiver, sender: Sender, *, close_s: float) -> None:
        """Use `trackhub.local`, which calls this.

        Args:
            folder: the run's folder.
            spool: the spool's folder.
            receiver: the started receiver.
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

    def set_round(self, value: int | None) -> None:
        """Set the round that is put on the records logged from now on; None for no round."""
        self._sender.set_round(value)

    def close(self, *, failed: bool = False) -> None:
        """Deliver what was logged, end the run, and make the report. Blocks up to the limits' deadline. Idempotent.

        In a forked child it ends only what the child logs. The parent delivers that.

        Args:
            failed: end the run as failed.
        """
        super().close()
        if os.getpid() != self._pid:
            return  # the sender and the receiver live in the parent
        withdraw_process_spool(self._spool_dir)
        if self.report is None:
            self._sender.close(self._close_s, failed=failed)
            self.report = self._receiver.finish(RunStatus.FAILED if failed else RunStatus.FINISHED)

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
        DeliveryError: the folder cannot be used.
    """
    if isinstance(backends, str):
        backends = [backends]
    options = backends if isinstance(backends, Mapping) else {name: {} for name in backends}
    limits = limits or Limits.from_mapping({}, environ=os.environ)
    job_info = JobInfo(job or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}", name, notes, tuple(tags))
    run_dir = Path(folder).absolute() / path_component(job_info.unique_name)
    # The receiver comes first: with a wrong configuration no spool is made.
    receiver = Receiver(run_dir, job=job_info, side=Side.LOCAL, backends=options, limits=limits)
    receiver.start()
    spool = receiver.folder / "spool"
    try:
        create_spool(spool, SpoolInfo(site, job_info.id, (_CURSOR,), limits.spool_bytes))
        sender = Sender(spool, receiver.channel(site), cursor=_CURSOR, limits=limits)
    except SpoolError:
        receiver.finish(RunStatus.FAILED, deadline_s=0.0)
        raise
    sender.start()
    set_process_spool(spool)
    return LocalWriter(run_dir, spool, receiver, sender, close_s=limits.deadline_s)
