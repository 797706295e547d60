# SPDX-License-Identifier: Apache-2.0
"""The backend class that the entry point names, and its runs.

A lane calls both. A run encodes entries with `events`, appends them with `event_files`, and keeps params in the file of
`hparams_file`.
"""

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
    Artifact,
    Backend,
    BackendContext,
    BackendRun,
    Capabilities,
    ConfigError,
    ConfirmedBy,
    Entry,
    Histogram,
    Image,
    Kind,
    Metrics,
    OptionMark,
    Params,
    Redelivery,
    Rejection,
    Results,
    RunInfo,
    RunStatus,
    Summary,
    Table,
    Tags,
    Text,
    TransientError,
    WriteReport,
    make_folder,
)

__all__ = ["TensorBoardBackend", "TensorBoardOptions"]

_WRITE_BYTES = 8 << 20
"""A run appends a batch with large images in pieces of about this size, so that it needs little memory."""


class TensorBoardOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of ``tensorboard``.

    Attributes:
        logdir: the folder for the event files of all jobs, absolute or relative to the job's run folder. By default it
            is ``tensorboard`` in the run folder. Another folder may be shared with the server, which may write the
            same site's records. So a client writes to ``<logdir>/<job>@client/<site>/`` there.
    """

    logdir: Annotated[str | None, OptionMark.PATH] = None


_MOVED_OPTIONS = {
    "tb_folder": "Give `logdir` in place of FLARE's tb_folder. A relative path starts in the job's run folder as well.",
}
"""Arguments of FLARE's receiver, and what to use in place of each."""


class TensorBoardBackend(Backend[TensorBoardOptions]):
    """Writes each run to a folder of event files, ``<logdir>/<job>/<site>/``, where ``<job>`` is the job's unique name.

    It keeps metric values as float32, as TensorBoard does: rounded to nearest, infinite beyond 3.4e38. TensorBoard has
    no place for files: an artifact becomes a text with its name, size and digest.
    """

    spi = 1
    contract = 1
    moved_options = _MOVED_OPTIONS
    capabilities = Capabilities(
        kinds=frozenset(
            {
                Kind.METRICS,
                Kind.PARAMS,
                Kind.TAGS,
                Kind.SUMMARY,
                Kind.TEXT,
                Kind.IMAGE,
                Kind.HISTOGRAM,
                Kind.TABLE,
                Kind.ARTIFACT,
            }
        ),
        redelivery=Redelivery.RESUMABLE,
        nonfinite=True,
        late_steps=True,
        optional_step=False,
        changing_params=True,
        probe=True,
        confirmed_by=ConfirmedBy.WRITE,
        key_rule=ANY_KEY,
    )

    def __init__(self, options: TensorBoardOptions, context: BackendContext) -> None:
        """Work out where the log folder is. Nothing is created yet."""
        super().__init__(options, context)
        self._logdir = context.folder(options.logdir)
        self._runs: list[TensorBoardRun] = []

    def preflight(self) -> None:
        """Make the log folder.

        Raises:
            ConfigError: the folder cannot be made, or this process may not write there.
        """
        try:
            make_folder(self._logdir)
            if not os.access(self._logdir, os.W_OK):
                raise PermissionError("no permission to write there")
        except OSError as error:
            raise ConfigError(
                f"tensorboard.logdir: cannot use the folder {self._logdir}: {error}. Give a folder that the receiver "
                "may write to"
            ) from error

    def open_run(self, info: RunInfo) -> TensorBoardRun:
        """Open the run's folder, and cut off a batch that a crash left unfinished.

        Raises:
            TransientError: the file system refuses.
        """
        folder = self._folder(info)
        try:
            run = TensorBoardRun(folder, info)
        except OSError as error:
            raise TransientError(
                f"cannot open the run's folder {folder}: {error}. It needs write access and free space"
            ) from error
        self._runs.append(run)
        return run

    def results(self, info: RunInfo) -> Results:
        """Return the run's folder, and the command that shows it beside all other runs of the log folder.

        If a step does not rise, TensorBoard's fast loader assumes a restart, and hides the points before it. If there
        are such steps, the command turns the fast loader off. Otherwise it stays on, since it is much faster.
        """
        shown = self.context.shown
        loader = "--load_fast=false " if any(run.has_late_steps for run in self._runs) else ""
        return Results(
            path=shown(self._folder(info)), command=f"tensorboard {loader}--logdir {shlex.quote(shown(self._logdir))}"
        )

    def _folder(self, info: RunInfo) -> Path:
        return self.context.run_path(self._logdir, info)


