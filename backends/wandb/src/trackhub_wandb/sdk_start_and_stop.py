# SPDX-License-Identifier: Apache-2.0
"""Starts and stops the W&B SDK and its service: imports it late, starts it once per process, and limits every wait.

Only this module of the backend changes the process-wide state of the SDK. A script in the same process may use the SDK
itself. It must not get a run of this backend, and its sweep, its launch and its environment are not for such runs.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import stat
import subprocess
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackhub.spi import PermanentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import ModuleType

    from wandb.sdk.wandb_run import Run

__all__ = [
    "QUIET_SETTINGS",
    "Login",
    "abandon_runs",
    "exclusive_sdk",
    "import_sdk",
    "loaded_settings",
    "open_sdk_run",
    "remove_from_config",
    "remove_links",
    "service_is_lost",
    "stop_service",
]

_log = logging.getLogger(__name__)

# A process has one service of the SDK. Without the lock, one backend would stop it while another starts it.
_lock = threading.RLock()
_import_lock = threading.Lock()

_own_runs: weakref.WeakKeyDictionary[Any, list[Run]] = weakref.WeakKeyDictionary()
"""The open runs of this backend, for each singleton of the SDK. The SDK's own list has only the script's runs."""

_SERVICE_VARIABLE = "WANDB_SERVICE"
_ERROR_REPORTING_VARIABLE = "WANDB_ERROR_REPORTING"

_RETRY_WAIT_MAX_S = 4.0
_HTTP_TIMEOUT_S = 30.0
_KILLED_WITHIN_S = 0.5

QUIET_SETTINGS: dict[str, Any] = {
    # The SDK would record the receiver's machine, console and code, which do not belong in a site's run.
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "host": "",
    "label_disable": True,
    "program": "",
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    # On SageMaker, the SDK would replace the run's id, and put the training job's configuration into the run.
    "sagemaker_disable": True,
    # Links have absolute targets, which break when a job's folder is archived and moved.
    "symlink": False,
    "use_dot_wandb": False,
    "silent": True,
    # Without this, the Stop button of the W&B page interrupts the receiver's process.
    "stop_fn": lambda: None,
    # By default the SDK waits up to 60 s after an outage, longer than a job waits for its lanes.
    "x_file_stream_retry_wait_max_seconds": _RETRY_WAIT_MAX_S,
    "x_file_stream_timeout_seconds": _HTTP_TIMEOUT_S,
    "x_file_transfer_retry_wait_max_seconds": _RETRY_WAIT_MAX_S,
    "x_file_transfer_timeout_seconds": _HTTP_TIMEOUT_S,
    "x_graphql_retry_wait_max_seconds": _RETRY_WAIT_MAX_S,
    "x_graphql_timeout_seconds": _HTTP_TIMEOUT_S,
}
"""Settings of every run, whatever its mode."""

_FROM_ENVIRONMENT = frozenset(
    {
        # Where the server is, who logs in, and how to get there.
        *("api_key", "app_url_override", "base_url", "credentials_file", "email", "identity_token_file"),
        *("organization", "settings_system", "username"),
        *("http_proxy", "https_proxy", "insecure_disable_ssl", "x_extra_http_headers", "x_proxies"),
        *("x_file_stream_max_bytes", "x_file_stream_max_line_bytes", "x_file_stream_no_gzip"),
        *("x_file_stream_retry_max", "x_file_transfer_retry_max", "x_graphql_retry_max"),
        *("x_executable", "x_log_level", "x_service_transport", "x_service_wait", "x_stats_pid"),
        # What the options say when they are left out.
        *("entity", "project", "run_group", "run_job_type", "run_notes", "run_tags"),
    }
)
"""Settings that a run takes from the environment, W&B's settings files and ``wandb.setup``.

Any other setting is for the script's own run. In a sweep, for example, the SDK would ignore the id and the project of
this backend's run, and each opening would make another run.
"""


@dataclass(frozen=True)
class Login:
    """A W&B login for one server.

    Attributes:
        base_url: the server.
        auth: the SDK's ``Auth``. Its ``repr`` shows no secret.
    """

    base_url: str
    auth: Any

    @property
    def api_key(self) -> str | None:
        """The API key, or None for a login by identity token."""
        return getattr(self.auth, "api_key", None)

    @property
    def token_path(self) -> Path | None:
        """The identity token's file, or None for a login by API key."""
        return getattr(self.auth, "path", None)


def import_sdk() -> ModuleType:
    """Return the ``wandb`` module. The first call imports it, which takes 0.5 s. May be called from any thread.

    The SDK sends crash reports and usage statistics to W&B, and needs two threads for it. This switches both off unless
    ``WANDB_ERROR_REPORTING`` is set. The SDK reads that variable when it is imported and when its service starts.
    """
    os.environ.setdefault(_ERROR_REPORTING_VARIABLE, "false")
    with _import_lock:
        import wandb

        with contextlib.suppress(ImportError):  # without Pillow, W&B rejects images and says what to install
            from PIL import Image

            # Otherwise Pillow loads its formats with the first image. If two lanes then open an image at the same time,
            # Pillow may fail to identify a good image in one of them (Pillow 13.0).
            Image.init()
    return wandb


