# SPDX-License-Identifier: Apache-2.0
"""Turns FLARE's log calls into records, in the process that makes them.

All of FLARE's writers end in one of three log functions. In an external trainer ``startup/sitecustomize.py`` calls
`take_in_trainer`, which replaces two of them. In process `trackhub.flare.source` replaces the third. They are
private in FLARE; ``tests/integration/test_flare_internals.py`` tests that they are as this module expects.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from nvflare.apis.analytix import AnalyticsDataType

from trackhub.errors import RecordError, SpoolError
from trackhub.spool.announcement import find_spool
from trackhub.spool.layout import read_spool_info
from trackhub.writer.writer import Writer

__all__ = ["LogCalls", "take_in_trainer", "write_call"]

_MAX_WARNINGS = 20  # different messages; a message may hold a key, and there may be many keys
_SCALAR, _METRIC, _METRICS = AnalyticsDataType.SCALAR, AnalyticsDataType.METRIC, AnalyticsDataType.METRICS
_log = logging.getLogger(__name__)


class LogCalls:
    """Writes FLARE's log calls with one writer. Thread-safe; never raises."""

    def __init__(self, writer: Writer, warn: Callable[[str], None]) -> None:
        """Use this writer.

        Args:
            writer: it belongs to this object, which closes it.
            warn: called with what the log should say. Each text is passed once.
        """
        self.writer = writer
        self._warn_of = warn
        self._warned: set[str] = set()

    def log_method(self, original: Callable[..., Any], cell: str | None = None) -> Callable[..., None]:
        """Return a method that takes the place of ``log`` in FLARE's client API.

        What cannot be a record is counted as dropped, and a value that cannot be stored as left out.

        Args:
            original: FLARE's method.
            cell: take only the calls that FLARE would send to this cell, and leave the others to FLARE. None takes all.
        """
        writer, append, count_lost = self.writer, self.writer.log, self.count_lost

        @functools.wraps(original)
        def log(self: Any, key: Any, value: Any, data_type: Any, **more: Any) -> None:
            if cell is not None and self._cj_fqcn != cell:
                original(self, key, value, data_type, **more)
                return
            try:
                # First those that nearly all calls are of. This is a hot path (docs/adr/0004).
                if data_type is _SCALAR or data_type is _METRIC:
                    append({key: value}, more.get("global_step"))
                elif data_type is _METRICS:
                    append(value, more.get("global_step"))
                else:
                    write_call(writer, key, value, data_type, more)
            except (RecordError, SpoolError) as e:
                count_lost(e)

        return log

    def count_lost(self, error: RecordError | SpoolError) -> None:
        """Count and name a call that is no record, or that came after ``close``."""
        if isinstance(error, RecordError):
            self.writer.count_unconvertible(str(error))
            self._warn(f"a stock record was dropped: {error}")
        else:
            self._warn(f"a stock record came after the end of tracking: {error}")

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
        more: FLARE's further arguments, of which the step and the path are taken.

    Raises:
        RecordError: the call is of a kind that no backend can show: a model, a Python log record. A strict writer
            raises it for a value that it cannot store, too, and SpoolError once it is closed.
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
            raise RecordError(f"{key!r}: trackhub has no kind of record for FLARE's type {kind}")


def take_in_trainer(module: ModuleType, cell: str, spool: str) -> None:
    """Replace the log function in a module of FLARE. Called once, when the trainer has imported the module.

    Calls for another job than the announced one go FLARE's way. A trainer may run a job of its own.

    Args:
        module: FLARE's module.
        cell: the full name (FQCN) of the cell of the client's process, to which FLARE would send what is logged.
        spool: the value of ``SPOOL_ENV`` when this process started.

    Raises:
        ConfigError: the announced spool is not there, or does not belong to this site and job, or has ended.
        SpoolError: it cannot be read.
        PermissionError: this process may not write there.
    """
    folder = find_spool(spool)
    read_spool_info(folder)  # the message path also works where this process does not see the folder
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"this process may not write to {folder}")
    calls = LogCalls(Writer(folder), _log.warning)
    if hasattr(module, "CellClientAPI"):
        # Of every rank, and also after the session has ended.
        module.CellClientAPI.log = calls.log_method(module.CellClientAPI.log, cell)
    else:
        _take_metrics_sender(module.MetricsSender, cell, calls.log_method(module.MetricsSender.add))


def _take_metrics_sender(sender_class: Any, cell: str, log: Callable[..., None]) -> None:
    """Take the calls of ``nvflare.client.tracking.init()``, which FLARE carries from rank 0 only."""
    original = sender_class.add

    @functools.wraps(original)
    def add(self: Any, tag: Any, value: Any, data_type: Any, **kwargs: Any) -> bool:
        is_sent = self.rank == "0" and self.initialized and not self.closed
        if not is_sent or self.config.get("receiver_fqcn") != cell:
            return bool(original(self, tag, value, data_type, **kwargs))
        log(self, tag, value, data_type, **kwargs)
        return True

    sender_class.add = add
