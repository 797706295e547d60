# SPDX-License-Identifier: Apache-2.0
"""Turns FLARE's log calls into records, in the process that makes them.

FLARE has three log functions, one for each kind of trainer. Most writers call them through a fourth, ``log`` in
``nvflare.client.tracking``. ``startup/sitecustomize.py`` calls `take_in_trainer`, which replaces these functions in an
external trainer. In the client's process, `trackhub.flare.flare_internals` replaces them. They are private in FLARE;
``tests/integration/test_flare_internals.py`` tests that they are as this module expects.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from nvflare.apis.analytix import AnalyticsDataType

from trackhub.errors import RecordError, SpoolError
from trackhub.flare.trainer.process_writer import process_writer
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.writer.plain_values import shown, shown_error
from trackhub.writer.writer import Writer

__all__ = ["LogCalls", "take_in_trainer", "write_call"]

_MAX_WARNINGS = 20  # how many different warnings; each may name a key, and there may be many keys
_SCALAR, _METRIC, _METRICS = AnalyticsDataType.SCALAR, AnalyticsDataType.METRIC, AnalyticsDataType.METRICS
_log = logging.getLogger(__name__)


class LogCalls:
    """Writes FLARE's log calls with one writer. Thread-safe; never raises."""

    def __init__(self, writer: Writer, warn: Callable[[str], None]) -> None:
        """Use this writer.

        Args:
            writer: it belongs to this object, which closes it.
            warn: called with the text of each warning, once for each text.
        """
        self.writer = writer
        self._warn_of = warn
        self._warned: set[str] = set()

    def log_method(self, original: Callable[..., Any], is_taken: Callable[[Any], bool]) -> Callable[..., None]:
        """Return a method that takes the place of ``log`` in FLARE's client API.

        It counts a call that cannot become a record as dropped, and a single value that cannot be stored as left out.

        Args:
            original: FLARE's method.
            is_taken: returns True for a client API whose calls are recorded. FLARE keeps the calls of all others.
        """
        writer, count_lost = self.writer, self.count_lost

        @functools.wraps(original)
        def log(self: Any, key: Any, value: Any, data_type: Any, **more: Any) -> None:
            if not is_taken(self):
                original(self, key, value, data_type, **more)
                return
            try:
                write_call(writer, key, value, data_type, more)
            except Exception as e:
                count_lost(e)

        return log

    def log_function(self, original: Callable[..., Any], attribute: str, taken: Any) -> Callable[..., Any]:
        """Return a function that takes the place of ``log`` in ``nvflare.client.tracking``, which FLARE's writers call.

        It records the frequent kinds of calls itself. This avoids four functions of FLARE, which cost half of what
        ``Writer.log`` costs (docs/adr/0016). All other calls go on to ``original``, and so reach ``log_method``.

        Args:
            original: FLARE's function.
            attribute, taken: a client API's calls are recorded if its attribute of this name has this value. A function
                such as ``is_taken`` would take 5% of the time of a call.
        """
        append, count_lost = self.writer.log, self.count_lost

        @functools.wraps(original)
        def log(key: Any, value: Any, data_type: Any, ctx: Any = None, **more: Any) -> Any:
            if getattr(getattr(ctx, "api", None), attribute, None) == taken:
                try:
                    if data_type is _SCALAR or data_type is _METRIC:
                        return append({key: value}, more.get("global_step"))
                    if data_type is _METRICS:
                        return append(value, more.get("global_step"))
                except Exception as e:
                    return count_lost(e)
            return original(key, value, data_type, ctx=ctx, **more)

        return log

    def count_lost(self, error: Exception) -> None:
        """Count a call that cannot become a record, and warn of it. Call it in ``except``.

        Raises:
            Exception: a signal handler of the script raised the error.
        """
        if isinstance(error, SpoolError):  # only a closed, strict writer raises it
            self._warn(f"a log call of FLARE's writers came after the end of tracking: {error}")
            return
        raise_if_from_signal_handler(error)
        # Any other error comes from an object of the script, such as a key that raises when it is hashed.
        reason = str(error) if isinstance(error, RecordError) else f"{type(error).__name__}: {shown_error(error)}"
        self.writer.count_unconvertible(reason)
        self._warn(f"a log call of FLARE's writers was dropped: {reason}")

    def _warn(self, message: str) -> None:
        if message not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add(message)
            self._warn_of(message)

    def close(self) -> None:
        """Close the writer."""
        self.writer.close()


