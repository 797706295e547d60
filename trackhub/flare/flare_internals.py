# SPDX-License-Identifier: Apache-2.0
"""What trackhub uses of FLARE beyond FLARE's documented interface. Written for nvflare 2.9.

The other modules of `trackhub.flare` call this one. Eight of them also use internals of FLARE, each for one purpose.
`cell_channel` uses cells. `read_task_events` uses the server's tasks. `collab_call_outcomes` uses the Collab API.
`flower_reply_outcomes` uses the connector to Flower. `find_global_model` uses the paths of persistors.
`log_job_context` uses settings of controllers. `how_a_run_ends` uses FLARE's runners. `trainer.record_flare_log_calls`
uses the log functions of an external trainer. To check a new FLARE release, run the tests of these modules. Start with
``tests/integration/test_flare_internals.py``.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE
from nvflare.apis.executor import Executor
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import (
    EventScope,
    FedEventHeader,
    FLContextKey,
    ProcessType,
    ReturnCode,
    WorkspaceConstants,
)
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import ALL_SITES, SERVER_SITE_NAME, JobMetaKey
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.ccwf.client_controller_executor import ClientControllerExecutor
from nvflare.app_common.ccwf.client_ctl import ClientSideController
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode
from nvflare.app_common.executors.ipc_exchanger import IPCExchanger
from nvflare.app_common.executors.multi_process_executor import MultiProcessExecutor
from nvflare.app_common.widgets.convert_to_fed_event import ConvertToFedEvent
from nvflare.client import tracking
from nvflare.client.in_process.api import InProcessClientAPI
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.job_config.api import FedJob
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants

from trackhub.errors import ConfigError
from trackhub.flare.say_reason_at_exit import say_reason_at_exit
from trackhub.flare.trainer.record_flare_log_calls import LogCalls
from trackhub.job_and_run_info import SERVER, JobInfo, RunStatus, path_component
from trackhub.operator_file import OperatorFile, read_operator_file
from trackhub.policy import Policy, SiteRules

__all__ = [
    "EVENT_SITE",
    "ROUND_STARTED",
    "STOCK_EVENTS",
    "add_first_handler",
    "add_last_handler",
    "add_to_clients",
    "app_components",
    "came_as_message",
    "cell_name",
    "client_sites",
    "components",
    "controls_workflow",
    "event_of_site",
    "execution_id",
    "executors",
    "has_component",
    "has_trainer",
    "ignored_apps",
    "is_from_another_process",
    "is_provisioned",
    "is_server",
    "job_id",
    "job_name",
    "job_of",
    "operator_file",
    "participants",
    "raise_shutdown_timeout",
    "reference_package",
    "replace_in_process_log",
    "round_of_context",
    "round_of_task",
    "run_dir",
    "site_of",
    "site_rules",
    "state_folder",
    "stop_job",
    "take_stock_event",
    "task_status",
]

ROUND_STARTED: str = AppEventType.ROUND_STARTED
"""The event that a workflow fires when a round starts: on the server, and on the clients that control a workflow."""

STOCK_EVENTS = (ANALYTIC_EVENT_TYPE, f"fed.{ANALYTIC_EVENT_TYPE}")
"""The events that carry what FLARE's own writers log: the local one in process, the federated one from an external
trainer."""

EVENT_SITE = "trackhub.site"
"""Header of a client's event, in which the server notes the site that it really comes from."""

_TAKEN = "trackhub.taken"
_EXECUTION_FOLDER = ".trackhub"


def is_server(fl_ctx: FLContext) -> bool:
    """Return whether this process is the server process of a job."""
    return bool(fl_ctx.get_process_type() == ProcessType.SERVER_JOB)


def run_dir(fl_ctx: FLContext) -> Path:
    """Return the job's run folder at this site. On the server, FLARE archives it after END_RUN, and then deletes it."""
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))


def job_id(fl_ctx: FLContext) -> str:
    """Return FLARE's job id. In the simulator, where the job id is a constant, return an id of this execution.

    The processes of one execution share the simulator's root folder. The simulator empties this folder before the next
    execution. So the first process stores an id there, and the other processes read it.
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
    """Return the id of the execution in this root folder, and make one if there is none. Safe between processes."""
    folder = simulator_root / _EXECUTION_FOLDER
    file = folder / "execution"
    if not file.exists():
        minted = f"sim-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        with tempfile.TemporaryDirectory(dir=simulator_root) as scratch:
            claim = Path(scratch) / "claim"
            claim.mkdir(mode=0o700)
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
        job: the job. The folder's name has the whole id, since two jobs of one name may have ids that begin alike.
    """
    if state_dir is None:
        return run_dir(fl_ctx) / "trackhub"
    own = job.id if job.name == job.id else f"{job.name}-{job.id}"
    return Path(state_dir) / path_component(own) / (SERVER if is_server(fl_ctx) else fl_ctx.get_identity_name())


