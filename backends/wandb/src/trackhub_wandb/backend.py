# SPDX-License-Identifier: Apache-2.0
"""The backend class that the entry point names.

It decides the mode with `mode_and_login`. It opens runs of `offline` or `online` with settings from the options.
"""

from __future__ import annotations

import logging
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trackhub.spi import (
    ANY_KEY,
    Backend,
    BackendContext,
    BackendRun,
    Capabilities,
    ConfirmedBy,
    Credentials,
    InvalidOptionError,
    JobInfo,
    Kind,
    Redelivery,
    Results,
    RunInfo,
)
from trackhub_wandb.mode_and_login import Mode, chosen_mode, find_login, require_login, verify_login
from trackhub_wandb.naming import PARAM_RULE, TAG_RULE, row_rule, run_name, tag_text
from trackhub_wandb.offline import OfflineRun, is_uploaded, offline_folders
from trackhub_wandb.online import OnlineRun
from trackhub_wandb.options import WandBOptions
from trackhub_wandb.sdk_start_and_stop import QUIET_SETTINGS, Login, import_sdk, loaded_settings, stop_service
from trackhub_wandb.server_state import Server

__all__ = ["WandBBackend"]

_log = logging.getLogger(__name__)

_FOLDER = "wandb"
_DEFAULT_PROJECT = "trackhub"
_PREFLIGHT_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 0.5

_DECIDED = (QUIET_SETTINGS.keys() - {"silent"}) | {
    *("mode", "api_key", "base_url", "run_id", "run_name", "resume", "reinit", "root_dir"),
    *("fork_from", "resume_from", "launch", "launch_config_path", "sweep_id", "sweep_param_path", "sync_tensorboard"),
}
"""Fields of ``wandb.Settings`` that the backend decides itself."""

_KINDS = frozenset(
    {Kind.METRICS, Kind.PARAMS, Kind.TAGS, Kind.TEXT, Kind.IMAGE, Kind.HISTOGRAM, Kind.TABLE, Kind.ARTIFACT}
    | {Kind.SUMMARY}
)


def _capabilities(options: WandBOptions, mode: Mode) -> Capabilities:
    """Return what the backend can store in this mode, with these columns for step and round."""
    return Capabilities(
        kinds=_KINDS,
        redelivery=Redelivery.IDEMPOTENT if mode == "online" else Redelivery.REBUILD,
        confirmed_by=ConfirmedBy.FLUSH,
        nonfinite=True,
        late_steps=True,
        changing_params=True,
        probe=True,
        # The server takes an artifact at any time. A picture is part of a row, and rows must come in order.
        files_beside=frozenset({Kind.ARTIFACT}) if mode == "online" else frozenset(),
        key_rule=row_rule(options.step_metric, options.round_metric),
        # An artifact's key is a value in its metadata; `naming.artifact_name` makes its name.
        key_rules={Kind.PARAMS: PARAM_RULE, Kind.TAGS: TAG_RULE, Kind.ARTIFACT: ANY_KEY},
    )


_MOVED_OPTIONS = {
    "wandb_args": "Of FLARE's wandb_args, project, entity, group, job_type, notes and tags are options of their own. "
    "Its name is `add_tracking(name=...)`, its config is `Writer.log_params`, and the rest goes into `settings`.",
    "process_timeout": "Give `init_timeout_s`, `flush_timeout_s` or `finish_timeout_s`.",
}
"""Arguments of FLARE's receiver, and what to use in place of each."""


