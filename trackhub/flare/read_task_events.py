# SPDX-License-Identifier: Apache-2.0
"""Reads from FLARE's events which tasks the server hands to sites, which results come back, and what FLARE computes.

`federation_facts`, `model_updates`, `model_and_validation_metrics` and the receiver's widget call it. Written for
nvflare 2.9, like `flare_internals`. It changes nothing in FLARE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.any_relay_manager import AnyRelayTaskManager
from nvflare.apis.impl.send_manager import SendTaskManager
from nvflare.apis.impl.seq_relay_manager import SequentialRelayTaskManager
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants, ValidateType
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from trackhub.flare.flare_internals import round_of_task

__all__ = [
    "AFTER_AGGREGATION",
    "BEST_MODEL",
    "EVALUATED",
    "MODEL_SAVED",
    "ROUND_DONE",
    "HandedTask",
    "ReturnedTask",
    "aggregated_metrics",
    "asking_site",
    "best_metrics",
    "evaluated_model",
    "evaluation_result",
    "handed_task",
    "model_in",
    "returned_task",
    "silent_evaluation_result",
    "site_weights",
]

ROUND_DONE: str = AppEventType.ROUND_DONE
AFTER_AGGREGATION: str = AppEventType.AFTER_AGGREGATION
MODEL_SAVED: str = AppEventType.AFTER_LEARNABLE_PERSIST
BEST_MODEL: str = AppEventType.GLOBAL_BEST_MODEL_AVAILABLE
EVALUATED: str = AppEventType.VALIDATION_RESULT_RECEIVED

_MAX_LEAVES = 1_000_000
_MANAGER = "___mgr"  # the property of a task in which FLARE keeps who decides which site gets it (`wf_comm_server.py`)


class HandedTask(NamedTuple):
    """A task that the server hands to a site.

    Attributes:
        id: FLARE's id of this site's copy of the task.
        workflow_task: FLARE's id of the task itself, which the copies of all sites share.
        name: what is to be done, such as ``train``.
        site: who gets it.
        targets: the sites that are all to do this task.
        is_relay: True if the sites do the task one after another.
        round: the round that the task carries; None if it carries none.
        model_bytes: bytes of the arrays in it.
        made_at: when the workflow made the task, in unix seconds.
    """

    id: str
    workflow_task: str
    name: str
    site: str
    targets: tuple[str, ...]
    is_relay: bool
    round: int | None
    model_bytes: int
    made_at: float = 0.0


class ReturnedTask(NamedTuple):
    """The result of a task.

    Attributes:
        id: as in `HandedTask`.
        is_ok: True if the site says that the task ended well.
        steps: the number of training steps that the site says it took. None if it does not say.
        model_bytes: bytes of the arrays in it.
    """

    id: str
    is_ok: bool
    steps: float | None
    model_bytes: int


def asking_site(fl_ctx: FLContext) -> str:
    """Return the name that a site gives when it asks the server for a task. Empty if it gives none."""
    peer = fl_ctx.get_peer_context()
    return "" if peer is None else str(peer.get_identity_name(default=""))


def handed_task(fl_ctx: FLContext) -> HandedTask | None:
    """Return the task that is being handed out. Call it on the server, at BEFORE_TASK_DATA_FILTER."""
    client_task = _client_task(fl_ctx)
    if client_task is None:
        return None
    data, task = fl_ctx.get_prop(FLContextKey.TASK_DATA), client_task.task
    manager = task.props.get(_MANAGER)
    one_does_it = isinstance(manager, SendTaskManager)  # the first of the targets that asks
    return HandedTask(
        id=str(fl_ctx.get_prop(FLContextKey.TASK_ID)),
        workflow_task=str(task.msg_root_id),
        name=str(task.name),
        site=str(client_task.client.name),
        targets=() if one_does_it else tuple(map(str, task.targets or ())),
        is_relay=isinstance(manager, SequentialRelayTaskManager | AnyRelayTaskManager),
        round=round_of_task(data),
        model_bytes=_array_bytes(data),
        made_at=task.schedule_time or 0.0,
    )


def _client_task(fl_ctx: FLContext) -> Any:
    """Return FLARE's own entry of the present task, or None if the workflow does not wait for it.

    Take the site's name from this entry. The name in the context cannot be trusted: the peer writes it.
    """
    communicator = fl_ctx.get_prop(FLContextKey.RUNNER).current_wf.controller.communicator
    return communicator.process_task_check(fl_ctx.get_prop(FLContextKey.TASK_ID), fl_ctx)


def returned_task(fl_ctx: FLContext) -> ReturnedTask | None:
    """Return the result that has arrived. Call it on the server, at BEFORE_PROCESS_SUBMISSION."""
    result = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
    if not isinstance(result, Shareable):
        return None
    steps = None
    try:
        steps = from_shareable(result).get_meta_prop(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
    except Exception:  # a result without a model, or a malformed one
        steps = None
    return ReturnedTask(
        id=str(fl_ctx.get_prop(FLContextKey.TASK_ID)),
        is_ok=result.get_return_code(ReturnCode.OK) == ReturnCode.OK,
        steps=_number(steps),
        model_bytes=_array_bytes(result),
    )


def aggregated_metrics(fl_ctx: FLContext) -> dict[str, float]:
    """Return the metrics that FLARE averaged over the sites. Call it on the server, at AFTER_AGGREGATION."""
    result = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT)
    if isinstance(result, Shareable):
        try:
            result = FLModelUtils.from_shareable(result)
        except Exception:  # an aggregator may return anything
            return {}
    return _numbers(result.metrics) if isinstance(result, FLModel) else {}


def site_weights(fl_ctx: FLContext) -> dict[str, float]:
    """Return site -> the weight that FLARE's aggregator gave it. Call it on the server, at AFTER_AGGREGATION.

    FedAvg's own aggregator reports the weights (``app_common/workflows/fedavg.py``). Other aggregators report them only
    if they put the same into their result. The controller names the sites, so no site can write another's weight.
    """
    result = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT)
    info = (result.meta or {}).get(AppConstants.METRICS_AGGREGATION_INFO) if isinstance(result, FLModel) else None
    listed = info.get("site_weights") if isinstance(info, Mapping) else None
    if not isinstance(listed, list):
        return {}
    return _numbers({one.get("name"): one.get("weight") for one in listed if isinstance(one, Mapping)})


def model_in(data: Any) -> DXO | None:
    """Return the model in a task or a result, in any form. None if there is no model, such as with metrics alone."""
    if not isinstance(data, Shareable):
        return None
    try:
        dxo = from_shareable(data)
    except Exception:  # it holds something else
        return None
    return dxo if dxo.data_kind in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF, DataKind.COLLECTION) else None


def best_metrics(fl_ctx: FLContext) -> tuple[int | None, dict[str, float]]:
    """Return the round of the best model so far, and its metrics. Call it on the server, at BEST_MODEL."""
    info = fl_ctx.get_prop(AppConstants.METRICS_SELECTION_INFO)
    if not isinstance(info, Mapping):
        return None, {}
    best = info.get("best_round")
    metrics = info.get("best_metrics")
    if isinstance(metrics, list):
        metrics = {str(m.get("name")): m.get("value") for m in metrics if isinstance(m, Mapping)}
    return best if isinstance(best, int) and best >= 0 else None, _numbers(metrics)


def evaluated_model(task: Any) -> str | None:
    """Return whose model a task of cross-site evaluation is about. None for any other task.

    Controllers put the owner into the task's header or beside the model. In a workflow that the clients control, a
    global model has no owner, so this returns ``global``.
    """
    if not isinstance(task, Shareable):
        return None
    owner = task.get_header(AppConstants.MODEL_OWNER)
    if owner is None and task.get_header(AppConstants.VALIDATE_TYPE) == ValidateType.MODEL_VALIDATE:
        owner = "global"
    if owner is None:
        try:
            owner = from_shareable(task).get_meta_prop(AppConstants.MODEL_OWNER)
        except Exception:  # a task without a model
            return None
    return None if owner is None else str(owner)


def evaluation_result(fl_ctx: FLContext) -> tuple[str, str, Any]:
    """Return client, owner of the model and result of an evaluation. Call it on the server, at EVALUATED."""
    site, owner = fl_ctx.get_prop(AppConstants.DATA_CLIENT), fl_ctx.get_prop(AppConstants.MODEL_OWNER)
    return str(site or ""), str(owner or ""), fl_ctx.get_prop(AppConstants.VALIDATION_RESULT)


def silent_evaluation_result(fl_ctx: FLContext) -> tuple[str, str, Any] | None:
    """Return client, owner of the model and result of an evaluation for which FLARE fires no event of its own.

    ``CrossSiteEval`` is such a workflow. Like all workflows based on ``ModelController``, it keeps the model's owner
    with the task. Call this on the server, at BEFORE_PROCESS_SUBMISSION. Returns None for other results, and for a
    result that the workflow refuses, such as a second result of one task.
    """
    client_task = _client_task(fl_ctx)
    if client_task is None or client_task.task.name != AppConstants.TASK_VALIDATION:
        return None
    if client_task.result_received_time is not None or client_task.task.completion_status is not None:
        return None
    meta = client_task.task.get_prop(AppConstants.META_DATA)
    owner = meta.get(AppConstants.MODEL_OWNER) if isinstance(meta, Mapping) else None
    return (
        None if owner is None else (str(client_task.client.name), str(owner), fl_ctx.get_prop(FLContextKey.TASK_RESULT))
    )


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, Mapping):
        return {}
    found = {str(name): _number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    """Return a number as a float; None for anything else, such as a text or an array of several numbers."""
    try:
        return None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _array_bytes(data: Any) -> int:
    """Return how many bytes the arrays in this data have. Arrays that FLARE sends apart, as references, count as 0."""
    total, left, seen = 0, [data], 0
    while left and seen < _MAX_LEAVES:
        value = left.pop()
        seen += 1
        if isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, list | tuple):
            left.extend(value)
        else:
            size = getattr(value, "nbytes", 0)
            total += size if isinstance(size, int) else 0
    return total
