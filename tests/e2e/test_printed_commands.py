# SPDX-License-Identifier: Apache-2.0
"""Every command that says how to look at a job shows its curves, as it is printed: also from a copy or a download."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.printed_commands import Curve, Shell, openings
from tests.e2e.stores import BACKENDS, own_home
from tests.integration.harness import Job
from tests.integration.poc import Poc, poc, wandb
from tests.support.wandb_emulator import Emulator
from trackhub.runnable_commands import runnable

__all__ = ["poc", "wandb"]  # the fixtures that the tests below ask for

pytestmark = pytest.mark.long

SITES = ("site-1", "site-2")
TRAINER = """
from trackhub import Writer

writer = Writer()


def train(n):
    for i in range(20):
        values = {"train/loss": 1 / (20 * n + i + 1)}
        fact(lambda: writer.log(values, 20 * n + i), values, 20 * n + i)
    writer.log({"late": 1.0}, 5)  # in the second round below the last step


rounds(train)
"""
LOGGED: list[Any] = [(step, pytest.approx(1 / (step + 1), rel=1e-6)) for step in range(40)]


@pytest.fixture
def shell(tmp_path: Path, wandb: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    own_home(tmp_path / "home", monkeypatch)
    yield Shell(tmp_path / "somewhere else", wandb)
    assert wandb.violations == []


def check_all_shown(shell: Shell, screen: str, *, alone: bool) -> None:
    """Run each command on a screen. Each backend shows all sites; ``alone``: in a store for each site."""
    said = openings(screen)
    shown: dict[str, dict[str, Curve]] = {}
    for backend, opening in said:
        if opening.startswith("http://127.0.0.1:5000/"):
            continue  # the page that MLflow's command serves; test_mlflow_page.py opens it in a browser
        curves = shell.curves(backend, opening, "train/loss")
        assert curves, (backend, opening)
        for site, curve in curves.items():
            if site in SITES:
                assert curve == LOGGED, (backend, opening, site)
                shown.setdefault(backend, {})[site] = curve
    expected = {*BACKENDS, *(["all together"] if alone else [])}
    assert {backend: set(sites) for backend, sites in shown.items()} == {name: set(SITES) for name in expected}


def test_what_the_log_of_a_job_prints_at_its_end_shows_the_curves(shell: Shell, tmp_path: Path) -> None:
    shell.activate()

    result = Job(tmp_path / "job", TRAINER, {"server": BACKENDS, "federation": False}).run()

    assert result.rc == 0, result.log[-3000:]
    check_all_shown(shell, result.log, alone=False)


def test_what_a_copy_of_a_job_of_clients_only_prints_shows_the_curves(shell: Shell, tmp_path: Path) -> None:
    result = Job(tmp_path / "job", TRAINER, {"clients": BACKENDS}).run()
    assert result.rc == 0, result.log[-3000:]
    copy = Path(shutil.copytree(result.workspace, tmp_path / "a copy"))
    shutil.rmtree(tmp_path / "job")

    check_all_shown(shell, shell.run(f"{runnable('trackhub')} status {shlex.quote(str(copy))}"), alone=True)


def test_what_a_downloaded_job_prints_shows_the_curves(poc: Poc, shell: Shell, tmp_path: Path) -> None:
    result = poc.run(Job(tmp_path / "job", TRAINER, {"server": BACKENDS, "federation": False}).export())

    assert result.status == "FINISHED:COMPLETED"
    check_all_shown(shell, shell.run(f"{runnable('trackhub')} status {shlex.quote(str(result.server))}"), alone=False)