class WandBBackend(Backend[WandBOptions]):
    """Writes one W&B run per site. The run is named after job and site, and all runs of a job are in one group.

    The class declares the capabilities of the offline mode with the default options. An instance declares its own. If
    the options leave the mode open, ``preflight`` decides it.
    """

    spi = 1
    contract = 1
    moved_options = _MOVED_OPTIONS
    capabilities = _capabilities(WandBOptions(), "offline")
    credentials = Credentials(("WANDB_API_KEY",), ("WANDB_BASE_URL",), "https://api.wandb.ai")

    def __init__(self, options: WandBOptions, context: BackendContext) -> None:
        """Work out the folder, and the mode if the options say it. Nothing is imported or opened yet."""
        super().__init__(options, context)
        self.capabilities = _capabilities(options, options.mode or "offline")
        self._mode: Mode | None = options.mode
        self._login: Login | None = None
        self._server: Server | None = None
        self._runs: list[OfflineRun | OnlineRun] = []
        self._last_opened: dict[str, OfflineRun | OnlineRun] = {}  # by the run's id
        # W&B writes to <root>/wandb. That is this backend's folder if its entry point is named wandb, as usual.
        self._root = context.run_folder if context.workdir.name == _FOLDER else context.workdir

    def preflight(self) -> None:
        """Decide the mode, and check that it can be used here.

        Raises:
            ConfigError: there is no login for the mode online, the server rejects it, or a setting is wrong.
            TransientError: the server cannot be asked now.
        """
        mode = self._decide()
        self._check_settings()
        if mode == "online":
            self._login = require_login(self.options)
            verify_login(self.options, self._login, _PREFLIGHT_TIMEOUT_S)

    def open_run(self, info: RunInfo) -> BackendRun:
        """Open the W&B run of this site.

        Raises:
            TransientError: the SDK failed, or the server cannot be reached.
            PermanentError: the server refuses this run for good.
        """
        settings = self._run_settings(info)
        if self._decide() == "offline":
            run_folder = self.context.run_folder.absolute()
            return self._opened(info, OfflineRun(info, self.options, settings, self._wandb_dir, run_folder))
        if self._server is None:
            self._server = Server(self.options, self._login or require_login(self.options))
        return self._opened(info, OnlineRun(info, self.options, settings, self._server))

    def _opened(self, info: RunInfo, run: OfflineRun | OnlineRun) -> BackendRun:
        self._runs.append(run)
        self._last_opened[info.run_id] = run
        return run

    def results(self, info: RunInfo) -> Results | None:
        """Return the URL of an online run, or the folder of an offline run and the commands that show and upload it.

        While an offline run is open, there is no command that uploads it. ``wandb sync`` marks the folder as uploaded,
        and never uploads what is written to it afterwards.
        """
        run = self._last_opened.get(info.run_id)
        if isinstance(run, OnlineRun):
            return Results(url=run.url) if run.url else None
        found = offline_folders(self._wandb_dir, info.run_id)
        if not found:
            return None
        # It shows the runs in the terminal, without a login.
        commands = [f"wandb leet {shlex.quote(self.context.shown(self._wandb_dir))}"]
        if run is None or run.has_ended:
            left = [self.context.shown(folder) for folder in found if not is_uploaded(folder)]
            commands += [f"wandb sync {' '.join(map(shlex.quote, left))}"] if left else []
        return Results(path=self.context.shown(found[-1]), command="\n".join(commands))

    def close(self) -> None:
        """End the SDK's service, and so the uploads of runs that could not be ended. Does not wait for the server."""
        for run in self._runs:
            run.abandon()
        if self._server is not None:
            self._server.close()
        stop_service(_CLOSE_TIMEOUT_S)

    @property
    def _wandb_dir(self) -> Path:
        return self._root.absolute() / _FOLDER

    def _decide(self) -> Mode:
        if self._mode is None:
            mode = chosen_mode(self.options)
            if mode is None:
                self._login = find_login(self.options)
                mode = "online" if self._login is not None else "offline"
                if mode == "offline":
                    _log.warning(
                        "W&B: no login was found on %s, so runs are recorded OFFLINE in %s. `wandb leet` with this "
                        "folder shows them in a terminal. To record online, run `wandb login` there, or set "
                        "WANDB_API_KEY for this process. To record offline without this warning, give the option "
                        "mode='offline'",
                        socket.gethostname(),
                        self._wandb_dir,
                    )
            self._mode = mode
            self.capabilities = _capabilities(self.options, mode)
        return self._mode

    def _check_settings(self) -> None:
        wandb = import_sdk()
        if taken := sorted(_DECIDED & self.options.settings.keys()):
            raise InvalidOptionError(
                f"wandb.settings: the backend decides {', '.join(taken)} itself; leave them out, or use the option of "
                "the same name, if there is one"
            )
        try:
            wandb.Settings(**self.options.settings)
        except (ValueError, TypeError, wandb.errors.UsageError) as error:
            raise InvalidOptionError(f"wandb.settings: {error}. Give fields of wandb.Settings") from error

    def _run_settings(self, info: RunInfo) -> dict[str, Any]:
        options, extra = self.options, self.options.settings
        # Read the environment and W&B's own settings files. `online` asks the server for a run by its full name before
        # the SDK opens the run, so entity and project must be known here.
        with loaded_settings() as settings:
            found = settings.model_copy()
        chosen: dict[str, Any] = {
            "project": options.project or extra.get("project") or found.project or _DEFAULT_PROJECT,
            "entity": options.entity or extra.get("entity") or found.entity,
            "run_group": options.group or extra.get("run_group") or found.run_group or run_name(info.job.unique_name),
            "run_job_type": options.job_type,
            "run_notes": options.notes or extra.get("run_notes") or info.job.notes or None,
            "run_tags": self._tags(info.job, found.run_tags),
        }
        return {
            **QUIET_SETTINGS,
            **extra,
            **{name: value for name, value in chosen.items() if value is not None},
            "run_id": info.run_id,
            "run_name": run_name(info.display_name),
            "reinit": "create_new",
            "root_dir": str(self._root.absolute()),
        }

    def _tags(self, job: JobInfo, found: Sequence[str] | None) -> tuple[str, ...]:
        """Return every run's tags: the job's, and the options'. If the options have none: the environment's."""
        more = self.options.tags or self.options.settings.get("run_tags") or found or ()
        return tuple(dict.fromkeys(tag_text(tag) for tag in (*job.tags, *more) if tag))
