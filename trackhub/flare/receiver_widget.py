# SPDX-License-Identifier: Apache-2.0
"""The FLARE component that runs a receiver, on the server or at a client.

`trackhub.flare.recipe` puts the component into a job's configuration. The component turns FLARE's events into calls of
`trackhub.delivery.Receiver`.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.widgets.widget import Widget

from trackhub import registry
from trackhub.delivery import (
    SERVER,
    Channel,
    ChannelError,
    Limits,
    Receiver,
    RunStatus,
    Sender,
    Side,
    create_spool,
    has_streams,
    prune_older,
    set_process_spool,
)
from trackhub.errors import ConfigError, PluginError
from trackhub.flare import flare_internals, model_and_validation_metrics
from trackhub.flare.cell_channel import CellChannel, note_sites_of_events
from trackhub.flare.current_round import ServerRounds
from trackhub.flare.federation_facts import FederationFacts
from trackhub.flare.federation_run_argument import FederationSettings
from trackhub.flare.find_analytics_listeners import listeners, server_warning
from trackhub.flare.how_a_run_ends import ServerEnding
from trackhub.flare.job_name_notes_tags import JobLabels, job_info, spool_info
from trackhub.flare.read_task_events import asking_site
from trackhub.flare.record_for_sites_without_sender import SitesWithoutSender
from trackhub.flare.records_from_flare_writers import StockRecords, TakeOver, check_take_over
from trackhub.flare.records_made_by_trackhub import OwnRecords, ServerRecords

__all__ = ["TrackhubReceiver"]

_MIN_OWN_CLOSE_S = 1.0
"""The server's own records get this much time at the end of the job, in seconds, even when waiting for the sites took
all of ``sites_s``."""

_IN_JOB_STORE = (
    "FLARE keeps this job's files in its job store. Get them with `nvflare job download {job}`. Then "
    "`trackhub status FOLDER` says how to open them"
)


class TrackhubReceiver(Widget):  # type: ignore[misc]  # FLARE has no types
    """Receives records, stores them in a journal, and delivers them to the job's backends.

    On the server it receives the records of all clients. Records that the server itself logs become the run ``server``.
    At a client it receives the records of that client's `TrackhubSender`, without a network. A wrong configuration or
    an unusable plugin stops the job before training. No other error of tracking stops a job.
    """

    def __init__(
        self,
        backends: dict[str, dict[str, Any]],
        take_over: TakeOver = True,
        limits: dict[str, Any] | None = None,
        state_dir: str | None = None,
        job: dict[str, Any] | None = None,
        federation: bool | dict[str, Any] = True,
        flare_metrics: list[str] | None = None,
        own_records: dict[str, Any] | None = None,
    ) -> None:
        """Keep the arguments. All of them are in the job's configuration, as plain JSON values.

        Args:
            backends: the name of each backend, and its options. The receiver checks them when the job starts.
            take_over: on the server, whether to record what FLARE's own writers log there, and at sites without a
                `TrackhubSender`. `TakeOver` lists the values.
            limits: the `trackhub.limits.Limits` that differ from the defaults, by name.
            state_dir: the folder for the journal and the spool at this site; by default in the job's run folder.
            job: the job's ``name``, ``notes`` and ``tags``, or some of them, as `JobLabels` says.
            federation: on the server, True or False for the job's federation run, or its settings as in
                `FederationSettings`.
            flare_metrics: with ``"server"`` in it, the server records the results of cross-site evaluation that it
                gets. If ``take_over`` is on, too, it also records its components' analytics events of types that are
                not FLARE's own.
            own_records: what trackhub logs itself into the federation run: ``context`` and ``log_model`` of
                `OwnRecords`.

        Raises:
            ConfigError: ``backends`` is not a mapping of names to options, or another argument is wrong.
        """
        super().__init__()
        if not isinstance(backends, dict) or not all(isinstance(o, dict) for o in backends.values()):
            raise ConfigError(f"TrackhubReceiver: backends: expected {{name: {{option: value}}}}, got {backends!r}")
        check_take_over(take_over)
        JobLabels.of(job)  # checks them when the job is written
        self._settings = FederationSettings.of(federation)
        model_and_validation_metrics.check_flare_metrics(flare_metrics)
        self._own = ServerRecords(OwnRecords.of(own_records), self)
        # FLARE writes each argument into the job's configuration. It reads the value from the attribute of that name.
        self.backends = backends
        self.take_over = take_over
        self.limits = limits
        self.state_dir = state_dir
        self.job = job
        self.federation = federation
        self.flare_metrics = flare_metrics
        self.own_records = own_records
        self._limits = Limits.from_mapping(limits or {}, environ=os.environ)
        self._opened = False
        self._core: Receiver | None = None
        self._own_sender: Sender | None = None
        self._stock = StockRecords(self, keep_events=take_over == "copy")
        self._without_sender: SitesWithoutSender | None = None
        self._wait_end: float | None = None
        self._ending = ServerEnding(self._note_status)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Handle one of FLARE's events. Never raises."""
        if event_type not in flare_internals.STOCK_EVENTS and flare_internals.is_from_another_process(fl_ctx):
            return
        try:
            if flare_internals.is_server(fl_ctx):
                self._on_server(event_type, fl_ctx)
            elif event_type == EventType.START_RUN and not self._opened:
                raise ConfigError(
                    "this client has a TrackhubReceiver, but no TrackhubSender names it as its client_receiver. Use "
                    "trackhub.flare.recipe.add_tracking, or add such a sender"
                )
        except (ConfigError, PluginError) as e:
            flare_internals.stop_job(self, fl_ctx, f"trackhub: {e}")
        except Exception as e:
            self.log_exception(
                fl_ctx,
                f"tracking failed at the event {event_type}, and the job goes on: {e}. See whether the folder of the "
                "journal is writable; if it is, report this",
                fire_event=False,
            )

    def _on_server(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type in flare_internals.STOCK_EVENTS:
            if self.take_over:
                self._stock.take(fl_ctx)
                if self._without_sender is not None and (found := flare_internals.event_of_site(fl_ctx)):
                    self._without_sender.take(*found)
        elif event_type == EventType.BEFORE_PROCESS_TASK_REQUEST:
            if self._without_sender is not None:
                self._without_sender.note_started(asking_site(fl_ctx))
        elif event_type == EventType.START_RUN:
            self._ending.watch(fl_ctx)
            self._start_on_server(fl_ctx)
        elif event_type == EventType.FATAL_SYSTEM_ERROR:
            self._ending.take_fatal_error()
        elif event_type == EventType.ABOUT_TO_END_RUN:
            self._ending.decide()
        elif event_type == EventType.CHECK_END_RUN_READINESS:
            self._wait_for_sites(fl_ctx)
        elif event_type == flare_internals.ROUND_STARTED:
            self._begin_federation_run(fl_ctx)
        elif self.take_over and self._records_flare_metrics():
            self._stock.take_custom(event_type, fl_ctx)

    def _records_flare_metrics(self) -> bool:
        return model_and_validation_metrics.SERVER in (self.flare_metrics or ())

    def _note_status(self, status: RunStatus) -> None:
        """Tell the sites how the job ends, so that their own receivers end their runs with the same status.

        The journal has it, too, in case that FLARE kills this process before its end.
        """
        if self._core is not None:
            self._core.note_status(status)

    def _start_on_server(self, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        channel = CellChannel(engine, self._id(engine))
        channel.announce()
        flare_internals.add_last_handler(engine, _EndOfRunHandler(self))
        try:
            self.open(fl_ctx)
        except Exception as e:
            channel.refuse(f"it could not start: {type(e).__name__}. The server's log says more")
            raise
        assert self._core is not None
        spool = self._core.folder / "spool"
        rules = flare_internals.site_rules(fl_ctx, None)
        create_spool(spool, spool_info(self._core.job, SERVER, ("server",), self._limits.spool_bytes, rules))
        self._own_sender = Sender(spool, self._own_channel(spool), cursor="server", limits=self._limits)
        self._own_sender.start()
        self._begin_federation_run(fl_ctx)
        ServerRounds(engine, self._own_sender.set_round)
        self._stock.open(spool)
        set_process_spool(spool)
        if self._records_flare_metrics():
            model_and_validation_metrics.ServerMetrics(engine, self._stock)
        self._core.sites.expect(flare_internals.participants(engine))
        channel.serve(self._core.handle)
        if warning := server_warning(
            listeners(flare_internals.components(engine)), self.take_over, has_server_side=True
        ):
            self.log_warning(fl_ctx, warning, fire_event=False)
        self._without_sender = SitesWithoutSender(self, engine, self._core, self._limits)
        try:
            note_sites_of_events(engine)
        except Exception as e:
            self.log_warning(
                fl_ctx,
                f"tracking: events of sites without a TrackhubSender are not recorded: {e!r}. This FLARE may be newer "
                "than trackhub knows",
                fire_event=False,
            )
        # Imported modules stay until the process ends. Without the freeze, the garbage collector visits them again and
        # again while lanes make small objects. That costs a fifth of an MLflow lane's time (docs/adr/0006).
        gc.collect()
        gc.freeze()

    def _begin_federation_run(self, fl_ctx: FLContext) -> None:
        """Watch the job for the federation run. While the disk is full there is no such run: each round tries again."""
        if not self._own.has_begun and self._core is not None and self._core.federation is not None:
            assert self._settings is not None
            update_statistics = self._settings.update_statistics
            FederationFacts(fl_ctx.get_engine(), self._core.federation, update_statistics=update_statistics)
            self._own.begin(self._core.federation, fl_ctx)

    def _id(self, engine: Any) -> str:
        """Return this component's id in the job's configuration, which senders address."""
        return next(
            (name for name, component in flare_internals.components(engine).items() if component is self), self.name
        )

    def open(self, fl_ctx: FLContext) -> None:
        """Open the journal and start the backends. Blocks up to the limit ``preflight_s``.

        Raises:
            ConfigError: a backend or an option is wrong, or a backend cannot be used as configured. The caller must
                stop the job.
            PluginError: the plugin of a backend cannot be used. The caller must stop the job.
            JournalError: the journal cannot be opened, for another reason than a full disk. Training goes on without
                this receiver.
        """
        self._opened = True
        job = job_info(fl_ctx, self.job)
        run_dir = flare_internals.run_dir(fl_ctx)
        backends, state_dir = self.backends, self.state_dir
        if (operator := flare_internals.operator_file(fl_ctx)) is not None:
            self._limits = operator.limits_for(self.limits or {}, environ=os.environ)
            state_dir = operator.state_dir_for(state_dir, run_dir)
            backends = {n: registry.permitted_options(n, o, operator, run_dir) for n, o in backends.items()}
            if operator.keep_days is not None and operator.state_dir is not None:
                older = (Path(operator.state_dir), operator.keep_days)
                threading.Thread(target=prune_older, args=older, name="trackhub-prune", daemon=True).start()
        is_server = flare_internals.is_server(fl_ctx)  # only the server's receiver gets the records of all sites
        core = Receiver(
            run_dir,
            state_dir=flare_internals.state_folder(fl_ctx, state_dir, job),
            job=job,
            side=Side.SERVER if is_server else Side.CLIENT,
            backends=backends,
            limits=self._limits,
            federation=self._settings.options() if is_server and self._settings is not None else None,
        )
        self._core = core  # before the start, since FLARE may abort the job while a backend is being checked
        if self._ending.status is not RunStatus.FINISHED:  # it was aborted before
            core.note_status(self._ending.status)
        try:
            core.start()
        except BaseException:
            self._core = None
            raise

    def channel(self, site: str) -> Channel:
        """Return a channel for a sender of this site in the receiver's own process."""

        def send(request: bytes, timeout_s: float) -> bytes:
            core = self._core
            if core is None:
                raise ChannelError("this site's receiver does not run; the log says why")
            return core.handle(site, request)

        return send

    def _own_channel(self, spool: Path) -> Channel:
        """Return the channel for what the server itself logs. A server that logs nothing gets no run."""
        send = self.channel(SERVER)

        def send_if_logged(request: bytes, timeout_s: float) -> bytes:
            if not has_streams(spool):
                raise ChannelError("the server has logged nothing yet")
            return send(request, timeout_s)

        return send_if_logged

    def close(self, status: RunStatus, moves_to: str = "") -> None:
        """Deliver until the deadline, write the report, and close the journal. Blocks up to the limit ``deadline_s``.

        Args:
            status: how the job ended.
            moves_to: as for `Receiver.finish`.
        """
        core, self._core = self._core, None
        if core is not None:
            core.finish(status, moves_to=moves_to)

    def _wait_for_sites(self, fl_ctx: FLContext) -> None:
        if self._core is None or self._wait_end is not None:  # FLARE asks again until all components are ready
            return
        self._wait_end = time.monotonic() + self._limits.sites_s
        sites = set(flare_internals.participants(fl_ctx.get_engine()))
        if self._without_sender is not None:
            self._without_sender.ask_now()
            self._core.sites.without_sender |= self._without_sender.found()
            sites -= self._without_sender.found()
        if missing := self._core.wait_for_sites(sites):
            self.log_warning(
                fl_ctx,
                f"tracking: the final message of {', '.join(sorted(missing))} did not come. What these sites did not "
                "send is in their spools; `trackhub replay` delivers it",
                fire_event=False,
            )

    def finish(self, fl_ctx: FLContext) -> None:
        """Deliver the server's own last records, and end. Called on the server, after all other components ended."""
        set_process_spool(None)
        self._stock.close()
        if self._without_sender is not None:
            self._without_sender.close(_MIN_OWN_CLOSE_S)
        if self._own_sender is not None:
            left_s = self._limits.sites_s
            if self._wait_end is not None:  # the wait for the sites has used a part of ``sites_s``
                left_s = max(self._wait_end - time.monotonic(), min(left_s, _MIN_OWN_CLOSE_S))
            assert self._core is not None
            self._own_sender.close(left_s if has_streams(self._core.folder / "spool") else 0.0)
        if self._core is not None and self._core.federation is not None:
            self._own.end(self._core.federation, fl_ctx)
        # A provisioned server archives the run folder after this, and then deletes it.
        moves = flare_internals.is_provisioned(fl_ctx)
        self.close(self._ending.status, _IN_JOB_STORE.format(job=fl_ctx.get_job_id()) if moves else "")


class _EndOfRunHandler(FLComponent):  # type: ignore[misc]  # FLARE has no types
    """Ends the receiver after every other handler of END_RUN, so that the records of these handlers still arrive."""

    def __init__(self, receiver: TrackhubReceiver) -> None:
        super().__init__()
        self._receiver = receiver

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.END_RUN and not flare_internals.is_from_another_process(fl_ctx):
            try:
                self._receiver.finish(fl_ctx)
            except Exception as e:
                self.log_exception(
                    fl_ctx, f"tracking could not end: {e}. `trackhub replay` delivers what is left", fire_event=False
                )