def operator_file(fl_ctx: FLContext) -> OperatorFile | None:
    """Return the operator's rules for jobs at this site. None in the simulator, where the submitter is the operator.

    Raises:
        ConfigError: the operator's file is wrong.
    """
    if not is_provisioned(fl_ctx):
        return None
    return read_operator_file(Path(fl_ctx.get_engine().get_workspace().get_site_config_dir()))


def is_provisioned(fl_ctx: FLContext) -> bool:
    """Return whether this site has an operator beside the job's submitter. The sites of the simulator have none.

    A site counts as the simulator's only if the job has the simulator's constant id, and the workspace has no startup
    kit. All else counts as provisioned, POC too, so that a mistake here can only make the rules stricter.
    """
    startup = Path(fl_ctx.get_engine().get_workspace().get_startup_kit_dir())
    kits = (WorkspaceConstants.SERVER_STARTUP_CONFIG, WorkspaceConstants.CLIENT_STARTUP_CONFIG)
    is_simulated = str(fl_ctx.get_job_id()) == SimulatorConstants.JOB_NAME
    return not is_simulated or any((startup / kit).exists() for kit in kits)


def site_rules(fl_ctx: FLContext, policy: Policy | None) -> SiteRules:
    """Return all that restricts the records of this site: the job's policy and the operator's rules.

    Raises:
        ConfigError: the operator's file is wrong.
    """
    operator = operator_file(fl_ctx)
    if operator is None:
        return SiteRules.of_job(policy)
    return operator.site_rules(policy, Path(fl_ctx.get_engine().get_workspace().get_site_config_dir()))


def components(engine: Any) -> dict[str, Any]:
    """Return all components of the job in this process: id -> component."""
    owner = engine if hasattr(engine, "get_all_components") else engine.run_manager
    found: dict[str, Any] = owner.components
    return found


def participants(engine: Any) -> dict[str, str]:
    """Return the job's clients: name -> full name (FQCN) of the client's cell. On the server only."""
    return {client.name: client.get_fqcn() for client in engine.get_participating_clients().values()}


def site_of(origin: str, clients: Mapping[str, str]) -> str | None:
    """Return the site that a message comes from, or None if it comes from no client.

    A site owns its cell and all cells below it. The sending cell sets the origin of a message. In a provisioned
    federation the server's parent process checks the origin against the site's token. Peer properties also name a
    site, but any component can claim any name there.

    Args:
        origin: the full name of the cell that sent the message.
        clients: what `participants` returns.
    """
    owners = [(fqcn, name) for name, fqcn in clients.items() if origin == fqcn or FQCN.is_ancestor(fqcn, origin)]
    # Take the longest, since a site's name may contain a dot. Otherwise the site "a" would own the cell of site "a.b".
    return max(owners, key=lambda owner: len(owner[0]))[1] if owners else None


def add_first_handler(engine: Any, handler: FLComponent) -> None:
    """Add a handler that gets each event before all components, from the next event on."""
    owner = engine if hasattr(engine, "add_handler") else engine.run_manager
    # A new list: FLARE may be walking through the old one, and would call the present component again.
    owner.handlers = [handler, *owner.handlers]


def add_last_handler(engine: Any, handler: FLComponent) -> None:
    """Add a handler that gets each event last: after all components, including executors and server components."""
    owner = engine if hasattr(engine, "add_handler") else engine.run_manager
    owner.add_handler(handler)


def is_from_another_process(fl_ctx: FLContext) -> bool:
    """Return whether the present event is a federated one, which another site may have made up.

    Any component of any site can send an event of any type, such as the one that ends a run.
    """
    return bool(fl_ctx.get_prop(FLContextKey.EVENT_SCOPE) == EventScope.FEDERATION)


def stop_job(component: FLComponent, fl_ctx: FLContext, reason: str) -> None:
    """Stop the job before it trains, because of an error at this site.

    The server calls ``system_panic``. A client must not call it: only the client would end, and the server would wait
    for it. In the simulator it would wait for ever. So a client answers its first task with a return code that makes
    the server panic.

    Args:
        component: the component that found the error.
        fl_ctx: FLARE's context.
        reason: what is wrong.
    """
    if is_server(fl_ctx):
        say_reason_at_exit(reason)
        component.system_panic(reason, fl_ctx)
    else:
        component.log_error(fl_ctx, f"{reason} (this site will train nothing, and the job stops)")
        fl_ctx.set_job_is_unsafe()


def executors(engine: Any) -> list[Executor]:
    """Return the executors of the job in this client's process."""
    owner = engine if hasattr(engine, "add_handler") else engine.run_manager
    return [handler for handler in owner.handlers if isinstance(handler, Executor)]