@contextlib.contextmanager
def exclusive_sdk() -> Iterator[ModuleType]:
    """Yield the SDK with its service running, while no other backend of this process starts or stops it.

    Meanwhile the SDK has the settings of `loaded_settings`.
    """
    with loaded_settings():
        wandb = import_sdk()
        singleton = wandb.sdk.wandb_setup.singleton()
        if singleton._connection is None:
            # Otherwise the SDK would use a service that the parent process announced and may end at any time. In the
            # same way, a trainer that this process starts would use the service of this process.
            os.environ.pop(_SERVICE_VARIABLE, None)
            singleton.ensure_service()
            os.environ.pop(_SERVICE_VARIABLE, None)
        yield wandb


@contextlib.contextmanager
def loaded_settings() -> Iterator[Any]:
    """Yield the SDK's settings: those of the environment, W&B's settings files and ``wandb.setup``.

    The SDK loads them once, and ignores what the script sets in the environment afterwards. So if the script has not
    used the SDK yet, none are left loaded.
    """
    with _lock:
        singleton = import_sdk().sdk.wandb_setup.singleton()
        is_new = singleton.settings_if_loaded is None
        try:
            yield singleton.settings
        finally:
            if is_new:
                singleton._settings = singleton._settings_environ = None


def open_sdk_run(settings: dict[str, Any], login: Login | None = None, config: dict[str, Any] | None = None) -> Run:
    """Open a W&B run beside any others of this process.

    Args:
        settings: fields of ``wandb.Settings``.
        login: the server and the login, or None for an offline run.
        config: the first entries of a new run's config.

    Raises:
        PermanentError: the SDK opened a run with another id.
        Exception: ``wandb.init`` failed, mostly with a ``wandb.errors.Error``.
    """
    with exclusive_sdk() as wandb:
        if login is not None:
            _use_login(wandb, login)
            settings = {**settings, "base_url": login.base_url}
        try:
            with _apart_from_script(wandb):
                run: Run = wandb.init(config=config, settings=wandb.Settings(**settings))
            _keep_from_others(Path(run.settings.sync_dir))
        except BaseException:
            _forget_unopened(wandb, settings["run_id"])
            raise
        finally:
            remove_links(settings["root_dir"], settings["run_id"])
        if run.id != settings["run_id"]:
            abandon_runs([run])
            raise PermanentError(
                f"the W&B SDK opened the run {run.id} instead of {settings['run_id']}: see which WANDB_ variables "
                "are set for the receiver, and unset those that choose a run"
            )
        return run


@contextlib.contextmanager
def _apart_from_script(wandb: ModuleType) -> Iterator[None]:
    """Have ``wandb.init`` in this thread open a run that the script's own use of the SDK does not see.

    The script's ``wandb.init()`` returns the newest run of the SDK's list, or ends all of them, also those that were
    opened with ``create_new``. So the run gets a copy of the SDK's singleton, with a list and settings of its own.
    Other threads are not affected.
    """
    module = wandb.sdk.wandb_init
    singleton = wandb.sdk.wandb_setup.singleton()
    apart = copy.copy(singleton)
    apart._active_runs = _own_runs.setdefault(singleton, [])
    apart._sweep_config = None
    apart._settings = wandb.Settings()
    found = singleton.settings
    kept = _FROM_ENVIRONMENT & found.model_fields_set
    apart._settings.update_from_dict({name: getattr(found, name) for name in kept})
    original, thread = module._WandbInit, threading.get_ident()

    def init_of(library: Any, telemetry: Any) -> Any:
        return original(apart if threading.get_ident() == thread else library, telemetry)

    module._WandbInit = init_of
    try:
        yield
    finally:
        module._WandbInit = original


def _keep_from_others(folder: Path) -> None:
    """Close a run's folder to all who may not use the folder around it.

    The SDK's service makes the folder, and its files, readable for everybody, and has no setting for that.
    """
    with contextlib.suppress(OSError):  # the folder around it still keeps them out
        folder.chmod(stat.S_IMODE(folder.stat().st_mode & folder.parent.stat().st_mode))


def remove_links(root_dir: str, run_id: str) -> None:
    """Remove the links to the log of the SDK's service from a run's folders.

    They name a file of this machine. `trackhub replay` refuses links that lead out of a job's folder.

    Args:
        root_dir: the folder in which the SDK has its folder ``wandb``.
        run_id: the run's id.
    """
    with contextlib.suppress(OSError):
        for path in Path(root_dir, "wandb").glob(f"*run-*-{run_id}*/logs/*"):
            if path.is_symlink():
                path.unlink()


