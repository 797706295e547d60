# SPDX-License-Identifier: Apache-2.0
"""What this backend needs of an MLflow store, whether a server or a file, and what it takes for failure there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from trackhub.spi import TransientError

__all__ = ["Experiment", "Pair", "Point", "RefusedError", "SetupError", "Store", "StoredRun", "deleted_error"]


class SetupError(TransientError):
    """The store can be reached, but not be used like this: login, certificate, schema, a server of another kind.

    Once training has begun, somebody may still mend it while the records wait. Before, it is a wrong configuration.
    """


def deleted_error(run_id: str) -> TransientError:
    """Return the error for a run that somebody deleted in MLflow, which may be undone."""
    return TransientError(
        f"MLflow run {run_id} was deleted; its records wait. Restore it in the UI, or by "
        f"`mlflow runs restore --run-id {run_id}`"
    )


class RefusedError(Exception):
    """MLflow says that it will never store what this request holds."""


class Point(msgspec.Struct, frozen=True, gc=False):
    """One metric value. The fields are named as in MLflow's REST API, so that it encodes as such.

    Attributes:
        timestamp: milliseconds since 1970, UTC.
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
        active: False once somebody deleted it, which keeps its name taken.
        artifact_root: the URI below which the artifacts of its runs lie.
    """

    id: str
    active: bool
    artifact_root: str


@dataclass(frozen=True, slots=True)
class StoredRun:
    """An MLflow run as the store has it.

    Attributes:
        status: ``RUNNING``, ``FINISHED``, ``FAILED``, ``KILLED`` or ``SCHEDULED``.
        start_ms, end_ms: milliseconds since 1970, UTC; end_ms is 0 while there is none.
        active: False once somebody deleted it.
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
    """An MLflow store. Every method may wait for it, and raises TransientError, SetupError or RefusedError.

    Used from one thread. ``close`` releases what it holds; the next call opens it again.
    """

    def experiment(self, name: str) -> Experiment:
        """Return the experiment of this name, created if there is none."""

    def create_run(self, experiment_id: str, name: str, start_ms: int, tags: Sequence[Pair]) -> StoredRun:
        """Create a run, whatever runs there are."""

    def find_runs(self, experiment_id: str, tag: str, value: str, *, deleted: bool = False) -> list[StoredRun]:
        """Return all runs with this tag that nobody deleted, or those that somebody did.

        The value must not hold a quote.
        """

    def run(self, run_id: str) -> StoredRun | None:
        """Return the run, or None if the store has none of this id."""

    def update_run(self, run_id: str, status: str, end_ms: int | None) -> None:
        """Set how the run stands; ``end_ms`` None leaves the time of its end as it is."""

    def log_batch(self, run_id: str, points: Sequence[Point], params: Sequence[Pair], tags: Sequence[Pair]) -> None:
        """Store all this, within MLflow's limits for one batch."""

    def delete_tag(self, run_id: str, key: str) -> None:
        """Remove a tag, if the run has it."""

    def delete_run(self, run_id: str) -> None:
        """Mark a run as deleted, as MLflow's UI does."""

    def put_artifact(self, run: StoredRun, path: str, content: bytes | Path) -> None:
        """Store one artifact of a run, in place of what may be there."""

    def artifact_sizes(self, run: StoredRun, folder: str) -> dict[str, int]:
        """Return the names in a folder of a run's artifacts and their sizes in bytes, -1 for a folder."""

    def artifact_sha256(self, run: StoredRun, path: str) -> str:
        """Return the SHA-256 of an artifact's content, in hex."""

    def run_url(self, run: StoredRun) -> str | None:
        """Return where the run's page is, if a server shows it."""

    def close(self) -> None:
        """Release connections and files."""
