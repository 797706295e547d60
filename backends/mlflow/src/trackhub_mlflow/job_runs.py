# SPDX-License-Identifier: Apache-2.0
"""The MLflow runs of one job: the parent run, and below it one run per site.

The backend has one `JobRuns`. It opens the runs, names and tags them, and ends them. The parent run is the job's
federation run (``RunInfo.parent``), and receivers on the server and at the clients share it. They agree on one parent
run by `find_or_create`. Only one receiver writes a site's run, so `JobRuns` finds or creates it by a simple search.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trackhub.spi import FEDERATION, RunInfo, RunKey, RunStatus
from trackhub_mlflow.flat_params import MAX_TAG_CHARS
from trackhub_mlflow.naming import digest
from trackhub_mlflow.shared_parent_run import (
    PENDING_TAG,
    find_or_create,
    is_settled,
    settle,
    settled_first,
    withdraw_unsettled,
)
from trackhub_mlflow.store import Experiment, Pair, Store, StoredRun, deleted_error

__all__ = ["NESTING_TAG", "PARENT_TAG", "RUN_TAG", "JobRuns"]

PARENT_TAG = "trackhub.job_id"
"""A tag of a job's parent run: a digest of ``RunInfo.parent`` without the side, since both sides share the run."""

RUN_TAG = "trackhub.run_id"
"""A tag of a site's run: ``RunInfo.run_id``."""

NESTING_TAG = "mlflow.parentRunId"
"""MLflow's own tag: the UI shows a run below the run that this tag names."""

