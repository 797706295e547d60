# SPDX-License-Identifier: Apache-2.0
"""Several runs of `trackhub.local` in one folder: which go on, which are refused, and how they are told apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import msgspec
import pytest

import trackhub
from tests.unit.local_runs import FAST, lines, open_local, report_of
from tests.unit.readers_and_bad_backends import assert_balanced
from trackhub.delivery.journal.read_only import read_journal_meta
from trackhub.errors import ConfigError, JournalError
from trackhub.spool.layout import read_spool_info


def test_resume_without_a_job_is_an_error_that_says_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    """Each call without ``job`` begins a new job, so there is no run in which this one could go on."""
    with open_local(tmp_path) as writer:
        writer.log({"a": 1.0})
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(
        ConfigError, match=r"resume=True needs job=.*Give the job= of the earlier call, or leave resume out"
    ):
        open_local(tmp_path, resume=True)

    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_goes_on_if_it_is_opened_with_resume(tmp_path: Path) -> None:
    for day in range(3):
        with open_local(tmp_path, job="j", resume=True) as writer:
            writer.log({"day": day}, day)
    assert [line["step"] for line in lines(writer)] == [0, 1, 2]
    assert [line["position"] for line in lines(writer)] == [0, 1, 2]
    assert_balanced(report_of(writer), {"local": 3}, {("jsonl", "local"): 3})


def test_the_same_job_again_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    before = threading.active_count()
    with open_local(tmp_path, job="j") as writer:
        writer.log({"a": 1.0})

    with pytest.raises(ConfigError, match=r"/j: this run was logged to before.*resume=True.*another job="):
        open_local(tmp_path, job="j")

    assert threading.active_count() == before
    assert len(lines(writer)) == 1


def test_two_sites_of_one_job_are_told_apart_and_a_failed_start_leaves_no_lock(tmp_path: Path) -> None:
    before = threading.active_count()
    with open_local(tmp_path, job="j", site="a") as writer:
        writer.log({"x": 1.0})
        with pytest.raises(JournalError, match="in use"):
            open_local(tmp_path, job="j", site="a", resume=True)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"/j: this run is of the site 'a'.*pass site='a'.*another job="):
            open_local(tmp_path, job="j", site="b", resume=True)
    assert threading.active_count() == before
    with open_local(tmp_path, job="j", site="a", resume=True) as writer:
        writer.log({"x": 2.0})
    assert len(lines(writer, "a")) == 2


def test_records_of_a_killed_script_are_delivered_by_the_next_one(tmp_path: Path) -> None:
    code = """
        import os, sys, trackhub
        writer = trackhub.local(["jsonl"], folder=sys.argv[1], job="j")
        for i in range(500):
            writer.log({"a": i}, i)
        os.kill(os.getpid(), 9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], timeout=60, check=False)
    with open_local(tmp_path, job="j", resume=True) as writer:
        writer.log({"a": 500}, 500)
    steps = sorted(int(str(line["step"])) for line in lines(writer))
    assert steps == list(range(501))
    assert_balanced(report_of(writer), {"local": 501}, {("jsonl", "local"): 501})


def test_a_job_can_be_continued_while_a_forked_worker_is_still_alive(tmp_path: Path) -> None:
    """Such as one of a data loader: it has inherited the file that locks the journal."""
    with open_local(tmp_path, job="job-1") as writer:
        writer.log({"a": 1.0})
        end, hold = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(hold)
            os.read(end, 1)
            os._exit(0)
        os.close(end)
    try:
        with open_local(tmp_path, job="job-1", resume=True) as again:
            again.log({"a": 2.0})
    finally:
        os.close(hold)
        os.waitpid(pid, 0)

    assert len(lines(again)) == 2


def test_two_jobs_of_one_name_are_two_folders_and_two_runs(tmp_path: Path) -> None:
    writers = [
        trackhub.local(["jsonl"], folder=tmp_path, name="lr 0.1", notes="why", tags=["a", "b"], limits=FAST)
        for _ in range(2)
    ]
    for writer in writers:
        writer.log({"loss": 1.0})
        writer.close()

    folders = sorted(path.name for path in tmp_path.iterdir())
    assert len(folders) == 2
    assert all(name.startswith("lr%200.1-") for name in folders)
    for writer in writers:
        told = msgspec.json.decode(read_journal_meta(writer.folder / "trackhub" / "trackhub.db")["job_info"])
        assert (told["name"], told["notes"], told["tags"]) == ("lr 0.1", "why", ["a", "b"])
        assert [line["values"] for line in lines(writer)] == [{"loss": 1.0}]


@pytest.mark.parametrize("resume", [True, False])
def test_a_job_that_was_logged_to_under_another_name_is_an_error_that_says_the_name(
    tmp_path: Path, resume: bool
) -> None:
    """It would be a second run of the same id in every backend."""
    with trackhub.local(["jsonl"], folder=tmp_path, job="j", name="first", limits=FAST) as writer:
        writer.log({"a": 1.0})

    for name in ("second", ""):
        with pytest.raises(ConfigError, match=r"first-j: the job 'j' was logged to before.*pass name='first'"):
            trackhub.local(["jsonl"], folder=tmp_path, job="j", name=name, resume=resume, limits=FAST)

    with trackhub.local(["jsonl"], folder=tmp_path, job="j", name="first", resume=True, limits=FAST) as writer:
        writer.log({"a": 2.0})
    assert len(lines(writer)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["first-j"]


@pytest.mark.parametrize("name", ["", "first"])
def test_a_run_resumes_or_starts_anew_beside_a_copy_of_its_folder(tmp_path: Path, name: str) -> None:
    """Only another name of the job is an error. A backup has the same one."""
    with trackhub.local(["jsonl"], folder=tmp_path, job="j", name=name, limits=FAST) as writer:
        writer.log({"a": 1.0})
    shutil.copytree(writer.folder, tmp_path / "backup")

    with trackhub.local(["jsonl"], folder=tmp_path, job="j", name=name, resume=True, limits=FAST) as resumed:
        resumed.log({"a": 2.0})
    shutil.rmtree(writer.folder)
    with trackhub.local(["jsonl"], folder=tmp_path, job="j", name=name, limits=FAST) as new:
        new.log({"a": 3.0})

    assert [report_of(run).sites["local"].journaled for run in (resumed, new)] == [2, 1]


def test_the_spool_has_what_a_replay_without_the_journal_calls_the_job(tmp_path: Path) -> None:
    with trackhub.local(["jsonl"], folder=tmp_path, name="lr-0.1", notes="try", tags=["t"], limits=FAST) as writer:
        info = read_spool_info(writer.folder / "trackhub" / "spool")

    assert (info.name, info.notes, info.tags) == ("lr-0.1", "try", ("t",))
