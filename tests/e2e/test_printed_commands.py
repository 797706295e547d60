# SPDX-License-Identifier: Apache-2.0
"""Every command that says how to look at a job shows its curves, as it is printed: also from a copy or a download."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.printed_commands import Curve, Shell, openings
from tests.e2e.stores import BACKENDS, own_home
from tests.integration.harness import Job, without_own_programs
from tests.integration.poc import Poc, poc, wandb
from tests.support.wandb_emulator import Emulator

__all__ = ["poc", "wandb"]  # the fixtures that the tests below ask for

pytestmark = pytest.mark.long

SITES = ("site-1", "site-2")
STATUS = f"{shlex.quote(str(Path(sys.executable).with_name('trackhub')))} status"
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
    expected = {*BACKENDS, *(["all together"] if alone else [])}
    check_shown(shell, openings(screen), {name: set(SITES) for name in expected}, LOGGED)


def check_shown(shell: Shell, said: list[tuple[str, str]], expected: dict[str, set[str]], logged: list[Any]) -> None:
    """Run these commands. They show exactly what was logged.

    Args:
        shell: where to run them.
        said: each as the backend's name and the command or path.
        expected: backend -> the sites that it shows.
        logged: the points of each site's training loss.
    """
    shown: dict[str, dict[str, Curve]] = {}
    for backend, opening in said:
        if opening.startswith("http://127.0.0.1:5000/"):
            continue  # the page that MLflow's command serves; test_mlflow_page.py opens it in a browser
        curves = shell.curves(backend, opening, "train/loss")
        assert curves, (backend, opening)
        for site, curve in curves.items():
            if site in SITES:
                assert curve == logged, (backend, opening, site)
                shown.setdefault(backend, {})[site] = curve
    assert {backend: set(sites) for backend, sites in shown.items()} == expected


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

    check_all_shown(shell, shell.run(f"{STATUS} {shlex.quote(str(copy))}"), alone=True)


def test_what_a_downloaded_job_prints_shows_the_curves(poc: Poc, shell: Shell, tmp_path: Path) -> None:
    result = poc.run(Job(tmp_path / "job", TRAINER, {"server": BACKENDS, "federation": False}).export())

    assert result.status == "FINISHED:COMPLETED"
    check_all_shown(shell, shell.run(f"{STATUS} {shlex.quote(str(result.server))}"), alone=False)


SCRIPT = """
import sys, trackhub

backends = {"tensorboard": {}, "mlflow": {}, "wandb": {"mode": "offline"}}
with trackhub.local(backends, folder=sys.argv[1], site="site-1") as writer:
    for step in range(40):
        if step == 20:
            sys.stdin.readline()
        writer.log({"train/loss": 1 / (step + 1)}, step)
"""
NOTICE = re.compile(r"trackhub: look at this job in (\w+), while it runs:\n  (.+)\n")


def test_what_a_script_prints_while_it_runs_harms_nothing_that_it_prints_at_its_end(
    shell: Shell, tmp_path: Path
) -> None:
    """A command shows what is there by then. Those of the end show all, though those of the start ran before them."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "my runs")], env=without_own_programs(os.environ),
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stderr is not None
        too_late = threading.Timer(120, process.kill)
        too_late.start()
        said = ""
        while {backend for backend, _ in NOTICE.findall(said)} != {"tensorboard", "mlflow", "wandb"}:
            line = process.stderr.readline()
            assert line, said
            said += line
        too_late.cancel()
        at_start = [found for found in NOTICE.findall(said) if not found[1].startswith("http")]
        one_site = {"tensorboard": {"site-1"}, "mlflow": {"site-1"}}  # what `wandb leet` draws has no numbers to read
        check_shown(shell, at_start, one_site, LOGGED[:20])
        process.stdin.write("\n")
        process.stdin.flush()
        rest = process.stderr.read()

    assert process.returncode == 0, rest
    check_shown(shell, openings(rest), {**one_site, "wandb": {"site-1"}}, LOGGED)
