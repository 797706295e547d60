# SPDX-License-Identifier: Apache-2.0
"""Finding or creating the runs of a job: one parent run, and one child run per site, when many sinks do it at once.

MLflow gives a run its id itself and has no way to create a run only if there is none. So a run is found again by a
tag with its identity, and sinks that create one at the same time agree on one of them:

1. Search. A run that is *settled*, without the tag ``trackhub.pending``, is the one. If there is no run at all,
   create one that is pending.
2. Search again. If mine is the only one, settle it. If several are there and none is settled, the first of them, by
   start time and id, stays; the others are withdrawn by those who created them.

Two sinks cannot both find theirs to be the only one, since each looks after it has created its own. A sink that
dies between creating and settling holds the others up for ``PATIENCE_S``; then the first run is settled for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from trackhub.spi import RunInfo, RunStatus, TransientError
from trackhub_mlflow.naming import digest
from trackhub_mlflow.store import Experiment, Pair, Store, StoredRun, deleted_error

__all__ = ["PARENT_TAG", "RUN_TAG", "close_parent", "find_or_create", "mlflow_status", "open_parent", "open_site_run"]

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


def mlflow_status(status: RunStatus) -> str:
    """Return MLflow's word for how a run ended."""
    return _ENDS[status]


def open_parent(store: Store, experiment: Experiment, info: RunInfo, tags: Sequence[Pair]) -> StoredRun:
    """Return the job's parent run, created if there is none, and running again if it had ended."""
    job = info.key.job
    identity = digest(job, 32)
    start_ms = int(info.created * 1000)

    def create() -> StoredRun:
        own = [Pair(PARENT_TAG, identity), Pair("job", job), *_MADE, *tags]
        return store.create_run(experiment.id, job[:_MAX_NAME_CHARS], start_ms, own)

    parent = find_or_create(store, experiment.id, PARENT_TAG, identity, create)
    if parent.status != "RUNNING":
        store.update_run(parent.id, "RUNNING", None)
    return parent


def open_site_run(
    store: Store, experiment: Experiment, parent: StoredRun, info: RunInfo, tags: Sequence[Pair]
) -> StoredRun:
    """Return the site's run below the parent, created if there is none, and running again if it had ended."""

    def create() -> StoredRun:
        own = [
            Pair(RUN_TAG, info.run_id),
            Pair(NESTING_TAG, parent.id),
            Pair("job", info.key.job),
            Pair("site", info.key.site),
            Pair("side", info.side.value),
        ]
        name = info.key.site[:_MAX_NAME_CHARS]
        return store.create_run(experiment.id, name, int(info.created * 1000), [*own, *_MADE, *tags])

    if info.resume_from > 0:
        _require_not_deleted(store, experiment, info)
    # Only one sink writes this run, so whatever is there without being settled is left over from its own attempts.
    run = find_or_create(store, experiment.id, RUN_TAG, info.run_id, create, patience_s=0.0)
    if run.status != "RUNNING":
        store.update_run(run.id, "RUNNING", None)
    if run.tags.get(NESTING_TAG) != parent.id:
        store.log_batch(run.id, (), (), [Pair(NESTING_TAG, parent.id)])
    return run


def _require_not_deleted(store: Store, experiment: Experiment, info: RunInfo) -> None:
    """Do not begin a run in its middle because somebody deleted it."""
    if store.find_runs(experiment.id, RUN_TAG, info.run_id):
        return
    for run in store.find_runs(experiment.id, RUN_TAG, info.run_id, deleted=True):
        raise deleted_error(run.id)
    _log.warning(
        "MLflow has no run of site %s of job %s any more; a new one begins at record %d. "
        "`trackhub replay --from-start` writes the whole run anew",
        info.key.site, info.key.job, info.resume_from,
    )  # fmt: skip


def close_parent(store: Store, info: RunInfo, run: StoredRun, *, is_last: bool) -> None:
    """End the job's parent run if this was the last of its runs: failed if one failed, else killed if one was.

    Whichever sink ends its run last does it. A site that is still running, or joins later, keeps the parent running.

    Args:
        is_last: whether this sink has no other open run. While it has one, nobody looks at the job's other runs: with
            a thousand sites, to look at all of them for each would take hours.
    """
    _withdraw_unsettled(store, store.find_runs(run.experiment_id, RUN_TAG, info.run_id), RUN_TAG)
    parents = store.find_runs(run.experiment_id, PARENT_TAG, digest(info.key.job, 32))
    parent = min(parents, key=_settled_first, default=None)
    if parent is None:
        return  # somebody deleted it
    if run.tags.get(NESTING_TAG) != parent.id:
        store.log_batch(run.id, (), (), [Pair(NESTING_TAG, parent.id)])
    if not is_last:
        return
    children = store.find_runs(run.experiment_id, NESTING_TAG, parent.id)
    states = {child.status for child in children if _is_settled(child)}
    if "RUNNING" in states:
        return
    status = next((state for state in ("FAILED", "KILLED") if state in states), "FINISHED")
    store.update_run(parent.id, status, max((child.end_ms for child in children), default=None))
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
    """Take back a run that was created while another sink created the one that counts."""
    store.delete_tag(run.id, tag)
    store.delete_run(run.id)


def _withdraw_unsettled(store: Store, runs: Sequence[StoredRun], tag: str) -> None:
    """Take back what is left of attempts whose reply was lost, or whose sink died."""
    for run in runs:
        if not _is_settled(run):
            _withdraw(store, run, tag)
