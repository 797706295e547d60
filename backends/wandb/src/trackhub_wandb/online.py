# SPDX-License-Identifier: Apache-2.0
"""A run on a W&B server."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from trackhub.spi import BackendRun, Confirmation, PermanentError, RunStatus, TransientError, WriteReport
from trackhub_wandb.naming import CONFIG_ENTRY
from trackhub_wandb.sdk import abandon_runs, open_sdk_run, service_is_lost, stop_service
from trackhub_wandb.session import Session, first_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from wandb.sdk.artifacts.artifact import Artifact as SdkArtifact

    from trackhub.spi import Entry, Rejection, RunInfo
    from trackhub_wandb.options import WandBOptions
    from trackhub_wandb.server import RunPath, Server

__all__ = ["OnlineRun"]

_log = logging.getLogger(__name__)

_POLL_S = 0.1
_POLL_MAX_S = 0.5
_FILES_AT_ONCE = 50
_MAX_UNCONFIRMED = 5000
_STALLED_FLUSHES = 3


class OnlineRun(BackendRun):
    """Writes to a server through the SDK, and confirms what the server says it has.

    ``flush`` asks the server how many rows the run has, whether the last config arrived, and whether the media files
    did. Artifacts are acknowledged by the SDK itself.

    Rows have their position as ``_step``. A run that is opened again is resumed; the server then says what the next
    ``_step`` is, and rows before it are not sent again (``Redelivery.IDEMPOTENT``). What is not confirmed is kept in
    memory, so that the run can be opened again under the lane, if the SDK's service dies or its upload gives up.
    """

    def __init__(self, info: RunInfo, options: WandBOptions, settings: dict[str, Any], server: Server) -> None:
        """Open the run.

        Raises:
            TransientError: the server cannot be reached, or refuses now.
            PermanentError: the server will not have this run.
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
        self._unconfirmed: list[Entry] = []
        self._stalled = (0, 0)
        self._ended = False
        self.url: str | None = None
        self._session: Session | None = self._open()

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        """Hand entries to the SDK; when too many are unconfirmed, confirm them first."""
        if len(self._unconfirmed) >= _MAX_UNCONFIRMED:
            self.flush()
        rejected = self._hand_over(self._opened(), batch)
        last = self._unconfirmed[-1].position if self._unconfirmed else -1
        self._unconfirmed.extend(entry for entry in batch if entry.position > last)
        return WriteReport(rejected) if rejected else None

    def flush(self) -> Confirmation:
        """Wait until the server has everything that was written, or ``flush_timeout_s``."""
        session = self._opened()
        deadline = time.monotonic() + self._options.flush_timeout_s
        self._await_artifacts(session, deadline)
        wait = threading.Event().wait
        pause = _POLL_S
        while missing := self._missing(session):
            if time.monotonic() + pause > deadline:
                self._help_along(session, missing)
                raise TransientError(f"W&B did not confirm within {self._options.flush_timeout_s:.0f} s: {missing}")
            wait(pause)
            pause = min(2 * pause, _POLL_MAX_S)
        self._unconfirmed.clear()
        self._stalled = (0, 0)
        return Confirmation.STORE

    def finish(self, status: RunStatus) -> None:
        """End the run at the server, as finished or failed; wait at most ``finish_timeout_s``."""
        if self._ended:
            return
        session, self._session = self._opened(), None
        try:
            session.run.finish(exit_code=0 if status is RunStatus.FINISHED else 1)
        except Exception as error:
            self._let_go(session)
            raise TransientError(f"the W&B run could not be ended: {error}") from error
        self._ended = True
        stop_service(self._options.finish_timeout_s)

    def abandon(self) -> None:
        """Let go of the run without ending it. Waits for no peer."""
        if self._session is not None:
            self._let_go(self._session)

    def _opened(self) -> Session:
        """Return the open session; open the run again if it was lost, and hand over what was not confirmed."""
        if self._session is None:
            session = self._open()
            self._hand_over(session, self._unconfirmed)
            self._session = session
        return self._session

    def _open(self) -> Session:
        import wandb

        site = self._info.site
        # Asked first, since the SDK takes far longer to find out that a server is down.
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
            run = open_sdk_run(settings, self._server.login, None if state else first_config(self._info))
        except wandb.errors.UsageError as error:
            raise PermanentError(f"W&B refuses the run of {site}: {error}") from error
        except Exception as error:
            raise TransientError(f"the W&B run of {site} cannot be opened: {error}") from error
        self.url = run.url
        self._path = {"entity": run.entity, "project": run.project, "name": run.id}
        self._rows_before = int((state or {}).get("historyLineCount") or 0)
        try:
            return Session(run, self._info, self._options, self._before_artifact)
        except Exception as error:
            abandon_runs([run])
            raise TransientError(f"the W&B run of {site} cannot be opened: {error}") from error

    def _before_artifact(self, artifact: SdkArtifact, folder: Path) -> None:
        # The SDK asks the server whether it may log an artifact, and waits 19 s for a dead one (wandb 0.31).
        self._server.state(self._path)

    def _hand_over(self, session: Session, batch: Sequence[Entry]) -> list[Rejection]:
        try:
            return session.write(batch)
        except Exception as error:
            raise self._failed(session, error) from error

    def _let_go(self, session: Session) -> None:
        self._session = None
        abandon_runs([session.run])

    def _help_along(self, session: Session, missing: _Missing) -> None:
        """Do something about what the server still lacks: send it again, or open the run again.

        The SDK gives up uploading rows for good when the server refuses a request for another reason than being
        busy, and then only prints a line.
        """
        if missing.rows == 0:
            session.send_again(missing.file)
            return
        rows, times = self._stalled
        self._stalled = (missing.rows, times + 1 if missing.rows == rows else 1)
        if self._stalled[1] < _STALLED_FLUSHES:
            return
        _log.warning("W&B run of %s: the upload makes no progress, opening the run again", self._info.site)
        self._stalled = (0, 0)
        self._session = None
        with contextlib.suppress(Exception):
            session.run.finish(exit_code=1)
            return
        abandon_runs([session.run])

    def _await_artifacts(self, session: Session, deadline: float) -> None:
        while session.artifacts:
            handle = session.artifacts[0]._save_handle
            if handle is not None:
                try:
                    result = handle.wait_or(timeout=max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    raise TransientError("W&B did not confirm an artifact in time") from None
                except Exception as error:
                    raise self._failed(session, error) from error
                if message := result.response.log_artifact_response.error_message:
                    raise TransientError(f"W&B did not take an artifact: {message}")
            session.artifacts.pop(0)

    def _failed(self, session: Session, error: Exception) -> TransientError:
        if service_is_lost():
            self._let_go(session)
        if isinstance(error, TransientError):
            return error
        return TransientError(f"the W&B SDK failed: {type(error).__name__}: {error}")

    def _missing(self, session: Session) -> _Missing | None:
        """Return what the server lacks of what was handed to the SDK; None when it has everything."""
        state = self._server.state(self._path) or {}
        arrived = int(state.get("historyLineCount") or 0) - self._rows_before
        if arrived < session.rows:
            return _Missing(session.rows - arrived)
        if session.config_changed:
            config = json.loads(state.get("config") or "{}")
            held = (config.get(CONFIG_ENTRY) or {}).get("value") or {}
            if held.get("through") != session.config["through"]:
                return _Missing(0)
            session.config_changed = False
        while session.files:
            names = list(session.files)[:_FILES_AT_ONCE]
            sizes = self._server.file_sizes(self._path, names)
            for name in names:
                if sizes.get(name) != session.files[name]:
                    return _Missing(0, name)
                del session.files[name]
        return None


class _Missing(NamedTuple):
    """The first thing that the server lacks: rows; else a file; else the config."""

    rows: int
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.rows} rows" if self.rows else self.file or "the config"
