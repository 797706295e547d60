# SPDX-License-Identifier: Apache-2.0
"""A receiver says how to look at a job: once its first runs are open, and at its end."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import trackhub
from tests.unit.readers_and_bad_backends import WAIT_S
from trackhub.delivery.lane.where_to_look_notice import OpeningNotice
from trackhub.delivery.replay_journal_or_spool import replay_journal
from trackhub.delivery.report import DeliveryReport, RunReport
from trackhub.delivery.report_text import format_report
from trackhub.limits import Limits
from trackhub.runnable_commands import command_for
from trackhub.spi import Results


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "trackhub")
    return caplog


def running() -> bool:
    return True


def test_a_command_that_opens_all_sites_is_said_once(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    notice = OpeningNotice("acme", tmp_path, running)

    for site in range(5):
        notice.note(site, Results(path=f"acme/site-{site}", command="acme-show all"))

    assert said.messages == [f"look at this job in acme, while it runs:\n  cd {tmp_path} && acme-show all"]


def test_a_thousand_runs_of_their_own_get_four_lines(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    notice = OpeningNotice("wandb", tmp_path, running)

    for site in range(1000):
        notice.note(site, Results(url=f"https://wandb.ai/team/project/runs/{site}"))

    assert [message.split("\n  ")[1] for message in said.messages] == [
        "https://wandb.ai/team/project/runs/0",
        "https://wandb.ai/team/project/runs/1",
        "https://wandb.ai/team/project/runs/2",
        f"`{command_for('trackhub status', tmp_path)}` names the other runs",
    ]


def test_a_run_that_is_not_open_or_shows_nothing_is_passed_over(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    notice = OpeningNotice("acme", tmp_path, running)

    notice.note(1, None)
    notice.note(1, Results())

    assert said.messages == []


SCRIPT = """
import sys, trackhub

with trackhub.local(["jsonl"], folder=sys.argv[1], quiet="quiet" in sys.argv) as writer:
    writer.log({"loss": 1.0})
    sys.stdin.readline()
"""


def start_script(*arguments: str) -> subprocess.Popen[str]:
    """Start a script that logs once, and then trains until it reads a line. It sets up no logging."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_running_script_says_on_stderr_how_to_look_at_it(tmp_path: Path) -> None:
    with start_script(str(tmp_path)) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        too_late = threading.Timer(WAIT_S, process.kill)
        too_late.start()
        said = [process.stderr.readline(), process.stderr.readline()]
        process.stdin.write("end\n")
        process.stdin.flush()
        rest = process.stderr.read()
        too_late.cancel()

    assert said[0] == "trackhub: look at this job in jsonl, while it runs:\n"
    assert Path(said[1].strip()).is_file()
    assert rest.startswith("trackhub: the run has ended as finished\n")
    assert "look at this job" not in rest


def test_a_quiet_script_says_nothing_on_stderr(tmp_path: Path) -> None:
    with start_script(str(tmp_path), "quiet") as process:
        _, said = process.communicate("end\n", WAIT_S)

    assert (process.returncode, said) == (0, "")


def test_a_run_that_ends_at_once_says_only_at_its_end_how_to_look_at_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent_at_the_end = Limits(linger_s=30)
    with trackhub.local(["jsonl"], folder=tmp_path, limits=sent_at_the_end) as writer:
        writer.log({"loss": 1.0})

    said = capsys.readouterr().err
    assert said.startswith("trackhub: the run has ended as finished\n")
    assert "look at this job" not in said
    assert "Open the results" in said


def test_a_replay_calls_no_job_a_running_one(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with trackhub.local(["jsonl"], folder=tmp_path, quiet=True) as writer:
        writer.log({"loss": 1.0})
    said.clear()

    replay_journal(writer.folder / "trackhub" / "trackhub.db", from_start=True)

    assert any("trackhub delivery report" in text for text in said.messages)
    assert not any("while it runs" in text for text in said.messages)


class Noticed(logging.Handler):
    """Waits for the notice in the log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("look at this job"):
            self.came.set()


def test_a_quiet_run_says_in_the_log_how_to_look_at_it(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    noticed = Noticed()
    logging.getLogger("trackhub").addHandler(noticed)
    try:
        with trackhub.local(backends=["jsonl"], folder=tmp_path, quiet=True) as writer:
            writer.log({"loss": 1.0})
            assert noticed.came.wait(WAIT_S)
    finally:
        logging.getLogger("trackhub").removeHandler(noticed)

    (opened,) = [text for text in said.messages if text.startswith("look at this job in jsonl, while it runs")]
    (ended,) = [text for text in said.messages if text.startswith("trackhub delivery report")]
    assert said.messages.index(opened) < said.messages.index(ended)
    assert Path(opened.split("\n  ")[1]).is_file()


def report(results: Results, run_dir: Path) -> DeliveryReport:
    lanes = {"acme": {"site-1": RunReport(results=results.resolved(run_dir))}}
    return DeliveryReport(
        job="j1", side="server", status="finished", balanced=True, sites={}, lanes=lanes, run_dir=str(run_dir)
    )


def test_a_folder_that_moves_at_the_end_is_not_named_as_the_place_to_look(tmp_path: Path) -> None:
    for url in (None, "http://127.0.0.1:5000/"):
        results = Results(url, path="acme/site-1", command="acme .")
        inside = format_report(report(results, tmp_path), "It moves to the store")

        assert inside.endswith("Open the results\n  It moves to the store")


@pytest.mark.parametrize("results", [Results(path="/srv/curves/site-1"), Results(path="here", url="https://acme/1")])
def test_results_elsewhere_are_named_also_if_the_folder_moves(tmp_path: Path, results: Results) -> None:
    elsewhere = format_report(report(results, tmp_path), "It moves to the store")

    assert "It moves to the store" not in elsewhere
    assert elsewhere.endswith(f"Open the results\n  acme: {results.url or results.path}")
