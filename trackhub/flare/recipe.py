# SPDX-License-Identifier: Apache-2.0
"""Adds tracking to a FLARE job: to a recipe, to a FedJob, or to a job that is written in JSON.

The script that makes the job calls it, and so does ``trackhub attach``. It checks the backends' options through
`trackhub.registry`, and puts a `TrackhubReceiver` and a `TrackhubSender` into the job.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from trackhub import registry
from trackhub.errors import ConfigError, PluginError, UnknownBackendError
from trackhub.flare import flare_internals
from trackhub.flare.federation_run_argument import FederationSettings, check_has_federation_run
from trackhub.flare.find_analytics_listeners import client_warning, listeners, server_warning
from trackhub.flare.log_job_context import context_of_job
from trackhub.flare.preflight_before_simulator import preflight_before_simulator
from trackhub.flare.receiver_widget import TrackhubReceiver
from trackhub.flare.records_from_flare_writers import TakeOver
from trackhub.flare.records_made_by_trackhub import OwnRecords
from trackhub.flare.sender_widget import TrackhubSender
from trackhub.limits import Limits
from trackhub.policy import Policy
from trackhub.system_metrics import check_interval

__all__ = ["add_tracking", "tracking_components"]

RECEIVER_ID = "trackhub_receiver"
SENDER_ID = "trackhub_sender"
MIN_SHUTDOWN_TIMEOUT_S = 30.0
"""How many seconds FLARE waits after the last round before it stops an external trainer. FLARE's recipes set 0."""

Backends = Mapping[str, Mapping[str, Any]] | Sequence[str]
"""Backend names and their options; a plain list of names for backends without options."""

_Checked = dict[str, dict[str, Any]]
_log = logging.getLogger(__name__)


