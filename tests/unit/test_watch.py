# SPDX-License-Identifier: Apache-2.0
"""A running job can be watched: its round, its sites, and what became of their records."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

import trackhub
from tests.unit.readers_and_bad_backends import batch_of, metric
from trackhub.delivery import Receiver, Sender, Side, SpoolInfo, create_spool
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.wire import KeepAlive, SiteCounts
from trackhub.job_and_run_info import RunStatus
from trackhub.watch.job_follower import JobFollower
from trackhub.watch.job_state import JobState, LaneState, SiteState
from trackhub.watch.panel import job_line, job_panel
from trackhub.watch.show_until_end import follow
from trackhub.writer.writer import Writer


def drawn(state: JobState, width: int = 160, *, styles: bool = False) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(job_panel(state, 83.0))
    return console.export_text(styles=styles)


def watch(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trackhub.cli", "watch", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_running_job_is_seen_with_its_newest_metrics_and_its_counts(tmp_path: Path) -> None:
    receiver = Receiver(tmp_path / "run", job="job-1", side=Side.SERVER, backends={"jsonl": {}})
    receiver.start()
    create_spool(tmp_path / "spool", SpoolInfo("site-1", "job-1", ("server",)))
    sender = Sender(tmp_path / "spool", receiver.channel("site-1"), cursor="server")
    sender.start()
    sender.set_round(2)
    with Writer(tmp_path / "spool") as writer:
        for step in range(100):
            writer.log({"train/loss": 1.0 / (step + 1)}, step=step)
    sender.close(20)

    follower = JobFollower(tmp_path)
    running = follower.look()
    receiver.finish(RunStatus.FINISHED)
    ended = follower.look()

    site = running.sites["site-1"]
    assert (running.status, running.name, ended.status) == ("running", "job-1", "finished")
    assert (site.round, site.step, site.values, site.logged) == (2, 99, {"train/loss": 0.01}, 100)
    assert ended.sites["site-1"].lanes["jsonl"] == LaneState(100, 0, "finished", "")


def test_metrics_that_came_in_since_the_last_look_are_seen_at_the_next(tmp_path: Path) -> None:
    follower = JobFollower(tmp_path)
    with trackhub.local(backends=["jsonl"], folder=tmp_path) as writer:
        writer.log({"loss": 1.0, "acc": 0.5}, step=1)
        assert writer.flush(20)
        first = follower.look().sites["local"].values.copy()
        writer.log({"loss": 0.5}, step=2)
        assert writer.flush(20)
        second = follower.look().sites["local"]

    assert first == {"loss": 1.0, "acc": 0.5}
    assert (second.values, second.step) == ({"acc": 0.5, "loss": 0.5}, 2)


def test_the_step_is_that_of_training_whatever_else_was_logged_last(tmp_path: Path) -> None:
    follower = JobFollower(tmp_path)
    with trackhub.local(backends=["jsonl"], folder=tmp_path) as writer:
        writer.log({"train/loss": 1.0}, step=70)
        writer.log({"val/loss": 1.0}, step=2)
        writer.log({"system/cpu": 9.0})
        assert writer.flush(20)

        assert follower.look().sites["local"].step == 70


def test_what_has_arrived_was_logged_whatever_the_site_said_before(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "trackhub.db", job="job-1", side="server")
    site = journal.add_site("site-1", 0.0)
    journal.note_counts(site, KeepAlive(SiteCounts(logged=1, spooled=1), "s", 0))
    journal.append(site, batch_of([metric(0), metric(1)]), {})

    seen = JobFollower(tmp_path).look().sites["site-1"]
    journal.close()

    assert seen.logged == 2


@pytest.mark.parametrize(("name", "more"), [("not there", ", and there is no such folder"), (".", "")])
def test_before_a_job_begins_it_is_said_that_no_receiver_has_begun(tmp_path: Path, name: str, more: str) -> None:
    state = JobFollower(tmp_path / name).look()

    line = f"no receiver has begun in {tmp_path / name} yet{more}"
    assert (state.status, state.sites, job_line(state)) == ("running", {}, line)
    assert [text.split() for text in drawn(state, 300).splitlines()] == [
        ["waiting", "for", "the", "first", "record", "1:23"],
        line.split(),
    ]


def test_a_damaged_journal_is_a_line_and_hides_no_other(tmp_path: Path) -> None:
    with trackhub.local(backends=["jsonl"], folder=tmp_path, job="good") as writer:
        writer.log({"loss": 1.0})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "trackhub.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000)

    state = JobFollower(tmp_path).look()

    assert "trackhub.db" in state.problem
    assert state.sites["local"].lanes["jsonl"].confirmed == 1


def test_what_is_not_delivered_and_why_a_backend_waits_is_shown() -> None:
    lane = LaneState(10, 990, "open", "connection refused\nTraceback")
    site = SiteState("site-1", 3, 42, {"val/acc": 0.5}, 1003, {"spool_full": 3}, {"mlflow": lane})
    state = JobState("cifar10", sites={"site-1": site})

    table, line = drawn(state), job_line(state)

    assert re.search(r"site-1 +3 +42 +0\.5 +1,003 +10 \+990 pending +3 spool_full", table)
    assert "mlflow: connection refused\n" in table
    assert line == (
        "cifar10: running; round 3; val/acc: site-1 0.5; mlflow: 10 confirmed, 990 pending; NOT DELIVERED: 3 spool_full"
    )


def test_what_is_not_delivered_is_red_and_nothing_else_is() -> None:
    red = re.compile(r"\x1b\[1;31m *([^\x1b]*?) *\x1b")
    lanes = {"jsonl": LaneState(5, 0, "open", ""), "mlflow": LaneState(7, 0, "stopped", "")}
    bad = SiteState("bad", 1, 1, {"loss": 1.0}, 15, {"spool_full": 3}, lanes)
    good = SiteState("good", 1, 1, {"loss": 1.0}, 15, {}, {"jsonl": lanes["jsonl"]})

    assert red.findall(drawn(JobState("job", sites={"bad": bad, "good": good}), styles=True)) == ["7", "3 spool_full"]


def test_a_run_that_could_not_be_ended_is_shown_with_the_reason() -> None:
    lane = LaneState(5, 0, "unfinished", "RuntimeError: cannot end the run")

    assert "mlflow: RuntimeError: cannot end" in drawn(
        JobState("job", sites={"a": SiteState("a", lanes={"mlflow": lane})})
    )


def test_of_many_sites_those_that_need_a_look_are_shown() -> None:
    sites = {
        f"site-{i:04}": SiteState(f"site-{i:04}", lanes={"jsonl": LaneState(1, 0, "open", "")}) for i in range(500)
    }
    sites["site-0321"].dropped = {"damaged": 1}

    table = drawn(JobState("big", sites=sites))

    assert "site-0321" in table
    assert "and 485 more" in table


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (100, {"step", "train/loss", "val/acc", "logged", "jsonl"}),
        (60, {"train/loss", "jsonl"}),
        (45, {"jsonl"}),
        (34, set()),
    ],
)
def test_a_narrow_terminal_shows_fewer_columns_and_cuts_no_number(width: int, shown: set[str]) -> None:
    lanes = {"jsonl": LaneState(123_456, 0, "open", "")}
    values = {"train/loss": 0.12345, "val/acc": 0.5}
    state = JobState("a job", sites={"site-1": SiteState("site-1", 3, 42_000, values, 654_321, {}, lanes)})

    table = drawn(state, width)

    assert "…" not in table
    assert {name for name in ("step", "val/acc", "train/loss", "logged", "jsonl") if name in table} == shown
    assert ("123,456" in table) == ("jsonl" in shown)
    assert max(map(len, table.splitlines())) <= width


@pytest.mark.parametrize("markup", ["[bold red]", "[/]", "[link=http://evil]x[/link]", "[/x]"])
def test_names_and_keys_of_a_hostile_site_are_inert(markup: str) -> None:
    evil = f"\x1b]0;pwned\x07{markup}\u202e"
    site = SiteState(evil, values={evil: 1.0}, lanes={evil: LaneState(0, 1, "open", evil)})
    state = JobState(evil, sites={evil: site}, problem=evil)

    for text in (drawn(state), job_line(state)):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        assert markup in text


def test_one_metric_of_each_sort_is_shown_before_a_second_loss() -> None:
    values = dict.fromkeys(["train/loss", "train/epoch_loss", "val/loss", "val/accuracy", "system/cpu"], 1.0)

    line = job_line(JobState("job", sites={"a": SiteState("a", values=values)}))

    assert re.findall(r"(\S+): a 1", line) == ["val/loss", "val/accuracy", "train/loss"]


def test_the_command_ends_with_the_job_and_says_where_to_look(tmp_path: Path) -> None:
    with trackhub.local(backends=["jsonl"], folder=tmp_path) as writer:
        writer.log({"loss": 1.0})

    done = watch(tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert "finished; loss: local 1; jsonl: 1 confirmed, 0 pending" in done.stdout
    assert "Open the results" in done.stdout


def test_a_show_can_be_stopped_while_the_job_runs(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with open(tmp_path / "out", "w", encoding="utf-8") as file:
        state = follow(JobFollower(tmp_path), stop, file=file)

    assert state.status == "running"
