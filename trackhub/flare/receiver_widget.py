# SPDX-License-Identifier: Apache-2.0
"""The FLARE component of a receiver: takes records in, on the server or at a client, and delivers them to backends."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.widgets.widget import Widget

from trackhub.delivery import (
    SERVER,
    Channel,
    ChannelError,
    JobInfo,
    Limits,
    Receiver,
    RunStatus,
    Sender,
    Side,
    SpoolInfo,
    create_spool,
    set_process_spool,
)
from trackhub.errors import ConfigError, PluginError
from trackhub.flare import compat
from trackhub.flare.events import StockRecords

__all__ = ["TrackhubReceiver"]

_OWN_GATE_S = 1.0  # of the gate for the records of the server itself, where the sites have used it up


class TrackhubReceiver(Widget):  # type: ignore[misc]  # FLARE has no types
    """Keeps what arrives in a journal, and delivers it to the backends that the job names.

    On the server it receives from all clients, and from code of the server itself, whose run is called ``server``. On
    a client it receives from that client's `TrackhubSender`, without any network. Nothing that goes wrong in it fails
    the job, except a wrong configuration.
    """

    def __init__(
        self,
        backends: dict[str, dict[str, Any]],
        take_over: bool = True,
        limits: dict[str, Any] | None = None,
        state_dir: str | None = None,
    ) -> None:
        """Check the arguments, all of which stand in the job's configuration.

        Args:
            backends: name of each backend, and its options. Whether they exist here is checked when the job starts.
            take_over: on the server, receive what FLARE's own writers log there.
            limits: values for `trackhub.limits.Limits` that differ from the defaults.
            state_dir: folder for journal and spool, at this site; by default in the job's run folder.

        Raises:
            ConfigError: ``backends`` is no mapping of names to options, or a limit is wrong.
        """
        super().__init__()
        if not isinstance(backends, dict) or not all(isinstance(o, dict) for o in backends.values()):
            raise ConfigError(f"TrackhubReceiver: backends: expected {{name: {{option: value}}}}, got {backends!r}")
        self.backends = backends
        self.take_over = take_over
        self.limits = limits
        self.state_dir = state_dir
        self._limits = Limits.from_mapping(limits or {}, environ=os.environ)
        self._opened = False
        self._core: Receiver | None = None
        self._own_sender: Sender | None = None
        self._stock = StockRecords(self)
        self._gate_end: float | None = None
        self._failed = False
        self._status = RunStatus.FINISHED

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """React to FLARE's events. Never raises."""
        try:
            if compat.is_server(fl_ctx):
                self._on_server(event_type, fl_ctx)
            elif event_type == EventType.START_RUN and not self._opened:
                raise ConfigError(
                    "a client has a TrackhubReceiver but no TrackhubSender whose client_receiver names it; use "
                    "trackhub.flare.recipe.add_tracking, or add the sender"
                )
        except (ConfigError, PluginError) as e:
            compat.stop_job(self, fl_ctx, f"trackhub: {e}")
        except Exception as e:
            self.log_exception(fl_ctx, f"tracking met an error, the job goes on: {e}", fire_event=False)

    def _on_server(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type in compat.STOCK_EVENTS:
            if self.take_over:
                self._stock.take(fl_ctx)
        elif event_type == EventType.START_RUN:
            self._start_on_server(fl_ctx)
        elif event_type == compat.ROUND_STARTED:
            if self._own_sender is not None:
                self._own_sender.set_round(compat.current_round(fl_ctx, on_server=True))
        elif event_type == EventType.FATAL_SYSTEM_ERROR:
            self._failed = True
        elif event_type == EventType.ABOUT_TO_END_RUN:
            # Not later: in the simulator the abort signal is triggered while the server waits for the last records.
            if self._failed:
                self._status = RunStatus.FAILED
            elif compat.was_aborted(fl_ctx):
                self._status = RunStatus.ABORTED
        elif event_type == EventType.CHECK_END_RUN_READINESS:
            self._wait_for_sites(fl_ctx)

    def _start_on_server(self, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        channel = compat.Channel(engine, self._id(engine))
        channel.announce()
        compat.add_tail_handler(engine, _Tail(self))
        try:
            self.open(fl_ctx)
        except Exception as e:
            channel.refuse(f"{type(e).__name__}; the server's log says more")
            raise
        assert self._core is not None
        spool = self._folder(fl_ctx) / "spool"
        create_spool(spool, SpoolInfo(SERVER, compat.job_id(fl_ctx), ("server",), self._limits.spool_bytes))
        self._own_sender = Sender(spool, self._own_channel(spool), cursor="server", limits=self._limits)
        self._own_sender.start()
        self._stock.open(spool)
        set_process_spool(spool)
        channel.serve(self._core.handle)
        # What is imported by now stays. The collector need not walk it again and again while lanes make small objects:
        # a fifth of an MLflow lane's time (docs/adr/0006).
        gc.collect()
        gc.freeze()

    def _id(self, engine: Any) -> str:
        """The id under which the job's configuration names this component: what senders address."""
        return next((name for name, component in compat.components(engine).items() if component is self), self.name)

    def open(self, fl_ctx: FLContext) -> None:
        """Open the journal and start the backends.

        Raises:
            ConfigError, PluginError: a backend, an option or a backend's check is wrong; this must stop the job.
            JournalError: the journal cannot be opened; training goes on without this receiver.
        """
        self._opened = True
        core = Receiver(
            compat.run_dir(fl_ctx),
            state_dir=self._folder(fl_ctx),
            job=JobInfo(compat.job_id(fl_ctx)),
            side=Side.SERVER if compat.is_server(fl_ctx) else Side.CLIENT,
            backends=self.backends,
            limits=self._limits,
        )
        core.start()
        self._core = core

    def channel(self, site: str) -> Channel:
        """Return the channel by which a sender in this same process reaches the receiver."""

        def send(request: bytes, timeout_s: float) -> bytes:
            if self._core is None:
                raise ChannelError("this site's receiver could not be started")
            return self._core.handle(site, request)

        return send

    def _own_channel(self, spool: Path) -> Channel:
        """The channel for what the server itself logs. Most servers log nothing, and then have no run either."""
        send = self.channel(SERVER)

        def send_if_logged(request: bytes, timeout_s: float) -> bytes:
            if not has_streams(spool):
                raise ChannelError("the server has logged nothing yet")
            return send(request, timeout_s)

        return send_if_logged

    def close(self, status: RunStatus) -> None:
        """Deliver what can be delivered until the deadline, write the report, and close the journal."""
        core, self._core = self._core, None
        if core is not None:
            core.finish(status)

    def _folder(self, fl_ctx: FLContext) -> Path:
        return compat.state_folder(fl_ctx, self.state_dir)

    def _wait_for_sites(self, fl_ctx: FLContext) -> None:
        if self._core is None or self._gate_end is not None:  # FLARE asks again until all components are ready
            return
        self._gate_end = time.monotonic() + self._limits.gate_s
        sites = set(compat.participants(fl_ctx.get_engine()))
        if silent := self._core.wait_for_sites(sites, self._limits.gate_s):
            self.log_warning(
                fl_ctx,
                f"tracking: no final message from {', '.join(sorted(silent))}; what they did not send is in their "
                "spools",
                fire_event=False,
            )

    def finish(self, fl_ctx: FLContext) -> None:
        """Deliver the server's own last records and end. Called on the server, after all other components ended."""
        set_process_spool(None)
        self._stock.close()
        if self._own_sender is not None:
            gate_s = self._limits.gate_s
            if self._gate_end is not None:  # what the sites have left of it
                gate_s = max(self._gate_end - time.monotonic(), min(gate_s, _OWN_GATE_S))
            self._own_sender.close(gate_s if has_streams(self._folder(fl_ctx) / "spool") else 0.0)
        self.close(self._status)


def has_streams(spool: Path) -> bool:
    """Return whether any process has logged to this spool."""
    return any(spool.glob("*.ledger"))


class _Tail(FLComponent):  # type: ignore[misc]  # FLARE has no types
    """Ends the receiver after every other handler of END_RUN, so that what they log is received as well."""

    def __init__(self, receiver: TrackhubReceiver) -> None:
        super().__init__()
        self._receiver = receiver

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.END_RUN:
            try:
                self._receiver.finish(fl_ctx)
            except Exception as e:
                self.log_exception(fl_ctx, f"tracking could not end in order: {e}", fire_event=False)
