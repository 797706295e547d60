# SPDX-License-Identifier: Apache-2.0
"""Adds tracking to a FLARE job: to a recipe, to a FedJob, or as components for a job written in JSON."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from trackhub import registry
from trackhub.errors import ConfigError, PluginError, UnknownBackendError
from trackhub.flare import compat
from trackhub.flare.receiver_widget import TrackhubReceiver
from trackhub.flare.sender_widget import TrackhubSender
from trackhub.limits import Limits

__all__ = ["add_tracking", "tracking_components"]

RECEIVER_ID = "trackhub_receiver"
SENDER_ID = "trackhub_sender"
MIN_SHUTDOWN_TIMEOUT_S = 30.0
"""FLARE stops an external trainer this long after the last round. Its recipes say 0: at once, in mid-sentence."""

Backends = Mapping[str, Mapping[str, Any]] | Sequence[str]
"""Backend names and their options; a plain list of names for backends without options."""


def add_tracking(
    recipe_or_job: Any,
    server: Backends | None = None,
    clients: Backends | None = None,
    sites: Mapping[str, Backends] | None = None,
    *,
    take_over: bool = True,
    limits: Limits | Mapping[str, Any] | None = None,
    state_dir: str | None = None,
) -> None:
    """Deliver what the job's training code logs to tracking backends, on the server, at the clients, or both.

    ::

        recipe = FedAvgRecipe(...)
        add_tracking(recipe, server={"tensorboard": {}})

    The training script uses `trackhub.Writer`; what it logs with FLARE's own writers is received as well.

    Args:
        recipe_or_job: a FLARE recipe or FedJob, complete with its executors.
        server: backends that receive the records of all sites on the FLARE server; None sends nothing to the server.
        clients: backends that receive a client's records within that client; None for none.
        sites: for some clients, backends in place of ``clients``; an empty mapping for none. The job must have a
            client app for each site: call FLARE's ``set_per_site_config`` right after constructing the recipe. At a
            site that tracks on neither side, ``Writer()`` records nothing and warns once.
        take_over: receive what FLARE's own writers log. FLARE's own receivers then get nothing; turn it off to use them
            beside trackhub.
        limits: values of `trackhub.limits.Limits` that differ from the defaults, for all sites.
        state_dir: folder for spools and journals, on every site; by default in the job's run folder.

    Raises:
        ConfigError: there is no side to track on, only the client side but no take-over, an option is wrong or holds
            a literal secret. A backend that is not installed here is left for the sites to check.
        ValueError: FLARE finds that the job has no client app for a site.
    """
    server_backends = _checked(server, "server")
    client_backends = _checked(clients, "clients")
    site_backends = {site: _checked(named, f"sites[{site!r}]") for site, named in (sites or {}).items()}
    job = compat.job_of(recipe_or_job)
    if compat.has_component(job, TrackhubSender):
        raise ConfigError("add_tracking: this job has tracking already; give all backends in one call")
    others = [site for site in compat.client_sites(recipe_or_job) if site not in site_backends]
    plan: list[tuple[list[str] | None, dict[str, dict[str, Any]]]] = [([s], b) for s, b in site_backends.items()]
    if not site_backends:
        plan.append((None, client_backends))
    elif others:
        plan.append((others, client_backends))
    if not server_backends and not any(backends for _, backends in plan):
        raise ConfigError("add_tracking: nothing to track with; give server={backend: options}, clients={...} or both")

    values = _limits(limits)
    if server_backends:
        job.to_server(TrackhubReceiver(server_backends, take_over, values, state_dir), id=RECEIVER_ID)
    for names, backends in plan:
        if not server_backends and not backends:
            continue
        if backends:
            receiver = TrackhubReceiver(backends, take_over, values, state_dir)
            compat.add_to_clients(recipe_or_job, receiver, names, RECEIVER_ID)
        sender = TrackhubSender(
            RECEIVER_ID if server_backends else None, RECEIVER_ID if backends else None, take_over, values, state_dir
        )
        compat.add_to_clients(recipe_or_job, sender, names, SENDER_ID)
    compat.reference_package(job, "trackhub")
    _let_trainers_finish(recipe_or_job)


def tracking_components(
    server: Backends | None = None,
    clients: Backends | None = None,
    *,
    take_over: bool = True,
    limits: Limits | Mapping[str, Any] | None = None,
    state_dir: str | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return what to put into the ``components`` of a job that is written in JSON.

    Args:
        server, clients, take_over, limits, state_dir: as for `add_tracking`.

    Returns:
        ``{"config_fed_server.json": [component, ...], "config_fed_client.json": [component, ...]}``. An executor that
        launches an external process also needs ``"shutdown_timeout": 30`` or more, or FLARE kills the trainer before
        its last lines.

    Raises:
        ConfigError: as for `add_tracking`.
    """
    server_backends, client_backends = _checked(server, "server"), _checked(clients, "clients")
    if not server_backends and not client_backends:
        raise ConfigError("tracking_components: give server={backend: options}, clients={...} or both")
    common = {"take_over": take_over, "limits": _limits(limits), "state_dir": state_dir}

    def receiver(backends: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return _component(RECEIVER_ID, TrackhubReceiver(backends, **common), {"backends": backends, **common})  # type: ignore[arg-type]

    ends = {
        "server_receiver": RECEIVER_ID if server_backends else None,
        "client_receiver": RECEIVER_ID if client_backends else None,
    }
    sender = _component(SENDER_ID, TrackhubSender(**ends, **common), {**ends, **common})  # type: ignore[arg-type]
    return {
        "config_fed_server.json": [receiver(server_backends)] if server_backends else [],
        "config_fed_client.json": [*([receiver(client_backends)] if client_backends else []), sender],
    }


def _component(component_id: str, component: Any, args: dict[str, Any]) -> dict[str, Any]:
    cls = type(component)
    return {"id": component_id, "path": f"{cls.__module__}.{cls.__name__}", "args": args}


def _checked(backends: Backends | None, where: str) -> dict[str, dict[str, Any]]:
    """Return plain options, checked as far as it can be done here."""
    if backends is None:
        return {}
    if isinstance(backends, str) or not isinstance(backends, Mapping | Sequence):
        raise ConfigError(f"add_tracking: {where}: expected {{backend: options}} or a list of names, got {backends!r}")
    named = backends if isinstance(backends, Mapping) else {name: {} for name in backends}
    checked: dict[str, dict[str, Any]] = {}
    for name, options in named.items():
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise ConfigError(
                f"add_tracking: {where}: expected {{backend: {{option: value}}}}, got {name!r}: {options!r}"
            )
        try:
            checked[name] = registry.check_options(name, options)
        except (UnknownBackendError, PluginError) as e:
            # The site that runs it may well have it, and checks it before training.
            warnings.warn(f"trackhub: backend {name!r} cannot be checked here: {e}", UserWarning, stacklevel=3)
            checked[name] = dict(options)
    return checked


def _limits(limits: Limits | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the job's configuration holds: the given values, of ``Limits`` those that differ from the defaults.

    What it does not hold, a site's environment may set.
    """
    if limits is None:
        return None
    if not isinstance(limits, Limits):
        checked = Limits.from_mapping(limits)
        return {name: getattr(checked, name) for name in limits} or None
    given, default = limits, Limits()
    changed = {n: getattr(given, n) for n in Limits.__struct_fields__ if getattr(given, n) != getattr(default, n)}
    return changed or None


def _let_trainers_finish(recipe_or_job: Any) -> None:
    raised = compat.raise_shutdown_timeout(compat.job_of(recipe_or_job), MIN_SHUTDOWN_TIMEOUT_S)
    if raised:
        warnings.warn(
            f"trackhub: shutdown_timeout of {raised} external trainer(s) was 0, so FLARE would kill a trainer before "
            f"its last lines run; it is now {MIN_SHUTDOWN_TIMEOUT_S:.0f} s. Set shutdown_timeout to choose another",
            UserWarning,
            stacklevel=3,
        )
