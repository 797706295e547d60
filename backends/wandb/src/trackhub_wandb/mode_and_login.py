# SPDX-License-Identifier: Apache-2.0
"""Decides whether the receiver uses W&B online, and with which login. `backend` calls it before training."""

from __future__ import annotations

import logging
import os
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

from trackhub.spi import ConfigError, TransientError, remember_secret
from trackhub_wandb.sdk_start_and_stop import QUIET_SETTINGS, Login, exclusive_sdk, import_sdk, loaded_settings

if TYPE_CHECKING:
    from trackhub_wandb.options import WandBOptions

__all__ = ["Mode", "chosen_mode", "find_login", "require_login", "verify_login"]

_log = logging.getLogger(__name__)

Mode = Literal["online", "offline"]

_MODES: dict[str, Mode] = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline"}


def chosen_mode(options: WandBOptions) -> Mode | None:
    """Return the mode that the options or ``WANDB_MODE`` ask for, or None if neither does.

    Raises:
        ConfigError: ``WANDB_MODE`` has another value, such as ``disabled``, with which every record would be lost.
    """
    if options.mode is not None:
        return options.mode
    value = os.environ.get("WANDB_MODE", "")
    if not value:
        return None
    if value not in _MODES:
        raise ConfigError(
            f"backend wandb: WANDB_MODE={value} in the environment of the receiver on {socket.gethostname()}; expected "
            "online or offline. Unset it, set the backend's option mode, or take the backend out of the job"
        )
    return _MODES[value]


def find_login(options: WandBOptions) -> Login | None:
    """Return the login to use on this machine, or None if there is none.

    This reads the option, the environment, the netrc file and W&B's own settings files. It asks no server.

    Raises:
        ConfigError: what was found cannot be a login, or the server's address is malformed.
    """
    wandb = import_sdk()
    try:
        with loaded_settings() as found:
            settings = found.model_copy()
            if options.base_url is not None:
                settings.base_url = options.base_url
            host = wandb.sdk.lib.wbauth.HostUrl(settings.base_url)
            if options.api_key:
                auth = wandb.sdk.lib.wbauth.AuthApiKey(host=host, api_key=options.api_key)
            else:
                auth = wandb.sdk.lib.wbauth.authenticate_session(
                    host=host, source="trackhub", prompt=False, update_session=False
                )
    except (ValueError, wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        raise ConfigError(f"backend wandb: on {socket.gethostname()}: {error}. {_how_to_log_in(options)}") from error
    if auth is None:
        return None
    login = Login(str(settings.base_url), auth)
    remember_secret(login.api_key)  # the core knows secrets in the environment, but not in a netrc file
    return login


def require_login(options: WandBOptions) -> Login:
    """Return the login to use on this machine.

    Raises:
        ConfigError: there is no login.
    """
    found = find_login(options)
    if found is None:
        raise ConfigError(
            f"backend wandb: mode is online, but no W&B login was found on {socket.gethostname()}, where this job's "
            f"receiver runs. {_how_to_log_in(options)}"
        )
    return found


def verify_login(options: WandBOptions, login: Login, timeout_s: float) -> str:
    """Ask the server whether it accepts this login. Return the entity that its runs go to by default.

    Args:
        options: the backend's options.
        login: the login to verify.
        timeout_s: longest wait for the server.

    Raises:
        ConfigError: the server rejects the login.
        TransientError: the server cannot be asked now.
    """
    with exclusive_sdk() as wandb:
        from wandb.apis.public.service_api import ServiceApi
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        settings = wandb.sdk.wandb_setup.singleton().settings.model_copy()
        settings.update_from_dict({**QUIET_SETTINGS, **options.settings, "base_url": login.base_url})
        wandb.sdk.lib.wbauth.set_auth_settings(settings, login.auth)
        api = ServiceApi(settings=settings, timeout=timeout_s)
        try:
            return str(api.authenticate().default_entity)
        except WandbApiFailedError as error:
            status = error.response.http_status if error.response is not None else 0
            if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                raise ConfigError(
                    f"backend wandb: {login.base_url} rejects the login that was found on {socket.gethostname()} "
                    f"(HTTP {status}). {_how_to_log_in(options)}"
                ) from error
            raise TransientError(f"W&B at {login.base_url} cannot be reached now{_proxy(login)}: {error}") from error


def _proxy(login: Login) -> str:
    """Say that the environment sends requests to this server through a proxy, if it does."""
    from requests.utils import get_environ_proxies, select_proxy

    if not select_proxy(login.base_url, get_environ_proxies(login.base_url)):
        return ""
    return (
        " through the proxy that HTTPS_PROXY or HTTP_PROXY names (see whether the proxy runs, or name the server in "
        "NO_PROXY)"
    )


def _how_to_log_in(options: WandBOptions) -> str:
    host = f" --host {options.base_url}" if options.base_url else ""
    return (
        f"Log in on that machine, as the user who runs the receiver, with `wandb login{host}`. Or set WANDB_API_KEY in "
        "its environment. Or give the option api_key='${secret:NAME}', with NAME set in its environment. To record "
        "without a login, choose mode='offline' and upload later with `wandb sync`"
    )
