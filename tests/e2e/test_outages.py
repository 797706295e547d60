# SPDX-License-Identifier: Apache-2.0
"""FLARE jobs that track to a real ``mlflow server`` which is away: for a while, at the end, or for good."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stores import canonical, own_home, read_run, same_points, were_logged
from tests.integration.harness import Job, JobResult
from tests.support.mlflow_server import Server
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.replay_journal_or_spool import replay_journal
from trackhub.job_and_run_info import JobInfo, Side
from trackhub.testing import ReadBack

SITES = ("site-1", "site-2")
DOWN_S = 10.0
PATIENCE_S = 120.0
SHORT_DEADLINE_S = 3.0

# Logs all the time, some fifty calls a second, until the test lets it end.
TRAINER = """
import time
import numpy as np
from trackhub import Writer

SIGNALS = os.environ["TRACKHUB_TEST_SIGNALS"]
writer = Writer()
writer.log_params({"lr": 0.1})
writer.set_tags({"stage": "test"})
writer.log_text("note", "hello from " + SITE)
step = 0


def log(count):
    global step
    for _ in range(count):
        values = {"train/loss": 1 / (step + 3), "train/lr": 0.1}
        fact(lambda: writer.log(values, step), values, step)
        step += 1
        time.sleep(0.02)


def train(n):
    values = {"val/loss": n / 3}
    fact(lambda: writer.log(values, n), values, n)
    writer.log_image("grid", np.full((8, 8, 3), 0.25), step=n)
    log(20)
    while n == 1 and not os.path.exists(os.path.join(SIGNALS, "end")):
        log(5)
    log(20)


rounds(train)
values = {"last": 42.0}
fact(lambda: writer.log(values), values)
"""

SERVER_PARTS = """
import os, time
from nvflare.apis.event_type import EventType
from nvflare.widgets.widget import Widget


class Clock(Widget):
    '''Notes when the server's run ends; trackhub's own end comes after that of every other component.'''

    def handle_event(self, event_type, fl_ctx):
        if event_type == EventType.END_RUN:
            with open(os.path.join(os.environ["TRACKHUB_TEST_SIGNALS"], "ended"), "w") as file:
                file.write(str(time.time()))
"""

MORE = """
from server_parts import Clock
job.to_server(Clock(), id="clock")
"""


class Run:
    """A job that runs beside the test, which decides when it ends."""

    def __init__(self, folder: Path, server: Server, deadline_s: float) -> None:
        self._server = server
        self._signals = folder / "signals"
        self._signals.mkdir()
        backends = {"mlflow": {"tracking_uri": server.url, "timeout_s": 2.0}, "jsonl": {}}
        self._job = Job(
            folder / "job",
            TRAINER,
            {"server": backends, "limits": {"deadline_s": deadline_s}},
            more=MORE,
            modules={"server_parts": SERVER_PARTS},
            env={"TRACKHUB_TEST_SIGNALS": str(self._signals)},
        )
        self._pool = ThreadPoolExecutor(1)
        self._future: Future[JobResult] = self._pool.submit(self._job.run)

    def wait_for_values(self, more: int) -> None:
        """Wait until each trainer has logged so many more values."""
        wanted = [logged + more for logged in self._logged()]
        self._wait_until(lambda: all(now >= least for now, least in zip(self._logged(), wanted, strict=True)))

    def wait_for_arrivals(self) -> None:
        """Wait until the server holds something of each trainer and of the federation, and the receiver knows it."""
        count = "SELECT COUNT(DISTINCT run_uuid) FROM metrics"
        self._wait_until(lambda: self._server.database.rows(count) == [(len(SITES) + 1,)])
        self._wait_until(lambda: all(self._confirmed(site) > 0 for site in SITES))

    def _confirmed(self, site: str) -> int:
        (journal,) = (self._job.folder / "workspace").rglob("server/simulate_job/trackhub/trackhub.db")
        run = read_journal_report(journal).lanes.get("mlflow", {}).get(site)
        return run.confirmed if run else 0

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert not self._future.done(), self._future.result().log[-6000:]
            assert time.monotonic() < deadline, "the job does not get there"
            pause(0.05)

    def result(self) -> JobResult:
        """Let the trainers log some more and end, and wait for the job's end. It must not have failed."""
        (self._signals / "end").touch()
        result = self._future.result()
        assert result.rc == 0, result.log[-6000:]
        return result

    def delivery_s(self, result: JobResult) -> float:
        """Return how long the receiver took to end, after everything else on the server had ended."""
        report = result.run_dir("server") / "trackhub" / "delivery.json"
        return report.stat().st_mtime - float((self._signals / "ended").read_text())

    def close(self) -> None:
        """End the job, if a failed test left it running."""
        (self._signals / "end").touch()
        self._pool.shutdown()

    def _logged(self) -> list[int]:
        files = [self._job.folder / "out" / f"{site}.facts" for site in SITES]
        return [file.read_bytes().count(b"\n") if file.exists() else 0 for file in files]


def pause(seconds: float) -> None:
    """Let time pass."""
    threading.Event().wait(seconds)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_home(tmp_path / "home", monkeypatch)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that is not running yet."""
    folder = tmp_path / "server"
    folder.mkdir()
    made = Server(folder)
    yield made
    made.kill()


@pytest.fixture
def start_job(tmp_path: Path, server: Server) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(*, deadline_s: float = PATIENCE_S) -> Run:
        runs.append(Run(tmp_path, server, deadline_s))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def read_server(server: Server, job: JobInfo, site: str) -> ReadBack:
    """Return what the server's database and artifact folder hold of a run."""
    options = {"tracking_uri": f"sqlite:///{server.folder}/mlflow.db"}
    return read_run("mlflow", server.folder, job, site, Side.SERVER, options)


