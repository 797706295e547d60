# SPDX-License-Identifier: Apache-2.0
"""Secrets are planted wherever a backend looks for them. After a whole job they are nowhere else.

Each secret is another one, so that a failure says which. The servers answer every request that they refuse with the
headers of the request, as some proxies do.
"""

from __future__ import annotations

import base64
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

from tests.e2e.stores import own_home
from tests.integration.harness import Job, JobResult, processes_with
from tests.support.wandb_emulator import Emulator

TRAINER = """
from trackhub import Writer

writer = Writer()
rounds(lambda n: fact(lambda: writer.log({"loss": 1.0}, n), {"loss": 1.0}, n))
"""


class _Echo(BaseHTTPRequestHandler):
    """Refuses everything, and shows what it was sent."""

    def do_GET(self) -> None:
        shown = "; ".join(f"{name}: {value}" for name, value in self.headers.items())
        body = f'{{"error_code": "UNAUTHENTICATED", "message": "not welcome: {shown}"}}'.encode()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@dataclass
class Planted:
    """The planted secrets, and the arguments of all processes that had them in their environment."""

    home: Path
    monkeypatch: pytest.MonkeyPatch
    values: dict[str, str] = field(default_factory=dict)
    arguments: set[str] = field(default_factory=set)

    def secret(self, where: str) -> str:
        return self.values.setdefault(where, secrets.token_hex(20))

    def in_environment(self, variable: str, value: str | None = None) -> None:
        self.values[variable] = value or secrets.token_hex(20)
        self.monkeypatch.setenv(variable, self.values[variable])

    def run(self, job: Job) -> JobResult:
        done = threading.Event()

        def watch() -> None:
            mark = f"TRACKHUB_TEST_OUT={job.folder}/".encode()
            while not done.wait(0.2):
                for pid in processes_with(mark):
                    try:
                        self.arguments.add(Path(f"/proc/{pid}/cmdline").read_text(errors="replace"))
                    except OSError:
                        continue  # it has ended

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            return job.run()
        finally:
            done.set()
            watcher.join()

    def assert_nowhere(self, folder: Path, result: JobResult) -> None:
        """Look in every file below this folder and its name, in the output and in the arguments of all processes."""
        places = {str(path.relative_to(folder)): path for path in folder.rglob("*") if self.home not in path.parents}
        assert any(name.endswith("delivery.json") for name in places) or result.rc != 0
        assert self.arguments
        for where, secret in self.values.items():
            logins = (secret, f"api:{secret}", f"me:{secret}")
            forms = [secret.encode(), *(base64.b64encode(login.encode()) for login in logins)]
            for name, path in places.items():
                assert secret not in name, where
                if path.is_file() and not path.is_symlink():
                    content = path.read_bytes()
                    assert not any(form in content for form in forms), f"the secret of {where} is in {name}"
            for form in forms:
                assert form.decode() not in result.log, f"the secret of {where} was printed"
                assert not any(form.decode() in args for args in self.arguments), f"{where}: in a process's arguments"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    own_home(tmp_path / "home", monkeypatch)
    return Planted(tmp_path / "home", monkeypatch)


def test_after_a_job_that_delivered_no_secret_is_anywhere(tmp_path: Path, planted: Planted) -> None:
    with Emulator(planted.secret("a file")) as server:
        (planted.home / "key").write_text(planted.secret("a file") + "\n")
        for variable in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "UNRELATED_TOKEN"):
            planted.in_environment(variable)
        wandb = {"mode": "online", "base_url": server.url, "api_key": f"${{secret:file:{planted.home / 'key'}}}"}
        backends = {"wandb": wandb, "mlflow": {}, "tensorboard": {}, "jsonl": {}}
        tracking = {"server": backends, "clients": {"jsonl": {}}, "limits": {"deadline_s": 120, "sites_s": 120}}

        result = planted.run(Job(tmp_path / "job", TRAINER, tracking))

    assert result.rc == 0, result.log[-4000:]
    runs = result.report("server")["lanes"]
    assert all(run["confirmed"] and not run["pending"] for sites in runs.values() for run in sites.values())
    planted.assert_nowhere(tmp_path, result)


@pytest.mark.parametrize(
    ("backend", "source", "way"),
    [
        ("wandb", "environment", "json"),
        ("mlflow", "environment", "json"),
        pytest.param("wandb", "home", "json", marks=pytest.mark.long),
        pytest.param("mlflow", "home", "json", marks=pytest.mark.long),
        pytest.param("wandb", "option", "json", marks=pytest.mark.long),
        pytest.param("wandb", "option", "recipe", marks=pytest.mark.long),
        pytest.param("mlflow", "environment", "recipe", marks=pytest.mark.long),
    ],
)
def test_a_login_that_fails_shows_no_secret(
    tmp_path: Path, planted: Planted, echo: str, backend: str, source: str, way: Literal["recipe", "json"]
) -> None:
    """A job in files fails at the server. The script of a recipe fails before it starts FLARE."""
    options: dict[str, dict[str, object]] = {
        "wandb": {"mode": "online", "base_url": echo},
        "mlflow": {"tracking_uri": echo},
    }
    host = echo.removeprefix("http://")
    if source == "environment":
        planted.in_environment("WANDB_API_KEY")
        planted.in_environment("MLFLOW_TRACKING_TOKEN")
    elif source == "home":
        netrc = f"machine {host}\n  login user\n  password {planted.secret('netrc')}\n"
        (planted.home / "netrc").write_text(netrc)
        (planted.home / ".mlflow").mkdir()
        password = planted.secret("the file of MLflow")
        (planted.home / ".mlflow" / "credentials").write_text(
            f"[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = {password}\n"
        )
    else:
        planted.in_environment("KEY_OF_THE_SITE")
        options["wandb"]["api_key"] = "${secret:KEY_OF_THE_SITE}"

    result = planted.run(Job(tmp_path / "job", TRAINER, {"server": {backend: options[backend]}}, way=way))

    assert "not welcome" in result.log or "rejects the login" in result.log, result.log[-4000:]
    assert not any(path.read_text() for path in (tmp_path / "job").rglob("*.facts"))
    planted.assert_nowhere(tmp_path, result)
