# SPDX-License-Identifier: Apache-2.0
"""A run without a server: a folder that ``wandb sync`` uploads later."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackhub.spi import BackendRun, Confirmation, RunStatus, TransientError, WriteReport
from trackhub_wandb.naming import CONFIG_ENTRY
from trackhub_wandb.sdk import abandon_runs, open_sdk_run, stop_service
from trackhub_wandb.session import Session, first_config, link_or_copy
from trackhub_wandb.txlog import LogTail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wandb.sdk.artifacts.artifact import Artifact as SdkArtifact

    from trackhub.spi import Entry, RunInfo
    from trackhub_wandb.options import WandBOptions

__all__ = ["OfflineRun", "offline_folders"]

_log = logging.getLogger(__name__)

_DISK_INTERVAL_S = 0.2
_POLL_S = 0.02


def offline_folders(wandb_dir: Path, run_id: str) -> list[Path]:
    """Return the folders that hold this run, oldest first. More than one, if it was opened again without a rebuild."""
    return sorted(wandb_dir.glob(f"offline-run-*-{run_id}*"))


class OfflineRun(BackendRun):
    """Writes one folder per run.

    The SDK cannot append to a folder: a run that is opened again gets a second one, of which ``wandb sync`` would
    take only one. So a run is always written from its first record, and what an interrupted process left is removed
    before (``Redelivery.REBUILD``).
    """

    def __init__(self, info: RunInfo, options: WandBOptions, settings: dict[str, Any], wandb_dir: Path) -> None:
        """Open the run.

        Raises:
            TransientError: the SDK's service cannot be started or the folder not be written.
        """
        if info.resume_from == 0:
            for folder in offline_folders(wandb_dir, info.run_id):
                _log.info("W&B run of %s is written anew: removing %s", info.site, folder)
                shutil.rmtree(folder, ignore_errors=True)
        self._flush_timeout_s = options.flush_timeout_s
        self._finish_timeout_s = options.finish_timeout_s
        offline = {"mode": "offline", "x_transaction_log_flush_interval": _DISK_INTERVAL_S}
        self._root = wandb_dir.parent
        try:
            run = open_sdk_run({**settings, **offline}, config=first_config(info))
        except Exception as error:
            raise TransientError(f"W&B run of {info.site} cannot be opened: {error}") from error
        self._session = Session(run, info, options, self._keep_files)
        self._ended = False
        self._tail = LogTail(Path(run.settings.sync_file))
        self._on_disk: tuple[str, int] = self._session.last

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        """Hand entries to the SDK."""
        try:
            rejected = self._session.write(batch)
        except Exception as error:
            raise TransientError(f"the W&B SDK failed: {error}") from error
        return WriteReport(rejected) if rejected else None

    def flush(self) -> Confirmation:
        """Wait until the last of them is in the run's file."""
        last = self._session.last
        if last == self._on_disk:
            return Confirmation.STORE
        deadline = time.monotonic() + self._flush_timeout_s
        wait = threading.Event().wait
        while not self._is_in_file(last):
            if time.monotonic() > deadline:
                raise TransientError(f"W&B's service wrote nothing to disk for {self._flush_timeout_s:.0f} s")
            wait(_POLL_S)
        self._on_disk = last
        self._session.artifacts.clear()
        self._session.files.clear()
        return Confirmation.STORE

    def _is_in_file(self, last: tuple[str, int]) -> bool:
        try:
            return self._tail.contains(lambda record: _position(record) == last)
        except OSError as error:
            raise TransientError(f"the W&B run's file cannot be read: {error}") from error

    def finish(self, status: RunStatus) -> None:
        """End the run, as finished or failed, and the SDK's service with the last run."""
        try:
            self._session.run.finish(exit_code=0 if status is RunStatus.FINISHED else 1)
        except Exception as error:
            raise TransientError(f"the W&B run could not be ended: {error}") from error
        self._ended = True
        stop_service(self._finish_timeout_s)

    def abandon(self) -> None:
        """Let go of the run without ending it; what was flushed is in its file."""
        if not self._ended:
            abandon_runs([self._session.run])

    def _keep_files(self, artifact: SdkArtifact, folder: Path) -> None:
        """Put an artifact's files into the run's folder, under paths relative to the folder that holds ``wandb``.

        So a job's folder can be moved or downloaded, and uploaded from where it lies then.
        """
        for entry in artifact.manifest.entries.values():
            if entry.local_path is None:
                continue
            target = folder / Path(entry.path).name
            if Path(entry.local_path) != target:
                target.unlink(missing_ok=True)
                link_or_copy(Path(entry.local_path), target)
            entry.local_path = str(target.relative_to(self._root))


def _position(record: Any) -> tuple[str, int] | None:
    if record.HasField("history"):
        return ("row", record.history.step.num)
    if record.HasField("config"):
        for item in record.config.update:
            if item.key == CONFIG_ENTRY:
                return ("config", json.loads(item.value_json)["through"])
    return None
