# SPDX-License-Identifier: Apache-2.0
"""All of FLARE that trackhub uses beyond FLARE's documented interface. Written for nvflare 2.9.

The other modules of `trackhub.flare` call this, and otherwise use `nvflare.apis` only. So this file and its test,
``tests/integration/test_flare_internals.py``, show whether a new release of FLARE still fits.
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
from nvflare.apis.job_def import ALL_SITES, SERVER_SITE_NAME, JobMetaKey
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
from trackhub.run import SERVER, JobInfo, RunStatus, path_component

__all__ = [
    "ROUND_STARTED",
    "STOCK_EVENTS",
    "CellChannel",
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
    "job_name",
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
"""FLARE's Cell routes a request by channel and topic. The topic is the receiver's component id."""

ROUND_STARTED: str = AppEventType.ROUND_STARTED
"""The event that a workflow fires on the server when a round starts."""

STOCK_EVENTS = (ANALYTIC_EVENT_TYPE, f"fed.{ANALYTIC_EVENT_TYPE}")
"""The events that carry what FLARE's own writers log: the local one in process, the federated one from an external
trainer."""

_PAYLOAD = "trackhub"
_REFUSAL = "trackhub.refusal"
_TAKEN = "trackhub.taken"
_EXECUTION_FOLDER = ".trackhub"


def is_server(fl_ctx: FLContext) -> bool:
    """Return whether this process is the server process of a job."""
    return bool(fl_ctx.get_process_type() == ProcessType.SERVER_JOB)


def run_dir(fl_ctx: FLContext) -> Path:
    """Return the job's run folder at this site. On the server, FLARE archives it after END_RUN, and then deletes it."""
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))


def job_id(fl_ctx: FLContext) -> str:
    """Return FLARE's job id. In the simulator, where that is a constant, return an id of this execution.

    The processes of one execution share the simulator's root folder. The simulator empties this folder before the next
    execution. So the first process leaves an id there, and the others read it.
    """
    job = str(fl_ctx.get_job_id())
    if job != SimulatorConstants.JOB_NAME:
        return job
    return execution_id(Path(fl_ctx.get_engine().get_workspace().get_root_dir()).parent)


def job_name(fl_ctx: FLContext) -> str:
    """Return what FLARE calls the job: the name in ``meta.json``, else the job's folder, else FLARE's job id.

    FLARE sends this file from the server to the job's clients, so all sites get the same name.
    """
    meta = fl_ctx.get_prop(FLContextKey.JOB_META)
    names = [meta.get(key.value) for key in (JobMetaKey.JOB_NAME, JobMetaKey.JOB_FOLDER_NAME)] if meta else []
    return next((name for name in names if isinstance(name, str) and name), str(fl_ctx.get_job_id()))


def execution_id(simulator_root: Path) -> str:
    """Return the id of the execution in this root folder, and mint one if there is none. Safe between processes."""
    folder = simulator_root / _EXECUTION_FOLDER
    file = folder / "execution"
    if not file.exists():
        minted = f"sim-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        with tempfile.TemporaryDirectory(dir=simulator_root) as scratch:
            claim = Path(scratch) / "claim"
            claim.mkdir()
            (claim / file.name).write_text(minted, encoding="utf-8")
            try:
                # A folder cannot be renamed onto one that is not empty. So one process wins, and no other process can
                # read an unfinished file.
                claim.rename(folder)
            except OSError:
                if not file.exists():
                    raise
    return file.read_text(encoding="utf-8")


def state_folder(fl_ctx: FLContext, state_dir: str | None, job: JobInfo) -> Path:
    """Return the folder for trackhub's own files of this site and job.

    Args:
        fl_ctx: FLARE's context.
        state_dir: the folder that holds such files of all jobs; None for the job's run folder.
        job: the job. Its folder has the whole id: two jobs of one name may have ids that begin alike.
    """
    if state_dir is None:
        return run_dir(fl_ctx) / "trackhub"
    own = job.id if job.name == job.id else f"{job.name}-{job.id}"
    return Path(state_dir) / path_component(own) / (SERVER if is_server(fl_ctx) else fl_ctx.get_identity_name())


def components(engine: Any) -> dict[str, Any]:
    """Return all components of the job in this process, by id."""
    owner = engine if hasattr(engine, "get_all_components") else engine.run_manager
    found: dict[str, Any] = owner.components
    return found


