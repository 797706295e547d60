# SPDX-License-Identifier: Apache-2.0
"""A run on a W&B server."""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from trackhub.spi import BackendRun, PermanentError, RunStatus, TransientError, WriteReport
from trackhub_wandb.naming import CONFIG_ENTRY
from trackhub_wandb.sdk import open_sdk_run, stop_service
from trackhub_wandb.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wandb.apis.public.service_api import ServiceApi

    from trackhub.spi import Entry, RunInfo
    from trackhub_wandb.options import WandBOptions
    from trackhub_wandb.sdk import Login

__all__ = ["OnlineRun"]

_log = logging.getLogger(__name__)

_POLL_S = 0.1
_POLL_MAX_S = 1.0
_QUERY_TIMEOUT_S = 5.0

# Only fields that the SDK itself asks for when it resumes a run or lists its files, so that every server has them.
_STATE_QUERY = """query TrackhubRunState($project: String, $entity: String, $name: String!) {
    model(name: $project, entityName: $entity) {
        bucket(name: $name, missingOk: true) { historyLineCount config }
    }
}"""
_FILES_QUERY = """query TrackhubRunFiles($project: String!, $entity: String!, $name: String!, $names: [String], $n: Int) {
    project(name: $project, entityName: $entity) {
        run(name: $name) { files(names: $names, first: $n) { edges { node { name sizeBytes md5 } } } }
    }
}"""
_FILES_AT_ONCE = 50


class OnlineRun(BackendRun):
    """Writes to a server through the SDK, and confirms what the server says it has.

    The SDK sends in the background and tells nobody what arrived, so ``flush`` asks the server: how many rows the run
    has, whether the last config arrived, and whether the media files did. Artifacts are acknowledged by the SDK.

    Rows have their position as ``_step``. A run that is opened again is resumed; the server says what the next
    ``_step`` is, and rows before it are not sent again (``Redelivery.IDEMPOTENT``).
    """

    def __init__(self, info: RunInfo, options: WandBOptions, settings: dict[str, Any], login: Login) -> None:
        """Open the run.

        Raises:
            TransientError: the server cannot be reached, or refuses now.
            PermanentError: the server will not have this run.
        """
        self._info = info
        self._options = options
        self._settings = settings
        self._login = login
        self._session: Session | None = None
        self._api: ServiceApi | None = None
        self._rows_before = 0
        self._ended = False
        self.url: str | None = None
        self._open()

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        session = self._session or self._open()
        try:
            rejected = session.write(batch)
        except Exception as error:
            self._drop()
            raise TransientError(f"the W&B SDK failed: {error}") from error
        return WriteReport(rejected) if rejected else None

    def flush(self) -> None:
        session = self._session
        if session is None:
            raise TransientError("the W&B run was lost and is opened again with the next records")
        deadline = time.monotonic() + self._options.flush_timeout_s
        self._await_artifacts(session, deadline)
        wait = threading.Event().wait
        pause = _POLL_S
        while missing := self._missing(session):
            if time.monotonic() + pause > deadline:
                raise TransientError(f"W&B did not confirm within {self._options.flush_timeout_s:.0f} s: {missing}")
            wait(pause)
            pause = min(2 * pause, _POLL_MAX_S)

    def finish(self, status: RunStatus) -> None:
        if not self._ended:
            session = self._session or self._open()
            self._session = None
            try:
                session.run.finish(exit_code=0 if status is RunStatus.FINISHED else 1)
            except Exception as error:
                raise TransientError(f"the W&B run could not be ended: {error}") from error
            finally:
                stop_service(self._options.finish_timeout_s)
            self._ended = True

    def _open(self) -> Session:
        import wandb

        site = self._info.key.site
        try:
            run = open_sdk_run(
                {
                    **self._settings,
                    "mode": "online",
                    "resume": "allow",
                    "init_timeout": self._options.init_timeout_s,
                    "finish_timeout": self._options.finish_timeout_s,
                    "finish_timeout_raises": True,
                    "x_file_stream_transmit_interval": self._options.upload_interval_s,
                },
                self._login,
            )
        except wandb.errors.UsageError as error:
            raise PermanentError(f"W&B refuses the run of {site}: {error}") from error
        except Exception as error:
            raise TransientError(f"W&B run of {site} cannot be opened: {error}") from error
        self.url = run.url
        self._api = None
        self._rows_before = int((self._state(run) or {}).get("historyLineCount") or 0)
        self._session = Session(run, self._info, self._options)
        return self._session

    def _drop(self) -> None:
        """Let go of a run whose service is gone; the next use opens it again."""
        self._session = None
        self._api = None
        stop_service(self._options.finish_timeout_s)

    def _await_artifacts(self, session: Session, deadline: float) -> None:
        while session.artifacts:
            handle = session.artifacts[0]._save_handle
            if handle is not None:
                try:
                    result = handle.wait_or(timeout=max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    raise TransientError("W&B did not confirm an artifact in time") from None
                if message := result.response.log_artifact_response.error_message:
                    raise TransientError(f"W&B did not take an artifact: {message}")
            session.artifacts.pop(0)

    def _missing(self, session: Session) -> str | None:
        """Return what the server lacks of what was handed to the SDK; None when it has everything."""
        state = self._state(session.run)
        if state is None:
            return "the run"
        rows = int(state.get("historyLineCount") or 0) - self._rows_before
        if rows < session.rows:
            return f"{session.rows - rows} rows"
        if session.config_changed:
            config = json.loads(state.get("config") or "{}")
            if (config.get(CONFIG_ENTRY) or {}).get("value") != session.config:
                return "the config"
            session.config_changed = False
        return self._missing_file(session)

    def _missing_file(self, session: Session) -> str | None:
        while session.files:
            names = list(session.files)[:_FILES_AT_ONCE]
            data = self._ask(session.run, _FILES_QUERY, names=names, n=len(names))
            edges = ((data.get("project") or {}).get("run") or {}).get("files", {}).get("edges", [])
            held = {edge["node"]["name"]: edge["node"] for edge in edges}
            for name in names:
                node = held.get(name)
                if node is None or int(node["sizeBytes"]) != session.files[name]:
                    return name
                del session.files[name]
        return None

    def _state(self, run: Any) -> dict[str, Any] | None:
        data = self._ask(run, _STATE_QUERY)
        bucket = (data.get("model") or {}).get("bucket")
        return dict(bucket) if bucket is not None else None

    def _ask(self, run: Any, query: str, **variables: Any) -> dict[str, Any]:
        from wandb.apis.public.service_api import ServiceApi

        if self._api is None:
            self._api = ServiceApi(settings=run.settings, timeout=_QUERY_TIMEOUT_S)
        path = {"entity": run.entity, "project": run.project, "name": run.id}
        try:
            answer: dict[str, Any] = self._api.execute_graphql(query, {**path, **variables})
        except Exception as error:
            raise TransientError(f"W&B does not say what it has: {error}") from error
        return answer
