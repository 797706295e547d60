# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from trackhub_mlflow.contract import MLflowContract

from trackhub.testing import Outage, StoreContext

if TYPE_CHECKING:
    from tests.support.mlflow_server import Server


class TestMLflow(MLflowContract):
    """In an SQLite store."""


class TestMLflowServer(MLflowContract):
    """On a real server, which is killed and started again."""

    deadline_s = 180.0  # some hundred files of all scenarios, one after another, beside other tests
    _server: ClassVar[Server]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def on_server(cls, running_server: Server) -> Iterator[None]:
        cls._server = running_server
        yield
        _Killed(running_server).end()  # for the tests of other files

    def options(self, tmp_path: Path) -> Mapping[str, Any]:
        return {"tracking_uri": self._server.url}

    def shared_options(self, tmp_path: Path) -> Mapping[str, Any]:
        return self.options(tmp_path)

    def outage(self, context: StoreContext) -> Outage:
        return _Killed(self._server)


class _Killed:
    """An outage of the server by SIGKILL."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def begin(self) -> None:
        self._server.kill()

    def end(self) -> None:
        if not self._server.is_running():
            self._server.start()
