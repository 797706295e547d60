# SPDX-License-Identifier: Apache-2.0
"""Sends metrics, params and tags in as few requests as MLflow's limits allow.

`MLflowRun` calls ``send`` with the items that it made from a batch of records. If MLflow refuses a request, ``send``
halves it until it has found the item that MLflow refuses, and stores the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from trackhub.spi import Rejection, TransientError
from trackhub_mlflow.store import Pair, Point, RefusedError, Store, deleted_error

__all__ = ["Item", "send"]

# Source: mlflow.utils.validation, mlflow 3.17.
_MAX_ITEMS = 1000
_MAX_PARAMS = 100
_MAX_TAGS = 100
_MAX_BYTES = 900_000  # MLflow allows 10**6, but the size is only estimated here
_ITEM_BYTES = 100


class Item(msgspec.Struct, frozen=True, gc=False):
    """One metric value, param or tag, and the record that it comes from.

    Attributes:
        position: the record's position in its run.
        kind: ``metric``, ``param`` or ``tag``.
        what: what is stored.
    """

    position: int
    kind: str
    what: Point | Pair


def send(store: Store, run_id: str, items: Sequence[Item]) -> list[Rejection]:
    """Store these items, in this order within each kind. Return a rejection for each item that MLflow never stores.

    Args:
        store: where the run is.
        run_id: MLflow's id of the run.
        items: what to store.

    Raises:
        TransientError: at least one item is not stored. Send all items again; MLflow recognises the items that it has.
    """
    rejections: list[Rejection] = []
    for batch in _batches(items):
        _send(store, run_id, batch, rejections)
    return rejections


def _send(store: Store, run_id: str, batch: Sequence[Item], rejections: list[Rejection]) -> None:
    try:
        store.log_batch(
            run_id,
            [item.what for item in batch if isinstance(item.what, Point)],
            [item.what for item in batch if isinstance(item.what, Pair) and item.kind == "param"],
            [item.what for item in batch if isinstance(item.what, Pair) and item.kind == "tag"],
        )
    except RefusedError as error:
        _require_active(store, run_id)
        if len(batch) == 1:
            item = batch[0]
            rejections.append(Rejection(item.position, "refused_by_mlflow", f"{item.kind} {item.what.key!r}: {error}"))
            return
        # Sending parts again is safe: MLflow checks a request before it stores any of it, and recognises what it has.
        middle = len(batch) // 2
        _send(store, run_id, batch[:middle], rejections)
        _send(store, run_id, batch[middle:], rejections)


def _require_active(store: Store, run_id: str) -> None:
    """Raise TransientError if the run was deleted: then MLflow refuses every record, although no record is bad."""
    run = store.run(run_id)
    if run is None:
        raise TransientError(f"MLflow has no run {run_id} any more; its records wait for the store to be restored")
    if not run.active:
        raise deleted_error(store, run)


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    seen: set[str] = set()
    params = tags = size = 0
    lengths: dict[str, int] = {}
    for item in items:
        key = item.what.key
        length = lengths.get(key) or lengths.setdefault(key, _ITEM_BYTES + len(key.encode()))
        full = len(batch) == _MAX_ITEMS
        if isinstance(item.what, Pair):
            length += len(item.what.value.encode())
            if item.kind == "param":
                if key in seen:
                    continue  # the same value again, and MLflow refuses a request that holds a param twice
                seen.add(key)
                full = full or params == _MAX_PARAMS
                params += 1
            else:
                full = full or tags == _MAX_TAGS
                tags += 1
        if batch and (full or size + length > _MAX_BYTES):
            yield batch
            batch, size = [], 0
            params, tags = int(item.kind == "param"), int(item.kind == "tag")
        batch.append(item)
        size += length
    if batch:
        yield batch
