# SPDX-License-Identifier: Apache-2.0
"""The login to an MLflow server: an HTTP session with the settings that MLflow's own client would use.

`RestStore` calls ``open_session``, which reads the receiver's environment and ``~/.mlflow/credentials``. It does so
without importing mlflow, because that takes seconds and a few hundred megabytes. It imports mlflow only if an
MLflow plugin for logins or request headers is in use.

Source: ``mlflow.utils.credentials`` and ``mlflow.utils.rest_utils.http_request``, mlflow 3.17.
"""

from __future__ import annotations

import configparser
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from trackhub.spi import remember_secret
from trackhub_mlflow.store import SetupError

if TYPE_CHECKING:
    import requests

__all__ = ["open_session"]


def open_session(login: tuple[str, str] | None) -> requests.Session:
    """Return a session that logs in as MLflow's client would.

    Args:
        login: user and password from the server's URI, used in place of those in the environment.

    Raises:
        SetupError: the settings contradict each other, or need a package that is not installed.
    """
    import requests

    session = requests.Session()
    session.headers["User-Agent"] = "trackhub-mlflow"
    user, password = login or _user_and_password()
    if user and password:
        session.auth = (user, password)
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        session.auth = _Bearer(token)
    if workspace := os.environ.get("MLFLOW_WORKSPACE", "").strip():
        session.headers["X-MLFLOW-WORKSPACE"] = workspace
    bundle = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
    insecure = _is_on("MLFLOW_TRACKING_INSECURE_TLS")
    if insecure and bundle:
        raise SetupError("both MLFLOW_TRACKING_INSECURE_TLS and MLFLOW_TRACKING_SERVER_CERT_PATH are set; set only one")
    session.verify = bundle or not insecure
    session.cert = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None
    _log_in_by_plugins(session)
    return session


def _user_and_password() -> tuple[str | None, str | None]:
    file = configparser.ConfigParser(interpolation=None)
    file.read(Path.home() / ".mlflow" / "credentials")
    stored = file["mlflow"] if file.has_section("mlflow") else {}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or stored.get("mlflow_tracking_username")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or stored.get("mlflow_tracking_password")
    remember_secret(password)  # the core knows secrets in the environment, but not in this file
    return user, password


def _log_in_by_plugins(session: requests.Session) -> None:
    if entry_points(group="mlflow.request_header_provider"):
        from mlflow.tracking.request_header.registry import resolve_request_headers

        session.headers.update(resolve_request_headers())
    try:
        if _is_on("MLFLOW_TRACKING_AWS_SIGV4"):
            from requests_auth_aws_sigv4 import AWSSigV4

            session.auth = AWSSigV4("execute-api")
        elif name := os.environ.get("MLFLOW_TRACKING_AUTH"):
            from mlflow.tracking.request_auth.registry import fetch_auth

            session.auth = fetch_auth(name)
            if session.auth is None:
                raise SetupError(
                    f"MLFLOW_TRACKING_AUTH names {name!r}, but no MLflow plugin of that name is installed; install it "
                    "in the receiver's environment"
                )
    except ImportError as error:
        raise SetupError(f"the MLflow login needs a package that is not installed: {error}; install it") from error


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("true", "1")


class _Bearer:
    """Sends a token. ``requests`` would replace a header of the session by a login in the user's ``.netrc``."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request
