# SPDX-License-Identifier: Apache-2.0
"""The backend and its runs."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from trackhub.spi import (
    ANY_KEY,
    Backend,
    BackendContext,
    BackendRun,
    Capabilities,
    ConfigError,
    ConfirmedBy,
    Entry,
    Image,
    Kind,
    OptionMark,
    Params,
    Redelivery,
    Rejection,
    Results,
    RunInfo,
    RunStatus,
    TransientError,
    WriteReport,
)

__all__ = ["TensorBoardBackend", "TensorBoardOptions"]

_WRITE_BYTES = 8 << 20
"""A batch with large images is appended in pieces of about this size, so that memory stays bounded."""


class TensorBoardOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of ``tensorboard``.

    Attributes:
        logdir: folder for the event files of all jobs, absolute or relative to the job's run folder; by default
            ``tensorboard`` in the run folder. Outside the run folder, where the server may write as well, what a
            client writes goes to ``<logdir>/<job>@client/<site>/``.
    """

    logdir: Annotated[str | None, OptionMark.PATH] = None


class TensorBoardBackend(Backend[TensorBoardOptions]):
    """Writes each run to a folder of event files, ``<logdir>/<job>/<site>/``.

    Metric values are kept as float32, as TensorBoard does: rounded to nearest, infinite beyond 3.4e38.
    """

    spi = 1
    contract = 1
    capabilities = Capabilities(
        kinds=frozenset({Kind.METRICS, Kind.PARAMS, Kind.TAGS, Kind.TEXT, Kind.IMAGE, Kind.HISTOGRAM, Kind.TABLE}),
        redelivery=Redelivery.RESUMABLE,
        nonfinite=True,
        late_steps=True,
        optional_step=False,
        changing_params=True,
        confirmed_by=ConfirmedBy.WRITE,
        key_rule=ANY_KEY,
    )

    def __init__(self, options: TensorBoardOptions, context: BackendContext) -> None:
        """Work out the folder; nothing is created yet."""
        super().__init__(options, context)
        self._logdir = context.folder(options.logdir)

    def preflight(self) -> None:
        """Make the log folder.

        Raises:
            ConfigError: that is impossible, or nothing can be written there.
        """
        try:
            self._logdir.mkdir(parents=True, exist_ok=True)
            if not os.access(self._logdir, os.W_OK):
                raise PermissionError("no permission to write there")
        except OSError as error:
            raise ConfigError(
                f"tensorboard cannot use the log folder {self._logdir}: {error}; give another `logdir`"
            ) from error

    def open_run(self, info: RunInfo) -> TensorBoardRun:
        """Open the run's folder, and cut off what a crash left unfinished.

        Raises:
            TransientError: the file system refuses.
        """
        folder = self._folder(info)
        try:
            return TensorBoardRun(folder, info)
        except OSError as error:
            raise TransientError(f"cannot open {folder}: {error}; give write access and free space") from error

    def results(self, info: RunInfo) -> Results:
        """Return the run's folder, and the command that shows it beside the others."""
        shown = self.context.shown
        return Results(
            path=shown(self._folder(info)), command=f"tensorboard --logdir {shlex.quote(shown(self._logdir))}"
        )

    def _folder(self, info: RunInfo) -> Path:
        return self.context.run_path(self._logdir, info)


class TensorBoardRun(BackendRun):
    """A folder of event files. When ``write`` returns, the records are in the operating system's hands."""

    def __init__(self, folder: Path, info: RunInfo) -> None:
        """Open the folder. Raises OSError."""
        self._folder = folder
        self._info = info
        # Here and not above, so that listing the installed backends does not import tensorboard.
        from trackhub_tensorboard.eventlog import EventLog
        from trackhub_tensorboard.events import Encoder
        from trackhub_tensorboard.hparams import Session

        self._log = EventLog(folder)
        self._session = Session(folder, info.created)
        self._encoder = Encoder(info, self._log.tags)

    def next_position(self) -> int:
        """Return the position after that of the last record of the last whole batch."""
        return self._log.next_position

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        """Append the entries' events, by one system call unless they are large.

        Raises:
            TransientError: the file system refuses; what was left of the attempt has been taken back.
        """
        try:
            rejected = self._append(batch)
        except OSError as error:
            raise TransientError(f"cannot write to {self._folder}: {error}") from error
        return WriteReport(rejected) if rejected else None

    def finish(self, status: RunStatus) -> None:
        """Mark how the run ended, where it has params, and see that all is on the disk.

        Raises:
            TransientError: the file system refuses.
        """
        try:
            self._session.finish(status, time.time())
            self._log.sync()
        except OSError as error:
            raise TransientError(f"cannot finish {self._folder}: {error}") from error

    def _append(self, batch: Sequence[Entry]) -> list[Rejection]:
        done = self._log.next_position  # an attempt that failed may have stored the first pieces
        rejected = []
        events: list[bytes] = []
        size = 0
        for entry in batch:
            payload = entry.payload
            if isinstance(payload, Image) and not self._info.blob_path(payload.blob).is_file():
                rejected.append(Rejection(entry.position, "blob_missing", f"no file for {payload.key!r}"))
                continue
            if entry.position < done:
                continue
            if isinstance(payload, Params):
                self._session.update(payload.values)
            events.append(self._encoder.encode(entry))
            size += len(events[-1])
            if size >= _WRITE_BYTES:
                self._commit(events, entry)
                events, size = [], 0
        if events:
            self._commit(events, batch[-1])
        return rejected

    def _commit(self, events: list[bytes], last: Entry) -> None:
        self._log.append(events, last.position + 1, self._encoder.new_tags, last.time)
        self._encoder.new_tags = []
