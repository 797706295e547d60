# SPDX-License-Identifier: Apache-2.0
"""The backend class: it chooses the store, checks it before training, opens runs, and says where they can be seen.

The lane calls it. It gives the runs to `JobRuns` and the writing to `MLflowRun`.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from trackhub.spi import (
    Backend,
    BackendContext,
    Capabilities,
    ConfigError,
    ConfirmedBy,
    Credentials,
    JobInfo,
    Kind,
    Redelivery,
    Results,
    RunInfo,
    Side,
)
from trackhub_mlflow.flat_params import stored_text
from trackhub_mlflow.job_runs import JobRuns
from trackhub_mlflow.mlflow_run import MLflowRun
from trackhub_mlflow.naming import KEY_RULE, NOTE_TAG, SUMMARY_RULE, TAG_RULE, job_tag_name
from trackhub_mlflow.options import MLflowOptions, server_url, sqlite_path
from trackhub_mlflow.rest_store import RestStore
from trackhub_mlflow.sqlite_store import ARTIFACTS, SqliteStore, sqlite_uri
from trackhub_mlflow.store import Experiment, SetupError, Store, StoredRun, restore_command

__all__ = ["MLflowBackend"]

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


_MOVED_OPTIONS = {
    "kw_args": "Of FLARE's kw_args, experiment_name is the option `experiment_name`, run_name is "
    "`add_tracking(name=...)`, and experiment_tags and run_tags are the option `run_tags`.",
    "artifact_location": "Leave it out: an experiment's artifacts are in the store that `tracking_uri` names. In an "
    "SQLite store they are in the folder `mlartifacts` beside it.",
    "buffer_flush_time": "Leave it out: the limits `linger_s` and `flush_s` of add_tracking say how long records wait.",
}
"""Arguments of FLARE's receiver, and what to use in place of each."""


