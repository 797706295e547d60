# SPDX-License-Identifier: Apache-2.0
"""The interface of an MLflow store: what the rest of this backend asks of it, and the errors that it raises.

`RestStore` implements it for a server and `SqliteStore` for a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from trackhub.spi import TransientError

__all__ = [
    "TRAINING_MODE",
    "Experiment",
    "Pair",
    "Point",
    "RefusedError",
    "SetupError",
    "Store",
    "StoredRun",
    "deleted_error",
    "restore_command",
    "root_cause",
]


TRAINING_MODE = "workflowType=machine_learning"
"""The part of an address by which MLflow's UI shows runs and charts. Without it, MLflow 3.17 begins with the pages for
GenAI traces, whatever the kind of the experiment is."""


class SetupError(TransientError):
    """The store answers, but cannot be used as configured: login, certificate, schema, a server of another kind.

    During preflight the backend turns it into a ConfigError. Later it is temporary: somebody may still repair the
    store, and the records wait.
    """


class RefusedError(Exception):
    """MLflow says that it will never store what this request holds."""


def deleted_error(store: Store, run: StoredRun) -> TransientError:
    """Return the error for a run that somebody deleted in MLflow, alone or with its experiment. Both can be undone.

    Raises:
        TransientError: the store cannot be asked now.
    """
    if store.is_experiment_deleted(run.experiment_id):
        return TransientError(
            f"MLflow experiment {run.experiment_id} was deleted with its run {run.id}, so the records wait. Restore it "
            f"with all its runs by `{restore_command(run.experiment_id)}`"
        )
    return TransientError(
        f"MLflow run {run.id} was deleted, so its records wait. Restore it in the UI, or by "
        f"`mlflow runs restore --run-id {run.id}`"
    )


def restore_command(experiment_id: str) -> str:
    """Return the command that undoes the deletion of an experiment, and of the runs that were deleted with it."""
    return f"mlflow experiments restore --experiment-id {experiment_id}"


def root_cause(error: BaseException) -> str:
    """Return the innermost error as text: requests and urllib3 wrap an error several times."""
    seen: list[BaseException] = [error]
    while len(seen) < 10:
        inner = seen[-1].__cause__ or seen[-1].__context__ or getattr(seen[-1], "reason", None)
        if not isinstance(inner, BaseException) or inner in seen:
            break
        seen.append(inner)
    return f"{type(seen[-1]).__name__}: {seen[-1]}"[:300]


class Point(msgspec.Struct, frozen=True, gc=False):
    """One metric value. Its fields are named as in MLflow's REST API, so that it is encoded as that API expects.

    Attributes:
        key: the metric's name.
        value: a number; it may be NaN, but not infinite.
        timestamp: milliseconds since 1970, UTC.
        step: the step, >= 0.
    """

    key: str
    value: float
    timestamp: int
    step: int


class Pair(msgspec.Struct, frozen=True, gc=False):
    """One param or tag."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Experiment:
    """An MLflow experiment.

    Attributes:
        id: MLflow's own id.
        active: False once somebody deleted it. Nobody else can use the name of a deleted experiment.
        artifact_root: the URI below which the artifacts of its runs lie.
    """

    id: str
    active: bool
    artifact_root: str


@dataclass(frozen=True, slots=True)
class StoredRun:
    """An MLflow run as the store has it.

    Attributes:
        id: MLflow's own id, which is not ``RunInfo.run_id``.
        experiment_id: the experiment that holds it.
        status: ``RUNNING``, ``FINISHED``, ``FAILED``, ``KILLED`` or ``SCHEDULED``.
        start_ms: milliseconds since 1970, UTC.
        end_ms: the same; 0 while the run has no end.
        artifact_uri: where its artifacts lie.
        active: False once somebody deleted it.
        tags: name to value.
        params: name to value.
    """

    id: str
    experiment_id: str
    status: str
    start_ms: int
    end_ms: int
    artifact_uri: str
    active: bool
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)


class Store(Protocol):
    """An MLflow store. Every method but ``run_url`` and ``close`` may block on the store.

    One thread uses it. With ``Capabilities.files_beside``, a second thread may use it at the same time.

    Raises:
        TransientError: by every method: the store cannot do it now.
        SetupError: by every method: the store cannot be used as configured.
        RefusedError: by every method: MLflow will never accept the request.
    """

    def experiment(self, name: str) -> Experiment:
        """Return the experiment of this name. Create it if there is none."""

    def is_experiment_deleted(self, experiment_id: str) -> bool:
        """Return whether somebody deleted this experiment."""

    def create_run(self, experiment_id: str, name: str, start_ms: int, tags: Sequence[Pair]) -> StoredRun:
        """Create a run and return it. MLflow chooses its id, so calling this twice creates two runs.

        Args:
            experiment_id: the experiment that holds it.
            name: what the UI calls it.
            start_ms: milliseconds since 1970, UTC.
            tags: its first tags.
        """

    def find_runs(self, experiment_id: str, tag: str, value: str, *, deleted: bool = False) -> list[StoredRun]:
        """Return all runs that have this tag.

        Args:
            experiment_id: the experiment to search.
            tag: the tag's name.
            value: its value, which must not hold a quote.
            deleted: return the runs that somebody deleted instead of the active ones.
        """

    def run(self, run_id: str) -> StoredRun | None:
        """Return the run, or None if the store has none of this id."""

    def update_run(self, run_id: str, status: str, end_ms: int | None) -> None:
        """Set a run's status and the time of its end.

        Args:
            run_id: which run.
            status: a status as in `StoredRun`.
            end_ms: milliseconds since 1970, UTC; None leaves the time of the end as it is.
        """

    def log_batch(self, run_id: str, points: Sequence[Point], params: Sequence[Pair], tags: Sequence[Pair]) -> None:
        """Store points, params and tags of a run. They must keep MLflow's limits for one batch.

        Args:
            run_id: which run.
            points: metric values.
            params: each name at most once.
            tags: a later value of a name wins.
        """

    def delete_tag(self, run_id: str, key: str) -> None:
        """Remove a tag. Do nothing if the run does not have it."""

    def delete_run(self, run_id: str) -> None:
        """Mark a run as deleted, as MLflow's UI does."""

    def put_artifact(self, run: StoredRun, path: str, content: bytes | Path) -> None:
        """Store one artifact of a run. An artifact that has this path already is replaced.

        Args:
            run: which run.
            path: the artifact's path within the run.
            content: the bytes, or the file that holds them.
        """

    def artifact_sizes(self, run: StoredRun, folder: str) -> dict[str, int]:
        """Return the names in a folder of a run's artifacts with their sizes in bytes; a folder has the size -1."""

    def artifact_sha256(self, run: StoredRun, path: str) -> str:
        """Return the SHA-256 of an artifact's content, in hex."""

    def run_url(self, run: StoredRun) -> str:
        """Return the address of a page with the run's charts."""

    def close(self) -> None:
        """Release connections and files. The next call opens them again."""
