# SPDX-License-Identifier: Apache-2.0
"""A run on a W&B server. `backend` opens it in the mode online.

It writes with `sdk_run`. It confirms by what `server_state` says. If that is not possible, it confirms by
`acknowledged_rows_in_sdk_log`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackhub.spi import Artifact, BackendRun, Confirmation, PermanentError, RunStatus, TransientError, WriteReport
from trackhub_wandb.acknowledged_rows_in_sdk_log import UploadLog
from trackhub_wandb.artifact_uploads import ArtifactUpload
from trackhub_wandb.naming import CONFIG_ENTRY
from trackhub_wandb.sdk_run import SdkRun, first_config
from trackhub_wandb.sdk_start_and_stop import abandon_runs, open_sdk_run, service_is_lost, stop_service

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wandb.sdk.artifacts.artifact import Artifact as SdkArtifact

    from trackhub.spi import Entry, Rejection, RunInfo
    from trackhub_wandb.options import WandBOptions
    from trackhub_wandb.server_state import RunPath, Server

__all__ = ["OnlineRun"]

_log = logging.getLogger(__name__)

_POLL_S = 0.1
_POLL_MAX_S = 0.5
_FILES_PATIENCE_S = 2.0
"""How long ``flush`` waits for the files of rows. If a file takes longer, the other rows are confirmed without it."""

_MAX_UNCONFIRMED = 5000
_STALLED_FLUSHES = 3
_COUNT_LAG_S = 2.0
"""If the server counts too few rows for longer than this, ``flush`` trusts the server's acknowledgements instead."""


