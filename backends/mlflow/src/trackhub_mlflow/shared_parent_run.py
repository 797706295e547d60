# SPDX-License-Identifier: Apache-2.0
"""Finds or creates one run that many receivers share, even if they create it at the same moment.

`JobRuns` calls it for a job's parent run. MLflow chooses a run's id itself and cannot create a run "only if there is
none". So a run is found by a tag that holds its identity, and receivers that create one at the same time agree:

1. Search. A run without the tag ``trackhub.pending`` is *settled*: all receivers use it. If there is no run at all,
   create one with this tag, which is then pending.
2. Search again. If my run is the only one, settle it. If there are several and none is settled, the first by start time
   and id stays. The receivers that created the others withdraw them.

Each receiver searches after it has created its run, so two receivers cannot both find only their own run. If a receiver
dies between creating and settling, the others wait for ``PATIENCE_S``. Then one of them settles the first run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from trackhub.spi import TransientError
from trackhub_mlflow.store import Store, StoredRun

__all__ = ["PATIENCE_S", "PENDING_TAG", "find_or_create", "is_settled", "settle", "settled_first", "withdraw_unsettled"]

PENDING_TAG = "trackhub.pending"
"""The tag of a run that may still be withdrawn in favour of another run of the same identity."""

PATIENCE_S = 2.0
_SEARCH_AGAIN_S = 0.05


def find_or_create(
    store: Store,
    experiment_id: str,
    tag: str,
    identity: str,
    create: Callable[[], StoredRun],
    *,
    patience_s: float = PATIENCE_S,
) -> StoredRun:
    """Return the one run with this tag, the same for every receiver. Create it if there is none.

    Blocks on the store, and up to ``patience_s`` on other receivers.

    Args:
        store: where to search.
        experiment_id: the experiment that holds the run.
        tag: the name of the tag that holds the identity.
        identity: the tag's value.
        create: creates a run that has this tag and `PENDING_TAG`, and returns it.
        patience_s: how long to wait until the others settle or withdraw the runs that they created.

    Raises:
        TransientError: the store fails, or does not find a run that it has just created.
    """
    mine: StoredRun | None = None
    give_up = time.monotonic() + patience_s
    while True:
        runs = sorted(store.find_runs(experiment_id, tag, identity), key=settled_first)
        if not runs and mine is None:
            mine = create()
            continue
        if not runs:
            raise TransientError(
                f"MLflow does not find a run that it has just created ({tag} = {identity}); see the server's log"
            )
        first = runs[0]
        alone = len(runs) == 1 and mine is not None and first.id == mine.id
        if mine is not None and mine.id != first.id:
            _withdraw(store, mine, tag)
            mine = None
        if not is_settled(first) and not alone and time.monotonic() < give_up:
            time.sleep(_SEARCH_AGAIN_S)
            continue
        settle(store, first)
        return first


def is_settled(run: StoredRun) -> bool:
    """Return whether this run is the final one of its identity."""
    return PENDING_TAG not in run.tags


def settle(store: Store, run: StoredRun) -> None:
    """Make this run the final one of its identity. Do nothing if it is already."""
    if not is_settled(run):
        store.delete_tag(run.id, PENDING_TAG)


def settled_first(run: StoredRun) -> tuple[bool, int, str]:
    """Return the sort key by which all receivers choose the same run: settled ones first, then the oldest."""
    return not is_settled(run), run.start_ms, run.id


def withdraw_unsettled(store: Store, runs: Iterable[StoredRun], tag: str) -> None:
    """Withdraw the runs whose receiver died, or did not get the store's reply that they were created.

    Args:
        store: where they are.
        runs: the runs of one identity or of several; settled ones stay.
        tag: the name of the tag that holds the identity.
    """
    for run in runs:
        if not is_settled(run):
            _withdraw(store, run, tag)


def _withdraw(store: Store, run: StoredRun, tag: str) -> None:
    store.delete_tag(run.id, tag)
    store.delete_run(run.id)