def participants(engine: Any) -> dict[str, str]:
    """Return the job's clients: from name to the full name (FQCN) of the client's cell. On the server only."""
    return {client.name: client.get_fqcn() for client in engine.get_participating_clients().values()}


def site_of(origin: str, clients: Mapping[str, str]) -> str | None:
    """Return the site that a message comes from, or None if it comes from no client.

    A site owns its cell and all cells below it. The sending cell sets the origin of a message. In a provisioned
    federation the server's parent process checks it against the site's token. Peer properties also name a site, but
    any component can claim any name there.

    Args:
        origin: the full name of the cell that sent the message.
        clients: what `participants` returns.
    """
    owners = [(fqcn, name) for name, fqcn in clients.items() if origin == fqcn or FQCN.is_ancestor(fqcn, origin)]
    # Take the longest, since a site's name may contain a dot. Otherwise the site "a" would own the cell of site "a.b".
    return max(owners, key=lambda owner: len(owner[0]))[1] if owners else None


def add_tail_handler(engine: Any, handler: FLComponent) -> None:
    """Add a handler that gets each event last: after all components, executors and server components included."""
    owner = engine if hasattr(engine, "add_handler") else engine.run_manager
    owner.add_handler(handler)


def stop_job(component: FLComponent, fl_ctx: FLContext, reason: str) -> None:
    """Stop the job before it trains, because of an error at this site.

    The server calls ``system_panic``. A client's panic would not reach the server: the client would end, and the server
    would wait for it, in the simulator for ever. So a client answers its first task with a return code that makes the
    server panic.

    Args:
        component: the component that found the error.
        fl_ctx: FLARE's context.
        reason: what is wrong.
    """
    if is_server(fl_ctx):
        component.system_panic(reason, fl_ctx)
    else:
        component.log_error(fl_ctx, f"{reason} (this site will train nothing, and the job stops)")
        fl_ctx.set_job_is_unsafe()


def was_aborted(fl_ctx: FLContext) -> bool:
    """Return whether somebody stopped the job. Call it at ABOUT_TO_END_RUN.

    A client's abort signal also triggers when a job ends normally. FLARE sets a property for this event that tells the
    two apart.
    """
    if is_server(fl_ctx):
        return is_ending(fl_ctx)
    return bool(fl_ctx.get_prop(FLContextKey.RUN_ABORT_REQUESTED, False))


def is_ending(fl_ctx: FLContext) -> bool:
    """Return whether the run was told to end, normally or not."""
    signal = fl_ctx.get_run_abort_signal()
    return bool(signal is not None and signal.triggered)


def task_status(fl_ctx: FLContext) -> RunStatus:
    """Return how a client's task ended. Call it at AFTER_TASK_EXECUTION."""
    result = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
    code = result.get_return_code(ReturnCode.OK) if isinstance(result, Shareable) else ReturnCode.OK
    if code == ReturnCode.OK:
        return RunStatus.FINISHED
    return RunStatus.ABORTED if code == ReturnCode.TASK_ABORTED else RunStatus.FAILED


