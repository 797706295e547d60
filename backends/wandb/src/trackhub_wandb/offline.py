# SPDX-License-Identifier: Apache-2.0
"""A run without a server: a folder that ``wandb sync`` uploads later. `backend` opens it in the mode offline."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackhub.spi import BackendRun, Confirmation, PermanentError, RunStatus, TransientError, WriteReport
from trackhub_wandb.naming import CONFIG_ENTRY
from trackhub_wandb.sdk_run import SdkRun, first_config, link_or_copy
from trackhub_wandb.sdk_start_and_stop import abandon_runs, open_sdk_run, stop_service
from trackhub_wandb.transaction_log_follower import TransactionLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wandb.sdk.artifacts.artifact import Artifact as SdkArtifact

    from trackhub.spi import Entry, RunInfo
    from trackhub_wandb.options import WandBOptions

__all__ = ["OfflineRun", "is_uploaded", "offline_folders"]

_log = logging.getLogger(__name__)

_DISK_INTERVAL_S = 0.2
_POLL_S = 0.02


def offline_folders(wandb_dir: Path, run_id: str) -> list[Path]:
    """Return the folders that hold this run, oldest first.

    There are several if an uploaded folder was kept, or if the run was opened to go on with it (``resume_from`` above
    0).

    Args:
        wandb_dir: the folder ``wandb`` that the SDK writes to.
        run_id: the run's id.
    """
    return sorted(wandb_dir.glob(f"offline-run-*-{run_id}*"))


def is_uploaded(folder: Path) -> bool:
    """Return whether ``wandb sync`` has uploaded all that is in the folder of a run. It leaves an empty file there."""
    try:
        log, mark = next(folder.glob("run-*.wandb")), next(folder.glob("run-*.wandb.synced"))
        # Otherwise it was uploaded while the run was open, and nobody knows how far.
        return log.stat().st_mtime_ns <= mark.stat().st_mtime_ns
    except (StopIteration, OSError):
        return False


def _uploaded_rows(folders: Sequence[Path]) -> tuple[int, dict[str, Any]]:
    """Return the position after the last row in these folders, and the last number or text of each key.

    Raises:
        TransientError: a folder cannot be read.
    """
    end = 0
    last: dict[str, Any] = {}

    def look(record: Any) -> bool:
        nonlocal end
        if record.HasField("history"):
            end = max(end, record.history.step.num + 1)
            for item in record.history.item:
                key = item.key or ".".join(item.nested_key)
                if not key.startswith("_") and not item.value_json.startswith("{"):
                    last.setdefault(key, json.loads(item.value_json))
        return False

    for folder in reversed(folders):
        try:
            for log in folder.glob("run-*.wandb"):
                TransactionLog(log).contains(look)  # the newest row first
        except Exception as error:
            raise TransientError(
                f"the uploaded W&B run in {folder} cannot be read: {type(error).__name__}: {error}. Move the folder "
                "away; its rows are then uploaded again"
            ) from error
    return end, last


class OfflineRun(BackendRun):
    """Writes one folder per run.

    The SDK cannot append to a folder. It gives a second folder to a run that is opened again, and ``wandb sync`` takes
    only one of them. So this class removes what an interrupted process left, and writes every run from its first record
    (``Redelivery.REBUILD``). A folder that ``wandb sync`` has uploaded stays, and its rows are not written again.

    Attributes:
        has_ended: ``finish`` has ended the run, so nothing more is written to its folder.
    """

    def __init__(
        self, info: RunInfo, options: WandBOptions, settings: dict[str, Any], wandb_dir: Path, run_folder: Path
    ) -> None:
        """Open the run.

        Args:
            info: which run.
            options: the backend's options.
            settings: fields of ``wandb.Settings``.
            wandb_dir: the folder ``wandb`` that the SDK writes to.
            run_folder: the job's run folder, in which a person runs ``wandb sync``.

        Raises:
            PermanentError: the SDK opened another run.
            TransientError: the SDK's service cannot be started, the folder cannot be written, or an uploaded folder of
                the run cannot be read.
        """
        uploaded: list[Path] = []
        if info.resume_from == 0:
            folders = offline_folders(wandb_dir, info.run_id)
            uploaded = [folder for folder in folders if is_uploaded(folder)]
            for folder in folders:
                if folder not in uploaded:
                    _log.info("The W&B run of %s is written anew, so its folder %s is removed", info.site, folder)
                    shutil.rmtree(folder, ignore_errors=True)
        first_row, last = _uploaded_rows(uploaded)
        self._flush_timeout_s = options.flush_timeout_s
        self._finish_timeout_s = options.finish_timeout_s
        self._run_folder = run_folder
        self._own_columns = (options.step_metric, options.round_metric)
        offline = {"mode": "offline", "x_transaction_log_flush_interval": _DISK_INTERVAL_S}
        run = None
        try:
            run = open_sdk_run({**settings, **offline}, config=first_config(info))
            self._run = SdkRun(run, info, options, settings.get("run_tags") or (), self._keep_files)
            if uploaded:
                self._go_on_after(first_row, last)
        except PermanentError:
            raise
        except Exception as error:
            if run is not None:  # the SDK would refuse to open it again
                abandon_runs([run])
            raise TransientError(
                f"the offline W&B run of {info.site} cannot be opened in {wandb_dir}: {error}"
            ) from error
        self.has_ended = False
        self._log = TransactionLog(Path(run.settings.sync_file))
        self._on_disk: tuple[str, int] = self._run.last

    def _go_on_after(self, first_row: int, last: dict[str, Any]) -> None:
        """Leave out the rows that were uploaded: W&B would store them a second time.

        Args:
            first_row: the position after the uploaded rows.
            last: their last values, which the run's summary gets.
        """
        self._run.first_row = first_row
        shown = {key: value for key, value in last.items() if key not in self._own_columns}
        if shown:
            self._run.run.summary.update(shown)

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        """Hand entries to the SDK.

        Raises:
            TransientError: the SDK failed.
        """
        try:
            rejected = self._run.write(batch)
        except Exception as error:
            raise TransientError(f"the W&B SDK failed: {type(error).__name__}: {error}") from error
        return WriteReport(rejected) if rejected else None

    def probe(self, entry: Entry) -> None:
        """Test the SDK's service and the folder of the run.

        Raises:
            TransientError: the SDK or the file system failed.
        """
        try:
            self._run.probe()
        except Exception as error:
            raise TransientError(f"the W&B SDK failed: {type(error).__name__}: {error}") from error

    def flush(self) -> Confirmation:
        """Wait until the last entry is in the run's file, at most ``flush_timeout_s``.

        Raises:
            TransientError: it is not there in time, or the file cannot be read.
        """
        last = self._run.last
        if last == self._on_disk:
            return Confirmation.STORE
        deadline = time.monotonic() + self._flush_timeout_s
        while not self._is_in_file(last):
            if time.monotonic() > deadline:
                raise TransientError(
                    f"W&B's service did not write the last record to {self._log.path} within "
                    f"{self._flush_timeout_s:.0f} s; check the free space on its disk"
                )
            time.sleep(_POLL_S)
        self._on_disk = last
        self._run.files.clear()
        return Confirmation.STORE

    def _is_in_file(self, last: tuple[str, int]) -> bool:
        try:
            return self._log.contains(lambda record: _position(record) == last)
        except Exception as error:
            raise TransientError(
                f"the W&B run's file {self._log.path} cannot be read: {type(error).__name__}: {error}"
            ) from error

    def finish(self, status: RunStatus) -> None:
        """End the run with this status. With the last run, end the SDK's service.

        Raises:
            TransientError: the SDK failed.
        """
        try:
            self._run.finish(status)
        except Exception as error:
            raise TransientError(f"the W&B run could not be ended: {type(error).__name__}: {error}") from error
        self.has_ended = True
        stop_service(self._finish_timeout_s)

    def abandon(self) -> None:
        """Give up the run without ending it. What was flushed is in its file."""
        if not self.has_ended:
            abandon_runs([self._run.run])

    def _keep_files(self, artifact: SdkArtifact, folder: Path) -> None:
        """Put an artifact's files into the run's folder, under paths relative to the job's run folder.

        So ``wandb sync`` also finds them after somebody moved or downloaded the run folder.
        """
        for entry in artifact.manifest.entries.values():
            if entry.local_path is None:
                continue
            target = folder / Path(entry.path).name
            if Path(entry.local_path) != target:
                target.unlink(missing_ok=True)
                link_or_copy(Path(entry.local_path), target)
            entry.local_path = str(target.relative_to(self._run_folder))


def _position(record: Any) -> tuple[str, int] | None:
    if record.HasField("history"):
        return ("row", record.history.step.num)
    if record.HasField("config"):
        for item in record.config.update:
            if item.key == CONFIG_ENTRY:
                return ("config", json.loads(item.value_json)["through"])
    return None
