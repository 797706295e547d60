# SPDX-License-Identifier: Apache-2.0
"""Pruning a journal removes what every backend has, and nothing else; all counts stay."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import trackhub
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.prune import prune_journal, prune_older
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.replay_journal_or_spool import replay_journal
from trackhub.delivery.report import DeliveryReport
from trackhub.errors import ConfigError, JournalError
from trackhub.operator_file import OperatorFile
from trackhub.query import read_jobs


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The journal of a run that is delivered, with files."""
    with trackhub.local(["jsonl"], folder=tmp_path, job="j") as writer:
        for step in range(3000):
            writer.log({"loss": 1 / (step + 1)}, step)
        writer.log_image("pic", [[0.0, 1.0]])
    return writer.folder / "trackhub" / "trackhub.db"


def counts(report: DeliveryReport) -> object:
    return (
        report.status,
        report.balanced,
        report.sites,
        {name: runs["local"].confirmed for name, runs in report.lanes.items()},
    )


def test_delivered_records_and_files_go_and_all_counts_stay(journal: Path) -> None:
    before, size = read_journal_report(journal), journal.stat().st_size

    result = prune_journal(journal)

    assert (result.records, result.kept) == ({"local": 3001}, {})
    assert result.freed_bytes > 0
    assert journal.stat().st_size < size / 2
    assert [path for path in journal.parent.rglob("*") if "blobs" in path.parts and path.is_file()] == []
    assert counts(read_journal_report(journal)) == counts(before)
    with read_jobs(journal) as jobs:
        assert list(jobs[0].records("local")) == []
        assert jobs.problems() == ["3,001 records of local were removed by `trackhub prune` after their delivery."]


@pytest.mark.parametrize("link", ["blobs", "blobs/local"])
def test_no_file_is_deleted_through_a_link_among_the_blobs(journal: Path, tmp_path: Path, link: str) -> None:
    """Somebody may have given you the job's folder."""
    mine = tmp_path / "mine" / "local"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    place = journal.parent / link
    shutil.rmtree(place)
    place.symlink_to(mine.parent if link == "blobs" else mine)

    prune_journal(journal)

    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_second_prune_and_a_replay_find_nothing_to_do(journal: Path) -> None:
    before = read_journal_report(journal)
    prune_journal(journal)

    assert prune_journal(journal).records == {}
    assert counts(replay_journal(journal)) == counts(before)
    assert not journal.with_name("trackhub.db.damaged").exists()


@pytest.mark.parametrize("choice", ["new", "from_start"])
def test_a_replay_that_needs_the_records_is_refused(journal: Path, choice: str) -> None:
    prune_journal(journal)

    with pytest.raises(ConfigError, match="removed 3,001 delivered records"):
        if choice == "new":
            replay_journal(journal, backends={"tensorboard": {}})
        else:
            replay_journal(journal, from_start=True)
    prune_journal(journal)  # it is closed


def test_a_pruned_run_cannot_go_on(journal: Path) -> None:
    prune_journal(journal)

    with pytest.raises(ConfigError, match="the job cannot go on"):
        trackhub.local(["jsonl"], folder=journal.parents[2], job="j", resume=True)


def test_what_is_pending_at_one_backend_stays(journal: Path) -> None:
    opened = Journal.open(journal, job="j", side="local")
    opened.set_meta("backends", '{"jsonl": {}, "acme": {}}')
    opened.close()

    result = prune_journal(journal)

    assert result.records == {}
    assert result.kept == {"local": "3,001 records are pending at acme; `trackhub replay` delivers them"}
    assert len(trackhub.load(journal)) == 3000


def test_the_journal_of_a_running_or_killed_job_stays(journal: Path) -> None:
    opened = Journal.open(journal, job="j", side="local")
    with pytest.raises(JournalError, match="in use by another process"):
        prune_journal(journal)
    opened.set_meta("status", "")
    opened.close()

    assert "were killed" in prune_journal(journal).kept["local"]


def test_keep_days_prunes_journals_that_are_older(journal: Path) -> None:
    prune_older(journal.parents[2], 1)
    assert len(trackhub.load(journal)) == 3000

    two_days_ago = time.time() - 2 * 86400
    os.utime(journal, (two_days_ago, two_days_ago))
    prune_older(journal.parents[2], 1)
    assert len(trackhub.load(journal)) == 0


def test_keep_days_without_state_dir_is_an_error() -> None:
    assert OperatorFile(keep_days=1, state_dir="/srv/x").keep_days == 1
    with pytest.raises(ConfigError, match="needs state_dir"):
        OperatorFile(keep_days=1)


def test_the_command_says_what_went_and_what_stays(journal: Path) -> None:
    command = [sys.executable, "-m", "trackhub.cli", "prune", str(journal.parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
    assert "removed 3,001 of local; 0." in done.stdout