def current_round(fl_ctx: FLContext, *, on_server: bool) -> int | None:
    """Return the federated round of a client's task, or of the server's workflow. None if it has none."""
    if on_server:
        value = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
    else:
        task = fl_ctx.get_prop(FLContextKey.TASK_DATA)
        value = task.get_header(AppConstants.CURRENT_ROUND) if isinstance(task, Shareable) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def take_stock_event(fl_ctx: FLContext) -> Shareable | None:
    """Return the record in a stock analytics event, or None if it came from another process or was taken before.

    FLARE converts a local event into a federated one, so this function marks the record: it is taken once. It also
    marks a federated event as an incoming one, so that FLARE does not send it.
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
    """The server has no receiver, and will have none in this job."""


class CellChannel:
    """Carries requests from clients to the receiver on the server, from cell to cell.

    The name of the server's job cell differs between the simulator and a provisioned federation. So a client first asks
    for it with an auxiliary message. It then sends its requests to that cell, on a channel that only trackhub uses.
    """

    def __init__(self, engine: Any, component_id: str) -> None:
        """Make one end of the channel.

        Args:
            engine: FLARE's engine in this process.
            component_id: the id of the receiver's component on the server.
        """
        self._engine = engine
        self._topic = component_id
        self._hello_topic = f"{CHANNEL}.hello.{component_id}"
        self._target: str | None = None
        self._ever_reached = False
        self._ready = False
        self._refusal = ""

    def announce(self) -> None:
        """Server: answer clients that ask for the cell's name. Until ``serve`` is called, the answer is "not yet"."""
        self._engine.register_aux_message_handler(self._hello_topic, self._on_hello)

    def serve(self, handle: Callable[[str, bytes], bytes]) -> None:
        """Server: call ``handle`` for every request, with the site that the request really comes from."""
        clients = participants(self._engine)

        def on_request(message: Any) -> Any:
            origin = message.get_header(MessageHeaderKey.ORIGIN) or ""
            site = site_of(origin, clients)
            payload = message.payload
            if site is None:
                clients.update(participants(self._engine))
                site = site_of(origin, clients)
            if site is None:
                return make_cell_reply(CellReturnCode.UNAUTHENTICATED, f"{origin!r} is not a client of this job")
            if not isinstance(payload, dict) or not isinstance(payload.get(_PAYLOAD), bytes):
                return make_cell_reply(CellReturnCode.INVALID_REQUEST, "not a trackhub request")
            return make_cell_reply(CellReturnCode.OK, body={_PAYLOAD: handle(site, payload[_PAYLOAD])})

        # FLARE's Cell dispatches on the keyword `channel`. A callback that is given by position is registered where no
        # request arrives.
        self._engine.get_cell().register_request_cb(channel=CHANNEL, topic=self._topic, cb=on_request)
        self._ready = True

    def refuse(self, reason: str) -> None:
        """Server: tell clients that there will be no receiver, and why, so that they do not wait for one."""
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
        """Client: send one request and return the reply. Blocks up to ``timeout_s``, twice for the first request.

        Raises:
            NoReceiverError: the server has no receiver, and will have none.
            ConnectionError: no valid reply came. The request may have arrived or not.
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
            raise ConnectionError(f"{target}: the reply is not from trackhub")
        self._target = target
        self._ever_reached = True
        return reply

    def _ask(self, timeout_s: float) -> str:
        with self._engine.new_context() as fl_ctx:
            # FLARE does not wait for replies once the run's abort signal has triggered, which happens at every normal
            # end of a client. So hide the signal, with put, since set_prop refuses to hide a sticky property.
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
    """Return the FedJob of a recipe, or the FedJob itself.

    Raises:
        ConfigError: the argument is neither.
    """
    job = getattr(recipe_or_job, "_job", recipe_or_job)
    if not isinstance(job, FedJob):
        raise ConfigError(f"tracking: expected a FLARE recipe or FedJob, got {type(recipe_or_job).__name__}")
    return job


def client_sites(recipe_or_job: Any) -> list[str]:
    """Return the sites that have a client app of their own. The list is empty when all clients share one app."""
    prepare = getattr(recipe_or_job, "_ensure_client_apps_prepared", None)
    if prepare is not None:
        prepare()
    return [target for target in job_of(recipe_or_job)._deploy_map if target not in (ALL_SITES, SERVER_SITE_NAME)]


def add_to_clients(recipe_or_job: Any, component: FLComponent, sites: list[str] | None, component_id: str) -> None:
    """Add a component to client apps.

    Args:
        recipe_or_job: the recipe or FedJob.
        component: the component.
        sites: the sites whose apps get it; None for all clients.
        component_id: its id in the job's configuration.

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
    """Make the job refer to an installed package. Otherwise FLARE copies the package's modules into the job.

    A copy would hide the package that is installed at the sites. It would also turn the job into one that brings code
    of its own, which a site may forbid.
    """
    known = list(job.job.app_packages)
    if package not in known:
        job.set_app_packages([*known, package])


def raise_shutdown_timeout(job: Any, timeout_s: float) -> int:
    """Give external trainers this time to end by themselves where the job gives none. Return how many got it."""
    raised = 0
    for app in job._deploy_map.values():
        for definition in getattr(app.app_config, "executors", []):
            executor = definition.executor
            if (
                isinstance(executor, ClientAPIExecutor)
                and executor.execution_mode == ExecutionMode.EXTERNAL_PROCESS
                and executor._shutdown_timeout == 0
            ):
                executor._shutdown_timeout = timeout_s
                raised += 1
    return raised
