# SPDX-License-Identifier: Apache-2.0
"""A folder or a journal that may not be read is named in a line. It ends no command."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import trackhub
from trackhub.cli import main
from trackhub.delivery import prune_older
from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.errors import JournalError
from trackhub.page.render import write_report
from trackhub.watch.job_follower import JobFollower

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="the test becomes another user, and only root can")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder with the jobs "a" and "b", which other users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        for job in ("a", "b"):
            with trackhub.local(["jsonl"], folder=made, job=job, quiet=True) as writer:
                writer.log({"loss": 1.0})
            os.chmod(writer.folder, 0o755)
            for file in (writer.folder / "trackhub").iterdir():
                os.chmod(file, 0o755)
            os.chmod(writer.folder / "trackhub", 0o700)
        yield Path(made)


@contextmanager
def another_user() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("path", [".", "a", "a/trackhub", "a/trackhub/trackhub.db", "a/trackhub/not there"])
def test_a_folder_that_may_not_be_read_is_named_and_not_called_empty(folder: Path, path: str) -> None:
    with another_user():
        problem = JobFollower(folder / path).look().problem
        with pytest.raises(JournalError, match=r"cannot look for journals: .*Permission denied.*the user who owns it"):
            find(folder / path)

    assert f"cannot look for journals: [Errno 13] Permission denied: '{folder}/" in problem


def test_a_job_that_may_be_read_is_shown_beside_one_that_may_not(folder: Path) -> None:
    os.chmod(folder / "b" / "trackhub", 0o755)
    with another_user():
        state = JobFollower(folder).look()

    assert (state.name, state.status) == ("b", "finished")


def test_a_journal_that_becomes_unreadable_while_it_is_watched_is_a_problem(folder: Path) -> None:
    os.chmod(folder / "a" / "trackhub", 0o755)
    follower = JobFollower(folder / "a")
    with another_user():
        before = follower.look()
    os.chmod(folder / "a" / "trackhub", 0o700)
    with another_user():
        after = follower.look()

    assert (before.name, before.problem) == ("a", "")
    assert "Permission denied" in after.problem


@pytest.mark.parametrize("command", ["status", "replay", "prune", "export"])
def test_a_command_does_what_it_can_and_names_the_folder_that_it_may_not_read(
    folder: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chmod(folder / "a", 0o700)
    for path in (folder / "b", *(folder / "b").rglob("*")):
        os.chown(path, 65534, 65534)
    target = ["--to", str(folder / "b" / "all.csv")] if command == "export" else []
    monkeypatch.setattr(sys, "argv", ["trackhub", command, str(folder), *target])
    capsys.readouterr()

    with another_user(), pytest.raises(SystemExit) as ended:
        main()

    said = capsys.readouterr()
    assert f"cannot look for journals: [Errno 13] Permission denied: '{folder}/a'" in said.err
    assert f"{folder}/b" in said.out
    assert ended.value.code == (0 if command == "export" else 1)


def test_a_folder_that_may_not_be_read_does_not_end_the_pruning_of_old_jobs(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with another_user(), caplog.at_level(logging.WARNING):
        prune_older(folder, 1)

    assert f"{folder} is not pruned: cannot look for journals: [Errno 13] Permission denied" in caplog.text


@pytest.mark.parametrize("mode", [0o700, 0o744])
def test_a_run_begins_beside_a_folder_that_its_user_may_not_search(folder: Path, mode: int) -> None:
    """The first is another user's run, or ``lost+found``. The second may be listed, and no file in it looked at."""
    os.chmod(folder, 0o777)
    for path in (folder / "a", folder / "b" / "trackhub"):
        os.chmod(path, mode)

    with another_user(), trackhub.local(["jsonl"], folder=folder, job="c", name="mine", quiet=True) as writer:
        writer.log({"loss": 1.0})

    assert writer.report is not None
    assert writer.report.is_complete()


@pytest.mark.parametrize("mode", [0o700, 0o744])
def test_a_folder_that_may_not_be_searched_hides_no_other_journal(folder: Path, mode: int) -> None:
    os.chmod(folder / "a" / "trackhub", mode)
    os.chmod(folder / "b" / "trackhub", 0o755)
    with another_user():
        found = find(folder)

    assert found.journals == [folder / "b" / "trackhub" / "trackhub.db"]
    assert any(f"{folder}/a/trackhub" in str(error) for error in found.unreadable)


@pytest.mark.parametrize("closed", ["blobs", "blobs/local", "blobs/local/*"])
def test_a_report_leaves_out_an_image_that_may_not_be_read(folder: Path, closed: str) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed; it is in the extra report")
    with trackhub.local(["jsonl"], folder=folder, job="c", quiet=True) as writer:
        writer.log_image("digit", np.zeros((4, 4)))
        writer.log({"loss": 1.0})
    for path in (folder / "c", *(folder / "c").rglob("*")):
        os.chown(path, 65534, 65534)
    (path,) = (folder / "c" / "trackhub").glob(closed)
    os.chown(path, 0, 0)
    os.chmod(path, 0)

    with another_user():
        write_report([folder / "c"], folder / "c" / "report.html")

    assert "1 images are not shown: too many, too large, missing, unreadable" in (
        (folder / "c" / "report.html").read_text(encoding="utf-8")
    )
