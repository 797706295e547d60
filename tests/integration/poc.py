# SPDX-License-Identifier: Apache-2.0
"""FLARE's POC for tests: separate services on this machine, mutual TLS, job processes, downloaded results.

A test module imports the fixtures that it uses. Each module has a POC of its own, which starts within a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import files_with, flare_environment, read_jsonl
from tests.support.wandb_emulator import Emulator

__all__ = [
    "ADMIN",
    "ALLOWED_CLASSES",
    "FIFTY_CALLS",
    "SITES",
    "Poc",
    "PocResult",
    "assert_nowhere",
    "operator_file",
    "poc",
    "points",
    "wait_until",
    "wandb",
]

FIFTY_CALLS = """
from trackhub import Writer

writer = Writer()


def train(n):
    for i in range(50):
        values = {"loss": n + i / 7}
        fact(lambda: writer.log(values, 50 * n + i), values, 50 * n + i)


rounds(train)
"""
"""A training script that logs fifty values in each round."""

ADMIN, LEAD = "admin@nvidia.com", "lead@nvidia.com"
SITES = ("site-1", "site-2")
ALLOWED_CLASSES = [
    "trackhub.flare.receiver_widget.TrackhubReceiver",
    "trackhub.flare.sender_widget.TrackhubSender",
    "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor",
]
"""What a site's operator adds to the list of classes that a job without code of its own may name."""


# It runs in a process of its own, since FLARE's client raises warnings in its threads, and warnings are errors here.
ADMIN_CONSOLE = """
import json, sys
from nvflare.fuel.flare_api.flare_api import new_secure_session

user, kit = sys.argv[1:]
session = new_secure_session(user, kit, timeout=60.0)

def do(what, arg):
    if what == "clients":
        return [client.name for client in session.get_system_info().client_info]
    if what == "submit":
        return session.submit_job(arg)
    if what == "abort":
        return session.abort_job(arg)
    if what == "status":
        return session.get_job_status(arg)
    session.monitor_job(arg, timeout=180, poll_interval=0.5)
    return [session.get_job_meta(arg)["status"], session.download_job_result(arg)]


for line in sys.stdin:
    try:
        answer = {"done": do(*json.loads(line))}
    except Exception as e:
        answer = {"failed": f"{type(e).__name__}: {e}"}
    print("@@" + json.dumps(answer), flush=True)
"""


class Console:
    """A session of a user of the federation, to whom the startup kit belongs."""

    def __init__(self, kit: Path, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", ADMIN_CONSOLE, kit.name, str(kit)], env=env, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=kit,
        )  # fmt: skip

    def ask(self, what: str, arg: str = "") -> Any:
        """Do one thing, and return FLARE's answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, arg]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@@"):
                answer = json.loads(line[2:])
                assert "done" in answer, answer
                return answer["done"]
        raise AssertionError(f"the console ended before it answered {what!r}")

    def close(self) -> None:
        """End the session."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class Poc:
    """A running federation. The user ``lead`` may submit jobs, and they may bring no code (no right ``byoc``)."""

    workspace: Path
    out: Path
    console: Console
    lead: Console
    wandb: Emulator

    @property
    def kits(self) -> Path:
        """The folder with the startup kit of each service and each user."""
        return self.workspace / "example_project" / "prod_00"

    def run(self, job: Path, *, meanwhile: Callable[[str], None] = lambda job_id: None) -> PocResult:
        """Submit a job, wait for its end, and fetch its result."""
        job_id = self.console.ask("submit", str(job))
        meanwhile(job_id)
        return self.result(job_id)

    def result(self, job_id: str, console: Console | None = None) -> PocResult:
        """Wait for the end of a job that was submitted, and fetch its result."""
        status, download = (console or self.console).ask("wait", job_id)
        return PocResult(job_id, status, Path(download) / "workspace", self.kits, self.out)


@dataclass(frozen=True)
class PocResult:
    """What a job left."""

    job: str
    status: str
    server: Path
    startup: Path
    out: Path

    def facts(self, site: str) -> list[list[Any]]:
        """Return what the trainer of this site noted."""
        return [json.loads(line) for line in (self.out / self.job / f"{site}.facts").read_text().splitlines()]

    def client(self, site: str) -> Path:
        """Return the job's run folder at a client, where it stays."""
        return self.startup / site / self.job

    def records(self, run_dir: Path, site: str) -> list[dict[str, Any]]:
        """Return the records in a site's ``jsonl`` file, and the line that ends the run."""
        return read_jsonl(run_dir / "jsonl" / self.job_folder / f"{site}.jsonl")

    @property
    def job_folder(self) -> str:
        """The name of the job's folder in a backend that has such folders: the job's name, and the start of its id."""
        return f"job-{self.job[:8]}"


