# SPDX-License-Identifier: Apache-2.0
"""Asks a W&B server what it has of a run, since the SDK uploads in the background and tells nobody what arrived.

`online` calls it before it opens a run and whenever it confirms.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from trackhub.spi import TransientError
from trackhub_wandb.sdk import QUIET_SETTINGS, exclusive_sdk

if TYPE_CHECKING:
    from wandb.apis.public.service_api import ServiceApi

    from trackhub_wandb.options import WandBOptions
    from trackhub_wandb.sdk import Login

__all__ = ["RunPath", "Server"]

RunPath = dict[str, str | None]
"""The names of a run in a query: ``entity`` (None for the login's default), ``project`` and ``name``."""

_TIMEOUT_S = 5.0
_DOWN_S = 3.0

# The SDK asks for the same fields when it resumes a run or lists its files, so every server has them.
_STATE = """query TrackhubRunState($project: String, $entity: String, $name: String!) {
    model(name: $project, entityName: $entity) {
        bucket(name: $name, missingOk: true) { historyLineCount config }
    }
}"""
_FILES = """
query TrackhubRunFiles($project: String!, $entity: String!, $name: String!, $names: [String], $count: Int) {
    project(name: $project, entityName: $entity) {
        run(name: $name) { files(names: $names, first: $count) { edges { node { name sizeBytes } } } }
    }
}"""


class Server:
    """The server of one backend.

    If the server does not answer, all runs take it for down for 3 seconds. Otherwise each of many runs would wait its
    full time for the same dead server.

    Attributes:
        login: the server's address, and the login for it.
    """

    def __init__(self, options: WandBOptions, login: Login) -> None:
        """Connect with the first question, not here."""
        self.login = login
        self._options = options
        self._api: ServiceApi | None = None
        self._connection: Any = None
        self._down_until = 0.0

    def state(self, path: RunPath) -> dict[str, Any] | None:
        """Return ``historyLineCount`` and ``config`` (JSON) of a run, or None if there is no such run.

        Raises:
            TransientError: the server does not answer.
        """
        bucket = (self._ask(_STATE, path).get("model") or {}).get("bucket")
        return dict(bucket) if bucket is not None else None

    def file_sizes(self, path: RunPath, names: list[str]) -> dict[str, int]:
        """Return name and size in bytes of those of these files of the run that the server has.

        Raises:
            TransientError: the server does not answer.
        """
        data = self._ask(_FILES, {**path, "names": names, "count": len(names)})
        run = (data.get("project") or {}).get("run") or {}
        nodes = (edge["node"] for edge in (run.get("files") or {}).get("edges", ()))
        return {node["name"]: int(node["sizeBytes"]) for node in nodes}

    def _ask(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if time.monotonic() < self._down_until:
            raise TransientError(f"W&B at {self.login.base_url} did not answer a moment ago; it is asked again soon")
        try:
            answer: dict[str, Any] = self._connected().execute_graphql(query, variables)
        except Exception as error:
            # The handle may belong to a service that has ended.
            self._api = None
            self._down_until = time.monotonic() + _DOWN_S
            raise TransientError(f"W&B at {self.login.base_url} does not answer what it has: {error}") from error
        return answer

    def _connected(self) -> ServiceApi:
        from wandb.apis.public.service_api import ServiceApi

        with exclusive_sdk() as wandb:
            singleton = wandb.sdk.wandb_setup.singleton()
            if self._api is None or self._connection is not singleton._connection:
                settings = singleton.settings.model_copy()
                extra = {**QUIET_SETTINGS, **self._options.settings, "base_url": self.login.base_url}
                settings.update_from_dict(extra)
                wandb.sdk.lib.wbauth.set_auth_settings(settings, self.login.auth)
                self._connection = singleton._connection
                self._api = ServiceApi(settings=settings, timeout=_TIMEOUT_S)
            return self._api
