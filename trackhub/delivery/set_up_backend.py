# SPDX-License-Identifier: Apache-2.0
"""Makes a job's backends: imports their plugins, makes their folders, and gives them their options.

The receiver calls it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trackhub import registry
from trackhub.environment_trouble import is_environment_trouble
from trackhub.errors import BackendLoadError, ConfigError, PluginError
from trackhub.job_and_run_info import JobInfo, Side
from trackhub.open_without_links import make_private_folder
from trackhub.spi import Backend, BackendContext

__all__ = ["set_up_backends"]


def set_up_backends(
    backends: Mapping[str, Mapping[str, Any]], *, run_dir: Path, job: JobInfo, side: Side
) -> dict[str, Backend[Any]]:
    """Return the backends of a job by name, set up for it. Their own check, ``preflight``, comes later.

    All options are checked before the first folder is made. If a backend cannot be set up, no empty folder is left.

    Args:
        backends: name -> options of each backend, as the job gives them.
        run_dir: the job's run folder. Each backend gets the folder of its name there. If a full disk prevents that, the
            backend's lane makes the folder later.
        job: the job.
        side: where the receiver is.

    Raises:
        ConfigError: a backend is unknown, an option is wrong, or a folder cannot be made.
        PluginError: a plugin cannot be used.
        OSError: the environment, such as a full disk, keeps a plugin from being set up.
    """
    planned: dict[str, tuple[type[Backend[Any]], Any]] = {}
    for name, options in backends.items():
        with _plugin_errors(name):
            cls = registry.load(name)
            planned[name] = cls, registry.build_options(name, cls, options)
    found: dict[str, Backend[Any]] = {}
    made = [folder for folder in (run_dir, *(run_dir / name for name in planned)) if not folder.exists()]
    try:
        for name, (cls, built) in planned.items():
            with _plugin_errors(name):
                _make_folder(run_dir / name, name)
                found[name] = cls(built, BackendContext(run_dir / name, job, side))
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # it was not made, or is not empty
                folder.rmdir()
        raise
    return found


def _make_folder(folder: Path, name: str) -> None:
    try:
        make_private_folder(folder)
    except OSError as e:
        if not is_environment_trouble(e):
            raise ConfigError(
                f"the folder {folder} for the files of backend {name!r} cannot be made: {e}. Give another folder"
            ) from e


@contextlib.contextmanager
def _plugin_errors(name: str) -> Iterator[None]:
    """Name the backend in an error of its plugin."""
    try:
        yield
    except (ConfigError, PluginError):
        raise
    except Exception as e:
        if isinstance(e, OSError) and is_environment_trouble(e):
            raise
        # A plugin may raise anything. Nothing has been trained yet, so this may stop the job.
        raise BackendLoadError(f"backend {name!r} cannot be set up: {type(e).__name__}: {e}") from e
