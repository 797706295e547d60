# SPDX-License-Identifier: Apache-2.0
"""Logs how a job was made, and on what it runs, as params and tags: recipe, script, versions, kind of machine.

`trackhub.flare.recipe` collects what the job's script knows, and puts it into the job's configuration. Both widgets add
what their process knows, and log it once, before training. `trackhub.context` reads script and machine.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey

from trackhub.context.describe_job_script import job_script, without_home
from trackhub.context.machine import describe_machine
from trackhub.errors import ConfigError
from trackhub.flare import flare_internals
from trackhub.secrets import may_name_secret, without_secrets

__all__ = ["PREFIX", "check_context", "context_of_job", "log_context", "with_federation", "with_machine"]

PREFIX = "context/"
"""The keys of all params that this module logs begin with this. A policy can withhold them by it."""

_TAGS = {
    "git/commit": "source.git.commit",
    "git/branch": "source.git.branch",
    "git/dirty": "source.git.dirty",
    "git/repository": "source.git.repoURL",
}
_COMMIT = "git:"  # without it, FLARE's search for secrets in a job's files would mistake a commit for a key
_MAX_ARGUMENTS = 100
_MAX_CHARS = 2000
_MAX_SITES = 100

Context = dict[str, Any]
"""Facts by key, such as ``git/commit``: plain texts, numbers and bools."""


def check_context(context: object) -> None:
    """Check a component's argument ``context`` when the job is written.

    Raises:
        ConfigError: it is neither None nor a mapping of names to plain values.
    """
    is_plain = isinstance(context, Mapping) and all(
        isinstance(k, str) and (v is None or isinstance(v, bool | int | float | str)) for k, v in context.items()
    )
    if context is not None and not is_plain:
        raise ConfigError(f"tracking: context: expected {{name: text, number or bool}}, got {context!r}")


def context_of_job(recipe_or_job: Any) -> Context:
    """Return what the process that writes the job knows: the script and the recipe's arguments. Without secrets."""
    found: Context = dict(job_script())
    if "git/commit" in found:
        found["git/commit"] = f"{_COMMIT}{found['git/commit']}"
    if flare_internals.job_of(recipe_or_job) is not recipe_or_job:
        found["recipe/class"] = type(recipe_or_job).__name__
        for name, value in list(vars(recipe_or_job).items())[:_MAX_ARGUMENTS]:
            if not name.startswith("_") and not may_name_secret(name) and (shown := _argument(name, value)) is not None:
                found[f"recipe/{name}"] = shown
    return found


def _argument(name: str, value: Any) -> bool | int | float | str | None:
    """Return an argument of a recipe as a plain value; None if it is empty, or of another type."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and value:
        return without_home(without_secrets(value), os.environ.get("HOME", ""))[:_MAX_CHARS]
    if name == "model" and value is not None and not isinstance(value, Mapping | list | str):
        return type(value).__name__
    return None


def with_machine(context: Mapping[str, Any]) -> Context:
    """Add facts about this process: versions and the kind of machine. Return all facts."""
    return {**context, **describe_machine()}


def with_federation(context: Mapping[str, Any], fl_ctx: FLContext) -> Context:
    """Add the server's facts about its job. Return all facts. Call it on the server."""
    found: Context = {**context}
    sites = sorted(flare_internals.participants(fl_ctx.get_engine()))
    found |= {"flare/n_sites": len(sites), "flare/sites": ", ".join(sites[:_MAX_SITES])}
    meta = fl_ctx.get_prop(FLContextKey.JOB_META)
    if isinstance(meta, Mapping) and isinstance(minimum := meta.get(JobMetaKey.MIN_CLIENTS.value), int):
        found["flare/min_clients"] = minimum
    controllers = [workflow.controller for workflow in fl_ctx.get_prop(FLContextKey.RUNNER).config.workflows]
    found["flare/workflows"] = ", ".join(type(controller).__name__ for controller in controllers)
    for name in ("num_rounds", "num_clients"):
        for controller in controllers:
            value = getattr(controller, name, getattr(controller, f"_{name}", None))
            if isinstance(value, int):
                found.setdefault(f"flare/{name}", value)
    return found


def log_context(
    context: Mapping[str, Any],
    log_params: Callable[[dict[str, Any]], None],
    set_tags: Callable[[dict[str, str]], None],
) -> None:
    """Log all facts as params. Log git's facts also as tags: MLflow shows these beside the run's source.

    Args:
        context: the facts.
        log_params: takes the params.
        set_tags: takes the tags.
    """
    facts = {key: value for key, value in context.items() if value is not None}
    if isinstance(commit := facts.get("git/commit"), str):
        facts["git/commit"] = commit.removeprefix(_COMMIT)
    if facts:
        log_params({f"{PREFIX}{key}": value for key, value in facts.items()})
    if tags := {tag: _text(facts[key]) for key, tag in _TAGS.items() if key in facts}:
        set_tags(tags)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