_MAX_NAME_CHARS = 250  # Source: the column `runs.name`, mlflow 3.17
_ENDS = {
    RunStatus.FINISHED: "FINISHED",
    RunStatus.FAILED: "FAILED",
    RunStatus.ABORTED: "KILLED",
    RunStatus.KILLED: "KILLED",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a job's runs are: their experiment and their parent run."""

    experiment: Experiment
    parent: StoredRun
    identity: str


@dataclass(frozen=True, slots=True)
class _End:
    """How and when a run ended; ``end_ms`` is 0 if the time is not known."""

    status: str
    end_ms: int


class JobRuns:
    """One receiver's part in a job: the parent run, and the runs of the sites that the receiver writes.

    One thread uses it. Every method blocks on the store, raises what `Store` raises, and may then be called again.
    """

    def __init__(self, store: Store, find_experiment: Callable[[], Experiment], common_tags: Mapping[str, str]) -> None:
        """Keep the arguments. Nothing is read or created yet.

        Args:
            store: where the runs are.
            find_experiment: returns the experiment for the job's runs.
            common_tags: tags that every run gets when it is created.
        """
        self._store = store
        self._find_experiment = find_experiment
        self._common_tags = common_tags
        self._place: _Place | None = None
        self._open: set[str] = set()
        self._opened_sites: set[str] = set()
        self._parent_end: _End | None = None

    def open_run(self, info: RunInfo) -> StoredRun:
        """Return the run of a site, or the parent run for the federation. Create it if there is none.

        Afterwards, the run and the parent run have the status running, even if they had ended.
        """
        parent_key = info.parent or RunKey(info.job.id, FEDERATION)
        is_parent = info.key == parent_key
        if self._place is None or not self._open:
            self._place = self._open_parent(info, parent_key, is_parent=is_parent)
        place = self._place  # while one of its runs is open, nobody ends the parent run
        if is_parent:
            run = self._current(place.parent)
            self._parent_end = None
        else:
            run = self._open_site_run(place, info)
            self._opened_sites.add(info.run_id)
        self._open.add(run.id)
        return run

    def close_run(self, run: StoredRun, status: RunStatus, end_ms: int | None) -> None:
        """End a run. If it is this receiver's last open run, end the parent run, too, unless a run below it still runs.

        The job's other runs are searched only when that last run ends. With a thousand sites, a search at each end
        would take hours.

        Args:
            run: what ``open_run`` returned.
            status: how it ended.
            end_ms: when, in milliseconds since 1970, UTC; None if that is not known.
        """
        assert self._place is not None
        if run.id == self._place.parent.id:
            self._parent_end = _End(_ENDS[status], end_ms or 0)
        else:
            self._store.update_run(run.id, _ENDS[status], end_ms)
        if self._open <= {run.id}:
            self._close_parent(self._place)
        self._open.discard(run.id)

    def _open_parent(self, info: RunInfo, key: RunKey, *, is_parent: bool) -> _Place:
        store, experiment = self._store, self._find_experiment()
        identity = digest("\0".join(key), 32)
        if is_parent and info.resume_from > 0 and not store.find_runs(experiment.id, PARENT_TAG, identity):
            self._require_not_deleted(experiment, info, PARENT_TAG, identity)

        def create() -> StoredRun:
            return self._create(experiment, info, info.job.name, {PARENT_TAG: identity, "site": key.site})

        parent = find_or_create(store, experiment.id, PARENT_TAG, identity, create)
        if parent.status != "RUNNING":
            store.update_run(parent.id, "RUNNING", None)
        return _Place(experiment, parent, identity)

    def _current(self, run: StoredRun) -> StoredRun:
        """Return the run as the store has it now. A search may return older tags and params."""
        current = self._store.run(run.id)
        if current is None or not current.active:
            raise deleted_error(self._store, run)
        return current

    def _open_site_run(self, place: _Place, info: RunInfo) -> StoredRun:
        store, experiment, parent = self._store, place.experiment, place.parent
        found = store.find_runs(experiment.id, RUN_TAG, info.run_id)
        if found:
            run = min(found, key=settled_first)
        else:
            if info.resume_from > 0:
                self._require_not_deleted(experiment, info, RUN_TAG, info.run_id)
            own = {RUN_TAG: info.run_id, NESTING_TAG: parent.id, "site": info.site, "side": info.side.value}
            # The site comes first because MLflow's run table cuts long names. The charts show only the name, so it
            # also holds the job's id: two jobs may have the same name.
            run = self._create(experiment, info, f"{info.site} · {info.job.unique_name}", own)
        settle(store, run)
        if run.status != "RUNNING":
            store.update_run(run.id, "RUNNING", None)
        if run.tags.get(NESTING_TAG) != parent.id:
            store.log_batch(run.id, (), (), [Pair(NESTING_TAG, parent.id)])
        return run

    def _create(self, experiment: Experiment, info: RunInfo, name: str, own_tags: Mapping[str, str]) -> StoredRun:
        """Create a run that is not settled yet (see `shared_parent_run`).

        The run table shows its source, the job's id, so jobs of the same name can be told apart.
        """
        job = info.job
        tags = {
            **self._common_tags,
            **own_tags,
            PENDING_TAG: "true",
            "job": job.id,
            "job_name": job.name,
            "mlflow.source.name": job.unique_name.removeprefix(f"{job.name}-"),  # the id, or the first digits of a UUID
            "mlflow.source.type": "JOB",
        }
        pairs = [Pair(key, _within(value, MAX_TAG_CHARS)) for key, value in tags.items()]
        return self._store.create_run(experiment.id, _within(name, _MAX_NAME_CHARS), int(info.created * 1000), pairs)

    def _require_not_deleted(self, experiment: Experiment, info: RunInfo, tag: str, identity: str) -> None:
        """Raise TransientError if somebody deleted the run, and the store still has it as deleted.

        Otherwise warn that a new run begins in the middle of the records.
        """
        for run in self._store.find_runs(experiment.id, tag, identity, deleted=True):
            raise deleted_error(self._store, run)
        _log.warning(
            "MLflow has no run of site %s of job %s any more; a new one begins at record %d. "
            "`trackhub replay --from-start` writes the whole run anew",
            info.site, info.job.id, info.resume_from,
        )  # fmt: skip

    def _close_parent(self, place: _Place) -> None:
        """End the parent run if none of its runs is running. It gets the worst status of these runs.

        The last receiver that ends a run does this. The parent keeps running while a site runs, and runs again when a
        site joins later.
        """
        store, used = self._store, place.parent
        children = store.find_runs(used.experiment_id, NESTING_TAG, used.id)
        own = [child for child in children if child.tags.get(RUN_TAG) in self._opened_sites]
        withdraw_unsettled(store, own, RUN_TAG)
        parents = store.find_runs(used.experiment_id, PARENT_TAG, place.identity)
        parent = min(parents, key=settled_first, default=None)
        if parent is None:
            return  # somebody deleted it
        if parent.id != used.id:  # two receivers each made a parent run, since neither found the other's in time
            for child in filter(is_settled, own):
                store.log_batch(child.id, (), (), [Pair(NESTING_TAG, parent.id)])
            children = store.find_runs(used.experiment_id, NESTING_TAG, parent.id)
        ends = [_End(child.status, child.end_ms) for child in children if is_settled(child)]
        if self._parent_end is not None:
            ends.append(self._parent_end)
        states = {end.status for end in ends}
        if "RUNNING" in states:
            return
        status = next((state for state in ("FAILED", "KILLED") if state in states), "FINISHED")
        store.update_run(parent.id, status, max((end.end_ms for end in ends), default=0) or None)
        withdraw_unsettled(store, parents, PARENT_TAG)


def _within(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max(0, max_chars - 1)] + "…"
