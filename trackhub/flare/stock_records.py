# SPDX-License-Identifier: Apache-2.0
"""Turns what FLARE's own writers log into records of trackhub, unchanged and once. Both widgets call it.

``SummaryWriter``, ``WandBWriter``, ``MLflowWriter``, ``flare.log``, Lightning's ``ClientLogger``, XGBoost's callback
and Flower all end in one FLARE event with an analytics DXO. The event has no time of the log call. In process FLARE
fires it during the call. For an external trainer FLARE fires it when the trainer's message arrives, and does not keep
the order.
"""

from __future__ import annotations

import threading
from pathlib import Path

from nvflare.apis.analytix import AnalyticsDataType, TrackConst
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from trackhub.errors import RecordError, SpoolError
from trackhub.flare import flare_internals
from trackhub.writer.writer import Writer

__all__ = ["StockRecords", "write_stock_record"]

_MAX_WARNINGS = 20  # different messages; a message may hold a key, and there may be many keys


class StockRecords:
    """Writes the stock records that are logged in this process into a spool. Thread-safe."""

    def __init__(self, component: FLComponent) -> None:
        self._component = component
        self._lock = threading.Lock()
        self._spool: Path | None = None
        self._writer: Writer | None = None
        self._warned: set[str] = set()

    def open(self, spool: Path) -> None:
        """Take records from now on, into this spool."""
        self._spool = spool

    def take(self, fl_ctx: FLContext) -> None:
        """Take the record in this event, if it is a new record of this process.

        A record that cannot be converted is counted as dropped, and a value that cannot be stored as left out. Each
        reason is logged once.
        """
        if self._spool is None or (event := flare_internals.take_stock_event(fl_ctx)) is None:
            return
        with self._lock:
            if self._writer is None:
                self._writer = Writer(self._spool)
            writer = self._writer
        try:
            write_stock_record(writer, event)
        except RecordError as e:
            writer.count_unconvertible(str(e))
            self._warn(fl_ctx, f"a stock record was dropped: {e}")
        except SpoolError as e:
            self._warn(fl_ctx, f"a stock record came after the end of tracking: {e}")

    def _warn(self, fl_ctx: FLContext, message: str) -> None:
        if message not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add(message)
            self._component.log_warning(fl_ctx, message, fire_event=False)

    def close(self) -> None:
        """Take no more records."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()


def write_stock_record(writer: Writer, event: Shareable) -> None:
    """Write the record in a stock analytics event.

    ``add_scalars(tag, {name: value})`` becomes metrics named ``tag/name``, as TensorBoard shows them. MLflow's
    ``log_text(text, path)`` becomes a text with the path as its key.

    Args:
        writer: where to write it.
        event: the event's data.

    Raises:
        RecordError: the event is malformed, or of a kind that no backend can show: a model, a Python log record.
            A strict writer raises it for a value that it cannot store, too, and SpoolError once it is closed.
    """
    try:
        dxo = from_shareable(event)
        data = dxo.data
        if dxo.data_kind != DataKind.ANALYTIC:
            raise RecordError(f"a stock event holds data of kind {dxo.data_kind!r}, expected {DataKind.ANALYTIC!r}")
        key, value = data[TrackConst.TRACK_KEY], data[TrackConst.TRACK_VALUE]
        step = data.get(TrackConst.GLOBAL_STEP_KEY)
        data_type = AnalyticsDataType(dxo.get_meta_prop(TrackConst.DATA_TYPE_KEY))
    except RecordError:
        raise
    except Exception as e:
        raise RecordError(f"a stock event cannot be read: {type(e).__name__}: {e}") from e

    match data_type:
        case AnalyticsDataType.SCALAR | AnalyticsDataType.METRIC:
            writer.log({key: value}, step)
        case AnalyticsDataType.SCALARS:
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
            writer.log_text(data.get(TrackConst.PATH_KEY) or key, value, step)
        case AnalyticsDataType.IMAGE:
            writer.log_image(key, value, step)
        case _:
            raise RecordError(f"{key!r}: trackhub has no kind of record for FLARE's type {data_type.value}")