def add_tracking(
    recipe_or_job: Any,
    server: Backends | None = None,
    clients: Backends | None = None,
    sites: Mapping[str, Backends] | None = None,
    *,
    name: str | None = None,
    notes: str = "",
    tags: Sequence[str] = (),
    take_over: TakeOver = True,
    capture: Sequence[str] = (),
    capture_only: bool = False,
    limits: Limits | Mapping[str, Any] | None = None,
    state_dir: str | None = None,
    policy: Mapping[str, Any] | None = None,
    federation: bool = True,
    aggregate: Sequence[str] | None = None,
    aggregate_weight: str | None = None,
    update_statistics: bool = False,
    flare_metrics: Sequence[str] = (),
    context: bool = True,
    system_metrics: float | None = None,
    log_model: Literal["best", "last"] | None = None,
) -> None:
    """Add tracking to a job: what its training code logs goes to backends on the server, at the clients, or both.

    ::

        recipe = FedAvgRecipe(...)
        add_tracking(recipe, server={"tensorboard": {}})

    The training script uses `trackhub.Writer`. The backends also receive what it logs with FLARE's own writers.

    Args:
        recipe_or_job: a FLARE recipe or FedJob, complete with its executors.
        server: backends on the FLARE server, which receive the records of all sites. With None, no record is sent to
            the server.
        clients: backends at each client, which receive that client's records. With None, the clients have none.
        sites: site -> backends that replace ``clients`` at this site. An empty mapping gives it none. The job must have
            a client app for each of these sites: call FLARE's ``set_per_site_config`` right after you construct the
            recipe. In a job without backends on the server, ``Writer()`` records nothing at a site without backends of
            its own, and warns once.
        name: the job's name as people see it in every backend; by default the name of the recipe or FedJob. Two jobs
            may have the same name, since backends keep the job's id as well.
        notes: a description of the job, in Markdown.
        tags: labels for every run of the job.
        take_over: whether and how to record what FLARE's own writers log. ``True``: the log call itself writes the
            record, with its time and in its order. FLARE's own receivers on the server then get nothing.
            ``"events"``: trainers stay as they are, and trackhub takes the record when FLARE's event comes.
            ``"copy"``: as ``"events"``, but trackhub lets the event pass, so FLARE's receivers and your own components
            get everything as without trackhub. ``False``: trackhub does not record it.
        capture: other loggers of the training script to record from: ``tensorboard`` (a ``SummaryWriter`` of torch or
            tensorboardX), ``wandb`` and ``mlflow``.
        capture_only: if True, the loggers in ``capture`` write nothing themselves. By default, they work as without
            trackhub.
        limits: the `trackhub.limits.Limits` that differ from the defaults, for all sites.
        state_dir: the folder for spools and journals, on every site; by default in the job's run folder.
        policy: what may leave a site for the server. The rules are those of `trackhub.policy.Policy`, such as
            ``{"allow": ["val/*"], "digits": 3}``. A site's operator may add rules, and all of them apply.
            ``docs/policy.md`` explains each rule.
        federation: if there are backends on the server, write the job's *federation run*. It has statistics over the
            sites by round. Keys that begin with ``fl/`` say what happened in the rounds.
        aggregate: patterns of the keys whose statistics the federation run has, such as ``"val/*"``. By default, these
            are the keys that two or more sites log, always with the round as the step. An empty list means no
            statistics.
        aggregate_weight: the key of the metric that weights each site in ``.../weighted_mean``, such as
            ``"train/samples"``. By default, the weight is FLARE's number of training steps.
        update_statistics: measure in each round how much each site changed the model, and how far the changes agree.
            The server then looks at each result once or twice, and keeps up to 1 GiB of changes for each round.
        flare_metrics: where to record the metrics that FLARE carries itself: ``"clients"``, ``"server"`` or both. A
            client records the metrics that its trainer sends with a model, as ``flare/<metric>``. It also records its
            results of cross-site evaluation, as ``cross_site/<model>/<metric>``. The server records the results that it
            gets, as ``cross_site/<client>/<model>/<metric>``.
        context: log once in each run how the job was made, without secrets: the recipe's arguments, the job's script,
            command line and git commit, versions, and the kind of machine. ``docs/federation.md`` lists the keys. Each
            key begins with ``context/`` or ``source.git.``, so that a policy can withhold it.
        system_metrics: seconds between two measurements of CPU, memory, disk, network and GPUs. They are logged as
            ``system/...``, for each site's host and for the job there. None measures nothing.
        log_model: the federation run gets this model as an artifact: the ``"best"`` or the ``"last"`` global model that
            FLARE's persistor has saved. None logs no model.

    Raises:
        ConfigError: there is no backend, an argument is wrong, two arguments contradict each other, or an option holds
            a literal secret. Also if FLARE would send records to the server, although there is a policy or no backend
            on the server. FLARE does so if ``take_over`` is False or ``"copy"``, or if ``flare_metrics`` has
            ``"server"``. A backend that is not installed in this environment gives only a warning, since the sites that
            use it may have it. FLARE's simulator runs all sites in this environment. There, a missing backend raises
            ConfigError before FLARE starts.
        ValueError: the job has no client app for one of ``sites``.
    """
    server_backends = _checked(server, "server")
    client_backends = _checked(clients, "clients")
    site_backends = {site: _checked(named, f"sites[{site!r}]") for site, named in (sites or {}).items()}
    job = flare_internals.job_of(recipe_or_job)
    if flare_internals.has_component(job, TrackhubSender):
        raise ConfigError("add_tracking: this job has tracking already; give all backends in one call")
    plan = list(_plan(flare_internals.client_sites(recipe_or_job), client_backends, site_backends))
    if not server_backends and not any(backends for _, backends in plan):
        raise ConfigError("add_tracking: nothing to track with; give server={backend: options}, clients={...} or both")

    settings = FederationSettings.argument(federation, aggregate, aggregate_weight, update_statistics)
    check_has_federation_run(
        federation, bool(server_backends), aggregate=aggregate, aggregate_weight=aggregate_weight,
        update_statistics=update_statistics, log_model=log_model,
    )  # fmt: skip
    common = _common(take_over, limits, state_dir, name, notes, tags, flare_metrics)
    facts = context_of_job(recipe_or_job) if context else None
    of_site, of_server = _own_records(facts, system_metrics, log_model)
    of_sender = {**common, **of_site, **_capture(capture, capture_only), "policy": _policy(policy)}
    _warn_of_job(job, take_over, has_server_side=bool(server_backends))
    if server_backends:
        receiver = TrackhubReceiver(server_backends, **common, **of_server, federation=settings)
        job.to_server(receiver, id=RECEIVER_ID)
    for names, backends in plan:
        if not server_backends and not backends:
            continue
        if backends:
            flare_internals.add_to_clients(recipe_or_job, TrackhubReceiver(backends, **common), names, RECEIVER_ID)
        sender = TrackhubSender(**_receivers(server_backends, backends), **of_sender)
        flare_internals.add_to_clients(recipe_or_job, sender, names, SENDER_ID)
    flare_internals.reference_package(job, "trackhub")
    _let_trainers_finish(job)
    preflight_before_simulator(job, [server_backends, *(backends for _, backends in plan)])