def controls_workflow(executor: Executor) -> bool:
    """Return whether this executor is the client's part of a workflow that the clients control, such as swarm."""
    return isinstance(executor, ClientSideController | ClientControllerExecutor)


def has_trainer(executor: Executor) -> bool:
    """Return whether this executor hands its tasks to a training script or process, which may outlive a task."""
    return isinstance(executor, ClientAPIExecutor | IPCExchanger | MultiProcessExecutor)


def task_status(result: Any) -> RunStatus:
    """Return how a client's task ended, from what its executor returned."""
    code = result.get_return_code(ReturnCode.OK) if isinstance(result, Shareable) else ReturnCode.OK
    if code == ReturnCode.OK:
        return RunStatus.FINISHED
    return RunStatus.ABORTED if code == ReturnCode.TASK_ABORTED else RunStatus.FAILED


def round_of_task(data: Any) -> int | None:
    """Return the federated round that a task's data carries. None if it carries none."""
    return _round(data.get_header(AppConstants.CURRENT_ROUND) if isinstance(data, Shareable) else None)


def round_of_context(fl_ctx: FLContext) -> int | None:
    """Return the federated round that a workflow put into its context. Call it at ROUND_STARTED only.

    At other times the context of an event can hold the round of a workflow that has ended.
    """
    return _round(fl_ctx.get_prop(AppConstants.CURRENT_ROUND))


def _round(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def take_stock_event(fl_ctx: FLContext, *, keep: bool = False) -> Shareable | None:
    """Return the record in an analytics event, or None if it came from another site or was taken before.

    FLARE fires a local event again as a federated one. So this function marks the record, and it is taken once.

    Args:
        fl_ctx: the event's context.
        keep: leave the event to FLARE. Otherwise mark a federated event as incoming, so that FLARE does not send it.
    """
    event = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
    if not isinstance(event, Shareable) or event.get_header(FedEventHeader.DIRECTION, "out") != "out":
        return None
    first = not event.get_header(_TAKEN, False)
    event.set_header(_TAKEN, True)
    if not keep and fl_ctx.get_prop(FLContextKey.EVENT_SCOPE) == EventScope.FEDERATION:
        event.set_header(FedEventHeader.DIRECTION, "in")
    return event if first else None


def event_of_site(fl_ctx: FLContext) -> tuple[str, Shareable] | None:
    """Return the site that sent the present event, and its data. None if no client sent it. On the server only."""
    event = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
    if not isinstance(event, Shareable) or event.get_header(FedEventHeader.DIRECTION, "out") == "out":
        return None
    # `cell_channel` sets this header from the origin of the message. The sender itself writes FLARE's own headers.
    site = event.get_header(EVENT_SITE)
    return (site, event) if isinstance(site, str) and site else None


def cell_name(engine: Any) -> str:
    """Return the full name (FQCN) of this process's cell. External trainers send to this cell what they log."""
    return str(engine.get_cell().get_fqcn())


def replace_in_process_log(calls: LogCalls) -> Callable[[], None]:
    """Replace the log functions of trainers in this process. Return a function that restores the old ones.

    Args:
        calls: takes what the trainers log.
    """
    method, function = InProcessClientAPI.log, tracking.log

    def is_taken(api: Any) -> bool:
        return isinstance(api, InProcessClientAPI)

    InProcessClientAPI.log = calls.log_method(method, is_taken)
    tracking.log = calls.log_function(function, "__class__", InProcessClientAPI)

    def undo() -> None:
        InProcessClientAPI.log, tracking.log = method, function

    return undo


def came_as_message(fl_ctx: FLContext) -> bool:
    """Return whether an analytics event stands for a message of another process of this site, such as a trainer.

    FLARE fires a federated event for such a message. It converts the events of this process into federated ones, too.
    """
    origin = fl_ctx.get_prop(FLContextKey.EVENT_ORIGIN)
    return is_from_another_process(fl_ctx) and origin != ConvertToFedEvent.__name__


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
    targets = job_of(recipe_or_job)._deploy_map
    # FLARE deploys the app for all clients to each of them, and then leaves out the apps for single sites.
    return [] if ALL_SITES in targets else [target for target in targets if target != SERVER_SITE_NAME]


def ignored_apps(job: Any) -> list[str]:
    """Return the sites whose own client apps FLARE leaves out, since the job has an app for all clients as well."""
    targets = job._deploy_map
    return [t for t in targets if t not in (ALL_SITES, SERVER_SITE_NAME)] if ALL_SITES in targets else []


def app_components(job: Any, *, server: bool) -> dict[str, Any]:
    """Return the components of the server's app, or of all client apps together: id -> component."""
    found: dict[str, Any] = {}
    for target, app in job._deploy_map.items():
        if (target == SERVER_SITE_NAME) is server:
            found |= app.app_config.components
    return found


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
    """Set this shutdown timeout for external trainers if the job sets none. Return how many of them got it."""
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
