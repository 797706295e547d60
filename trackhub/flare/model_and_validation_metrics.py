# SPDX-License-Identifier: Apache-2.0
"""Records metrics that FLARE itself carries from a site to the server, without any log call.

These are the metrics that a trainer sends with its model, and the results of cross-site evaluation. Both widgets call
it if the job says so (``flare_metrics``). It writes the records with the widget's own writer: at a client into the run
of the site, on the server into the run ``server``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable, get_leaf_dxos
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from trackhub.errors import ConfigError
from trackhub.flare import flare_internals, read_task_events
from trackhub.flare.records_from_flare_writers import StockRecords

__all__ = ["CLIENTS", "SERVER", "ClientMetrics", "ServerMetrics", "check_flare_metrics"]

CLIENTS, SERVER = "clients", "server"

_SENT = "flare"
"""The keys of metrics that a trainer sent with its model begin with this. So they differ from logged keys."""

_EVALUATED = "cross_site"
"""The keys of results of cross-site evaluation begin with this. The owner of the model comes next."""

_MAX_WARNINGS = 20
_RESULT = "the result of an evaluation"


def check_flare_metrics(value: object, *, has_server_side: bool = True) -> None:
    """Check a job's ``flare_metrics`` when the job is written.

    Raises:
        ConfigError: it is not a list of sides, or it has the server though the server tracks nothing.
    """
    if value is None:
        return
    if not isinstance(value, list | tuple) or any(side not in (CLIENTS, SERVER) for side in value):
        raise ConfigError(f"tracking: flare_metrics: expected a list with 'clients', 'server' or both, got {value!r}")
    if SERVER in value and not has_server_side:
        raise ConfigError(
            "tracking: flare_metrics has 'server', but tracking is on the client side only. Leave 'server' out, or "
            "track on the server as well"
        )


class _MetricsWriter:
    """Writes metrics, and keeps its own errors out of FLARE. Thread-safe; no method raises."""

    def __init__(self, records: StockRecords) -> None:
        self._records = records
        self._warned: set[str] = set()

    def attempt(self, what: str, record: Callable[[], None]) -> None:
        """Call ``record``. If it raises, these metrics are missing, and the log says so once."""
        try:
            record()
        except Exception as e:
            message = f"the metrics in {what} are not recorded: {type(e).__name__}: {e}"
            if message not in self._warned and len(self._warned) < _MAX_WARNINGS:
                self._warned.add(message)
                self._records.warn(message)

    def log(self, prefix: str, metrics: Any, step: int | None) -> None:
        """Record metrics. A trainer may send a single number instead of a dict."""
        if metrics is None or (isinstance(metrics, Mapping) and not metrics):
            return
        values = metrics if isinstance(metrics, Mapping) else {"metric": metrics}
        self._records.calls().writer.log({prefix: values}, step)


class ClientMetrics:
    """Records what this client's executors return. Thread-safe; no method raises."""

    def __init__(self, records: StockRecords) -> None:
        """Use the writer of these records. Its spool must be open before a result is taken."""
        self._metrics = _MetricsWriter(records)

    def take_result(self, task: Any, result: Any) -> None:
        """Record the metrics in the result of a task, if it has any.

        Args:
            task: the task's data.
            result: what the executor returned.
        """
        self._metrics.attempt("the result of a task", lambda: self._take(task, result))

    def _take(self, task: Any, result: Any) -> None:
        if not _holds_dxo(result):
            return
        metrics = _metrics_of(from_shareable(result))
        if (owner := read_task_events.evaluated_model(task)) is not None:
            self._metrics.log(f"{_EVALUATED}/{owner}", metrics, None)
        else:
            self._metrics.log(_SENT, metrics, flare_internals.round_of_task(task))


class ServerMetrics(FLComponent):  # type: ignore[misc]  # FLARE has no types
    """Records the results of cross-site evaluation that the server gets."""

    def __init__(self, engine: Any, records: StockRecords) -> None:
        """Watch the server's events from now on.

        Args:
            engine: FLARE's engine in this process.
            records: must be open. Its writer is used.
        """
        super().__init__()
        self._metrics = _MetricsWriter(records)
        flare_internals.add_last_handler(engine, self)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Handle one of FLARE's events. Never raises."""
        if flare_internals.is_from_another_process(fl_ctx):
            return
        if event_type == read_task_events.EVALUATED:
            self._metrics.attempt(_RESULT, lambda: self._take(*read_task_events.evaluation_result(fl_ctx)))
        elif event_type == EventType.BEFORE_PROCESS_SUBMISSION:
            self._metrics.attempt(_RESULT, lambda: self._take_silent(fl_ctx))

    def _take_silent(self, fl_ctx: FLContext) -> None:
        if (found := read_task_events.silent_evaluation_result(fl_ctx)) is not None:
            self._take(*found)

    def _take(self, site: str, owner: str, result: Any) -> None:
        if not site or not owner or not _holds_dxo(result):
            return  # the task failed; FLARE's log says so
        # A relay sends a collection: the results of several clients.
        leaves, errors = get_leaf_dxos(from_shareable(result), site)
        for client, dxo in leaves.items():
            self._metrics.log(f"{_EVALUATED}/{client}/{owner}", _metrics_of(dxo), None)
        if errors:
            raise ValueError("; ".join(map(str, errors)))


def _holds_dxo(data: Any) -> bool:
    return isinstance(data, Shareable) and data.get_header(ReservedHeaderKey.CONTENT_TYPE) == "DXO"


def _metrics_of(dxo: DXO) -> Any:
    """Return the metrics in a result, alone or beside a model. None if the result has no metrics."""
    return dxo.data if dxo.data_kind == DataKind.METRICS else dxo.get_meta_prop(MetaKey.INITIAL_METRICS)
