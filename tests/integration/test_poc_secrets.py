# SPDX-License-Identifier: Apache-2.0
"""Secrets are planted in the environment and the files of a whole federation. After a job they are nowhere else."""

from __future__ import annotations

import base64
import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.harness import Job, files_with, processes_with
from tests.integration.poc import SITES, Poc, PocResult, operator_file, poc, wandb
from tests.integration.test_planted_secrets import TRAINER, echo

__all__ = ["echo", "operator_file", "poc", "wandb"]  # the fixtures that the tests below ask for

pytestmark = pytest.mark.long

ENVIRONMENT = {
    "WANDB_API_KEY": None,  # so that W&B looks into netrc
    "KEY_OF_THE_SITE": secrets.token_hex(20),
    "MLFLOW_TRACKING_TOKEN": None,
    "UNRELATED_TOKEN": secrets.token_hex(20),
}
"""What all services have in their environment."""


def plant_files(poc: Poc, host: str, wandb_key: str) -> list[str]:
    """Write the files in which W&B and MLflow look for a login. Return all planted secrets."""
    home, password = poc.workspace.parent / "home", secrets.token_hex(20)
    (home / ".netrc").write_text(f"machine {host}\n  login user\n  password {wandb_key}\n")
    (home / ".netrc").chmod(0o600)
    (home / ".mlflow").mkdir(exist_ok=True)
    login = f"mlflow_tracking_username = me\nmlflow_tracking_password = {password}\n"
    (home / ".mlflow" / "credentials").write_text(f"[mlflow]\n{login}")
    return [wandb_key, password, *filter(None, ENVIRONMENT.values())]


def run(poc: Poc, job: Path) -> tuple[PocResult, set[str]]:
    """Run a job, and return its result and the arguments of all processes of the federation meanwhile."""
    arguments: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        mark = f"NVFLARE_POC_WORKSPACE={poc.workspace}\0".encode()
        while not done.wait(0.2):
            for pid in processes_with(mark):
                try:
                    arguments.add(Path(f"/proc/{pid}/cmdline").read_text(errors="replace"))
                except OSError:
                    continue  # it has ended

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return poc.run(job), arguments
    finally:
        done.set()
        watcher.join()


def assert_only_where_planted(planted: list[str], poc: Poc, result: PocResult, arguments: set[str]) -> None:
    """No secret is in a file of the federation, the result or the services' output, nor in a process's arguments."""
    home = poc.workspace.parent / "home"
    assert arguments
    for secret in planted:
        logins = (secret, f"api:{secret}", f"user:{secret}", f"me:{secret}")
        forms = [secret.encode(), *(base64.b64encode(login.encode()) for login in logins)]
        for folder in (poc.workspace.parent, result.server):
            assert [path for path in files_with(folder, *forms) if home not in path.parents] == []
            assert not any(secret in str(path) for path in folder.rglob("*"))
        assert not any(form.decode() in text for form in forms for text in arguments)


def test_after_a_job_in_a_federation_no_secret_is_anywhere(poc: Poc, tmp_path: Path) -> None:
    planted = plant_files(poc, poc.wandb.url.removeprefix("http://"), poc.wandb.state.api_key)
    backends = {"wandb": {"mode": "online"}, "mlflow": {}, "tensorboard": {}, "jsonl": {}}
    tracking = {"server": backends, "clients": {"jsonl": {}}, "limits": {"deadline_s": 120, "sites_s": 120}}

    result, arguments = run(poc, Job(tmp_path, TRAINER, tracking).export())

    assert result.status == "FINISHED:COMPLETED"
    report = json.loads((result.server / "trackhub" / "delivery.json").read_text())
    for backend in backends:
        for site in SITES:
            stored = report["lanes"][backend][site]
            assert (stored["confirmed"], stored["pending"]) == (len(result.facts(site)), 0)
    assert_only_where_planted(planted, poc, result, arguments)


@pytest.mark.parametrize(("backend", "source"), [("wandb", "netrc"), ("wandb", "option"), ("mlflow", "credentials")])
def test_a_login_that_fails_in_a_federation_shows_no_secret(
    poc: Poc, tmp_path: Path, operator_file: Callable[[str, str], None], echo: str, backend: str, source: str
) -> None:
    """The server answers with the headers of the request. So its answer has the login."""
    planted = plant_files(poc, echo.removeprefix("http://"), secrets.token_hex(20))
    operator_file("server", f'[backends.{backend}]\nhosts = ["{echo}"]\nsecrets = ["KEY_OF_THE_SITE"]\n')
    options = {"tracking_uri": echo} if backend == "mlflow" else {"mode": "online", "base_url": echo}
    if source == "option":
        options["api_key"] = "${secret:KEY_OF_THE_SITE}"

    result, arguments = run(poc, Job(tmp_path, TRAINER, {"server": {backend: options}}).export())

    assert result.status != "FINISHED:COMPLETED"
    log = "".join(path.read_text(errors="replace") for path in result.server.rglob("log.txt"))
    assert "not welcome" in log or "rejects the login" in log, log[-4000:]
    assert_only_where_planted(planted, poc, result, arguments)
