# SPDX-License-Identifier: Apache-2.0
"""All of FLARE that trackhub uses beyond its documented interface, in one place.

The rest of `trackhub.flare` uses `nvflare.apis` and what is here, so that a new FLARE release can be judged by one
file and its test (``tests/integration/test_flare_compat.py``). Written for nvflare 2.9.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import EventScope, FedEventHeader, FLContextKey, ProcessType, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import ALL_SITES, SERVER_SITE_NAME
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.defs import ReturnCode as CellReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply as make_cell_reply
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.job_config.api import FedJob
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants

from trackhub.errors import ConfigError
from trackhub.run import SERVER, RunStatus

__all__ = [
    "ROUND_STARTED",
    "STOCK_EVENTS",
    "Channel",
    "NoReceiverError",
    "add_tail_handler",
    "add_to_clients",
    "client_sites",
    "components",
    "current_round",
    "execution_id",
    "has_component",
    "is_ending",
    "is_server",
    "job_id",
    "job_of",
    "participants",
    "raise_shutdown_timeout",
    "reference_package",
    "run_dir",
    "site_of",
    "state_folder",
    "stop_job",
    "take_stock_event",
    "task_status",
    "was_aborted",
]

CHANNEL = "trackhub"
"""FLARE's Cell routes a request by channel and topic; the topic is the receiver's component id."""

ROUND_STARTED: str = AppEventType.ROUND_STARTED
"""The event that workflows fire on the server at the start of a round."""

STOCK_EVENTS = (ANALYTIC_EVENT_TYPE, f"fed.{ANALYTIC_EVENT_TYPE}")
"""What FLARE's own writers end in: the local event in process, the federated one from an external trainer."""

_PAYLOAD = "trackhub"
_REFUSAL = "trackhub.refusal"
_TAKEN = "trackhub.taken"
_EXECUTION_FOLDER = ".trackhub"


def is_server(fl_ctx: FLContext) -> bool:
    """Return whether this process is a job's server process."""
    return bool(fl_ctx.get_process_type() == ProcessType.SERVER_JOB)


def run_dir(fl_ctx: FLContext) -> Path:
    """Return the job's run folder at this site. On the server, FLARE archives and then deletes it after END_RUN."""
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))


def job_id(fl_ctx: FLContext) -> str:
    """Return FLARE's job id; for the simulator, whose job id is a constant, an id of this execution.

    The processes of one execution share the simulator's root folder, and the simulator empties it before the next
    execution. So whoever comes first leaves an id there, and all others read it.
    """
    job = str(fl_ctx.get_job_id())
    if job != SimulatorConstants.JOB_NAME:
        return job
    return execution_id(Path(fl_ctx.get_engine().get_workspace().get_root_dir()).parent)


def execution_id(simulator_root: Path) -> str:
    """Return the id of the execution in this root folder, and mint it if there is none. Safe between processes."""
    folder = simulator_root / _EXECUTION_FOLDER
    file = folder / "execution"
    if not file.exists():
        minted = f"sim-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        with tempfile.TemporaryDirectory(dir=simulator_root) as scratch:
            claim = Path(scratch) / "claim"
            claim.mkdir()
            (claim / file.name).write_text(minted, encoding="utf-8")
            try:
                # Renaming a folder onto one that is not empty fails, on every file system and without a gap in which
                # another process could read an unfinished file.
                claim.rename(folder)
            except OSError:
                if not file.exists():
                    raise
    return file.read_text(encoding="utf-8")


def state_folder(fl_ctx: FLContext, state_dir: str | None) -> Path:
    """Return the folder for trackhub's own files of this site and job."""
    if state_dir is None:
        return run_dir(fl_ctx) / "trackhub"
    return Path(state_dir) / job_id(fl_ctx) / (SERVER if is_server(fl_ctx) else fl_ctx.get_identity_name())