class TensorBoardRun(BackendRun):
    """A folder of event files. When ``write`` returns, the operating system has the records, so SIGKILL loses none."""

    def __init__(self, folder: Path, info: RunInfo) -> None:
        """Open the folder.

        Args:
            folder: the run's folder; it need not exist.
            info: the run.

        Raises:
            OSError: the file system refuses.
        """
        self._folder = folder
        self._info = info
        # Imported here, so that listing the installed backends does not import tensorboard.
        from trackhub_tensorboard.event_files import EventFiles
        from trackhub_tensorboard.events import Encoder
        from trackhub_tensorboard.hparams_file import HParamsFile

        self._files = EventFiles(folder)
        self._hparams = HParamsFile(folder, info)
        self._encoder = Encoder(info, self._files.tags)

    @property
    def has_late_steps(self) -> bool:
        """True if TensorBoard's fast loader may hide points of this run."""
        return self._encoder.has_late_steps

    def next_position(self) -> int:
        """Return the position after the last record of the last whole batch."""
        return self._files.next_position

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        """Append the entries' events, by one system call unless they are large.

        Raises:
            TransientError: the file system refuses. An incomplete write has been cut off again.
        """
        try:
            rejected = self._append(batch)
        except OSError as error:
            raise TransientError(
                f"cannot write to {self._folder}: {error}. It needs write access and free space"
            ) from error
        return WriteReport(rejected) if rejected else None

    def probe(self, entry: Entry) -> None:
        """Write a file into the run's folder, and delete it.

        Raises:
            TransientError: the file system refuses.
        """
        try:
            self._files.probe()
        except OSError as error:
            raise TransientError(f"cannot write to {self._folder}: {error}") from error

    def finish(self, status: RunStatus) -> None:
        """Store how the run ended, if it has params, and sync its files to the disk.

        Raises:
            TransientError: the file system refuses.
        """
        try:
            self._hparams.finish(status, time.time())
            self._files.sync()
        except OSError as error:
            raise TransientError(
                f"cannot finish {self._folder}: {error}. It needs write access and free space"
            ) from error

    def _append(self, batch: Sequence[Entry]) -> list[Rejection]:
        done = self._files.next_position  # a failed attempt may have stored the first pieces
        rejected = []
        events: list[bytes] = []
        size = 0
        for entry in batch:
            payload = entry.payload
            if not isinstance(payload, Metrics) and (rejection := self._rejection(entry)):
                rejected.append(rejection)
                continue
            if entry.position < done:
                continue
            if isinstance(payload, Params):
                self._hparams.update(payload.values)
            events.append(self._encoder.encode(entry))
            size += len(events[-1])
            if size >= _WRITE_BYTES:
                self._commit(events, entry)
                events, size = [], 0
        if events:
            self._commit(events, batch[-1])
        return rejected

    def _rejection(self, entry: Entry) -> Rejection | None:
        """Return why this entry, which holds no metrics, can never be stored; None if it can."""
        payload = entry.payload
        if not isinstance(payload, Params | Tags | Summary | Text | Image | Histogram | Table | Artifact):
            return Rejection(entry.position, "unsupported_kind", f"{type(payload).__name__} cannot be stored")
        # TensorBoard gets an artifact's name and digest. Without the bytes, they would promise a file that nobody has.
        if isinstance(payload, Image | Artifact) and not self._info.blob_path(payload.blob).is_file():
            return Rejection(entry.position, "blob_missing", f"no file for {payload.key!r}")
        return None

    def _commit(self, events: list[bytes], last: Entry) -> None:
        self._hparams.write()  # before the events: if it fails, the lane hands over the params once more
        self._files.append(events, last.position + 1, self._encoder.new_tags, last.time)
        self._encoder.new_tags = []
