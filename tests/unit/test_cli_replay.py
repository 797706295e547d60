# SPDX-License-Identifier: Apache-2.0
"""``trackhub replay`` delivers what a job left. What crashes leave, the fault suite replays; this is the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.readers_and_bad_backends import json_lines, settle_all
from trackhub.delivery.receiver import Receiver
from trackhub.job_and_run_info import RunStatus, Side
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.spool.reading import SpoolReader
from trackhub.writer.writer import Writer


def replay(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trackhub.cli", "replay", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """The spool of a site of a job called cifar10. No receiver has had its three records."""
    folder = tmp_path / "site-1" / "trackhub" / "spool"
    create_spool(folder, SpoolInfo("site-1", "job-1", ("server",), name="cifar10", tags=("sgd",)))
    with Writer(folder) as writer:
        for step in range(3):
            writer.log({"loss": 1.0}, step)
    return folder


def test_a_spool_alone_is_replayed_into_the_run_of_the_jobs_name(spool: Path) -> None:
    """The server would have written to this run, and a site's machine has no server's journal that knows the name."""
    done = replay(spool, "--backend", "jsonl")

    assert done.returncode == 0, done.stderr
    assert "job cifar10 (job-1), server side" in done.stdout
    lines = json_lines(spool.parent.parent / "jsonl" / "cifar10-job-1" / "site-1.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "metrics"] == [0, 1, 2]


def test_a_spool_that_was_replayed_can_be_replayed_into_one_more_backend(spool: Path) -> None:
    assert replay(spool, "--backend", "jsonl").returncode == 0

    done = replay(spool, "--backend", "tensorboard")

    assert done.returncode == 0, done.stderr
    assert list((spool.parent.parent / "tensorboard" / "cifar10-job-1" / "site-1").glob("events*"))


def test_a_replay_that_finds_nothing_to_do_says_so_and_where_it_looked(spool: Path, tmp_path: Path) -> None:
    reader = SpoolReader(spool, "server")
    settle_all(reader, final=True)

    done = replay(tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to deliver" in done.stdout
    assert f"{spool}: the server side has had all of it" in done.stdout


def test_what_cannot_be_delivered_is_an_error_beside_what_can(spool: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "spool.json").write_text("this is no spool")

    done = replay(tmp_path, "--backend", "jsonl")

    assert done.returncode == 1
    assert f"{tmp_path / 'other'} is not a spool" in done.stderr
    assert "not delivered" not in done.stderr
    assert json_lines(spool.parent.parent / "jsonl" / "cifar10-job-1" / "site-1.jsonl")


def test_a_spool_alone_needs_a_backend_that_is_named(spool: Path) -> None:
    done = replay(spool)

    assert done.returncode == 1
    assert "a site does not know the server's backends; name one to deliver to with --backend" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--option", "jsonl.path=x"], "--option is given for jsonl, but no --backend"),
        (["--backend", "jsonl", "--option", "wandb.mode=offline"], "--option is given for wandb, which no --backend"),
        (["--backend", "jsonl", "--from-start"], "--from-start needs the journal of a receiver"),
    ],
)
def test_flags_that_do_not_fit_together_are_an_error(tmp_path: Path, args: list[str], message: str) -> None:
    create_spool(tmp_path / "spool", SpoolInfo("site-1", "job-1", ("server",)))

    done = replay(tmp_path, *args)

    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_journal_that_two_spools_go_through_is_reported_once(tmp_path: Path) -> None:
    for site in ("site-1", "site-2"):
        create_spool(tmp_path / site, SpoolInfo(site, "job-1", ("server",), name="cifar10"))
        with Writer(tmp_path / site) as writer:
            writer.log({"loss": 1.0}, 0)
    journal = tmp_path / "run" / "trackhub"
    receiver = Receiver(tmp_path / "run", job="job-1", side=Side.SERVER, backends={"jsonl": {}})
    receiver.start()
    receiver.finish(RunStatus.FINISHED)

    done = replay(tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trackhub delivery report") == 1
    assert done.stdout.count("what the server side did not get") == 2
    assert journal.joinpath("delivery.json").is_file()