def write_call(writer: Writer, key: Any, value: Any, data_type: Any, more: Mapping[str, Any]) -> None:
    """Write the record that a log call of FLARE means.

    ``add_scalars(tag, {name: value})`` becomes metrics named ``tag/name``, as TensorBoard shows them. MLflow's
    ``log_text(text, path)`` becomes a text with the path as its key.

    Args:
        writer: where to write it.
        key, value, data_type: as in FLARE's log functions.
        more: FLARE's further arguments. The step and the path are read from them.

    Raises:
        RecordError: the call is of a kind that no record can hold: a model, a Python log record. A strict writer also
            raises it for a value that it cannot store.
        SpoolError: a strict writer is closed.
    """
    step = more.get("global_step")
    match data_type:
        case AnalyticsDataType.SCALAR | AnalyticsDataType.METRIC | AnalyticsDataType.SCALARS:
            writer.log({key: value}, step)
        case AnalyticsDataType.METRICS:
            writer.log(value, step)
        case AnalyticsDataType.PARAMETER:
            writer.log_params({key: value})
        case AnalyticsDataType.PARAMETERS:
            writer.log_params(value)
        case AnalyticsDataType.TAG:
            writer.set_tags({key: value})
        case AnalyticsDataType.TAGS:
            writer.set_tags(value)
        case AnalyticsDataType.TEXT:
            writer.log_text(more.get("path") or key, value, step)
        case AnalyticsDataType.IMAGE:
            writer.log_image(key, value, step)
        case _:
            kind = getattr(data_type, "value", data_type)
            raise RecordError(f"{shown(key)}: trackhub has no kind of record for FLARE's type {kind}")


def take_in_trainer(module: ModuleType, cell: str, spool: str) -> None:
    """Replace the log function in a module of FLARE. Called when the trainer has imported the module.

    Only calls for the announced job are recorded. FLARE keeps all others, since a trainer may run a job of its own.

    Args:
        module: FLARE's module.
        cell: the full name (FQCN) of the cell of the client's process, to which FLARE would send what is logged.
        spool: the value of ``SPOOL_ENV`` when this process started.

    Raises:
        ConfigError: the announced spool is not there, or does not belong to this site and job, or has ended.
        SpoolError: it cannot be read.
        PermissionError: this process may not write there.
    """
    calls = _calls_into(spool)

    def is_taken(api: Any) -> bool:
        return getattr(api, "_cj_fqcn", None) == cell

    if module.__name__ == "nvflare.client.tracking":
        module.log = calls.log_function(module.log, "_cj_fqcn", cell)  # type: ignore[attr-defined]
    elif hasattr(module, "CellClientAPI"):
        # FLARE's own method raises at all ranks but the first, and does nothing once the session has ended. Here these
        # calls become records, too.
        module.CellClientAPI.log = calls.log_method(module.CellClientAPI.log, is_taken)
    else:
        _take_metrics_sender(module.MetricsSender, cell, calls)


@functools.cache
def _calls_into(spool: str) -> LogCalls:
    """Return the object that writes all log calls of this process. One writer keeps their order."""
    return LogCalls(process_writer(spool), _log.warning)


def _take_metrics_sender(sender_class: Any, cell: str, calls: LogCalls) -> None:
    """Record calls after the script called ``nvflare.client.tracking.init()``. FLARE takes only calls of rank 0."""
    original = sender_class.add

    def is_taken(sender: Any) -> bool:
        is_sent = sender.rank == "0" and sender.initialized and not sender.closed
        return is_sent and sender.config.get("receiver_fqcn") == cell

    write = calls.log_method(original, is_taken)

    @functools.wraps(original)
    def add(self: Any, tag: Any, value: Any, data_type: Any, **kwargs: Any) -> bool:
        if not is_taken(self):
            return bool(original(self, tag, value, data_type, **kwargs))
        write(self, tag, value, data_type, **kwargs)
        return True

    sender_class.add = add