def components(engine: Any) -> dict[str, Any]:
    """Return all components of the job in this process, by id."""
    owner = engine if hasattr(engine, "get_all_components") else engine.run_manager
    found: dict[str, Any] = owner.components
    return found


def participants(engine: Any) -> dict[str, str]:
    """Return the job's clients, from name to the fqcn of their cell. On the server only."""
    return {client.name: client.get_fqcn() for client in engine.get_participating_clients().values()}


def site_of(origin: str, clients: Mapping[str, str]) -> str | None:
    """Return the site whose cell, or a cell below it, is the origin of a message; None if it is no client's.

    The origin is set by the sender's cell, and in a provisioned federation checked by the server's parent process
    against the site's token, unlike the identity in peer properties, which any component may claim.
    """
    owners = [(fqcn, name) for name, fqcn in clients.items() if origin == fqcn or FQCN.is_ancestor(fqcn, origin)]
    # The longest, since a site's name may contain a dot: "a" is no ancestor of the site "a.b".
    return max(owners, key=lambda owner: len(owner[0]))[1] if owners else None


def add_tail_handler(engine: Any, handler: FLComponent) -> None:
    """Add a handler that gets events after all components have had them, executors and server components included."""
    owner = engine if hasattr(engine, "add_handler") else engine.run_manager
    owner.add_handler(handler)


def stop_job(component: FLComponent, fl_ctx: FLContext, reason: str) -> None:
    """Stop the job because of this error at this site, before it trains.

    On the server by ``system_panic``. A client's own panic would not reach the server: the client would end, and the
    server would go on waiting for it (in the simulator, for ever). So a client answers its first task with a return
    code upon which the server panics.
    """
    if is_server(fl_ctx):
        component.system_panic(reason, fl_ctx)
    else:
        component.log_error(fl_ctx, f"{reason} (this site will train nothing, and the job is going to stop)")
        fl_ctx.set_job_is_unsafe()


def was_aborted(fl_ctx: FLContext) -> bool:
    """Return whether somebody stopped the job, asked at ABOUT_TO_END_RUN.

    A client's abort signal also triggers when a job ends as it should; what tells the two apart is a property that
    FLARE sets for this event only.
    """
    if is_server(fl_ctx):
        return is_ending(fl_ctx)
    return bool(fl_ctx.get_prop(FLContextKey.RUN_ABORT_REQUESTED, False))


def is_ending(fl_ctx: FLContext) -> bool:
    """Return whether the run has been told to end, as it should or not."""
    signal = fl_ctx.get_run_abort_signal()
    return bool(signal is not None and signal.triggered)


def task_status(fl_ctx: FLContext) -> RunStatus:
    """Return how a client's task ended, asked at AFTER_TASK_EXECUTION."""
    result = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
    code = result.get_return_code(ReturnCode.OK) if isinstance(result, Shareable) else ReturnCode.OK
    if code == ReturnCode.OK:
        return RunStatus.FINISHED
    return RunStatus.ABORTED if code == ReturnCode.TASK_ABORTED else RunStatus.FAILED


def current_round(fl_ctx: FLContext, *, on_server: bool) -> int | None:
    """Return the federated round of the task in this context (at the server: of the workflow), None if it has none."""
    if on_server:
        value = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
    else:
        task = fl_ctx.get_prop(FLContextKey.TASK_DATA)
        value = task.get_header(AppConstants.CURRENT_ROUND) if isinstance(task, Shareable) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def take_stock_event(fl_ctx: FLContext) -> Shareable | None:
    """Return the record in a stock analytics event if it was logged in this process and is seen for the first time.

    An event is marked, so that the federated event into which FLARE converts a local one is not a second record, and
    a federated one is marked as if it had come in, so that FLARE does not send it.
    """
    event = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
    if not isinstance(event, Shareable) or event.get_header(FedEventHeader.DIRECTION, "out") != "out":
        return None
    first = not event.get_header(_TAKEN, False)
    event.set_header(_TAKEN, True)
    if fl_ctx.get_prop(FLContextKey.EVENT_SCOPE) == EventScope.FEDERATION:
        event.set_header(FedEventHeader.DIRECTION, "in")
    return event if first else None