def remove_from_config(run: Run, keys: Sequence[str]) -> None:
    """Remove entries from a run's config. The SDK's protocol allows this, but ``run.config`` has no method for it."""
    if not keys:
        return
    from wandb.proto import wandb_internal_pb2 as pb

    items = [pb.ConfigItem(key=key) for key in keys]  # type: ignore[attr-defined]  # made at import time
    run._interface._publish_config(pb.ConfigRecord(remove=items))  # type: ignore[attr-defined, union-attr]


def service_is_lost() -> bool:
    """Return whether the SDK's service has died: somebody killed it, or it ran out of memory."""
    with _lock:
        process = _service_process(import_sdk().sdk.wandb_setup.singleton())
        return process is not None and process.poll() is not None


def stop_service(timeout_s: float) -> None:
    """End the SDK's service process if this process has no open run. Kill it if it takes longer than ``timeout_s``.

    A run that the user's own code opened in this process keeps the service alive.
    """
    with _lock:
        singleton = _own_singleton()
        if singleton is not None and not _has_open_runs(singleton):
            _end_service(singleton, timeout_s)


def abandon_runs(runs: Iterable[Run]) -> None:
    """Give up runs that could not be ended. Kill the SDK's service, unless it lives and serves other open runs.

    Does not wait for the server.
    """
    with _lock:
        singleton = _own_singleton()
        if singleton is None:
            return
        checkers = []
        for run in runs:
            run._is_finished = True
            if run._wl is not None:
                run._wl.remove_active_run(run)
            if run._run_status_checker is not None:
                run._run_status_checker.stop()
                checkers.append(run._run_status_checker)
        if _has_open_runs(singleton) and not service_is_lost():
            return
        if process := _service_process(singleton):
            process.kill()
        _end_service(singleton, _KILLED_WITHIN_S, checkers)


def _has_open_runs(singleton: Any) -> bool:
    """Return whether this process has an open run: one of this backend, or one of the script's own."""
    return bool(singleton._active_runs or _own_runs.get(singleton))


def _use_login(wandb: ModuleType, login: Login) -> None:
    """Make this the login of the SDK's session.

    With an ``api_key`` in the settings of each run, the SDK would warn each time.
    """
    wbauth = wandb.sdk.lib.wbauth
    held = wbauth.session_credentials(host=login.base_url)
    same = Login(login.base_url, held)
    if held is not None and (same.api_key, same.token_path) == (login.api_key, login.token_path):
        # The SDK makes new settings with each service, so the session is kept outside of them.
        wbauth.set_auth_settings(wandb.sdk.wandb_setup.singleton().settings, held)
        return
    wbauth.use_explicit_auth(login.auth, source="trackhub")


def _forget_unopened(wandb: ModuleType, run_id: str) -> None:
    """Make the service forget a run that could not be opened.

    Otherwise the service would refuse the run's id at the next attempt (wandb 0.31).
    """
    from wandb.sdk.interface.interface_sock import InterfaceSock

    singleton = wandb.sdk.wandb_setup.singleton()
    connection = singleton._connection
    with contextlib.suppress(Exception):
        # The service waits for an exit record before it closes the run. Until then, it answers no other request.
        interface = InterfaceSock(singleton.asyncer, connection._client, stream_id=run_id)
        interface.deliver_exit(1).wait_or(timeout=_HTTP_TIMEOUT_S)
        connection.inform_finish(run_id=run_id)


def _own_singleton() -> Any:
    singleton = import_sdk().sdk.wandb_setup._singleton
    return singleton if singleton is not None and singleton._pid == os.getpid() else None


def _service_process(singleton: Any) -> subprocess.Popen[bytes] | None:
    connection = singleton._connection
    owned = connection._proc if connection is not None else None
    return owned._process if owned is not None else None


class _ServiceHandle:
    """Takes the place of the SDK's handle of its service, whose ``join`` has no limit. This one kills the service."""

    def __init__(self, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        self._process = process
        self._timeout_s = timeout_s

    def join(self) -> int:
        """Wait for the service's end. Kill it if it takes longer. Return 0: the SDK calls ``sys.exit`` otherwise."""
        try:
            self._process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            _log.warning(
                "The W&B service did not end within %.1f s and is killed. What it had not uploaded stays pending; "
                "`trackhub replay` delivers it",
                self._timeout_s,
            )
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._timeout_s)
        return 0


def _end_service(singleton: Any, timeout_s: float, checkers: Sequence[Any] = ()) -> None:
    """End the SDK's service in this thread: when a script ends, Python 3.12.0 to 3.12.2 start no new threads."""
    process = _service_process(singleton)
    handle = None if process is None else _ServiceHandle(process, timeout_s)
    if handle is not None:
        singleton._connection._proc = handle
    for checker in checkers:
        # Otherwise its thread would end with an uncaught error when the service is gone.
        with contextlib.suppress(Exception):
            checker.join()
    with contextlib.suppress(Exception):
        import_sdk().teardown()
    # If the service was dead, the teardown above has failed before it took these two steps.
    with contextlib.suppress(Exception):
        singleton.asyncer.join()
    if handle is not None:
        handle.join()
