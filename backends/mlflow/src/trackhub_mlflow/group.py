# SPDX-License-Identifier: Apache-2.0
"""Finding or creating the runs of a job: one parent run, and one child run per site, when many receivers do it at once.

MLflow gives a run its id itself and has no way to create a run only if there is none. So a run is found again by a
tag with its identity, and receivers that create one at the same time agree on one of them:

1. Search. A run that is *settled*, without the tag ``trackhub.pending``, is the one. If there is no run at all,
   create one that is pending.
2. Search again. If mine is the only one, settle it. If several are there and none is settled, the first of them, by
   start time and id, stays; the others are withdrawn by those who created them.

Two receivers cannot both find theirs to be the only one, since each looks after it has created its own. A receiver that
dies between creating and settling holds the others up for ``PATIENCE_S``; then the first run is settled for it.

That is for the parent run. Only one receiver writes a site's run, so there the second search is left out; what its own
attempts left behind, of which the store's replies were lost, is withdrawn when the receiver's last run ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from trackhub.spi import RunInfo, RunStatus, TransientError
from trackhub_mlflow.naming import digest
from trackhub_mlflow.store import Experiment, Pair, Store, StoredRun, deleted_error

__all__ = ["PARENT_TAG", "RUN_TAG", "Group", "find_or_create"]

PARENT_TAG = "trackhub.job_id"
"""On a job's parent run: a digest of the job's name."""

RUN_TAG = "trackhub.run_id"
"""On a site's run: ``RunInfo.run_id``."""

PENDING_TAG = "trackhub.pending"
"""On a run that may yet give way to another of the same identity."""

NESTING_TAG = "mlflow.parentRunId"
"""MLflow's own: the UI folds runs that have it below the run that it names."""

PATIENCE_S = 2.0
_LOOK_AGAIN_S = 0.05
_MAX_NAME_CHARS = 250  # of a run. Source: the column `runs.name`, mlflow 3.17

_ENDS = {RunStatus.FINISHED: "FINISHED", RunStatus.FAILED: "FAILED", RunStatus.ABORTED: "KILLED"}
_MADE = (Pair(PENDING_TAG, "true"), Pair("mlflow.source.name", "trackhub"), Pair("mlflow.source.type", "LOCAL"))

_log = logging.getLogger(__name__)