class NoReceiverError(Exception):
    """The server has no receiver that could receive records, and will have none in this job."""


class Channel:
    """Carries requests from clients to the receiver with this component id on the server.

    FLARE's job cells have different names in the simulator and in a provisioned federation, so a client first asks
    for the name, by an auxiliary message, and then sends its requests to that cell, on a channel of our own.
    """

    def __init__(self, engine: Any, component_id: str) -> None:
        self._engine = engine
        self._topic = component_id
        self._hello_topic = f"{CHANNEL}.hello.{component_id}"
        self._target: str | None = None
        self._ever_reached = False
        self._ready = False
        self._refusal = ""

    def announce(self) -> None:
        """Server: answer clients that ask for the cell; until ``serve``, with "not yet"."""
        self._engine.register_aux_message_handler(self._hello_topic, self._on_hello)

    def serve(self, handle: Callable[[str, bytes], bytes]) -> None:
        """Server: hand every request to ``handle`` with the name of the site from which it really came."""
        clients = participants(self._engine)

        def on_request(message: Any) -> Any:
            origin = message.get_header(MessageHeaderKey.ORIGIN) or ""
            site = site_of(origin, clients)
            payload = message.payload
            if site is None:
                clients.update(participants(self._engine))
                site = site_of(origin, clients)
            if site is None:
                return make_cell_reply(CellReturnCode.UNAUTHENTICATED, f"{origin!r} is no client of this job")
            if not isinstance(payload, dict) or not isinstance(payload.get(_PAYLOAD), bytes):
                return make_cell_reply(CellReturnCode.INVALID_REQUEST, "not a trackhub request")
            return make_cell_reply(CellReturnCode.OK, body={_PAYLOAD: handle(site, payload[_PAYLOAD])})

        # Keywords, since FLARE's Cell dispatches on the keyword `channel`: given by position, the callback would be
        # registered where requests never arrive.
        self._engine.get_cell().register_request_cb(channel=CHANNEL, topic=self._topic, cb=on_request)
        self._ready = True

    def refuse(self, reason: str) -> None:
        """Server: tell clients that there will be no receiver, so that they do not wait for one."""
        self._refusal = reason

    def _on_hello(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        if self._refusal:
            return make_reply(ReturnCode.ERROR, {_REFUSAL: self._refusal})
        if not self._ready:
            return make_reply(ReturnCode.SERVER_NOT_READY)
        reply = make_reply(ReturnCode.OK)
        reply[_PAYLOAD] = self._engine.get_cell().get_fqcn()
        return reply

    def request(self, request: bytes, timeout_s: float) -> bytes:
        """Client: send one request and return the reply.

        Raises:
            NoReceiverError: the server has no receiver, and will have none.
            ConnectionError: there was no answer, or none that is a reply. Whether the request arrived is not known.
        """
        target = self._target or self._ask(timeout_s)
        try:
            message = self._engine.get_cell().send_request(
                channel=CHANNEL,
                topic=self._topic,
                target=target,
                request=new_cell_message({}, {_PAYLOAD: request}),
                timeout=timeout_s,
                optional=True,
            )
        except Exception as e:
            raise ConnectionError(f"{target}: {type(e).__name__}: {e}") from e
        code = message.get_header(MessageHeaderKey.RETURN_CODE)
        if code != CellReturnCode.OK:
            if code != CellReturnCode.TIMEOUT:
                self._target = None
            raise ConnectionError(f"{target}: {code} {message.get_header(MessageHeaderKey.ERROR) or ''}".rstrip())
        reply = message.payload.get(_PAYLOAD) if isinstance(message.payload, dict) else None
        if not isinstance(reply, bytes):
            raise ConnectionError(f"{target}: the reply is no trackhub reply")
        self._target = target
        self._ever_reached = True
        return reply

    def _ask(self, timeout_s: float) -> str:
        with self._engine.new_context() as fl_ctx:
            # FLARE gives up on replies once the run's abort signal is triggered, as it is at every normal end of a
            # client. Put, since set_prop refuses to hide a sticky property.
            fl_ctx.put(key=ReservedKey.RUN_ABORT_SIGNAL, value=Signal(), private=True, sticky=False)
            replies = self._engine.send_aux_request(
                targets=[FQCN.ROOT_SERVER],
                topic=self._hello_topic,
                request=Shareable(),
                timeout=timeout_s,
                fl_ctx=fl_ctx,
                optional=True,
            )
        reply = (replies or {}).get(FQCN.ROOT_SERVER)
        if not isinstance(reply, Shareable):
            raise ConnectionError("the server does not answer")
        refusal = reply.get_header(_REFUSAL)
        if isinstance(refusal, str) and not self._ever_reached:
            raise NoReceiverError(refusal)
        target = reply.get(_PAYLOAD)
        if reply.get_return_code() != ReturnCode.OK or not isinstance(target, str):
            raise ConnectionError(f"the server answers {reply.get_return_code()}")
        return target


def job_of(recipe_or_job: Any) -> Any:
    """Return the FedJob of a recipe; a FedJob as it is.

    Raises:
        ConfigError: it is neither.
    """
    job = getattr(recipe_or_job, "_job", recipe_or_job)
    if not isinstance(job, FedJob):
        raise ConfigError(f"expected a FLARE recipe or FedJob, got {type(recipe_or_job).__name__}")
    return job


def client_sites(recipe_or_job: Any) -> list[str]:
    """Return the sites that have a client app of their own; empty when one app serves all clients."""
    prepare = getattr(recipe_or_job, "_ensure_client_apps_prepared", None)
    if prepare is not None:
        prepare()
    return [target for target in job_of(recipe_or_job)._deploy_map if target not in (ALL_SITES, SERVER_SITE_NAME)]


def add_to_clients(recipe_or_job: Any, component: FLComponent, sites: list[str] | None, component_id: str) -> None:
    """Add a component to the client apps of these sites; None for all clients.

    Raises:
        ValueError: a site has no client app of its own.
    """
    job, own_apps = job_of(recipe_or_job), client_sites(recipe_or_job)
    if sites is None and not own_apps:
        job.to_clients(component, id=component_id)
        return
    for site in own_apps if sites is None else sites:
        if site not in own_apps:
            raise ValueError(
                f"the job has no client app for site {site!r} (it has {', '.join(own_apps) or 'one for all clients'}); "
                f"call set_per_site_config right after constructing the recipe, or add the site's executor first"
            )
        job.to(component, site, id=component_id)


def has_component(job: Any, cls: type) -> bool:
    """Return whether any app of this FedJob has a component of this class."""
    return any(
        isinstance(component, cls)
        for app in job._deploy_map.values()
        for component in app.app_config.components.values()
    )


def reference_package(job: Any, package: str) -> None:
    """Let the job refer to an installed package, instead of taking a copy of its modules along.

    A copy would shadow what is installed at the sites, and make the job one that brings its own code.
    """
    known = list(job.job.app_packages)
    if package not in known:
        job.set_app_packages([*known, package])


def raise_shutdown_timeout(job: Any, seconds: float) -> int:
    """Give external trainers this long to end by themselves, where the job says 0, and return how many there are."""
    raised = 0
    for app in job._deploy_map.values():
        for definition in getattr(app.app_config, "executors", []):
            executor = definition.executor
            if (
                isinstance(executor, ClientAPIExecutor)
                and executor.execution_mode == ExecutionMode.EXTERNAL_PROCESS
                and executor._shutdown_timeout == 0
            ):
                executor._shutdown_timeout = seconds
                raised += 1
    return raised
