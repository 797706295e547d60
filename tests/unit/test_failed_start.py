# SPDX-License-Identifier: Apache-2.0
"""A replay or a resumed run whose start fails changes nothing of the job: neither its status nor what replays it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import trackhub
from tests.conftest import MakePlugin
from tests.unit.local_runs import FAST, open_local
from trackhub.cli.replay import replay
from trackhub.cli.status import status
from trackhub.delivery import Sender, SpoolInfo, create_spool
from trackhub.delivery.journal.read_only import read_journal_meta
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.errors import ConfigError, TrackhubError
from trackhub.spool.layout import close_spool

PLUGIN = """
    import os
    from trackhub.spi import Backend, BackendRun, Capabilities, ConfigError, ConfirmedBy
    class Run(BackendRun):
        def __init__(self, folder, key):
            self._folder, self._key = folder, key
        def write(self, batch):
            pass
        def finish(self, status):
            (self._folder / "ended").write_text(f"{self._key.job} {self._key.site} {status}")
    class Login(Backend):
        spi = 1
        capabilities = Capabilities(confirmed_by=ConfirmedBy.WRITE)
        def __init__(self, options, context):
            super().__init__(options, context)
            self._folder = context.workdir
        def preflight(self):
            if "NO_LOGIN" in os.environ:
                raise ConfigError("there is no login")
        def open_run(self, info):
            return Run(self._folder, info.key)
"""

KILLED = """
import os, sys, trackhub
writer = trackhub.local(["jsonl"], folder=sys.argv[1], job="j")
writer.log({"a": 1.0}, 0)
os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def login(make_plugin: MakePlugin, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Install the backend ``login``, whose check fails until this function is called."""
    make_plugin("login", {"login": "login_plugin:Login"}, {"login_plugin": PLUGIN})
    monkeypatch.setenv("NO_LOGIN", "1")
    before = threading.active_count()
    yield lambda: monkeypatch.delenv("NO_LOGIN")
    assert threading.active_count() == before


@pytest.fixture(params=["finished", "killed"])
def ended(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Make the run ``j`` of a script that logged a record and ended so."""
    if request.param == "finished":
        with open_local(tmp_path, job="j") as writer:
            writer.log({"a": 1.0}, 0)
    else:
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
    return str(request.param)


def told(run: Path) -> dict[str, Any]:
    """Return all that a run's folder tells of the job and its backends."""
    journal = run / "trackhub" / "trackhub.db"
    report = read_journal_report(journal)
    told: dict[str, Any] = {"meta": read_journal_meta(journal), "status": report.status, "lanes": report.lanes}
    files = [*run.rglob("*.json*"), run / "trackhub" / "delivery.json"]
    return told | {str(file): file.read_bytes() for file in files if file.exists()}


def replayed(run: Path, *words: str) -> Result:
    return CliRunner().invoke(replay, [str(run), *words])


def resume(run: Path, *backends: str, site: str = "local") -> None:
    open_local(run.parent, *backends, job="j", site=site, resume=True).close()


FAILED_STARTS: dict[str, Callable[[Path], object]] = {
    "replay into another backend": lambda run: replayed(run, "--backend", "login"),
    "replay from the start": lambda run: replayed(run, "--backend", "jsonl", "--backend", "login", "--from-start"),
    "resume with another backend": lambda run: resume(run, "jsonl", "login"),
    "resume with a wrong option": lambda run: trackhub.local(
        {"jsonl": {"colour": 1}}, folder=run.parent, job="j", resume=True, limits=FAST
    ),
    "resume at another site": lambda run: resume(run, "jsonl", site="typo"),
}


@pytest.mark.parametrize("how", FAILED_STARTS)
def test_a_start_that_fails_leaves_the_job_as_it_was(
    tmp_path: Path, ended: str, how: str, login: Callable[[], None]
) -> None:
    run = tmp_path / "j"
    before = told(run)
    assert before["status"] == ended

    try:
        result = FAILED_STARTS[how](run)
    except TrackhubError:
        pass
    else:
        assert isinstance(result, Result)
        assert result.exit_code == 1, result.output

    assert told(run) == before
    assert f", {ended}" in CliRunner().invoke(status, [str(run)]).output
    assert replayed(run).exit_code == 0, "the command that status advises"
    login()
    assert replayed(run, "--backend", "login").exit_code == 0
    assert (run / "login" / "ended").read_text() == f"j local {ended}"


def test_a_new_job_whose_start_fails_ends_as_failed_and_hinders_no_later_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no login"):
        open_local(tmp_path, "jsonl", "login", job="j")
    assert read_journal_report(tmp_path / "j" / "trackhub" / "trackhub.db").status == "failed"
    assert (tmp_path / "j" / "trackhub" / "delivery.json").exists()

    with open_local(tmp_path, job="j") as writer:
        writer.log({"a": 1.0}, 0)

    assert read_journal_report(tmp_path / "j" / "trackhub" / "trackhub.db").status == "finished"
    assert replayed(tmp_path / "j").exit_code == 0


def test_a_run_that_cannot_start_its_sender_keeps_its_status(
    tmp_path: Path, ended: str, monkeypatch: pytest.MonkeyPatch, login: Callable[[], None]
) -> None:
    def no_thread(sender: Sender) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Sender, "start", no_thread)
        with pytest.raises(RuntimeError, match="new thread"):
            resume(tmp_path / "j")

    assert f", {ended}" in CliRunner().invoke(status, [str(tmp_path / "j")]).output
    login()
    assert replayed(tmp_path / "j", "--backend", "login").exit_code == 0
    assert (tmp_path / "j" / "login" / "ended").read_text() == f"j local {ended}"


def test_a_replay_of_a_spool_that_fails_does_not_make_the_next_one_fail(
    tmp_path: Path, login: Callable[[], None]
) -> None:
    """On a site's machine, a replay makes a journal of its own, which must not tell a wrong end of the job."""
    spool = tmp_path / "trackhub" / "spool"
    create_spool(spool, SpoolInfo("site-1", "job-1", ("server",), name="named"))
    with trackhub.Writer(spool) as writer:
        writer.log({"a": 1.0}, 0)
    close_spool(spool)
    assert "there is no login" in replayed(tmp_path, "--backend", "login").output
    assert "--backend" in replayed(tmp_path).output, "the next one must name the backend as well"

    login()
    assert replayed(tmp_path, "--backend", "login").exit_code == 0

    assert (tmp_path / "login" / "ended").read_text() == "job-1 site-1 finished"
    (journal,) = tmp_path.rglob("trackhub.db")
    assert '"name":"named"' in read_journal_meta(journal)["job_info"]
