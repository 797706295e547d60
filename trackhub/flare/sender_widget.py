# SPDX-License-Identifier: Apache-2.0
"""The FLARE component that runs a client's senders: to the server's receiver, to the client's own receiver, or to both.

`trackhub.flare.recipe` puts the component into a job's configuration. The component turns FLARE's events into calls of
`trackhub.delivery.Sender`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.widgets.widget import Widget

from trackhub.delivery import (
    SPOOL_ENV,
    Channel,
    ChannelError,
    Limits,
    RunStatus,
    Sender,
    close_spool,
    create_spool_anywhere,
    refusal,
    spool_env,
)
from trackhub.errors import ConfigError, PluginError, SpoolError
from trackhub.flare import flare_internals
from trackhub.flare.cell_channel import CellChannel, NoReceiverError, answer_for_sender
from trackhub.flare.current_round import ClientRounds
from trackhub.flare.how_a_run_ends import ClientEnding
from trackhub.flare.job_name_notes_tags import JobLabels, job_info, spool_info
from trackhub.flare.model_and_validation_metrics import CLIENTS, SERVER, ClientMetrics, check_flare_metrics
from trackhub.flare.receiver_widget import TrackhubReceiver
from trackhub.flare.records_from_flare_writers import StockRecords, TakeOver, check_take_over
from trackhub.flare.records_made_by_trackhub import OwnRecords, SiteRecords
from trackhub.flare.replace_log_functions import LogCallSource
from trackhub.flare.trainer.capture import CaptureSetting
from trackhub.flare.trainer.note_other_loggers import seen_loggers
from trackhub.operator_file import OperatorFile
from trackhub.policy import Policy, SiteRules

__all__ = ["TrackhubSender"]

_OUTCOME_S = 5.0
"""The longest wait for the server to say how the job ends, in seconds."""


class TrackhubSender(Widget):  # type: ignore[misc]  # FLARE has no types
    """Sends a client's records to the job's receivers.

    Add it to every client, with `trackhub.flare.recipe.add_tracking` or as a component in ``config_fed_client.json``.
    It creates the site's spool before the trainer starts, and announces it to the trainer. Then it sends what appears
    in the spool until the receiver has acknowledged it. A wrong configuration or an unusable plugin stops the job
    before it trains. No other error of tracking stops a job.
    """

    def __init__(
        self,
        server_receiver: str | None = "trackhub_receiver",
        client_receiver: str | None = None,
        take_over: TakeOver = True,
        limits: dict[str, Any] | None = None,
        state_dir: str | None = None,
        job: dict[str, Any] | None = None,
        policy: dict[str, Any] | None = None,
        capture: list[str] | None = None,
        capture_only: bool = False,
        flare_metrics: list[str] | None = None,
        own_records: dict[str, Any] | None = None,
    ) -> None:
        """Keep the arguments. All of them are in the job's configuration, as plain JSON values.

        Args:
            server_receiver: the component id of the `TrackhubReceiver` on the server. None sends nothing to the server.
            client_receiver: the component id of the `TrackhubReceiver` at this client. None if the client has none.
            take_over: whether and how to record what FLARE's own writers log, as `TakeOver` says.
            limits: the `trackhub.limits.Limits` that differ from the defaults, by name.
            state_dir: the folder for the spool at this site. By default the spool is in the job's run folder.
            job: the job's ``name``, ``notes`` and ``tags``, or some of them, as `JobLabels` says.
            policy: what may leave the site: the rules of `trackhub.policy.Policy`. The site's operator may add others.
            capture: other loggers of the script to record from: ``tensorboard``, ``wandb``, ``mlflow``.
            capture_only: True makes these loggers write nothing themselves; their calls are recorded only.
            flare_metrics: with ``"clients"`` in it, record the metrics that FLARE carries from here to the server.
            own_records: what trackhub logs itself at this site: ``context`` and ``system_metrics`` of `OwnRecords`.

        Raises:
            ConfigError: no receiver is named, or another argument is wrong. If ``server_receiver`` is None, or if there
                is a policy, FLARE itself must not send records to the server. So ``take_over`` must then not be False
                or ``"copy"``, and ``flare_metrics`` must not have ``"server"``.
        """
        super().__init__()
        if server_receiver is None and client_receiver is None:
            raise ConfigError("TrackhubSender: server_receiver and client_receiver are both None; give one of them")
        check_take_over(take_over)
        if server_receiver is None and take_over in (False, "copy"):
            raise ConfigError(
                f"TrackhubSender: tracking is on the client side only, but take_over is {take_over!r}. So FLARE would "
                "send to the server what its own writers log. Leave take_over on, or track on the server as well"
            )
        check_flare_metrics(flare_metrics, has_server_side=server_receiver is not None)
        CaptureSetting.of(capture, capture_only)  # checks it when the job is written
        JobLabels.of(job)  # checks them when the job is written
        OwnRecords.of(own_records)
        # FLARE writes each argument into the job's configuration. It reads the value from the attribute of that name.
        self.server_receiver = server_receiver
        self.client_receiver = client_receiver
        self.take_over = take_over
        self.limits = limits
        self.state_dir = state_dir
        self.job = job
        self.policy = policy
        self.capture = capture
        self.capture_only = capture_only
        self.flare_metrics = flare_metrics
        self._check_rules(SiteRules.of_job(self._job_policy()))
        self.own_records = own_records
        self._limits = Limits.from_mapping(limits or {}, environ=os.environ)
        self._operator: OperatorFile | None = None
        self._senders: dict[str, Sender] = {}
        self._receiver: TrackhubReceiver | None = None
        self._stock = StockRecords(self, keep_events=take_over == "copy")
        self._source = LogCallSource(self._stock)
        self._spool: Path | None = None
        self._announced = ""
        self._ending = ClientEnding()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Handle one of FLARE's events. Never raises."""
        if event_type not in flare_internals.STOCK_EVENTS and flare_internals.is_from_another_process(fl_ctx):
            return
        try:
            self._handle(event_type, fl_ctx)
        except (ConfigError, PluginError) as e:
            flare_internals.stop_job(self, fl_ctx, f"trackhub: {e}")
        except Exception as e:
            self.log_exception(
                fl_ctx,
                f"tracking failed at the event {event_type}, and training goes on: {e}. See whether the "
                "folder of the spool is writable; if it is, report this",
                fire_event=False,
            )

    def _handle(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type in flare_internals.STOCK_EVENTS:
            if self.take_over:
                self._stock.take(fl_ctx)
                for sender in self._senders.values():
                    sender.facts.by_message = self._stock.by_message
        elif event_type == EventType.ABOUT_TO_START_RUN:
            self._start(fl_ctx)
        elif event_type == EventType.BEFORE_SEND_TASK_RESULT:
            self._barrier()
        elif event_type == EventType.FATAL_SYSTEM_ERROR:
            self._ending.take_fatal_error(fl_ctx)
        elif event_type == EventType.ABOUT_TO_END_RUN:
            self._ending.decide(fl_ctx)
        elif self.take_over:
            self._stock.take_custom(event_type, fl_ctx)

    def _job_policy(self) -> Policy | None:
        return None if self.policy is None else Policy.from_mapping(self.policy)

    def _start(self, fl_ctx: FLContext) -> None:
        engine, site = fl_ctx.get_engine(), fl_ctx.get_identity_name()
        own = SiteRecords(OwnRecords.of(self.own_records), self)
        flare_internals.add_last_handler(engine, _EndOfRunHandler(self, own))
        answer_for_sender(engine)
        self._operator = flare_internals.operator_file(fl_ctx)
        if self._operator is not None:
            self._limits = self._operator.limits_for(self.limits or {}, environ=os.environ)
        rules = flare_internals.site_rules(fl_ctx, self._job_policy())
        self._check_rules(rules)
        spool = self._create_spool(fl_ctx, site, rules)
        if self.server_receiver is not None:
            send = self._server_channel(engine, self.server_receiver)
            self._senders["server"] = Sender(spool, send, cursor="server", limits=self._limits)
        if self.client_receiver is not None:
            receiver = self._open_receiver(fl_ctx)
            self._senders["client"] = Sender(spool, receiver.channel(site), cursor="client", limits=self._limits)
        self._stock.open(spool)
        own.start(lambda: self._stock.calls().writer, spool, fl_ctx)
        at_source = self._open_source(fl_ctx)
        for sender in self._senders.values():
            sender.facts.at_source = at_source
            sender.start()
        metrics = ClientMetrics(self._stock).take_result if CLIENTS in (self.flare_metrics or ()) else None
        ClientRounds(engine, self._set_round, self._end_task, metrics)

    def _check_rules(self, rules: SiteRules) -> None:
        """Check that no setting of the job lets records bypass the rules.

        Raises:
            ConfigError: ``take_over`` or ``flare_metrics`` lets records bypass the rules.
        """
        if rules and self.take_over in (False, "copy"):
            raise ConfigError(
                "TrackhubSender: a policy restricts what may leave this site, but take_over is "
                f"{self.take_over!r}. So FLARE would send to the server what its own writers log, past the policy. "
                "Leave take_over on, or set it to 'events'"
            )
        if rules and SERVER in (self.flare_metrics or ()):
            raise ConfigError(
                "TrackhubSender: a policy restricts what may leave this site, but flare_metrics has 'server'. So the "
                "server would record what FLARE carries there, past the policy. Leave 'server' out"
            )

    def _open_source(self, fl_ctx: FLContext) -> bool:
        """Replace the log functions, if the job and the operator allow it, so that each call is recorded at once.

        Return True if the functions of FLARE's own writers are replaced, too.
        """
        take_over = self.take_over is True and not self._leaves_trainers()
        setting = self._capture_setting()
        if self.capture and not setting.names:
            self.log_warning(
                fl_ctx, 'capture is off: the operator\'s file of this site has take_over = "events"', fire_event=False
            )
        if not take_over and not setting.names:
            return False
        assert self._spool is not None
        try:
            return self._source.open(fl_ctx.get_engine(), setting, self._spool, take_over=take_over)
        except Exception as e:
            self.log_exception(
                fl_ctx,
                f"trackhub cannot replace the log functions at this site: {e}. From FLARE's events, it still records "
                "what FLARE's own writers log. What the job captures may be missing",
            )
            return False

    def _leaves_trainers(self) -> bool:
        """Return whether the operator forbids changing trainers."""
        return self._operator is not None and self._operator.take_over == "events"

    def _capture_setting(self) -> CaptureSetting:
        return CaptureSetting() if self._leaves_trainers() else CaptureSetting.of(self.capture, self.capture_only)

    def _set_round(self, current: int | None) -> None:
        for sender in self._senders.values():
            sender.set_round(current)

    def _end_task(self, status: RunStatus) -> None:
        self._ending.task = status

    def _server_channel(self, engine: Any, receiver: str) -> Channel:
        """Return the channel to the server's receiver. Tests override this method to put faults into the channel."""
        channel = CellChannel(engine, receiver)

        def send(request: bytes, timeout_s: float) -> bytes:
            try:
                return channel.request(request, timeout_s)
            except NoReceiverError as e:
                return refusal("no_receiver", str(e))
            except ConnectionError as e:
                raise ChannelError(str(e)) from e

        return send

    def _create_spool(self, fl_ctx: FLContext, site: str, rules: SiteRules) -> Path:
        job = job_info(fl_ctx, self.job)
        cursors = [side for side, on in (("server", self.server_receiver), ("client", self.client_receiver)) if on]
        info = spool_info(job, site, cursors, self._limits.spool_bytes, rules)
        state_dir = self.state_dir
        if self._operator is not None:
            state_dir = self._operator.state_dir_for(state_dir, flare_internals.run_dir(fl_ctx))
        folder = flare_internals.state_folder(fl_ctx, state_dir, job) / "spool"
        spool = create_spool_anywhere(folder, info)
        # Trainers start later, at START_RUN. An external one inherits the variable, and one in this process reads it.
        self._spool = spool
        self._announced = spool_env(spool, site, job.id)
        os.environ[SPOOL_ENV] = self._announced
        return spool

    def _open_receiver(self, fl_ctx: FLContext) -> TrackhubReceiver:
        receiver = fl_ctx.get_engine().get_component(self.client_receiver)
        if not isinstance(receiver, TrackhubReceiver):
            raise ConfigError(
                f"TrackhubSender: client_receiver={self.client_receiver!r} is not the id of a TrackhubReceiver in this "
                "client's configuration"
            )
        self._receiver = receiver
        try:
            receiver.open(fl_ctx)
        except (ConfigError, PluginError):
            raise
        except Exception as e:
            self.log_exception(
                fl_ctx,
                f"this site's receiver cannot start: {e}. The records wait in the site's spool; `trackhub replay` "
                "delivers them",
            )
        return receiver

    def _barrier(self) -> None:
        waits = [threading.Thread(target=s.flush, args=(self._limits.barrier_s,)) for s in self._senders.values()]
        for wait in waits:
            wait.start()
        for wait in waits:
            wait.join()

    def finish(self, fl_ctx: FLContext) -> None:
        """Send the rest and the final message, and end this client's receiver. Call it after the trainer has ended."""
        if os.environ.get(SPOOL_ENV) == self._announced:
            del os.environ[SPOOL_ENV]
        self._source.close()
        self._stock.close()
        if self._spool is not None:
            seen, captured = set(seen_loggers(self._spool)), set(self._capture_setting().names)
            for sender in self._senders.values():
                sender.facts.not_captured = tuple(sorted(seen - captured))
                sender.facts.not_used = tuple(sorted(captured - seen))
            with contextlib.suppress(SpoolError):  # it only keeps out late writers; no record depends on it
                close_spool(self._spool)
        # Close both senders at once: the server waits for this site's final message, and a local backend may take long.
        server = self._senders.get("server")
        remote = threading.Thread(target=self._close, args=("server",))
        remote.start()
        try:
            self._close("client")
            if self._receiver is not None:
                remote.join(_OUTCOME_S)
                self._receiver.close(self._outcome(server))
        finally:
            remote.join()

    def _outcome(self, server: Sender | None) -> RunStatus:
        """Return the status with which this site's own receiver ends the run.

        It is the server's status, if the server told FAILED or ABORTED. Otherwise it is this site's own status.
        """
        told = server.job_status if server is not None else None
        return self._ending.status if told in (None, RunStatus.FINISHED) else told

    def _close(self, side: str) -> None:
        if (sender := self._senders.pop(side, None)) is not None:
            sender.close(self._limits.sites_s, failed=self._ending.status is RunStatus.FAILED)

    def pause(self, fl_ctx: FLContext) -> None:
        """Send for at most a second per receiver, before the simulator replaces this process with another one."""
        for sender in self._senders.values():
            sender.flush(1.0)


class _EndOfRunHandler(FLComponent):  # type: ignore[misc]  # FLARE has no types
    """Ends the sender after every other handler of END_RUN, when the executor has ended the trainer.

    It also pauses the sender at SWAP_OUT.
    """

    def __init__(self, sender: TrackhubSender, own: SiteRecords) -> None:
        super().__init__()
        self._sender = sender
        self._own = own

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if flare_internals.is_from_another_process(fl_ctx):
            return
        try:
            if event_type == EventType.END_RUN:
                self._own.stop()  # first, since it logs into the spool, which `finish` closes
                self._sender.finish(fl_ctx)
            elif event_type == EventType.SWAP_OUT:
                self._sender.pause(fl_ctx)
        except Exception as e:
            self.log_exception(
                fl_ctx, f"tracking could not end: {e}. `trackhub replay` delivers what is left", fire_event=False
            )
