# SPDX-License-Identifier: Apache-2.0
"""Status, watch, replay and the report page say the same of a job: what is wrong, and what is mended since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from trackhub.cli.replay import replay
from trackhub.cli.status import status
from trackhub.cli.watch import watch
from trackhub.delivery import wire
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport, RunReport, SiteReport
from trackhub.delivery.report_text import format_report, format_results
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.page.table_and_media_values import deliveries
from trackhub.query import read_jobs
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.spool.reading import SpoolReader
from trackhub.writer.writer import Writer


def run(command: Any, *args: str | Path) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])


def document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(status, path, "--json").stdout)
    return found


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A job whose processes were killed: the journal has 3 records of a site, its spool 2 more, the server's none."""
    folder = tmp_path / "job"
    for site in ("server", "site-1"):
        create_spool(folder / site / "spool", SpoolInfo(site, "job-1", ("server",)))
    with Writer(folder / "site-1" / "spool") as writer:
        writer.log({"loss": 1.0, "bad": None}, 0)
        for step in range(1, 5):
            writer.log({"loss": 1.0}, step)
    receiver = Receiver(folder, job=JobInfo("job-1"), side=Side.SERVER, backends={"jsonl": {}}, limits=Limits())
    receiver.start()
    reader = SpoolReader(folder / "site-1" / "spool", "server")
    batch = reader.next_batch(3, 1 << 20)
    assert batch is not None
    request = wire.Batch(batch.stream, batch.first_seq, batch.next_seq, batch.records, batch.frames)
    assert wire.decode_reply(receiver.handle("site-1", wire.encode(request))) == wire.Accepted()
    reader.settle(batch)
    assert receiver._lanes is not None
    assert receiver._journal is not None
    receiver._lanes.abandon()
    receiver._journal.close()
    return folder


def test_a_killed_job_is_wrong_until_a_replay_and_right_after_it_everywhere(killed: Path) -> None:
    before, watched_before = run(status, killed), run(watch, killed)

    replayed = run(replay, killed)
    after, watched_after = run(status, killed), run(watch, killed)

    assert (before.exit_code, watched_before.exit_code) == (1, 1)
    assert "Its process was killed. Deliver what is left" in before.stdout
    assert ", killed\n" in before.stdout
    assert (replayed.exit_code, after.exit_code, watched_after.exit_code) == (0, 0, 0), replayed.output
    for shown in (replayed.stdout, after.stdout, watched_after.stdout):
        assert "killed, all delivered since" in shown
    journal = document(killed)["journals"][0]
    assert (journal["status"], journal["interrupted"], journal["problems"]) == ("killed", False, [])
    with read_jobs(killed) as jobs:
        assert jobs.problems() == []
        assert deliveries(list(jobs), ["job-1"])["good"]


def test_a_replay_makes_no_site_of_a_server_that_logged_nothing(killed: Path) -> None:
    run(replay, killed)

    found = document(killed)

    assert list(found["journals"][0]["sites"]) == ["site-1"]
    assert [spool["open"] for spool in found["spools"]] == [False, False]


def test_a_job_that_was_killed_while_it_ended_is_left_over_as_well(killed: Path) -> None:
    """The receiver notes how the job ended before it ends the runs."""
    from trackhub.delivery.journal.journal import Journal

    journal = Journal.open(killed / "trackhub" / "trackhub.db", job="job-1", side="server")
    journal.set_meta("status", "finished")
    journal.close()

    found = document(killed)["journals"][0]

    assert (found["status"], found["interrupted"]) == ("finished", True)
    assert "the receiver was killed before it had ended the runs" in found["left_over"]


@pytest.mark.parametrize("status_so_far", ["finished", ""])
def test_a_replay_is_advised_only_when_nobody_delivers_any_more(killed: Path, status_so_far: str) -> None:
    """The receiver notes how the job ended and then delivers the rest. A replay would be refused until it is done."""
    from trackhub.delivery.journal.journal import Journal

    journal = Journal.open(killed / "trackhub" / "trackhub.db", job="job-1", side="server")
    journal.set_meta("status", status_so_far)
    meanwhile, found = run(status, killed / "trackhub"), document(killed / "trackhub")["journals"][0]
    with read_jobs(killed) as jobs:
        problems = jobs.problems()
    journal.close()
    afterwards = run(status, killed / "trackhub")

    assert (meanwhile.exit_code, found["delivering"], found["problems"]) == (0, True, [])
    assert "trackhub replay" not in meanwhile.stdout
    assert "final message" not in meanwhile.stdout
    assert ("its records are still being delivered" in meanwhile.stdout) == bool(status_so_far)
    assert ("its records are still being delivered" in " ".join(problems)) == bool(status_so_far)
    assert (afterwards.exit_code, "trackhub replay" in afterwards.stdout) == (1, True)