def tracking_components(
    server: Backends | None = None,
    clients: Backends | None = None,
    *,
    name: str | None = None,
    notes: str = "",
    tags: Sequence[str] = (),
    take_over: TakeOver = True,
    capture: Sequence[str] = (),
    capture_only: bool = False,
    limits: Limits | Mapping[str, Any] | None = None,
    state_dir: str | None = None,
    policy: Mapping[str, Any] | None = None,
    federation: bool = True,
    aggregate: Sequence[str] | None = None,
    aggregate_weight: str | None = None,
    update_statistics: bool = False,
    flare_metrics: Sequence[str] = (),
    context: bool = True,
    system_metrics: float | None = None,
    log_model: Literal["best", "last"] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return what to put into the ``components`` of a job that is written in JSON. ``trackhub attach`` does it for you.

    Args:
        server, clients, notes, tags, take_over, capture, capture_only, limits, state_dir: as for `add_tracking`.
        policy, federation, aggregate, aggregate_weight, update_statistics: as for `add_tracking`.
        flare_metrics: as for `add_tracking`.
        context: as for `add_tracking`, without recipe and script: a job that is written in JSON has none.
        system_metrics, log_model: as for `add_tracking`.
        name: the job's name as people see it in every backend; by default the name in the job's ``meta.json``.

    Returns:
        ``{"config_fed_server.json": [component, ...], "config_fed_client.json": [component, ...]}``. An executor that
        launches an external process also needs ``"shutdown_timeout": 30`` or more. With less, FLARE may kill the
        trainer before its last lines run.

    Raises:
        ConfigError: as for `add_tracking`.
    """
    server_backends, client_backends = _checked(server, "server"), _checked(clients, "clients")
    if not server_backends and not client_backends:
        raise ConfigError("tracking_components: give server={backend: options}, clients={...} or both")
    settings = FederationSettings.argument(federation, aggregate, aggregate_weight, update_statistics)
    check_has_federation_run(
        federation, bool(server_backends), aggregate=aggregate, aggregate_weight=aggregate_weight,
        update_statistics=update_statistics, log_model=log_model,
    )  # fmt: skip
    common = _common(take_over, limits, state_dir, name, notes, tags, flare_metrics)
    facts: dict[str, Any] | None = {} if context else None
    of_site, of_server = _own_records(facts, system_metrics, log_model)
    of_sender = {**_receivers(server_backends, client_backends), **common, **of_site, **_capture(capture, capture_only)}
    sender = _component(SENDER_ID, TrackhubSender, {**of_sender, "policy": _policy(policy)})

    def receiver(backends: _Checked, **own: Any) -> list[dict[str, Any]]:
        args = {"backends": backends, **common, **own}
        return [_component(RECEIVER_ID, TrackhubReceiver, args)] if backends else []

    return {
        "config_fed_server.json": receiver(server_backends, **of_server, federation=settings),
        "config_fed_client.json": [*receiver(client_backends), sender],
    }


def _plan(
    own_apps: list[str], client_backends: _Checked, site_backends: Mapping[str, _Checked]
) -> Iterator[tuple[list[str] | None, _Checked]]:
    """Yield pairs: the names of some clients, and their backends. None stands for all clients.

    Args:
        own_apps: the sites that have a client app of their own.
        client_backends: the backends of all sites that ``site_backends`` does not name.
        site_backends: the backends of single sites.
    """
    for site, backends in site_backends.items():
        yield [site], backends
    if not site_backends:
        yield None, client_backends
    elif others := [site for site in own_apps if site not in site_backends]:
        yield others, client_backends


def _common(
    take_over: TakeOver,
    limits: Limits | Mapping[str, Any] | None,
    state_dir: str | None,
    name: str | None,
    notes: str,
    tags: Sequence[str],
    flare_metrics: Sequence[str],
) -> dict[str, Any]:
    """Return the arguments that both components take, as JSON values. The components check them."""
    labels = {"name": name, "notes": notes, "tags": list(tags) or None if isinstance(tags, list | tuple) else tags}
    return {
        "take_over": take_over,
        "limits": _limits(limits),
        "state_dir": state_dir,
        "job": {label: value for label, value in labels.items() if value not in (None, "")} or None,
        "flare_metrics": list(flare_metrics) or None if isinstance(flare_metrics, list | tuple) else flare_metrics,
    }


def _policy(policy: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the rules of a policy as JSON values. They are checked here, and once more at each site."""
    return None if policy is None else Policy.from_mapping(policy).plain()


def _own_records(
    context: dict[str, Any] | None, system_metrics: float | None, log_model: Literal["best", "last"] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that tell the senders and the server's receiver what trackhub logs itself.

    Args:
        context, log_model, system_metrics: as in `OwnRecords`.

    Raises:
        ConfigError: one of them is wrong.
    """
    check_interval(system_metrics)
    if log_model is not None and log_model not in ("best", "last"):
        raise ConfigError(f"tracking: log_model: expected 'best', 'last' or None, got {log_model!r}")
    of_site = OwnRecords(context=context, system_metrics=system_metrics).plain()
    of_server = OwnRecords(context=context, log_model=log_model).plain()
    return {"own_records": of_site}, {"own_records": of_server}


def _capture(capture: Sequence[str], capture_only: bool) -> dict[str, Any]:
    """Return the arguments that a sender takes for the capture of other loggers, as JSON values. It checks them."""
    return {"capture": list(capture) or None if isinstance(capture, list | tuple) else capture,
            "capture_only": capture_only}  # fmt: skip


def _warn_of_job(job: Any, take_over: TakeOver, *, has_server_side: bool) -> None:
    """Warn of components that get no events or that change how trackhub works, and of apps that FLARE leaves out."""
    on_server = listeners(flare_internals.app_components(job, server=True))
    at_clients = listeners(flare_internals.app_components(job, server=False))
    messages = [
        server_warning(on_server, take_over, has_server_side=has_server_side),
        client_warning(at_clients, take_over),
    ]
    if ignored := flare_internals.ignored_apps(job):
        messages.append(
            f"trackhub: this job has an app for all clients, so FLARE leaves out the own apps of {', '.join(ignored)}. "
            "Tracking is in the app for all clients only"
        )
    for message in filter(None, messages):
        warnings.warn(message, UserWarning, stacklevel=3)


def _receivers(server_backends: _Checked, client_backends: _Checked) -> dict[str, Any]:
    """Return the arguments that tell a sender which receivers there are."""
    return {
        "server_receiver": RECEIVER_ID if server_backends else None,
        "client_receiver": RECEIVER_ID if client_backends else None,
    }


def _component(component_id: str, cls: type, args: dict[str, Any]) -> dict[str, Any]:
    """Return a component as JSON configures it. Making one here checks its arguments.

    Raises:
        ConfigError: an argument is wrong.
    """
    cls(**args)
    return {"id": component_id, "path": f"{cls.__module__}.{cls.__name__}", "args": args}


def _checked(backends: Backends | None, where: str) -> _Checked:
    """Return the options of each backend as JSON values. They are checked here, and once more at the receiver.

    Args:
        backends: what the caller of this module gave.
        where: the argument in which it was given, for messages.

    Raises:
        ConfigError: an option is wrong or holds a literal secret, ``backends`` has another form, or a backend's name is
            misspelt.
    """
    if backends is None:
        return {}
    if isinstance(backends, str) or not isinstance(backends, Mapping | Sequence):
        raise ConfigError(f"tracking: {where}: expected {{backend: options}} or a list of names, got {backends!r}")
    named = backends if isinstance(backends, Mapping) else {name: {} for name in backends}
    checked: _Checked = {}
    for name, options in named.items():
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise ConfigError(f"tracking: {where}: expected {{backend: {{option: value}}}}, got {name!r}: {options!r}")
        try:
            checked[name] = registry.check_options(name, options)
        except (UnknownBackendError, PluginError) as e:
            if isinstance(e, UnknownBackendError) and not registry.may_be_elsewhere(name):
                raise
            # The site that runs the backend may well have it, and checks it before training.
            warnings.warn(f"trackhub: backend {name!r} cannot be checked here: {e}", UserWarning, stacklevel=3)
            checked[name] = dict(options)
    return checked


def _limits(limits: Limits | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the limits that the job's configuration holds. A site's environment may set the others.

    From a mapping, these are all limits that it names. From `Limits`, these are the values that differ from the
    defaults.
    """
    if limits is None:
        return None
    if not isinstance(limits, Limits):
        checked = Limits.from_mapping(limits)
        return {name: getattr(checked, name) for name in limits} or None
    given, default = limits, Limits()
    changed = {n: getattr(given, n) for n in Limits.__struct_fields__ if getattr(given, n) != getattr(default, n)}
    return changed or None


def _let_trainers_finish(job: Any) -> None:
    """Increase each ``shutdown_timeout`` of 0. Log it as information, not as a warning, since FLARE's recipes set 0."""
    raised = flare_internals.raise_shutdown_timeout(job, MIN_SHUTDOWN_TIMEOUT_S)
    if raised:
        _log.info(
            "shutdown_timeout of %d external trainer(s) was 0, so FLARE would kill a trainer before its last lines "
            "run. It is now %.0f s. Set shutdown_timeout to choose another one",
            raised,
            MIN_SHUTDOWN_TIMEOUT_S,
        )