class OnlineRun(BackendRun):
    """Writes to a server through the SDK, and confirms the records that the server says it has.

    ``flush`` asks the server how many rows the run has, and whether the last config arrived. It waits a moment for the
    files that belong to rows. A record whose file is late stays pending. All others are confirmed. An artifact comes
    from the lane's second thread. ``write`` waits until the SDK reports that the server has acknowledged the artifact.

    Not every server counts rows as wandb.ai does. If the count is missing, lags, or is too high, ``flush`` reads the
    SDK's log. There the SDK's service notes which sent rows the server has acknowledged. Such a flush returns
    ``Confirmation.CLIENT``.

    The ``_step`` of a row is its position. When a run is opened again, W&B resumes it and says what the next ``_step``
    is. Rows before that are not sent again (``Redelivery.IDEMPOTENT``).

    The class keeps unconfirmed entries in memory. So it can open the run again without the lane's help if the
    SDK's service died or gave up an upload.

    Attributes:
        url: the run's page, or None before the SDK opened the run.
    """

    def __init__(self, info: RunInfo, options: WandBOptions, settings: dict[str, Any], server: Server) -> None:
        """Open the run.

        Args:
            info: which run.
            options: the backend's options.
            settings: fields of ``wandb.Settings``.
            server: asks the W&B server what it has.

        Raises:
            TransientError: the server cannot be reached, or refuses now.
            PermanentError: the server refuses this run for good.
        """
        self._info = info
        self._options = options
        self._settings = settings
        self._server = server
        self._path: RunPath = {
            "entity": settings.get("entity"),
            "project": settings["project"],
            "name": settings["run_id"],
        }
        self._rows_before = 0
        self._log: UploadLog | None = None
        self._is_count_doubted = False
        self._unconfirmed: list[Entry] = []
        self._left_out: list[Entry] = []
        self._stalled = (0, 0)
        self._acknowledged_at: float | None = None
        self._by = Confirmation.STORE
        self._ended = self._is_closed = False
        self._uploads: dict[int, tuple[SdkRun, ArtifactUpload]] = {}
        # The lane's thread holds this lock while it writes rows, flushes, probes or finishes. The second thread holds
        # it only while it gets the run, and after an upload failed.
        self._lock = threading.RLock()
        self.url: str | None = None
        self._run: SdkRun | None = self._open()

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        """Hand entries to the SDK. If too many earlier entries are unconfirmed, confirm them first. Wait for artifacts.

        Raises:
            TransientError: the SDK failed, or the server did not confirm in time.
            PermanentError: W&B refuses an artifact for good.
        """
        others = [entry for entry in batch if not isinstance(entry.payload, Artifact)]
        with self._lock:
            report = self._write_others(others) if others else None
        for entry in batch:
            if isinstance(entry.payload, Artifact):
                self._write_artifact(entry, entry.payload)
        return report

    def _write_others(self, batch: Sequence[Entry]) -> WriteReport | None:
        if len(self._unconfirmed) >= _MAX_UNCONFIRMED:
            self.flush()
        rejected = self._hand_over(self._opened(), batch)
        last = self._unconfirmed[-1].position if self._unconfirmed else -1
        self._unconfirmed.extend(entry for entry in batch if entry.position > last)
        return WriteReport(rejected) if rejected else None

    def probe(self, entry: Entry) -> None:
        """Test the SDK's service and the folder of the run. Opens the run again if it was lost.

        Raises:
            TransientError: the SDK or the file system failed.
        """
        with self._lock:
            run = self._opened()
            try:
                run.probe()
            except Exception as error:
                raise self._failed(run, error) from error

    def flush(self) -> Confirmation:
        """Wait until the server has all rows and the config, at most ``flush_timeout_s``. Then wait a moment for files.

        This moment is at most two seconds. ``left_out`` then returns the records whose files are late.

        Raises:
            TransientError: the server did not confirm in time, or cannot be asked.
        """
        with self._lock:
            return self._confirm_all()

    def _confirm_all(self) -> Confirmation:
        run = self._opened()
        deadline = time.monotonic() + self._options.flush_timeout_s
        wait = threading.Event().wait
        pause = _POLL_S
        self._acknowledged_at, self._by = None, Confirmation.STORE
        while True:
            state = self._server.state(self._path) or {}
            rows = self._missing_rows(run, _count(state))
            if not rows and not self._lacks_config(run, state):
                break
            if time.monotonic() + pause > deadline:
                if rows:
                    self._open_again_if_stalled(run, rows)
                else:
                    run.send_config_again()
                raise TransientError(
                    f"W&B did not confirm within {self._options.flush_timeout_s:.0f} s. It still lacks "
                    + (f"{rows} rows" if rows else "the config")
                )
            wait(pause)
            pause = min(2 * pause, _POLL_MAX_S)
        self._await_files(run)
        late = run.files.positions()
        self._unconfirmed = [entry for entry in self._unconfirmed if entry.position in late]
        self._left_out = list(self._unconfirmed)
        self._stalled = (0, 0)
        return self._by

    def left_out(self) -> list[Entry]:
        """Return the records that the last ``flush`` did not confirm, since their files are still on their way."""
        return self._left_out

    def finish(self, status: RunStatus) -> None:
        """End the run at the server with this status. Waits at most ``finish_timeout_s``.

        Raises:
            TransientError: the SDK failed, or the server did not answer in time.
        """
        with self._lock:
            self._end(status)

    def _end(self, status: RunStatus) -> None:
        if self._ended:
            return
        run, self._run = self._opened(), None
        try:
            run.finish(status)
        except Exception as error:
            self._let_go(run)
            raise TransientError(f"the W&B run could not be ended: {type(error).__name__}: {error}") from error
        self._ended = True
        stop_service(self._options.finish_timeout_s)

    def abandon(self) -> None:
        """Give up the run without ending it. Does not wait for the server."""
        self._is_closed = True
        if self._run is not None:
            self._let_go(self._run)

    def _opened(self) -> SdkRun:
        """Return the open run. If it was lost, open it again and hand over the unconfirmed entries."""
        if self._run is None:
            run = self._open()
            self._hand_over(run, self._unconfirmed)
            self._run = run
        return self._run

    def _open(self) -> SdkRun:
        import wandb

        site = self._info.site
        # This question comes first, since the SDK takes far longer to notice that a server is down.
        state = self._server.state(self._path)
        settings = {
            **self._settings,
            "mode": "online",
            "resume": "allow",
            "init_timeout": self._options.init_timeout_s,
            "finish_timeout": self._options.finish_timeout_s,
            "finish_timeout_raises": True,
            "x_file_stream_transmit_interval": self._options.upload_interval_s,
        }
        try:
            opened = open_sdk_run(settings, self._server.login, None if state else first_config(self._info))
        except PermanentError:
            raise
        except wandb.errors.UsageError as error:
            raise PermanentError(f"W&B refuses the run of {site}: {error}") from error
        except Exception as error:
            raise TransientError(f"the W&B run of {site} cannot be opened: {error}") from error
        self.url = opened.url
        self._path = {"entity": opened.entity, "project": opened.project, "name": opened.id}
        self._rows_before = _count(state) or 0
        self._log = UploadLog(Path(opened.settings.log_internal))
        last_step = _last_step(state)
        if last_step is not None and opened.starting_step > last_step + 1:
            # The SDK continues after the counted rows. It would silently drop the rows in between.
            abandon_runs([opened])
            raise TransientError(
                f"W&B at {self._server.login.base_url} says that the run of {site} has {self._rows_before} rows, but "
                f"its last one is step {last_step}. The SDK would lose records {last_step + 1} to "
                f"{opened.starting_step - 1} there. So the lane delivers none of this run's records. `trackhub replay "
                "--from-start` with another project writes the whole run anew"
            )
        try:
            return SdkRun(
                opened, self._info, self._options, self._settings.get("run_tags") or (), self._before_artifact
            )
        except Exception as error:
            abandon_runs([opened])
            raise TransientError(f"the W&B run of {site} cannot be opened: {error}") from error

    def _before_artifact(self, artifact: SdkArtifact, folder: Path) -> None:
        self._ask_first()

    def _ask_first(self) -> None:
        # This fails at once if the server is down. The SDK would wait 19 s for an answer here (wandb 0.31).
        self._server.state(self._path)

    def _hand_over(self, run: SdkRun, batch: Sequence[Entry]) -> list[Rejection]:
        try:
            return run.write(batch)
        except Exception as error:
            raise self._failed(run, error) from error

    def _let_go(self, run: SdkRun) -> None:
        self._run = None
        abandon_runs([run.run])

    def _open_again_if_stalled(self, run: SdkRun, missing: int) -> None:
        """Open the run again if the number of missing rows has not changed for several flushes.

        If the server refuses rows for another reason than being busy, the SDK stops the upload for good and only prints
        a line. Opening the run again starts a new upload.
        """
        rows, times = self._stalled
        self._stalled = (missing, times + 1 if missing == rows else 1)
        if self._stalled[1] < _STALLED_FLUSHES:
            return
        _log.warning(
            "The upload of the W&B run of %s makes no progress. The run is opened again, and its unconfirmed records "
            "are sent again",
            self._info.site,
        )
        self._stalled = (0, 0)
        self._run = None
        with contextlib.suppress(Exception):
            run.run.finish(exit_code=1)
            return
        abandon_runs([run.run])

    def _write_artifact(self, entry: Entry, payload: Artifact) -> None:
        """Wait until the server has an artifact.

        After ``flush_timeout_s`` it raises. The next call continues to wait for the same upload.
        """
        with self._lock:
            if self._ended or self._is_closed:
                raise TransientError("the W&B run is over; the artifact waits for `trackhub replay`")
            run = self._opened()
        sent_to, upload = self._uploads.get(entry.position, (None, None))
        if upload is None or sent_to is not run:  # an upload dies with the SDK's run
            upload = ArtifactUpload(partial(self._log_artifact, run, run.artifact_of(entry, payload)))
            self._uploads[entry.position] = run, upload
        try:
            upload.wait(self._options.flush_timeout_s)
        except TransientError:
            raise
        except Exception as error:
            del self._uploads[entry.position]
            if isinstance(error, PermanentError):
                raise
            if run.is_refusal(error):
                raise PermanentError(f"W&B cannot hold artifact {payload.key!r}: {error}") from error
            with self._lock:
                raise self._failed(run, error) from error
        del self._uploads[entry.position]

    def _log_artifact(self, run: SdkRun, artifact: SdkArtifact) -> SdkArtifact:
        self._ask_first()
        return run.run.log_artifact(artifact)

    def _await_files(self, run: SdkRun) -> None:
        """Wait a moment until the server has the files and artifacts of rows. A late file delays only its record."""
        patience_s = min(_FILES_PATIENCE_S, self._options.flush_timeout_s)
        sizes = partial(self._server.file_sizes, self._path)
        try:
            run.files.wait(sizes, run.send_again, patience_s, self._options.flush_timeout_s)
        except Exception as error:
            raise self._failed(run, error) from error

    def _failed(self, run: SdkRun, error: Exception) -> TransientError:
        if service_is_lost() and run is self._run:
            self._let_go(run)
        if isinstance(error, TransientError):
            return error
        return TransientError(f"the W&B SDK failed: {type(error).__name__}: {error}")

    def _lacks_config(self, run: SdkRun, state: dict[str, Any]) -> bool:
        """Return whether the server lacks the last config that the SDK got."""
        if run.config_changed:
            config = json.loads(state.get("config") or "{}")
            held = (config.get(CONFIG_ENTRY) or {}).get("value") or {}
            run.config_changed = held.get("through") != run.config["through"]
        return run.config_changed

    def _missing_rows(self, run: SdkRun, count: int | None) -> int:
        """Return how many rows are missing, by the server's count or by what the SDK's service noted."""
        if count is not None and count - self._rows_before == run.rows:
            return 0
        assert self._log is not None
        acknowledged = self._log.rows()
        if acknowledged < run.rows or self._log.has_given_up:
            return max(1, run.rows - acknowledged)
        now = time.monotonic()
        self._acknowledged_at = self._acknowledged_at or now
        is_behind = count is not None and count - self._rows_before < run.rows
        if is_behind and not self._is_count_doubted and now < self._acknowledged_at + _COUNT_LAG_S:
            return run.rows - ((count or 0) - self._rows_before)
        if not self._is_count_doubted:
            self._is_count_doubted = True
            _log.warning(
                "W&B at %s reports %s rows for the run of %s, but it has acknowledged %d rows to the SDK. From now on, "
                "trackhub uses the acknowledgements whenever the reported number is wrong. The report shows such "
                "records as client_confirmed",
                self._server.login.base_url, "no number of" if count is None else count, self._info.site,
                self._rows_before + run.rows,
            )  # fmt: skip
        self._by = Confirmation.CLIENT
        return 0


def _count(state: dict[str, Any] | None) -> int | None:
    """Return how many rows the server says that a run has; None if it gives no number."""
    count = (state or {}).get("historyLineCount")
    return count if isinstance(count, int) and count >= 0 else None


def _last_step(state: dict[str, Any] | None) -> int | None:
    """Return the ``_step`` of the last row of a run; None if the run has no row, or the server does not say."""
    try:
        step = json.loads(json.loads((state or {})["historyTail"])[-1])["_step"]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return step if isinstance(step, int) else None