def report(**changes: Any) -> DeliveryReport:
    counts = wire.SiteCounts(logged=5, acked=5)
    site = SiteReport(at_site=counts, received=5, journaled=5, final=True)
    fields = {"job": "j", "side": "server", "status": "finished", "balanced": True, "sites": {"site-1": site}}
    return DeliveryReport(**{**fields, "lanes": {"acme": {"site-1": RunReport(confirmed=5)}}, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"error": "a damaged disk"}, "NOTHING IS KNOWN OF ITS RECORDS: a damaged disk"),
        ({"adds_up": False}, "THE COUNTS DO NOT ADD UP for a backend"),
        ({"balanced": False}, "NOT ALL COUNTS ARE KNOWN of the sites"),
        (
            {"lanes": {"acme": {"a": RunReport(rejected={"nonfinite": 2})}}},
            "2 records were dropped, refused or rejected",
        ),
        ({"lanes": {"acme": {"a": RunReport(pending=2)}}}, "2 records are not delivered yet"),
        ({"status": "running", "lanes": {"acme": {"a": RunReport(pending=2)}}}, ""),
        ({"delivering": True, "lanes": {"acme": {"a": RunReport(pending=2)}}}, ""),
        ({"status": "killed", "interrupted": True}, "the receiver was killed before it had ended the runs"),
        ({"status": "killed"}, ""),
        ({"lanes": {"acme": {"a": RunReport(confirmed=5, altered={"nonfinite_removed": 1})}}}, ""),
    ],
)
def test_each_thing_that_is_wrong_is_said_and_nothing_else(changes: dict[str, Any], problem: str) -> None:
    found = report(**changes).problems()

    assert [text[: len(problem)] for text in found] == ([problem] if problem else [])


def test_a_rejected_record_is_an_error_of_status_and_none_of_a_replay(tmp_path: Path) -> None:
    receiver = Receiver(tmp_path, job=JobInfo("job-1"), side=Side.SERVER, backends={"jsonl": {}})
    receiver.start()
    counts = wire.SiteCounts(logged=1, dropped={"spool_full": 1})
    receiver.handle("site-1", wire.encode(wire.Final(counts)))
    receiver.finish(RunStatus.FINISHED, deadline_s=10)

    shown, replayed = run(status, tmp_path), run(replay, tmp_path)

    assert (shown.exit_code, replayed.exit_code) == (1, 0)
    for text in (shown.stdout, replayed.stderr):
        assert "1 records were dropped, refused or rejected (spool_full 1)" in text


def test_values_left_out_of_a_record_are_shown_with_their_reason_everywhere(killed: Path) -> None:
    run(replay, killed)

    with read_jobs(killed) as jobs:
        reports = {"server": next(iter(jobs[0].reports.values()))}
        (row,) = deliveries(list(jobs), ["job-1"])["rows"]

    expected = "values left out at the site (invalid_value): 1"
    assert expected in row["remarks"]
    for text in (format_report(reports["server"]), format_results(reports), run(status, killed).stdout):
        assert expected in text


def test_what_a_backend_changed_is_shown_with_its_reason() -> None:
    found = report(lanes={"acme": {"site-1": RunReport(confirmed=5, altered={"nonfinite_removed": 3})}})

    for text in (format_report(found), format_results({"server": found})):
        assert "records altered for this backend (nonfinite_removed): 3" in text


def test_status_takes_several_folders_and_shows_each_journal_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        receiver = Receiver(tmp_path / name, job=JobInfo(name), side=Side.SERVER, backends={"jsonl": {}})
        receiver.start()
        receiver.finish(RunStatus.FINISHED, deadline_s=10)

    found = json.loads(run(status, tmp_path / "b", tmp_path, tmp_path / "a", "--json").stdout)

    assert [journal["job"] for journal in found["journals"]] == ["b", "a"]


def test_a_run_that_its_backend_could_not_end_is_left_to_a_replay() -> None:
    """Such a run shows as running in MLflow or W&B, although all its records are there."""
    runs = {"site-1": RunReport(confirmed=5, state="unfinished"), "site-2": RunReport(confirmed=5, state="finished")}
    report = DeliveryReport(
        job="job-1", side="server", status="finished", balanced=True, sites={}, lanes={"mlflow": runs}
    )

    assert report.left_over() == ["1 run is not ended at the backend"]
    assert not report.is_complete()
