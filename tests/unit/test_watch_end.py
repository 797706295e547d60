# SPDX-License-Identifier: Apache-2.0
"""What is watched is one job, until its receivers deliver nothing any more."""

from __future__ import annotations

import errno
import io
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import trackhub
from tests.unit.readers_and_bad_backends import WAIT_S, batch_of, metric
from trackhub.delivery import Receiver, Side, wire
from trackhub.delivery.journal.journal import JOURNAL_NAME, Journal
from trackhub.job_and_run_info import JobInfo, RunStatus
from trackhub.watch.job_follower import JobFollower
from trackhub.watch.job_state import JobState
from trackhub.watch.panel import job_notes
from trackhub.watch.show_until_end import follow


class Pauses(threading.Event):
    """Takes the place of the event that ends a show: in each pause between two looks, the next step is done."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        super().__init__()
        self._steps = iter(steps)

    def wait(self, timeout: float | None = None) -> bool:
        next(self._steps)()
        return False


def receiver_of(folder: Path, job: str = "job-1", side: Side = Side.SERVER) -> Receiver:
    receiver = Receiver(folder, job=JobInfo(job), side=side, backends={"jsonl": {}})
    receiver.start()
    return receiver


def send(receiver: Receiver, first: int, end: int, site: str = "site-1") -> None:
    batch = wire.encode(batch_of([metric(seq) for seq in range(first, end)]))
    assert wire.decode_reply(receiver.handle(site, batch)) == wire.Accepted()


def state_when(follower: JobFollower, holds: Callable[[JobState], bool]) -> JobState:
    deadline = time.monotonic() + WAIT_S
    while not holds(state := follower.look()):
        assert time.monotonic() < deadline
    return state


def confirmed(state: JobState) -> int:
    return sum(lane.confirmed for site in state.sites.values() for lane in site.lanes.values())


def run_of(folder: Path, name: str, loss: float, **extra: object) -> None:
    with trackhub.local(backends=["jsonl"], folder=folder, name=name) as writer:
        writer.log({"loss": loss, **extra}, step=1)


def test_a_job_is_finishing_until_its_receiver_delivers_nothing_any_more(tmp_path: Path) -> None:
    receiver, shown = receiver_of(tmp_path), io.StringIO()
    send(receiver, 0, 10)
    state_when(JobFollower(tmp_path), lambda state: confirmed(state) == 10)

    def end() -> None:
        send(receiver, 10, 20)
        receiver.finish(RunStatus.FINISHED)

    state = follow(JobFollower(tmp_path), Pauses(lambda: receiver.note_status(RunStatus.FINISHED), end), file=shown)

    found = [line.split(" ", 1)[1] for line in shown.getvalue().splitlines() if " job-1: " in line]
    assert [line.split(";")[0] for line in found] == ["job-1: running", "job-1: finishing", "job-1: finished"]
    assert "jsonl: 10 confirmed, 0 pending" in found[1]
    assert confirmed(state) == 20


def test_a_receiver_that_was_killed_while_it_finished_has_ended(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / JOURNAL_NAME, job="job-1", side="server")
    journal.set_facts({"status": "failed"})
    follower = JobFollower(tmp_path)
    before = follower.look().status
    journal.close()

    assert (before, follower.look().status) == ("finishing", "failed")


def test_without_locks_a_job_has_ended_when_its_report_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    journal = Journal.open(tmp_path / JOURNAL_NAME, job="job-1", side="server")
    journal.set_facts({"status": "finished"})
    before = JobFollower(tmp_path).look().status
    (tmp_path / "delivery.json").write_text("{}")

    after = JobFollower(tmp_path).look().status
    journal.close()

    assert (before, after) == ("finishing", "finished")


KILLED = """
import os, sys
from pathlib import Path
from trackhub.delivery.journal.journal import Journal
Journal.open(Path(sys.argv[1]), job="job-1", side="server").add_site("late", 0.0)
os._exit(9)
"""


def test_what_a_killed_replay_left_in_the_journals_log_is_seen(tmp_path: Path) -> None:
    receiver_of(tmp_path).finish(RunStatus.FAILED)
    follower = JobFollower(tmp_path)
    before = follower.look()
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "trackhub" / JOURNAL_NAME)], check=False)
    after = follower.look()

    assert (before.status, list(before.sites)) == ("failed", [])
    assert (after.status, list(after.sites)) == ("failed", ["late"])


def test_a_job_is_finishing_while_a_receiver_of_a_site_delivers(tmp_path: Path) -> None:
    server, client = receiver_of(tmp_path / "server"), receiver_of(tmp_path / "site-1", side=Side.CLIENT)
    follower = JobFollower(tmp_path)
    found = [follower.look().status]
    server.finish(RunStatus.ABORTED)
    found.append(follower.look().status)
    client.finish(RunStatus.FINISHED)
    found.append(follower.look().status)

    assert found == ["running", "finishing", "aborted"]


def test_of_several_jobs_the_running_one_is_shown_and_the_others_are_named(tmp_path: Path) -> None:
    run_of(tmp_path, "old", 99.0, acc=0.1)
    with trackhub.local(backends=["jsonl"], folder=tmp_path, name="new") as writer:
        writer.log({"loss": 0.5}, step=0)
        assert writer.flush(20)
        run_of(tmp_path, "newest", 98.0)
        state = JobFollower(tmp_path).look()

    site = state.sites["local"]
    assert (state.name, state.status, site.values, site.step, site.logged) == ("new", "running", {"loss": 0.5}, 0, 1)
    assert re.search(
        r"^other jobs here: newest \(\S+\), old \(\S+\); give a job's own folder to watch it$", job_notes(state)[-1]
    )


def test_of_many_other_jobs_three_are_named(tmp_path: Path) -> None:
    for number in range(6):
        receiver_of(tmp_path / str(number), f"job-{number}").finish(RunStatus.FINISHED)

    (note,) = job_notes(JobFollower(tmp_path).look())

    assert note.count("job-") == 3
    assert " and 2 more; " in note


def test_the_command_shows_the_newest_job_and_its_exit_status_is_of_this_one(tmp_path: Path) -> None:
    dropping = receiver_of(tmp_path / "a", "dropping")
    dropping.handle("site-1", wire.encode(wire.Final(wire.SiteCounts(logged=1, dropped={"spool_full": 1}))))
    dropping.finish(RunStatus.FINISHED, deadline_s=10)
    run_of(tmp_path, "new", 0.5)

    done = subprocess.run(
        [sys.executable, "-m", "trackhub.cli", "watch", str(tmp_path)], capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert " new: finished; loss: local 0.5; jsonl: 1 confirmed, 0 pending\n" in done.stdout
    assert "other jobs here: dropping; " in done.stdout
    assert "spool_full" not in done.stdout


def test_a_show_stays_with_a_job_until_that_has_ended(tmp_path: Path) -> None:
    first = receiver_of(tmp_path / "a", "first")
    send(first, 0, 1)
    follower = JobFollower(tmp_path)
    assert follower.look().name == "first"
    follower._look_at = 0.0  # look for journals again at once
    second = receiver_of(tmp_path / "b", "second")
    found = [follower.look()]
    first.finish(RunStatus.FINISHED)
    found += [follower.look(), follower.look()]
    second.finish(RunStatus.FINISHED)

    assert [(state.name, state.status) for state in found] == [
        ("first", "running"),
        ("first", "finished"),
        ("second", "running"),
    ]


def test_a_show_of_a_new_job_leaves_out_another_that_runs_already(tmp_path: Path) -> None:
    other = receiver_of(tmp_path / "a", "other")
    follower = JobFollower(tmp_path, new_only=True)
    found = [follower.look()]
    own = receiver_of(tmp_path / "b", "own")
    follower._look_at = 0.0  # look for journals again at once
    found.append(follower.look())
    own.finish(RunStatus.FINISHED)
    found.append(follower.look())
    other.finish(RunStatus.FINISHED)
    found.append(follower.look())
    again = receiver_of(tmp_path / "a", "other")
    found.append(follower.look())
    again.finish(RunStatus.FINISHED)

    assert [(state.name, state.status, state.others) for state in found] == [
        ("", "running", []),
        ("own", "running", []),
        ("own", "finished", []),
        ("own", "finished", []),
        ("other", "running", ["own"]),
    ]


def test_a_job_in_the_place_of_an_earlier_one_takes_over_nothing_of_it(tmp_path: Path) -> None:
    """FLARE's simulator empties its workspace before a job."""
    old = receiver_of(tmp_path / "run", "old")
    send(old, 0, 10)
    old.finish(RunStatus.FINISHED)
    own, any_job = JobFollower(tmp_path, new_only=True), JobFollower(tmp_path)
    found = [own.look(), any_job.look()]
    shutil.rmtree(tmp_path / "run")
    found += [own.look(), any_job.look()]
    new = receiver_of(tmp_path / "run", "new")
    send(new, 0, 1)
    own._look_at = any_job._look_at = 0.0  # look for journals again at once
    seen = [own.look(), any_job.look()]
    new.finish(RunStatus.FINISHED)

    not_begun = f"no receiver has begun in {tmp_path} yet"
    assert [(state.name, state.problem) for state in found] == [
        ("", not_begun),
        ("old", ""),
        ("", not_begun),
        ("", not_begun),
    ]
    for state in seen:
        assert (state.name, state.sites["site-1"].values, state.sites["site-1"].step) == ("new", {"loss": 0.0}, 0)


