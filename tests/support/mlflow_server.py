# SPDX-License-Identifier: Apache-2.0
"""A real ``mlflow server`` for tests and benchmarks, and a reader of its database that shares no code with trackhub."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["JOB", "STANDARD_COMMAND", "Database", "RunRow", "Server"]

JOB = "job-1"
STANDARD_COMMAND = ("server", "--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "./mlartifacts")
_START_S = 180.0
"""The longest start of a server, in seconds. Its imports take seconds alone, and a minute beside other tests."""


class RunRow(NamedTuple):
    """A run in the database."""

    id: str
    name: str
    status: str
    start: int
    end: int | None
    experiment: str
    artifact_uri: str


class Database:
    """Reads an MLflow database with plain SQL."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def rows(self, query: str, *values: Any) -> list[Any]:
        with contextlib.closing(sqlite3.connect(f"{self.file.as_uri()}?mode=ro", uri=True, timeout=20)) as connection:
            return connection.execute(query, values).fetchall()

    def runs(self, *, deleted: bool = False) -> list[RunRow]:
        query = """
            SELECT run_uuid, runs.name, status, start_time, end_time, experiments.name, runs.artifact_uri
            FROM runs JOIN experiments USING (experiment_id) WHERE runs.lifecycle_stage = ?
            ORDER BY start_time, run_uuid
        """
        return [RunRow(*row) for row in self.rows(query, "deleted" if deleted else "active")]

    def tags(self, run_id: str) -> dict[str, str]:
        return dict(self.rows("SELECT key, value FROM tags WHERE run_uuid = ?", run_id))

    def params(self, run_id: str) -> dict[str, str]:
        return dict(self.rows("SELECT key, value FROM params WHERE run_uuid = ?", run_id))

    def points(self, run_id: str) -> list[tuple[str, int, float, int]]:
        """Return (key, step, value, milliseconds), sorted."""
        query = (
            "SELECT key, step, CASE is_nan WHEN 1 THEN 'NaN' ELSE value END, timestamp FROM metrics WHERE run_uuid = ?"
        )
        return sorted(self.rows(query, run_id), key=str)

    def parents(self, job: str = JOB) -> list[RunRow]:
        """Return the parent runs of the job with this id."""
        return [run for run, tags in self._runs_of(job) if "mlflow.parentRunId" not in tags]

    def site_run(self, site: str = "site-1", job: str = JOB) -> RunRow:
        """Return the run of a site in the job with this id."""
        (run,) = [run for run, tags in self._runs_of(job) if tags["site"] == site]
        return run

    def _runs_of(self, job: str) -> list[tuple[RunRow, dict[str, str]]]:
        tagged = [(run, self.tags(run.id)) for run in self.runs()]
        return [(run, tags) for run, tags in tagged if tags["job"] == job]


class Server:
    """A real ``mlflow server`` on loopback, which can be killed and started again."""

    def __init__(self, folder: Path, command: Sequence[str] = STANDARD_COMMAND) -> None:
        self.folder = folder
        self._command = [sys.executable, "-m", "mlflow", *command]
        self.database = Database(folder / "mlflow.db")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [*self._command, "--workers", "1", "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return
            time.sleep(0.1)
        raise AssertionError(
            f"mlflow server did not start within {_START_S:.0f} s; its log ends: "
            f"{(self.folder / 'server.log').read_text()[-2000:]}"
        )

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Kill it, as a crash would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def call(self, path: str, body: Any = None) -> Any:
        """Send a request to the REST API, with the standard library only."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)

    def artifact(self, run_id: str, path: str) -> bytes:
        query = urllib.parse.urlencode({"run_uuid": run_id, "path": path})
        with urllib.request.urlopen(f"{self.url}/get-artifact?{query}", timeout=20) as response:
            content: bytes = response.read()
            return content
