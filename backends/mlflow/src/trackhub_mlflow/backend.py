# SPDX-License-Identifier: Apache-2.0
"""The backend: which store is used, whether it can be, and how its runs are opened and shown."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from urllib.parse import urlsplit

from trackhub.spi import (
    Backend,
    BackendContext,
    Capabilities,
    ConfigError,
    ConfirmedBy,
    KeyRule,
    Kind,
    Redelivery,
    Results,
    RunInfo,
)
from trackhub_mlflow.group import Group
from trackhub_mlflow.naming import KEY_CHARS, MAX_NAME_CHARS, NOTE_TAG, tag_name
from trackhub_mlflow.options import MLflowOptions, server_url, sqlite_path
from trackhub_mlflow.rest import RestStore
from trackhub_mlflow.run import MLflowRun
from trackhub_mlflow.sqlite import ARTIFACTS, SqliteStore
from trackhub_mlflow.store import Experiment, Pair, SetupError, Store, StoredRun

__all__ = ["MLflowBackend"]

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class MLflowBackend(Backend[MLflowOptions]):
    """Writes one MLflow run per site below one parent run per job, into a store of the job's own or on a server.

    Canonical form, beyond what ``capabilities`` say: times are whole milliseconds, and a point that agrees with an
    earlier one of its run in key, step, value and millisecond is stored a millisecond later. Infinities become the
    largest finite floats, and SQLite has no negative zero. Params are text, nested ones joined by dots. The federated
    round is not stored.
    """

    spi = 1
    contract = 1
    capabilities = Capabilities(
        kinds=frozenset(Kind) - {Kind.GAP},
        redelivery=Redelivery.IDEMPOTENT,
        nonfinite=True,
        late_steps=True,
        confirmed_by=ConfirmedBy.WRITE,
        key_rule=KeyRule(max_chars=MAX_NAME_CHARS, chars=KEY_CHARS),
    )

    def __init__(self, options: MLflowOptions, context: BackendContext) -> None:
        """Choose the store; nothing is opened or sent yet."""
        super().__init__(options, context)
        self._options = options
        self._file: Path | None = None
        self._store: Store
        if options.tracking_uri.startswith(("http://", "https://")):
            self._store = RestStore(options.tracking_uri, timeout_s=options.timeout_s)
        else:
            self._file = (
                sqlite_path(options.tracking_uri, context.workdir.parent)
                if options.tracking_uri
                else context.workdir / "mlflow.db"
            ).absolute()
            self._store = SqliteStore(self._file)
        self._seen: dict[str, StoredRun] = {}
        tags = [Pair(tag_name(key), value) for key, value in options.run_tags.items()]
        if options.note:
            tags.append(Pair(NOTE_TAG, options.note))
        self._group = Group(self._store, self._experiment, tags)

    def preflight(self) -> None:
        """Check that the store can be used, creating it if it is a file, and the experiment if there is none.

        Raises:
            ConfigError: the login, the server or the experiment is wrong.
            TransientError: the server cannot be reached now.
        """
        try:
            self._check_artifact_root(self._experiment())
        except SetupError as error:
            raise ConfigError(f"mlflow: {error}") from error

    def open_run(self, info: RunInfo) -> MLflowRun:
        """Open the site's run and, if this is the job's first, its parent run."""
        run = self._group.open_run(info)
        self._seen[info.run_id] = run
        return MLflowRun(self._store, run, info, self._group)

    def results(self, info: RunInfo) -> Results | None:
        """Return the run's page on the server, or the command that starts MLflow's UI on the job's store.

        The command is the one to use in the folder, wherever that is moved.
        """
        if self._file is None:
            run = self._seen.get(info.run_id)
            base, _ = server_url(self._options.tracking_uri)
            return Results(url=base if run is None else self._store.run_url(run))
        folder = self._file.parent
        store = shlex.quote(f"sqlite:///{self._file.name}")
        command = f"mlflow ui --backend-store-uri {store} --artifacts-destination ./{ARTIFACTS}"
        return Results(path=str(self._file), command=f"cd {shlex.quote(str(folder))} && {command}")

    def close(self) -> None:
        """Close connections and files. The parent run has ended with the last of its runs."""
        self._store.close()

    def _experiment(self) -> Experiment:
        name = self._options.experiment_name
        experiment = self._store.experiment(name)
        if not experiment.active:
            raise SetupError(
                f"the experiment {name!r} was deleted, which keeps its name taken. Restore it by `mlflow experiments "
                f"restore --experiment-id {experiment.id}`, or set the option experiment_name"
            )
        return experiment

    def _check_artifact_root(self, experiment: Experiment) -> None:
        """Find a server that would have its clients store artifacts in a folder that is only there on its machine."""
        root = urlsplit(experiment.artifact_root)
        if self._file is not None or root.scheme not in ("", "file"):
            return
        if urlsplit(self._options.tracking_uri).hostname not in _LOOPBACK and not os.path.isdir(root.path):
            raise SetupError(
                f"the experiment {self._options.experiment_name!r} stores artifacts in {experiment.artifact_root}, a "
                "folder that this machine does not have. Start the server with --serve-artifacts, use another "
                "experiment, or mount the folder"
            )
