# SPDX-License-Identifier: Apache-2.0
"""A folder or a journal that may not be read is named in a line. It ends no show."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import trackhub
from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.errors import JournalError
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
