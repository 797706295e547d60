# SPDX-License-Identifier: Apache-2.0
"""Asks a W&B server what it has of a run. The SDK uploads in the background, and does not say what has arrived.

`online` calls it before it opens a run and whenever it confirms.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from trackhub.spi import TransientError
from trackhub_wandb.sdk_start_and_stop import QUIET_SETTINGS, exclusive_sdk

if TYPE_CHECKING:
    import requests

    from trackhub_wandb.options import WandBOptions
    from trackhub_wandb.sdk_start_and_stop import Login

__all__ = ["RunPath", "Server"]

RunPath = dict[str, str | None]
"""The names of a run in a query: ``entity`` (None for the login's default), ``project`` and ``name``."""

_TIMEOUT_S = 5.0
_DOWN_S = 3.0
_MAX_TEXT = 300

# The SDK asks for the same fields when it resumes a run or lists its files, so every server has them.
_STATE_NAME = "TrackhubRunState"
_STATE = """query TrackhubRunState($project: String, $entity: String, $name: String!) {
    model(name: $project, entityName: $entity) {
        bucket(name: $name, missingOk: true) { historyLineCount historyTail config }
    }
}"""
_FILES_NAME = "TrackhubRunFiles"
_FILES = """
query TrackhubRunFiles($project: String!, $entity: String!, $name: String!, $names: [String], $count: Int) {
    project(name: $project, entityName: $entity) {
        run(name: $name) { files(names: $names, first: $count) { edges { node { name sizeBytes } } } }
    }
}"""


class Server:
    """The server of one backend. It is asked over HTTP, with the SDK's login, proxies and certificates.

    The SDK has a call for such questions, too. But the call sends an empty ``operationName`` with a named query. The
    GraphQL specification forbids this, and some servers refuse it (wandb 0.31).

    If the server does not answer, no run asks it again for 3 seconds. Otherwise each of many runs would wait for the
    same dead server.

    Attributes:
        login: the server's address, and the login for it.
    """

    def __init__(self, options: WandBOptions, login: Login) -> None:
        """Keep the login. The first question makes the connection."""
        self.login = login
        self._options = options
        self._session: requests.Session | None = None
        self._down_until = 0.0
        self._lock = threading.Lock()

    def state(self, path: RunPath) -> dict[str, Any] | None:
        """Return ``historyLineCount``, ``historyTail`` and ``config`` (JSON) of a run. None if there is no such run.

        Raises:
            TransientError: the server does not answer.
        """
        bucket = (self._ask(_STATE_NAME, _STATE, path).get("model") or {}).get("bucket")
        return dict(bucket) if bucket is not None else None

    def file_sizes(self, path: RunPath, names: list[str]) -> dict[str, int]:
        """Return which of these files of the run the server has, with their sizes in bytes.

        Raises:
            TransientError: the server does not answer.
        """
        data = self._ask(_FILES_NAME, _FILES, {**path, "names": names, "count": len(names)})
        run = (data.get("project") or {}).get("run") or {}
        nodes = (edge["node"] for edge in (run.get("files") or {}).get("edges", ()))
        return {node["name"]: int(node["sizeBytes"]) for node in nodes}

    def close(self) -> None:
        """Close the connections. The next question opens them again."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _ask(self, name: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        with self._lock:  # the lane's two threads ask
            return self._ask_alone(name, query, variables)

    def _ask_alone(self, name: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if time.monotonic() < self._down_until:
            raise TransientError(f"W&B at {self.login.base_url} did not answer a moment ago; it is asked again soon")
        try:
            return self._post({"operationName": name, "query": query, "variables": variables})
        except Exception as error:
            self.close()  # the next question reads the login again, since a token may have expired
            self._down_until = time.monotonic() + _DOWN_S
            if isinstance(error, TransientError):
                raise
            raise TransientError(f"{_who_failed(self.login.base_url, error)}: {error}") from error

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._session is None:
            self._session = self._log_in()
        # No redirect is followed: `requests` would change the POST into a GET, and pass on the login.
        reply = self._session.post(
            f"{self.login.base_url.rstrip('/')}/graphql", json=body, timeout=_TIMEOUT_S, allow_redirects=False
        )
        if not reply.ok or reply.is_redirect:
            raise TransientError(
                f"W&B at {self.login.base_url} answers HTTP {reply.status_code} when asked what it has: "
                f"{' '.join(reply.text[:_MAX_TEXT].split())}"
            )
        answer = reply.json()
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, dict):
            raise TransientError(
                f"W&B at {self.login.base_url} did not say what it has: {str(answer)[:_MAX_TEXT]}. Expected the "
                "reply of a W&B server to a GraphQL query"
            )
        return data

    def _log_in(self) -> requests.Session:
        import requests
        from wandb.apis.public.service_api import ServiceApi

        with exclusive_sdk() as wandb:
            settings = wandb.sdk.wandb_setup.singleton().settings.model_copy()
            extra = {**QUIET_SETTINGS, **self._options.settings, "base_url": self.login.base_url}
            settings.update_from_dict(extra)
            wandb.sdk.lib.wbauth.set_auth_settings(settings, self.login.auth)
            token = ServiceApi(settings=settings, timeout=_TIMEOUT_S).access_token() if self.login.token_path else None
        session = requests.Session()
        session.auth = _Bearer(token) if token else ("api", self.login.api_key or "")
        session.headers.update({"User-Agent": "trackhub-wandb", **(settings.x_extra_http_headers or {})})
        chosen = {"http": settings.http_proxy, "https": settings.https_proxy}
        session.proxies.update({scheme: proxy for scheme, proxy in chosen.items() if proxy})
        bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
        session.verify = False if settings.insecure_disable_ssl else bundle or True
        return session


class _Bearer:
    """Sends an access token. ``requests`` would replace a header of the session by a login in the user's ``.netrc``."""

    def __init__(self, token: str) -> None:
        self._header = f"Bearer {token}"

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = self._header
        return request


def _who_failed(url: str, error: Exception) -> str:
    from requests.exceptions import ProxyError

    if isinstance(error, ProxyError):
        return f"the proxy on the way to W&B at {url} cannot be used (check HTTPS_PROXY, HTTP_PROXY and NO_PROXY)"
    return f"W&B at {url} did not say what it has"
