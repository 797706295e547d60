# SPDX-License-Identifier: Apache-2.0
"""A writer with a receiver of its own in the same process, so that a training script runs outside FLARE as well."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.sender import Sender
from trackhub.errors import SpoolError
from trackhub.limits import Limits
from trackhub.run import JobInfo, RunStatus, Side
from trackhub.spool.announcement import set_process_spool, withdraw_process_spool
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.writer.writer import Writer

__all__ = ["LocalWriter", "open_local"]

_CURSOR = "local"


class LocalWriter(Writer):
    """A `trackhub.Writer` that delivers by itself. Close it, or use it as a context manager, to have all delivered.

    Attributes:
        folder: the run's folder; each backend's files are in the subfolder of its name.
        report: the delivery report, once closed.
    """

    report: DeliveryReport | None

    def __init__(self, folder: Path, receiver: Receiver, sender: Sender, spool_dir: Path, limits: Limits) -> None:
        """Use ``trackhub.local``."""
        super().__init__(spool_dir)
        self.folder = folder
        self.report = None
        self._spool_dir = spool_dir
        self._receiver = receiver
        self._sender = sender
        self._limits = limits
        self._pid = os.getpid()

    def set_round(self, value: int | None) -> None:
        """Set the round that is stamped on the records logged from now on."""
        self._sender.set_round(value)

    def close(self, *, failed: bool = False) -> None:
        """Deliver what was logged, finish the runs, and make the report. Blocks up to the limits' deadline. Idempotent.

        In a forked child it closes the child's stream only; what the child logged is delivered by its parent.

        Args:
            failed: end the runs as failed.
        """
        super().close()
        if os.getpid() != self._pid:
            return  # a forked child has a stream of its own, and no receiver: its parent delivers
        withdraw_process_spool(self._spool_dir)
        if self.report is None:
            self._sender.close(self._limits.deadline_s, failed=failed)
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
    site: str = "local",
    limits: Limits | None = None,
) -> LocalWriter:
    """Start a receiver in this process and return a writer on it; see ``trackhub.local``."""
    if isinstance(backends, str):
        backends = [backends]
    options = backends if isinstance(backends, Mapping) else {name: {} for name in backends}
    limits = limits or Limits.from_mapping({}, environ=os.environ)
    job = job or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    run_dir = Path(folder).absolute() / job
    state = run_dir / "trackhub"
    receiver = Receiver(state, run_dir, job=JobInfo(job), side=Side.LOCAL, backends=options, limits=limits)
    receiver.start()
    spool_dir = state / "spool"
    try:
        create_spool(spool_dir, SpoolInfo(site, job, (_CURSOR,), limits.spool_bytes))
    except SpoolError:
        receiver.finish(RunStatus.FAILED, deadline_s=0.0)
        raise
    sender = Sender(
        spool_dir, lambda request, _: receiver.handle(site, request), site=site, cursor=_CURSOR, limits=limits
    )
    sender.start()
    set_process_spool(spool_dir)
    return LocalWriter(run_dir, receiver, sender, spool_dir, limits)