class Group:
    """One receiver's part in a job: the job's parent run, and the runs of the sites that the receiver writes.

    Used from one thread. Every method waits for the store, and raises what the store raises; it may then be called
    again.
    """

    def __init__(self, store: Store, experiment: Callable[[], Experiment], tags: Sequence[Pair]) -> None:
        """Keep these; nothing is read or created yet.

        Args:
            experiment: returns the job's experiment.
            tags: what each run gets when it is created.
        """
        self._store = store
        self._find_experiment = experiment
        self._tags = tags
        self._place: tuple[Experiment, StoredRun] | None = None
        self._open: set[str] = set()
        self._opened: set[str] = set()

    def open_run(self, info: RunInfo) -> StoredRun:
        """Return the site's run, created if there is none, and running again if it had ended."""
        if self._place is None or not self._open:
            experiment = self._find_experiment()
            self._place = experiment, self._open_parent(experiment, info)
        experiment, parent = self._place  # while one of its runs is open, nobody ends the parent run
        run = self._open_site_run(experiment, parent, info)
        self._open.add(run.id)
        self._opened.add(info.run_id)
        return run

    def close_run(self, run: StoredRun, job: str, status: RunStatus, end_ms: int | None) -> None:
        """End the site's run; and the parent run, if no other of its runs is running.

        Nobody looks at the job's other runs while this receiver has one open: with a thousand sites, to look at all of
        them for each would take hours.
        """
        self._store.update_run(run.id, _ENDS[status], end_ms)
        if self._open <= {run.id}:
            self._close_parent(run.experiment_id, job)
        self._open.discard(run.id)

    def _open_parent(self, experiment: Experiment, info: RunInfo) -> StoredRun:
        job = info.job.id
        identity = digest(job, 32)
        start_ms = int(info.created * 1000)

        def create() -> StoredRun:
            own = [Pair(PARENT_TAG, identity), Pair("job", job), *_MADE, *self._tags]
            return self._store.create_run(experiment.id, job[:_MAX_NAME_CHARS], start_ms, own)

        parent = find_or_create(self._store, experiment.id, PARENT_TAG, identity, create)
        if parent.status != "RUNNING":
            self._store.update_run(parent.id, "RUNNING", None)
        return parent

    def _open_site_run(self, experiment: Experiment, parent: StoredRun, info: RunInfo) -> StoredRun:
        store = self._store
        found = store.find_runs(experiment.id, RUN_TAG, info.run_id)
        if found:
            run = min(found, key=_settled_first)
        else:
            if info.resume_from > 0:
                self._require_not_deleted(experiment, info)
            own = [
                Pair(RUN_TAG, info.run_id),
                Pair(NESTING_TAG, parent.id),
                Pair("job", info.job.id),
                Pair("site", info.site),
                Pair("side", info.side.value),
            ]
            name = info.site[:_MAX_NAME_CHARS]
            run = store.create_run(experiment.id, name, int(info.created * 1000), [*own, *_MADE, *self._tags])
        if not _is_settled(run):
            store.delete_tag(run.id, PENDING_TAG)
        if run.status != "RUNNING":
            store.update_run(run.id, "RUNNING", None)
        if run.tags.get(NESTING_TAG) != parent.id:
            store.log_batch(run.id, (), (), [Pair(NESTING_TAG, parent.id)])
        return run

    def _require_not_deleted(self, experiment: Experiment, info: RunInfo) -> None:
        """Do not begin a run in its middle because somebody deleted it."""
        for run in self._store.find_runs(experiment.id, RUN_TAG, info.run_id, deleted=True):
            raise deleted_error(run.id)
        _log.warning(
            "MLflow has no run of site %s of job %s any more; a new one begins at record %d. "
            "`trackhub replay --from-start` writes the whole run anew",
            info.site, info.job.id, info.resume_from,
        )  # fmt: skip

    def _close_parent(self, experiment_id: str, job: str) -> None:
        """End the parent run if none of its runs is running: failed if one failed, else killed if one was.

        Whichever receiver ends its run last does it. A site that is still running, or joins later, keeps the parent
        running.
        """
        assert self._place is not None
        store, (_, used) = self._store, self._place
        children = store.find_runs(experiment_id, NESTING_TAG, used.id)
        own = [child for child in children if child.tags.get(RUN_TAG) in self._opened]
        _withdraw_unsettled(store, own, RUN_TAG)
        parents = store.find_runs(experiment_id, PARENT_TAG, digest(job, 32))
        parent = min(parents, key=_settled_first, default=None)
        if parent is None:
            return  # somebody deleted it
        if parent.id != used.id:  # receivers that waited for each other in vain had chosen different ones
            for child in filter(_is_settled, own):
                store.log_batch(child.id, (), (), [Pair(NESTING_TAG, parent.id)])
            children = store.find_runs(experiment_id, NESTING_TAG, parent.id)
        settled = [child for child in children if _is_settled(child)]
        states = {child.status for child in settled}
        if "RUNNING" in states:
            return
        status = next((state for state in ("FAILED", "KILLED") if state in states), "FINISHED")
        store.update_run(parent.id, status, max((child.end_ms for child in settled), default=None))
        _withdraw_unsettled(store, parents, PARENT_TAG)


def find_or_create(
    store: Store,
    experiment_id: str,
    tag: str,
    identity: str,
    create: Callable[[], StoredRun],
    *,
    patience_s: float = PATIENCE_S,
) -> StoredRun:
    """Return the one run with this tag, the same to all who ask, created if there is none.

    Args:
        identity: the tag's value; what ``create`` returns must have it.
        patience_s: how long to wait for others to settle or withdraw a run that they have created.
    """
    mine: StoredRun | None = None
    give_up = time.monotonic() + patience_s
    while True:
        runs = sorted(store.find_runs(experiment_id, tag, identity), key=_settled_first)
        if not runs and mine is None:
            mine = create()
            continue
        if not runs:
            raise TransientError(f"MLflow does not find a run that it has just created ({tag} = {identity})")
        first = runs[0]
        settled = _is_settled(first)
        alone = len(runs) == 1 and mine is not None and first.id == mine.id
        if mine is not None and mine.id != first.id:
            _withdraw(store, mine, tag)
            mine = None
        if not settled and not alone and time.monotonic() < give_up:
            time.sleep(_LOOK_AGAIN_S)
            continue
        if not settled:
            store.delete_tag(first.id, PENDING_TAG)
        return first


def _is_settled(run: StoredRun) -> bool:
    return PENDING_TAG not in run.tags


def _settled_first(run: StoredRun) -> tuple[bool, int, str]:
    return not _is_settled(run), run.start_ms, run.id


def _withdraw(store: Store, run: StoredRun, tag: str) -> None:
    """Take back a run that was created while another receiver created the one that counts."""
    store.delete_tag(run.id, tag)
    store.delete_run(run.id)


def _withdraw_unsettled(store: Store, runs: Sequence[StoredRun], tag: str) -> None:
    """Take back what is left of attempts whose reply was lost, or whose receiver died."""
    for run in runs:
        if not _is_settled(run):
            _withdraw(store, run, tag)
