# SPDX-License-Identifier: Apache-2.0
"""Turns what FLARE's own writers log into records of trackhub: unchanged, and each once. Both widgets call it.

``SummaryWriter``, ``WandBWriter``, ``MLflowWriter``, ``flare.log``, Lightning's ``ClientLogger``, XGBoost's callback
and Flower all make FLARE fire the same event, with an analytics DXO. The event has no time of the log call. In process
FLARE fires it during the call. For an external trainer FLARE fires it when the trainer's message arrives, and does not
keep the order. So `trackhub.flare.replace_log_functions` takes the call itself where that is possible, and FLARE fires
no event for it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

from nvflare.apis.analytix import AnalyticsDataType, TrackConst
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, LogMessageTag
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_event_type import AppEventType

from trackhub.errors import ConfigError, RecordError, SpoolError
from trackhub.flare import flare_internals
from trackhub.flare.trainer.record_flare_log_calls import LogCalls, write_call
from trackhub.writer.writer import Writer

__all__ = ["StockRecords", "TakeOver", "check_take_over", "write_stock_record"]

_LOG_LINES = frozenset(tag for name, tag in vars(LogMessageTag).items() if name.isupper())
"""The keys of the events with which FLARE carries the log lines of its components."""
_FLARES_EVENTS = frozenset(
    value for owner in (EventType, AppEventType) for name, value in vars(owner).items() if name.isupper()
)
"""The types of the many events that FLARE fires itself. None of them carries a record."""

_MAX_EARLY = 1000
"""How many records are kept until the spool is there. Further ones are counted as dropped."""

TakeOver = bool | Literal["events", "copy"]
"""Whether and how to record what FLARE's own writers log:

- ``True``: in the call itself. FLARE fires no event for it and sends nothing.
- ``"events"``: from FLARE's events. Trainers stay as they are, and FLARE sends nothing to the server.
- ``"copy"``: from FLARE's events, which FLARE still sends to its own receivers and to the user's components.
- ``False``: not at all.
"""


def check_take_over(value: object) -> None:
    """Check a job's ``take_over`` when the job is written.

    Raises:
        ConfigError: it has another value.
    """
    if not isinstance(value, bool) and value not in ("events", "copy"):
        raise ConfigError(f"tracking: take_over: expected true, false, 'events' or 'copy', got {value!r}")


class StockRecords:
    """Writes the records of FLARE's own writers into a spool. Thread-safe.

    FLARE's own writers make FLARE fire events. This class takes the records from these events.

    Attributes:
        by_message: records that came as messages of another process. Nobody knows how many such messages were lost.
    """

    def __init__(self, component: FLComponent, *, keep_events: bool = False) -> None:
        """Prepare; ``open`` starts it.

        Args:
            component: the component in whose log warnings appear.
            keep_events: leave the events to FLARE, which then handles them as without trackhub.
        """
        self.by_message = 0
        self._keep_events = keep_events
        self._component = component
        self._lock = threading.Lock()
        self._spool: Path | None = None
        self._calls: LogCalls | None = None
        self._early: list[tuple[Shareable, bool]] = []
        self._lost = 0

    def open(self, spool: Path) -> None:
        """Write records into this spool, earlier ones included."""
        with self._lock:
            self._spool = spool
            early, self._early = self._early, []
        for event, by_message in early:
            self.write(event, by_message=by_message)
        for _ in range(self._lost):
            self.calls().count_lost(RecordError(f"more than {_MAX_EARLY} were logged before tracking had started"))

    def _keep(self, event: Shareable, by_message: bool) -> bool:
        """Keep a record that comes before the spool is there. Return False if the spool is there."""
        with self._lock:
            if self._spool is not None:
                return False
            if len(self._early) < _MAX_EARLY:
                self._early.append((event, by_message))
            else:
                self._lost += 1
            return True

    def take(self, fl_ctx: FLContext) -> None:
        """Take the record in this event, if it is a new record of this site.

        A record that cannot be converted is counted as dropped, and a value that cannot be stored is counted
        as left out. Each reason is logged once.
        """
        # Take the event even if the spool could not be created. Otherwise FLARE would send it to the server, and the
        # site's policy would not apply.
        event = flare_internals.take_stock_event(fl_ctx, keep=self._keep_events)
        if event is not None:
            self.write(event, by_message=flare_internals.came_as_message(fl_ctx))

    def take_custom(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take the record in an event of another type, if it has one. FLARE still handles the event.

        An ``AnalyticsSender`` with its own event type fires such events, for a component of the user.
        """
        if event_type in _FLARES_EVENTS:
            return
        event = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
        if not isinstance(event, Shareable):
            return
        try:
            dxo = from_shareable(event)
        except Exception:  # the data of most events is something else
            return
        # FLARE fires its own log lines as such events, too. They can hold paths and values, and must stay at the site.
        if dxo.data_kind == DataKind.ANALYTIC and dxo.data.get(TrackConst.TRACK_KEY) not in _LOG_LINES:
            self.take(fl_ctx)

    def write(self, event: Shareable, *, by_message: bool) -> None:
        """Write the record in an event's data. What cannot be converted is counted.

        Args:
            event: the event's data.
            by_message: the event came as a message of another process.
        """
        if self._keep(event, by_message):
            return
        calls = self.calls()
        if by_message:
            with self._lock:
                self.by_message += 1
        try:
            write_stock_record(calls.writer, event)
        except (RecordError, SpoolError) as e:
            calls.count_lost(e)

    def warn(self, message: str) -> None:
        """Warn in the component's log."""
        self._component.logger.warning(message)

    def calls(self) -> LogCalls:
        """Return the object that writes log calls into the spool.

        All log calls of this process share one writer. Call ``open`` first.
        """
        with self._lock:
            if self._calls is None:
                assert self._spool is not None
                self._calls = LogCalls(Writer(self._spool), self._component.logger.warning)
            return self._calls

    def close(self) -> None:
        """Take no more records."""
        with self._lock:
            if self._calls is not None:
                self._calls.close()


def write_stock_record(writer: Writer, event: Shareable) -> None:
    """Write the record in an analytics event of FLARE's own writers, as `write_call` does.

    Args:
        writer: where to write it.
        event: the event's data.

    Raises:
        RecordError: the event is malformed, or of a kind that no record can hold: a model, a Python log record. A
            strict writer also raises it for a value that it cannot store.
        SpoolError: a strict writer is closed.
    """
    try:
        dxo = from_shareable(event)
        data = dxo.data
        if dxo.data_kind != DataKind.ANALYTIC:
            raise RecordError(f"an analytics event: expected data of kind {DataKind.ANALYTIC!r}, got {dxo.data_kind!r}")
        key, value = data[TrackConst.TRACK_KEY], data[TrackConst.TRACK_VALUE]
        data_type = AnalyticsDataType(dxo.get_meta_prop(TrackConst.DATA_TYPE_KEY))
    except RecordError:
        raise
    except Exception as e:
        raise RecordError(f"an analytics event cannot be read: {type(e).__name__}: {e}") from e
    write_call(writer, key, value, data_type, data)