def test_how_to_look_at_a_running_job_is_said_once_for_each_backend(tmp_path: Path) -> None:
    shown = io.StringIO()
    with trackhub.local(backends=["jsonl"], folder=tmp_path, name="job") as writer:

        def log(value: float) -> None:
            writer.log({"loss": value})
            assert writer.flush(20)

        log(1.0)
        state_when(JobFollower(tmp_path), lambda state: bool(state.openings))  # the backend opens its run after that
        follow(JobFollower(tmp_path), Pauses(lambda: log(2.0), writer.close), file=shown)

    (path,) = tmp_path.glob("*/jsonl/**/local.jsonl")
    lines = [line.split(" ", 1)[1] for line in shown.getvalue().splitlines()]
    assert [line.split(";")[0] for line in lines] == [
        f"look at it in jsonl: {path}",
        "job: running",
        "job: running",
        "job: finished",
    ]


def test_of_several_receivers_the_command_for_all_together_is_said(tmp_path: Path) -> None:
    clients = [receiver_of(tmp_path / site, side=Side.CLIENT) for site in ("site-1", "site-2")]
    for client, site in zip(clients, ("site-1", "site-2"), strict=True):
        send(client, 0, 5, site)
    follower = JobFollower(tmp_path)
    notes = job_notes(state_when(follower, lambda state: bool(state.openings)))
    for client in clients:
        client.finish(RunStatus.FINISHED)

    assert notes[0].startswith(f"look at it in jsonl: {tmp_path}")
    assert re.fullmatch(rf"look at it all together: \S*trackhub report {tmp_path}", notes[1])
    assert job_notes(follower.look()) == []
