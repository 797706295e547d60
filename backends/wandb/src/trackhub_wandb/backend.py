# SPDX-License-Identifier: Apache-2.0
"""The backend that the entry point names."""

from __future__ import annotations

import logging
import shlex
import socket
from typing import Any

import msgspec

from trackhub.spi import (
    Backend,
    BackendContext,
    BackendRun,
    Capabilities,
    InvalidOptionError,
    KeyRule,
    Kind,
    Redelivery,
    Results,
    RunInfo,
)
from trackhub_wandb.login import Mode, chosen_mode, find_login, require_login, verify_login
from trackhub_wandb.offline import OfflineRun, offline_folders
from trackhub_wandb.online import OnlineRun
from trackhub_wandb.options import WandBOptions
from trackhub_wandb.sdk import QUIET_SETTINGS, Login, import_sdk, stop_service
from trackhub_wandb.server import Server

__all__ = ["WandBBackend"]

_log = logging.getLogger(__name__)

_FOLDER = "wandb"
_DEFAULT_PROJECT = "trackhub"
_PREFLIGHT_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 0.5

_OFFLINE = Capabilities(
    kinds=frozenset(
        {
            Kind.METRICS,
            Kind.PARAMS,
            Kind.TAGS,
            Kind.TEXT,
            Kind.IMAGE,
            Kind.HISTOGRAM,
            Kind.TABLE,
            Kind.ARTIFACT,
        }
    ),
    redelivery=Redelivery.REBUILD,
    nonfinite=True,
    late_steps=True,
    changing_params=True,
    # Source: W&B's documentation, "Experiments limits and performance", asks for metric names below 300 characters.
    key_rule=KeyRule(max_chars=299, chars=""),
)
_ONLINE = msgspec.structs.replace(_OFFLINE, redelivery=Redelivery.IDEMPOTENT)


class WandBBackend(Backend[WandBOptions]):
    """One W&B run per site, named after it, in a group named after the job.

    ``capabilities`` are those of the offline mode; an instance that writes online replaces them, at the latest in
    ``preflight``, where the mode is decided if the options leave it open.
    """

    spi = 1
    contract = 1
    capabilities = _OFFLINE

    def __init__(self, options: WandBOptions, context: BackendContext) -> None:
        super().__init__(options, context)
        if options.step_metric == options.round_metric:
            raise InvalidOptionError("wandb.round_metric: must differ from step_metric")
        self._options = options
        self._mode: Mode | None = None
        self._login: Login | None = None
        self._server: Server | None = None
        self._runs: list[OfflineRun | OnlineRun] = []
        self._results: dict[str, Results] = {}
        # W&B puts its files into <root>/wandb, and the receiver calls this backend's folder that.
        folder = context.workdir.absolute()
        self._root = folder.parent if folder.name == _FOLDER else folder
        if options.mode is not None:
            self._set_mode(options.mode)

    def preflight(self) -> None:
        """Decide the mode, and check that it can be used here."""
        mode = self._decide()
        self._check_settings()
        if mode == "online":
            self._login = require_login(self._options)
            verify_login(self._options, self._login, _PREFLIGHT_TIMEOUT_S)

    def open_run(self, info: RunInfo) -> BackendRun:
        """Open the W&B run of this site."""
        settings = self._run_settings(info)
        if self._decide() == "offline":
            offline = OfflineRun(info, self._options, settings, self._root / _FOLDER)
            self._runs.append(offline)
            return offline
        if self._server is None:
            self._server = Server(self._options, self._login or require_login(self._options))
        online = OnlineRun(info, self._options, settings, self._server)
        self._runs.append(online)
        if online.url:
            self._results[info.run_id] = Results(url=online.url)
        return online

    def results(self, info: RunInfo) -> Results | None:
        """Return the URL of an online run; the folder of an offline one, and the command that uploads it."""
        if info.run_id in self._results:
            return self._results[info.run_id]
        folders = offline_folders(self._root / _FOLDER, info.run_id)
        if not folders:
            return None
        # From there, since the paths of an artifact's files are relative to it.
        paths = " ".join(shlex.quote(str(folder.relative_to(self._root))) for folder in folders)
        return Results(path=str(folders[-1]), command=f"cd {shlex.quote(str(self._root))} && wandb sync {paths}")

    def close(self) -> None:
        """End the SDK's service, and with it the uploads of runs that could not be ended. Waits for no peer."""
        for run in self._runs:
            run.abandon()
        stop_service(_CLOSE_TIMEOUT_S)

    def _set_mode(self, mode: Mode) -> None:
        self._mode = mode
        self.capabilities = _ONLINE if mode == "online" else _OFFLINE

    def _decide(self) -> Mode:
        if self._mode is None:
            mode = chosen_mode(self._options)
            if mode is None:
                self._login = find_login(self._options)
                mode = "online" if self._login is not None else "offline"
                if mode == "offline":
                    _log.warning(
                        "W&B: no login was found on %s, so runs are recorded OFFLINE in %s. To record online, run "
                        "`wandb login` there, or set WANDB_API_KEY for this process.",
                        socket.gethostname(),
                        self._root / _FOLDER,
                    )
            self._set_mode(mode)
        assert self._mode is not None
        return self._mode

    def _check_settings(self) -> None:
        wandb = import_sdk()
        ours = {*QUIET_SETTINGS, "mode", "run_id", "run_name", "resume", "reinit", "root_dir", "api_key"} - {"silent"}
        if taken := sorted(ours & set(self._options.settings)):
            raise InvalidOptionError(f"wandb.settings: {', '.join(taken)} cannot be set here")
        try:
            wandb.Settings(**self._options.settings)
        except (ValueError, TypeError, wandb.errors.UsageError) as error:
            raise InvalidOptionError(f"wandb.settings: {error}") from error

    def _run_settings(self, info: RunInfo) -> dict[str, Any]:
        options = self._options
        # From the environment and W&B's own settings files. The server is asked for a run under its full name before
        # the SDK opens it, so entity and project must be known, not left to the SDK.
        found = import_sdk().sdk.wandb_setup.singleton().settings
        chosen: dict[str, Any] = {
            "project": options.project or options.settings.get("project") or found.project or _DEFAULT_PROJECT,
            "entity": options.entity or options.settings.get("entity") or found.entity,
            "run_group": options.group or options.settings.get("run_group") or found.run_group or info.job.id,
            "run_job_type": options.job_type,
            "run_notes": options.notes,
            "run_tags": tuple(options.tags) or None,
        }
        return {
            **QUIET_SETTINGS,
            **options.settings,
            **{name: value for name, value in chosen.items() if value is not None},
            "run_id": info.run_id,
            "run_name": info.site,
            "reinit": "create_new",
            "root_dir": str(self._root),
        }