def check_everything_is_there_once(result: JobResult, server: Server) -> None:
    """The server holds each record of each site once, in one finished run per site below one of the job."""
    for site in SITES:
        logged = read_run("jsonl", result.run_dir("server"), result.job, site, Side.SERVER).points
        were_logged(result.facts(site), logged)
        found = read_server(server, result.job, site)
        same_points(found.points, canonical("mlflow", logged))
        assert found.status == "FINISHED"
        assert (found.params, found.tags) == ({"lr": "0.1"}, {"stage": "test"})
        assert [text.text for text in found.texts or ()] == [f"hello from {site}"]
        assert [image.step for image in found.images or ()] == [0, 1]
    runs = {(run.name, run.status) for run in server.database.runs()}
    assert len(server.database.runs()) == len(runs)
    names = [result.job.name, *(f"{site} · {result.job.unique_name}" for site in SITES)]
    assert runs == {(name, "FINISHED") for name in names}


def check_confirmed(report: dict[str, Any]) -> None:
    assert report["balanced"]
    for site, run in report["lanes"]["mlflow"].items():
        assert (run["state"], run["pending"], run["rejected"]) == ("finished", 0, {}), run
        assert run["confirmed"] == report["sites"][site]["journaled"]


def status_of(result: JobResult) -> dict[str, Any]:
    """Return what ``trackhub status`` says of the job's journal."""
    command = [sys.executable, "-m", "trackhub.cli", "status", "--json", str(result.workspace)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # 1 while something is not delivered
    (journal,) = json.loads(done.stdout)["journals"]
    found: dict[str, Any] = journal
    return found


def test_an_outage_that_spans_the_jobs_end_costs_the_job_at_most_the_deadline_and_a_replay_delivers_the_rest(
    server: Server, start_job: Callable[..., Run]
) -> None:
    """The server is down when the job starts, too: it comes up while the job does."""
    run = start_job(deadline_s=SHORT_DEADLINE_S)
    server.start()
    run.wait_for_arrivals()
    server.kill()
    run.wait_for_values(60)

    result = run.result()

    # A lane that hangs may take a second more, and a busy machine some.
    assert run.delivery_s(result) < SHORT_DEADLINE_S + 5
    report = result.report("server")
    said = status_of(result)
    assert report["balanced"]
    assert said["undelivered"] > 0
    for site in SITES:
        lane, journaled = report["lanes"]["mlflow"][site], report["sites"][site]["journaled"]
        assert 0 < lane["confirmed"] < journaled
        assert lane["confirmed"] + lane["pending"] == journaled
        assert lane["state"] == "unfinished"
        assert "cannot be reached" in lane["last_error"]
        assert report["lanes"]["jsonl"][site]["confirmed"] == journaled
        assert {n: said["lanes"]["mlflow"][site][n] for n in ("confirmed", "pending", "state")} == {
            n: lane[n] for n in ("confirmed", "pending", "state")
        }

    server.start()
    replayed = replay_journal(
        result.run_dir("server") / "trackhub" / "trackhub.db", timeout_s=PATIENCE_S, operator=None
    )

    assert replayed.undelivered() == 0
    assert status_of(result)["undelivered"] == 0
    check_confirmed(result.report("server"))
    check_everything_is_there_once(result, server)


@pytest.mark.long
def test_a_server_that_is_killed_in_mid_job_and_started_10_seconds_later_has_everything_once(
    server: Server, start_job: Callable[..., Run]
) -> None:
    server.start()
    run = start_job()
    run.wait_for_arrivals()
    server.kill()
    pause(DOWN_S)
    server.start()
    run.wait_for_values(20)

    result = run.result()

    check_confirmed(result.report("server"))
    check_everything_is_there_once(result, server)


@pytest.mark.long
def test_a_server_that_is_down_when_the_job_starts_and_comes_later_has_everything_once(
    server: Server, start_job: Callable[..., Run]
) -> None:
    run = start_job()
    run.wait_for_values(60)
    server.start()
    run.wait_for_values(20)

    result = run.result()

    check_confirmed(result.report("server"))
    check_everything_is_there_once(result, server)


@pytest.mark.long
def test_with_a_server_that_never_comes_the_job_ends_at_most_the_deadline_later_and_everything_is_pending(
    server: Server, start_job: Callable[..., Run]
) -> None:
    run = start_job(deadline_s=SHORT_DEADLINE_S)
    run.wait_for_values(60)

    result = run.result()

    assert run.delivery_s(result) < SHORT_DEADLINE_S + 5
    report = result.report("server")
    assert report["balanced"]
    for site in SITES:
        lane, journaled = report["lanes"]["mlflow"][site], report["sites"][site]["journaled"]
        assert (lane["confirmed"], lane["pending"], lane["state"]) == (0, journaled, "unfinished")
        assert report["lanes"]["jsonl"][site]["confirmed"] == journaled

    server.start()
    assert replay_journal(result.run_dir("server") / "trackhub" / "trackhub.db", operator=None).undelivered() == 0
    check_everything_is_there_once(result, server)
