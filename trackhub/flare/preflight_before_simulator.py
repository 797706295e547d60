# SPDX-License-Identifier: Apache-2.0
"""Checks a job's backends before FLARE's simulator starts. The simulator runs all sites in this environment.

`trackhub.flare.recipe` calls it. `trackhub.preflight` does the check. Without this check, the script would end with
FLARE's "return code 2", and the reason would be far up in the log.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from trackhub.errors import ConfigError
from trackhub.preflight import Readiness, check_ready

__all__ = ["preflight_before_simulator"]

_Options = Mapping[str, Any]


def preflight_before_simulator(job: Any, receivers: Iterable[Mapping[str, _Options]]) -> None:
    """Make the job's ``simulator_run`` first try each backend as a receiver would. FLARE's ``SimEnv`` calls it.

    Args:
        job: the FedJob.
        receivers: for each receiver, backend -> options.
    """
    start = job.simulator_run
    tried: list[tuple[str, _Options]] = []
    for backends in receivers:
        tried += [one for one in backends.items() if one not in tried]

    @functools.wraps(start)
    def simulator_run(*args: Any, **kwargs: Any) -> Any:
        for name, options in tried:
            _check(name, options)
        _warn_of_space(str(args[0] if args else kwargs.get("workspace", "")))
        return start(*args, **kwargs)

    job.simulator_run = simulator_run


def _warn_of_space(workspace: str) -> None:
    path = os.path.abspath(workspace)
    if " " in path:
        warnings.warn(
            f"trackhub: the simulator's workspace {path!r} has a space in its path. FLARE splits a command there, so "
            "no client will start. Use a path without spaces: SimEnv(workspace_root=...)",
            UserWarning,
            stacklevel=3,
        )


def _check(name: str, options: _Options) -> None:
    """Raise ConfigError if this backend would stop the job before training."""
    ready = check_ready(name, options)
    if ready.word is Readiness.NO:
        raise ConfigError(f"the job does not start, since the backend {name!r} cannot be used: {ready.remark}")