class MLflowBackend(Backend[MLflowOptions]):
    """Writes one MLflow run per site below one parent run per job, into a store of the job's own or on a server.

    MLflow changes some values. This is their canonical form, beyond what ``capabilities`` say:

    - Times are whole milliseconds. A point that agrees with an earlier one of its run in key, step, value and
      millisecond is stored a millisecond later.
    - Infinities become the largest finite floats. SQLite has no negative zero.
    - Final values are tags such as ``summary.best``, with JSON as their text.
    - Params are text, and nested ones are joined by dots.
    - A NUL in the text of a param or tag becomes ``␀`` (U+2400), since PostgreSQL refuses it.
    - The federated round is not stored.
    """

    spi = 1
    contract = 1
    moved_options = _MOVED_OPTIONS
    capabilities = Capabilities(
        kinds=frozenset(Kind) - {Kind.GAP},
        redelivery=Redelivery.IDEMPOTENT,
        nonfinite=True,
        late_steps=True,
        any_order=True,
        confirmed_by=ConfirmedBy.WRITE,
        key_rule=KEY_RULE,
        key_rules={Kind.TAGS: TAG_RULE, Kind.SUMMARY: SUMMARY_RULE},
    )
    credentials = Credentials(
        ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"), host_variables=("MLFLOW_TRACKING_URI",)
    )

    def __init__(self, options: MLflowOptions, context: BackendContext) -> None:
        """Choose the store. Nothing is opened or sent yet."""
        super().__init__(options, context)
        self._file = _store_file(options, context)
        self._store: Store
        if self._file is None:
            self._store = RestStore(options.tracking_uri, timeout_s=options.timeout_s)
            # Only a server gets files beside metrics. In a file, both threads would wait for SQLite's lock.
            files = frozenset({Kind.IMAGE, Kind.ARTIFACT})
            self.capabilities = msgspec.structs.replace(type(self).capabilities, files_beside=files)
        else:
            is_own = Path(os.path.abspath(self._file)).is_relative_to(os.path.abspath(context.run_folder))
            self._store = SqliteStore(self._file, is_own=is_own)
        self._stored_runs: dict[str, StoredRun] = {}
        self._job_runs = JobRuns(self._store, self._experiment, _common_tags(options, context.job))

    def preflight(self) -> None:
        """Check that the store can be used. Create an SQLite store, and the experiment, if they are not there.

        Raises:
            ConfigError: the login, the server or the experiment is wrong.
            TransientError: the server cannot be reached now.
        """
        try:
            self._check_artifact_root(self._experiment())
        except SetupError as error:
            raise ConfigError(f"mlflow: {error}") from error

    def open_run(self, info: RunInfo) -> MLflowRun:
        """Open a site's run. The first call also opens the job's parent run, which is the federation run.

        Raises:
            TransientError: the store cannot be used now, or somebody deleted the run.
        """
        run = self._job_runs.open_run(info)
        self._stored_runs[info.run_id] = run
        return MLflowRun(self._store, run, info, self._job_runs)

    def results(self, info: RunInfo) -> Results | None:
        """Return the run's page on the server, or the command and the address of MLflow's UI on the SQLite store.

        MLflow's UI looks for the artifacts in the folder where it is started, so the command changes to the store's
        folder. The run folder may be moved as a whole, and the store's folder alone as well.
        """
        run = self._stored_runs.get(info.run_id)
        url = None if run is None else self._store.run_url(run)
        if self._file is None:
            base, _ = server_url(self.options.tracking_uri)
            return Results(url=url or base)
        folder = self.context.shown(self._file.parent)
        store = shlex.quote(sqlite_uri(Path(self._file.name)))
        command = f"mlflow ui --backend-store-uri {store} --artifacts-destination ./{ARTIFACTS}"
        if self.context.side == Side.CLIENT:
            command += " --port 0"  # MLflow then takes a free port and prints it, since each site has a store to show
            url = None
        if folder != ".":
            command = f"cd {shlex.quote(folder)} && {command}"
        return Results(url, self.context.shown(self._file), command)

    def close(self) -> None:
        """Close connections and files. The parent run has ended already, with the last of its runs."""
        self._store.close()

    def _experiment(self) -> Experiment:
        name = self.options.experiment_name
        experiment = self._store.experiment(name)
        if not experiment.active:
            raise SetupError(
                f"the experiment {name!r} was deleted, and its name cannot be used again. Restore it by "
                f"`{restore_command(experiment.id)}`, or set the option experiment_name"
            )
        return experiment

    def _check_artifact_root(self, experiment: Experiment) -> None:
        """Raise SetupError if the server sends its clients to an artifact folder that only its own machine has."""
        root = urlsplit(experiment.artifact_root)
        if self._file is not None or root.scheme not in ("", "file"):
            return
        if urlsplit(self.options.tracking_uri).hostname not in _LOOPBACK and not os.path.isdir(root.path):
            raise SetupError(
                f"the experiment {self.options.experiment_name!r} stores artifacts in {experiment.artifact_root}, a "
                "folder that this machine does not have. Start the server with --serve-artifacts, use another "
                "experiment, or mount the folder"
            )


def _store_file(options: MLflowOptions, context: BackendContext) -> Path | None:
    """Return the absolute path of the SQLite store; None for a server."""
    uri = options.tracking_uri
    if uri.startswith(("http://", "https://")):
        return None
    file = sqlite_path(uri, context.run_folder) if uri else context.workdir / "mlflow.db"
    return file.absolute()


def _common_tags(options: MLflowOptions, job: JobInfo) -> dict[str, str]:
    """Return the tags that every run gets: the job's tags and description. The options may replace them."""
    tags = {job_tag_name(tag): "" for tag in job.tags if tag}  # the UI shows a tag without a value as its name alone
    if job.notes:
        tags[NOTE_TAG] = job.notes
    tags |= {job_tag_name(key): value for key, value in options.run_tags.items()}
    if options.note:
        tags[NOTE_TAG] = options.note
    return {key: stored_text(value) for key, value in tags.items()}
