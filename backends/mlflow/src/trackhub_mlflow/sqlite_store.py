# SPDX-License-Identifier: Apache-2.0
"""The MLflow store in an SQLite file, written without a server by MLflow's own classes.

The backend uses it if no server is configured. The artifacts are in the folder ``mlartifacts`` beside the file. Both
can be moved: runs name their artifacts ``mlflow-artifacts:/…``, as on a server. MLflow itself would store an absolute
path. ``mlflow ui``, started beside the file, looks for the artifacts in ``./mlartifacts``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trackhub.spi import TransientError, make_folder, open_file
from trackhub_mlflow.artifact_upload_by_client import put_by_client
from trackhub_mlflow.store import TRAINING_MODE, Experiment, Pair, Point, RefusedError, SetupError, StoredRun

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

__all__ = ["ARTIFACTS", "SqliteStore", "sqlite_uri"]

ARTIFACTS = "mlartifacts"
"""The folder of the artifacts. Source: the default of ``mlflow server --artifacts-destination``, mlflow 3.17."""

_SCHEME = "mlflow-artifacts"
_WITH_DRIVER = "sqlite+pysqlite"
"""With a plain ``sqlite``, MLflow makes the folder of the file from the URI as it is, and so one named ``a%3Fb``."""
_PAGE = 1000
_NEVER = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST"})


def sqlite_uri(file: Path, scheme: str = "sqlite") -> str:
    """Return the URI by which the SQLAlchemy that is installed, and so MLflow, opens exactly this file.

    SQLAlchemy 2.1 decodes percent signs in the path and ends it at a question mark; 2.0 does not decode them. A path
    that is put in as it is would name another file, such as that of another job.

    Args:
        file: the store.
        scheme: ``sqlite``, with a driver or without.

    Raises:
        SetupError: this SQLAlchemy has no URI for the path.
    """
    import sqlalchemy

    uri = sqlalchemy.URL.create(scheme, database=str(file)).render_as_string()
    if sqlalchemy.make_url(uri).database != str(file):
        raise SetupError(
            f"SQLAlchemy {sqlalchemy.__version__} cannot name the file {file} in a URI. Choose a folder without "
            "question marks and percent signs, or upgrade SQLAlchemy to 2.1 or later"
        )
    return uri


class SqliteStore:
    """The store in one SQLite file, created when it is first used.

    It implements `Store`, whose docstrings say what each method does, takes and raises.
    """

    def __init__(self, file: Path, *, is_own: bool = True) -> None:
        """Keep the path. Nothing is opened yet.

        Args:
            file: the store.
            is_own: True if the store is in the job's own folder. Such a folder may come from anybody. So the artifact
                places that the store names must then be beside the store.
        """
        self._file = file
        self._is_own = is_own
        self._open_store: SqlAlchemyStore | None = None

    def experiment(self, name: str) -> Experiment:
        """Return the experiment of this name. Create it if there is none."""
        from mlflow.entities import ExperimentTag
        from mlflow.exceptions import MlflowException

        with self._store() as store:
            found = store.get_experiment_by_name(name)
            if found is None:
                tags = [ExperimentTag("mlflow.experimentKind", "custom_model_development")]
                try:
                    store.create_experiment(name, tags=tags)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":  # otherwise another receiver was quicker
                        raise
                found = store.get_experiment_by_name(name)
            return Experiment(found.experiment_id, found.lifecycle_stage == "active", found.artifact_location)

    def is_experiment_deleted(self, experiment_id: str) -> bool:
        """Return whether somebody deleted this experiment."""
        with self._store() as store:
            return bool(store.get_experiment(experiment_id).lifecycle_stage != "active")

    def create_run(self, experiment_id: str, name: str, start_ms: int, tags: Sequence[Pair]) -> StoredRun:
        """Create a run and return it."""
        from mlflow.entities import RunTag

        with self._store() as store:
            return _run(store.create_run(experiment_id, "", start_ms, [RunTag(t.key, t.value) for t in tags], name))

    def find_runs(self, experiment_id: str, tag: str, value: str, *, deleted: bool = False) -> list[StoredRun]:
        """Return all runs that have this tag: the active ones, or those that somebody deleted."""
        from mlflow.entities import ViewType

        view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        runs: list[StoredRun] = []
        token: str | None = None
        with self._store() as store:
            while True:
                query = f"tags.`{tag}` = '{value}'"
                page = store.search_runs([experiment_id], query, view, _PAGE, None, token)
                runs += map(_run, page)
                token = page.token
                if not token:
                    return runs

    def run(self, run_id: str) -> StoredRun | None:
        """Return the run, or None if the store has none of this id."""
        from mlflow.exceptions import MlflowException

        with self._store() as store:
            try:
                return _run(store.get_run(run_id))
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

    def update_run(self, run_id: str, status: str, end_ms: int | None) -> None:
        """Set a run's status and the time of its end."""
        from mlflow.entities import RunStatus

        with self._store() as store:
            store.update_run_info(run_id, RunStatus.from_string(status), end_ms, None)

    def log_batch(self, run_id: str, points: Sequence[Point], params: Sequence[Pair], tags: Sequence[Pair]) -> None:
        """Store points, params and tags of a run. They must keep MLflow's limits for one batch."""
        from mlflow.entities import Metric, Param, RunTag

        with self._store() as store:
            store.log_batch(
                run_id,
                [Metric(p.key, p.value, p.timestamp, p.step) for p in points],
                [Param(p.key, p.value) for p in params],
                [RunTag(t.key, t.value) for t in tags],
            )

    def delete_tag(self, run_id: str, key: str) -> None:
        """Remove a tag. Do nothing if the run does not have it."""
        from mlflow.exceptions import MlflowException

        with self._store() as store:
            try:
                store.delete_tag(run_id, key)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def delete_run(self, run_id: str) -> None:
        """Mark a run as deleted, as MLflow's UI does."""
        with self._store() as store:
            store.delete_run(run_id)

    def put_artifact(self, run: StoredRun, path: str, content: bytes | Path) -> None:
        """Store one artifact of a run. An artifact that has this path already is replaced."""
        target = self._local(run, path)
        if target is None:
            if self._is_own or urlsplit(run.artifact_uri).scheme == _SCHEME:
                raise RefusedError(
                    f"the store {self._file} says that the run's artifacts are at {run.artifact_uri}, which is not in "
                    f"the folder {ARTIFACTS} beside it"
                )
            put_by_client(run.artifact_uri, path, content)
            return
        # Write another file and rename it, so that a killed process leaves no half of the artifact under its name.
        part = target.with_name(f".{uuid.uuid4().hex}.part")
        with _disk_errors(f"artifact {path}"):
            make_folder(target.parent)
            try:
                _make_file(part)
                if isinstance(content, Path):
                    shutil.copyfile(content, part)
                else:
                    part.write_bytes(content)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)

    def artifact_sizes(self, run: StoredRun, folder: str) -> dict[str, int]:
        """Return the names in a folder of a run's artifacts with their sizes in bytes; a folder has the size -1."""
        path = self._local(run, folder)
        if path is None or not path.is_dir():
            return {}
        with _disk_errors(f"artifact folder {path}"):
            return {file.name: -1 if file.is_dir() else file.stat().st_size for file in path.iterdir()}

    def artifact_sha256(self, run: StoredRun, path: str) -> str:
        """Return the SHA-256 of an artifact's content, in hex."""
        file = self._local(run, path)
        if file is None:
            return ""
        with _disk_errors(f"artifact {path}"), file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    def run_url(self, run: StoredRun) -> str:
        """Return the address at which ``mlflow ui``, on its usual port, shows the charts of the jobs in the store.

        It is the same for all runs of a job, so that people see one address beside the command.
        """
        return f"http://127.0.0.1:5000/#/experiments/{run.experiment_id}/runs?{TRAINING_MODE}&compareRunsMode=CHART"

    def close(self) -> None:
        """Close the file. The next call opens it again."""
        if self._open_store is not None:
            self._open_store.engine.dispose()
            self._open_store = None

    def _local(self, run: StoredRun, path: str) -> Path | None:
        """Return the file of an artifact; None if somebody gave the experiment another place for its artifacts."""
        root = urlsplit(run.artifact_uri)
        if root.scheme != _SCHEME or root.netloc or ".." in root.path.split("/"):
            return None
        return self._file.parent.joinpath(ARTIFACTS, root.path.strip("/"), path)

    @contextmanager
    def _store(self) -> Iterator[SqlAlchemyStore]:
        """Give MLflow's store, open it if necessary, and translate its errors to those of `Store`."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if self._open_store is None:
                self._open_store = self._opened()
            yield self._open_store
        except MlflowException as error:
            if error.error_code in _NEVER:
                raise RefusedError(f"{error.error_code}: {error.message}"[:500]) from error
            raise TransientError(f"MLflow store {self._file}: {error.error_code}: {error.message}"[:500]) from error
        except SQLAlchemyError as error:
            raise TransientError(
                f"MLflow store {self._file}: {error}; see whether another program holds it"[:500]
            ) from error

    def _opened(self) -> SqlAlchemyStore:
        from mlflow.exceptions import MlflowException
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        with _disk_errors(f"MLflow store {self._file}"):
            if self._file.exists():
                self._check()
            else:
                make_folder(self._file.parent)
                _create(self._file)
        try:
            # The root has no host and one slash: append_to_uri_path makes it mlflow-artifacts:/EXPERIMENT.
            return SqlAlchemyStore(sqlite_uri(self._file, _WITH_DRIVER), "mlflow-artifacts:/")
        except MlflowException as error:
            if "schema" in str(error):
                raise SetupError(
                    f"another version of MLflow made the store {self._file}. Upgrade it as MLflow says, or name "
                    f"another file in tracking_uri. MLflow says: {error.message}"
                ) from error
            raise

    def _check(self) -> None:
        """Raise SetupError if the file is not an SQLite file. MLflow would try to open it for 100 s."""
        try:
            with contextlib.closing(
                sqlite3.connect(f"{self._file.absolute().as_uri()}?mode=rw", uri=True)
            ) as connection:
                connection.execute("PRAGMA schema_version").fetchone()
        except sqlite3.OperationalError as error:
            raise TransientError(
                f"MLflow store {self._file} cannot be opened: {error}; its folder must be writable and have free space"
            ) from error
        except sqlite3.DatabaseError as error:
            raise SetupError(
                f"{self._file} is not an SQLite file: {error}. Move it away, or name another file in tracking_uri"
            ) from error


def _create(file: Path) -> None:
    """Create an empty MLflow store, completely or not at all. This takes about a second.

    MLflow builds the tables by some fifty migrations. They take 5 s and more, because SQLite waits for the disk each
    time. Here they run without these waits on a temporary file, which then gets its name.
    """
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - it registers the tables
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables

    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    engine = sqlalchemy.create_engine(sqlite_uri(part))

    @sqlalchemy.event.listens_for(engine, "connect")
    def without_waiting(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")

    try:
        _make_file(part)  # SQLite's own files beside it get its mode
        with _quiet("alembic", "mlflow.store.db.utils"):
            _initialize_tables(engine)
        engine.dispose()
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        try:
            os.link(part, file)  # a rename would replace a store that another process has just put there
        except FileExistsError:
            pass
        except OSError:  # this file system has no links
            part.replace(file)
    finally:
        engine.dispose()
        part.unlink(missing_ok=True)


def _make_file(file: Path) -> None:
    """Make an empty file, for those who may use its folder."""
    os.close(open_file(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL))


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence these loggers, which would report each of some fifty migrations."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransientError(
            f"{what} cannot be written or read: {error}; its folder must be writable and have free space"
        ) from error


def _run(run: Run) -> StoredRun:
    return StoredRun(
        id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        status=run.info.status,
        start_ms=run.info.start_time or 0,
        end_ms=run.info.end_time or 0,
        artifact_uri=run.info.artifact_uri or "",
        active=run.info.lifecycle_stage == "active",
        tags=run.data.tags,
        params=run.data.params,
    )
