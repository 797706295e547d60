# SPDX-License-Identifier: Apache-2.0
"""Makes a job's backend: imports its plugin, makes its folder, and gives it its options. The receiver calls it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trackhub import registry
from trackhub.environment_trouble import is_environment_trouble
from trackhub.errors import BackendLoadError, ConfigError, PluginError
from trackhub.job_and_run_info import JobInfo, Side
from trackhub.plain_files import make_private_folder
from trackhub.spi import Backend, BackendContext

__all__ = ["set_up_backend"]


def set_up_backend(name: str, options: Mapping[str, Any], *, workdir: Path, job: JobInfo, side: Side) -> Backend[Any]:
    """Return the backend of this name, set up for a job. Its own check, ``preflight``, comes later.

    Args:
        name: the backend's name.
        options: its options, as the job gives them.
        workdir: the backend's folder. If a full disk keeps it from being made, its lane makes it later.
        job: the job.
        side: where the receiver is.

    Raises:
        ConfigError: the backend is unknown, an option is wrong, or the folder cannot be made.
        PluginError: the plugin cannot be used.
        OSError: the environment, such as a full disk, keeps the plugin from being set up.
    """
    cls = registry.load(name)
    try:
        try:
            make_private_folder(workdir)
        except OSError as e:
            if not is_environment_trouble(e):
                raise ConfigError(
                    f"the folder {workdir} for the files of backend {name!r} cannot be made: {e}. Give another folder"
                ) from e
        return cls(registry.build_options(name, cls, options), BackendContext(workdir, job, side))
    except (ConfigError, PluginError):
        raise
    except Exception as e:
        if isinstance(e, OSError) and is_environment_trouble(e):
            raise
        # A plugin may raise anything. Nothing has been trained yet, so this may stop the job.
        raise BackendLoadError(f"backend {name!r} cannot be set up: {type(e).__name__}: {e}") from e