@pytest.fixture(scope="module")
def wandb() -> Iterator[Emulator]:
    """The W&B server that the environment of the services names, with the key that they have."""
    with Emulator(secrets.token_hex(20)) as server:
        yield server


@pytest.fixture(scope="module")
def poc(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wandb: Emulator) -> Iterator[Poc]:
    """The federation. A module's ``ENVIRONMENT`` has further variables of all services; None removes one."""
    root = tmp_path_factory.mktemp("poc")
    (root / "home").mkdir()
    out = root / "out"
    env = flare_environment() | {
        "HOME": str(root / "home"),
        "NVFLARE_POC_WORKSPACE": str(root / "ws"),
        "TRACKHUB_TEST_OUT": str(out / "{job}"),
        "WANDB_API_KEY": wandb.state.api_key,
        "WANDB_BASE_URL": wandb.url,
    }
    changed = {**env, **getattr(request.module, "ENVIRONMENT", {})}
    env = {name: value for name, value in changed.items() if value is not None}

    def poc(*args: str) -> None:
        done = subprocess.run(["nvflare", "poc", *args], env=env, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    poc("prepare", "-n", str(len(SITES)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    project = root / "project.yml"
    project.write_text((root / "ws" / "project.yml").read_text().replace("8002", str(port)))
    poc("prepare", "-i", str(project), "--force")
    kits = root / "ws" / "example_project" / "prod_00"
    for name in ("server", *SITES):
        _configure(kits / name / "local", root / "storage")
    services = [_start(kits / "server", root / "server.log", env)]
    try:
        # A client that asks a server that is still starting fails its login, and ends.
        wait_until(lambda: "Server started" in (root / "server.log").read_text(errors="replace"), 60)
        services += [_start(kits / site, root / f"{site}.log", env) for site in SITES]
        console, lead = Console(kits / ADMIN, env), Console(kits / LEAD, env)
        try:
            wait_until(lambda: len(console.ask("clients")) == len(SITES), 60)
            yield Poc(root / "ws", out, console, lead, wandb)
        finally:
            console.close()
            lead.close()
    finally:
        for service in services:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(service.pid, signal.SIGKILL)
            service.wait()


def _configure(local: Path, storage: Path) -> None:
    """Do what a site's operator does once, and give the server a job store of its own.

    The operator allows trackhub's components in jobs that bring no code. By default all federations on a machine share
    one job store. Federations that run at once would take each other's jobs, and fail them.
    """
    default = (local / "resources.json.default").read_text()
    resources = json.loads(default.replace("/tmp/nvflare", str(storage)))
    resources["class_allow_list"] += ALLOWED_CLASSES
    (local / "resources.json").write_text(json.dumps(resources))
    authorization = json.loads((local / "authorization.json.default").read_text())
    authorization["permissions"]["lead"]["byoc"] = "none"
    (local / "authorization.json").write_text(json.dumps(authorization))


def _start(kit: Path, log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            [kit / "startup" / "sub_start.sh", "--once"], env=env, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def wait_until(true: Callable[[], bool], timeout_s: float) -> None:
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.2)):
        if true():
            return
        pause.wait(0.2)
    raise AssertionError(f"it did not happen within {timeout_s} s")


def points(result: PocResult, run_dir: Path, site: str) -> list[tuple[str, int | None, float]]:
    """Return the metrics of a site in its ``jsonl`` file, without forged ones: key, step and value."""
    return [
        (key, record["step"], value)
        for record in result.records(run_dir, site)
        if record["kind"] == "metrics"
        for key, value in record["values"].items()
        if not key.startswith("forged/")
    ]


@pytest.fixture
def operator_file(poc: Poc) -> Iterator[Callable[[str, str], None]]:
    """Write an operator's file: give it the service's name and the text. A job that starts later reads it."""
    written = []

    def write(service: str, text: str) -> None:
        path = poc.workspace / "example_project" / "prod_00" / service / "local" / "trackhub.toml"
        path.write_text(text)
        written.append(path)

    yield write
    for path in written:
        path.unlink(missing_ok=True)


def assert_nowhere(secret: str, poc: Poc, result: PocResult) -> None:
    """The secret is in no file of the federation, and in no file of the result."""
    assert [path for folder in (poc.workspace, result.server) for path in files_with(folder, secret.encode())] == []
