# SPDX-License-Identifier: Apache-2.0
"""The report says what is not known: counts that are old, incomplete or missing, and jobs whose processes died."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import STREAM, batch_of, metric
from trackhub.delivery import wire
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.replay_journal_or_spool import replay_journal
from trackhub.delivery.report import Counted, DeliveryReport, SiteReport
from trackhub.delivery.report_text import format_report, format_results
from trackhub.framing import encode_frame
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.records import Record, Text

SITE = "site-1"
LIMITS = Limits(silence_s=0.4, keepalive_s=0.1, flush_s=0.01)


class Rig:
    """A receiver that is asked with messages in place of bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.receiver = Receiver(folder, job=JobInfo("job-1"), side=Side.SERVER, backends={"jsonl": {}}, limits=LIMITS)
        self.receiver.start()

    def ask(self, request: wire.Request, site: str = SITE) -> wire.Reply:
        return wire.decode_reply(self.receiver.handle(site, wire.encode(request)))

    def log(self, n: int, site: str = SITE, first: int = 0) -> None:
        assert self.ask(batch_of([metric(first + i) for i in range(n)]), site) == wire.Accepted()

    @property
    def journal(self) -> Path:
        return self.receiver.folder / "trackhub.db"

    def finish(self, status: RunStatus = RunStatus.FINISHED) -> DeliveryReport:
        return self.receiver.finish(status, deadline_s=10)

    def die(self) -> None:
        """Leave the files as a killed process does: the lock is gone, and the journal says nothing of an end."""
        assert self.receiver._lanes is not None
        assert self.receiver._journal is not None
        self.receiver._lanes.abandon()  # otherwise they would warn of their closed journal during all later tests
        self.receiver._journal.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "run")
    yield rig
    rig.finish()


def status(path: Path, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "trackhub.cli", "status", str(path), *flags], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode in (0, 1), done.stderr) == (True, "")  # 1 if counts are not known
    return done.stdout


def site_status(path: Path, site: str = SITE) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(status(path, "--json"))["journals"][0]["sites"][site]
    return found


def test_a_site_whose_final_message_did_not_come_has_stale_counts(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(5)
    rig.ask(wire.KeepAlive(wire.SiteCounts(logged=5, acked=5)))

    report = rig.finish()

    assert report.sites[SITE].counted is Counted.STALE
    assert (report.balanced, report.adds_up) == (False, True)
    for screen in (format_report(report), format_results({"server": report}), status(rig.journal)):
        assert "5+" in screen
        assert "may have logged more" in screen
    assert "DO NOT ADD UP" not in format_report(report) + status(rig.journal)
    assert site_status(rig.journal)["counted"] == "stale"


def test_a_site_that_sent_records_and_no_counts_has_unknown_counts(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(5)

    report = rig.finish()

    assert report.sites[SITE].counted is Counted.UNKNOWN
    assert not report.balanced
    assert "sent no counts" in format_report(report)


def test_a_site_that_was_expected_and_not_heard_is_in_the_report_with_unknown_counts(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(5)
    rig.ask(wire.Final(wire.SiteCounts(logged=5, acked=5)))
    assert rig.receiver.wait_for_sites([SITE, "site-2"]) == {"site-2"}

    report = rig.finish()
    screens = (format_report(report), status(rig.journal))

    assert report.sites["site-2"].counted is Counted.UNKNOWN
    assert not report.balanced
    for screen in screens:
        (line,) = (line for line in screen.splitlines() if line.strip().startswith("site-2"))
        assert "?" in line
        assert "nothing arrived from this site" in line
    assert site_status(rig.journal, "site-2")["logged"] is None


def test_a_site_that_could_not_count_everything_has_incomplete_counts(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(5)
    rig.ask(wire.Final(wire.SiteCounts(logged=5, acked=5, complete=False)))

    report = rig.finish()

    assert report.sites[SITE].counted is Counted.INCOMPLETE
    assert (report.balanced, report.adds_up) == (False, True)
    assert "could not count everything" in format_report(report)


def test_records_that_came_in_flares_messages_are_named_after_a_replay_too(tmp_path: Path) -> None:
    """A replay does not know of them: only FLARE's client sees the messages."""
    rig = Rig(tmp_path)
    rig.log(5)
    rig.ask(wire.Final(wire.SiteCounts(logged=5, acked=5, at_source=True, by_message=3), session="one", number=7))
    rig.ask(wire.Final(wire.SiteCounts(logged=5, acked=5), session="two", number=1))

    report = rig.finish()

    counts = report.sites[SITE].at_site
    assert counts is not None
    assert (counts.at_source, counts.by_message, report.balanced) == (True, 3, True)
    for text in (format_report(report), format_results({"server": report})):
        assert "3 came in FLARE's messages, which are not counted at their source: there may be more" in text


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (wire.SiteCounts(), "nothing was logged: no log call of trackhub or FLARE was made"),
        (wire.SiteCounts(not_captured=("wandb",)), "the scripts used wandb: give capture to record it"),
        (wire.SiteCounts(not_used=("mlflow",)), "capture: no use of mlflow was seen"),
    ],
)
def test_a_site_that_logged_nothing_is_named_with_the_likely_reason(
    tmp_path: Path, counts: wire.SiteCounts, expected: str
) -> None:
    rig = Rig(tmp_path)
    rig.ask(wire.Final(counts, session="one", number=7))
    rig.ask(wire.Final(wire.SiteCounts(), session="two", number=1))  # a replay, which does not know of loggers

    report = rig.finish()

    for text in (format_report(report), format_results({"server": report})):
        assert expected in text


@pytest.mark.parametrize("n_received", [0, 10])
def test_of_a_site_with_a_deleted_spool_no_report_says_that_nothing_was_logged(tmp_path: Path, n_received: int) -> None:
    rig = Rig(tmp_path)
    if n_received:
        rig.log(n_received)
    rig.ask(wire.Final(wire.SiteCounts(complete=False, not_captured=("wandb",)), session="one", number=7))

    report = rig.finish()

    for text in (format_report(report), format_results({"server": report})):
        assert "nothing was logged" not in text
        assert "could not count everything" in text


def test_a_site_without_a_sender_is_named_and_not_waited_for(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(5)
    rig.ask(wire.Final(wire.SiteCounts(logged=5, acked=5)))
    rig.receiver.sites.without_sender.add("site-without")

    missing = rig.receiver.wait_for_sites([SITE], timeout_s=0.0)
    report = rig.finish()

    assert missing == set()
    assert (report.sites["site-without"].has_sender, report.sites["site-without"].counted) == (False, Counted.UNKNOWN)
    assert not report.balanced
    assert "its app has no TrackhubSender" in format_report(report)


def test_records_that_the_site_cannot_read_are_neither_delivered_nor_forgotten(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(5)
    rig.ask(wire.Final(wire.SiteCounts(logged=8, acked=5, unreadable=3)))

    report = rig.finish()

    assert report.balanced
    assert report.undelivered() == 3
    assert "cannot be read at the site: 3" in format_report(report)


def test_a_journal_that_lacks_acknowledged_records_does_not_add_up(tmp_path: Path) -> None:
    """The site's numbers agree with each other, and so do the receiver's. Only together they show the loss."""
    rig = Rig(tmp_path)
    rig.log(5)
    rig.ask(wire.Final(wire.SiteCounts(logged=9, acked=9)))

    report = rig.finish()

    assert not report.adds_up
    assert not report.balanced
    assert "lacks 4 records" in format_report(report)


def test_a_site_that_lost_its_spool_has_incomplete_counts(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(9)
    rig.ask(wire.Final(wire.SiteCounts(logged=5, acked=4, spooled=1)))

    report = rig.finish()

    assert report.sites[SITE].counted is Counted.INCOMPLETE
    assert not report.balanced


def test_while_the_job_runs_counts_are_open_until_the_site_falls_silent(rig: Rig) -> None:
    rig.log(5)
    rig.ask(wire.KeepAlive(wire.SiteCounts(logged=5, acked=5)))
    fresh = read_journal_report(rig.journal)
    deadline = time.monotonic() + 10
    while (later := read_journal_report(rig.journal)).balanced:
        assert time.monotonic() < deadline

    assert (fresh.status, fresh.balanced, fresh.sites[SITE].counted) == ("running", True, Counted.OPEN)
    assert (later.status, later.sites[SITE].counted) == ("running", Counted.STALE)


def test_a_job_whose_processes_died_is_killed_and_a_replay_keeps_that(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(5)
    rig.log(5, "site-2")
    rig.ask(wire.Final(wire.SiteCounts(logged=5, acked=5)), "site-2")
    rig.die()
    before = read_journal_report(rig.journal)

    replay_journal(rig.journal, timeout_s=10)
    after = read_journal_report(rig.journal)

    assert (before.status, after.status) == ("killed", "killed")
    assert before.sites[SITE].counted is Counted.UNKNOWN
    assert "killed" in status(rig.journal)
    ends = {
        site: (tmp_path / "jsonl" / "job-1" / f"{site}.jsonl").read_text().splitlines()[-1] for site in (SITE, "site-2")
    }
    assert '"status":"killed"' in ends[SITE]
    assert '"status":"finished"' in ends["site-2"], "this site said how its training ended"


def test_a_job_that_goes_on_after_its_end_runs_again_until_it_ends(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(5)
    rig.finish()

    again = Rig(tmp_path)
    running = read_journal_report(rig.journal).status
    again.die()

    assert (running, read_journal_report(rig.journal).status) == ("running", "killed")


def test_a_run_begins_with_its_first_record_not_with_the_first_sign_of_life(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.ask(wire.KeepAlive(wire.SiteCounts()))
    rig.log(3, first=0)
    rig.log(3, first=3)
    assert rig.receiver._journal is not None

    ((name, created),) = rig.receiver._journal.sites().values()
    rig.finish()

    assert (name, created) == (SITE, 1000.0)


def test_a_site_without_records_has_no_run_and_its_run_does_not_stay_open(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.ask(wire.Final(wire.SiteCounts()))

    report = rig.finish()

    assert report.lanes["jsonl"][SITE].state == "finished"
    assert not (tmp_path / "jsonl" / "job-1").exists()
    assert report.balanced


def test_an_older_keep_alive_that_arrives_after_the_final_message_changes_nothing(tmp_path: Path) -> None:
    """The late counts are larger: a damaged ledger had said more than the site found in the end."""
    rig = Rig(tmp_path)
    rig.log(5)
    rig.ask(wire.Final(wire.SiteCounts(logged=5, acked=5), session="s", number=7))

    assert rig.ask(wire.KeepAlive(wire.SiteCounts(logged=9, acked=5, spooled=4), "s", 6)) == wire.Accepted()
    report = rig.finish()

    assert report.sites[SITE].at_site == wire.SiteCounts(logged=5, acked=5)
    assert report.balanced


def test_counts_of_a_new_sender_replace_those_of_an_ended_one(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(5)
    rig.ask(wire.Hello(session="one"))
    rig.ask(wire.Final(wire.SiteCounts(logged=5, acked=5), session="one", number=7))
    assert rig.receiver.wait_for_sites([SITE], 1.0) == set()
    rig.ask(wire.Hello(session="two"))
    rig.ask(wire.Hello(session="one"))  # late
    rig.ask(wire.KeepAlive(wire.SiteCounts(logged=6, acked=5, spooled=1), "two", 1))
    assert rig.receiver.wait_for_sites([SITE], 0.1) == {SITE}, "the site runs again"

    report = rig.finish()

    assert report.sites[SITE].at_site == wire.SiteCounts(logged=6, acked=5, spooled=1)
    assert report.sites[SITE].counted is Counted.STALE


def test_a_hello_asks_what_the_receiver_has_of_a_stream(rig: Rig) -> None:
    gap = batch_of([metric(i) for i in range(5)])
    rig.ask(gap)
    other = "f" * 32

    reply = rig.ask(wire.Hello(session="s", streams=(STREAM, other)))

    assert reply == wire.Accepted(job="job-1", streams={STREAM: wire.StreamState(5, 5)})
    assert (
        len(wire.encode(wire.Accepted(streams={f"{i:032x}": wire.StreamState(2**40, 2**40) for i in range(500)})))
        < 2**15
    )


def test_the_report_of_a_journal_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log(5)
    rig.die()

    report = rig.finish()

    assert (report.status, report.balanced) == ("finished", False)
    assert "is closed" in report.error
    assert "is closed" in format_report(report)


def test_the_facts_of_a_site_report_are_checked_against_each_other() -> None:
    good = SiteReport(
        at_site=wire.SiteCounts(logged=9, acked=9), received=6, duplicates=1, journaled=5, earlier=4,
        counted=Counted.FINAL,
    )  # fmt: skip

    assert good.adds_up()
    assert good.is_balanced()
    assert not SiteReport(received=5, duplicates=1, journaled=5).adds_up()


def test_text_that_is_no_utf_8_costs_itself_and_nothing_behind_it(tmp_path: Path) -> None:
    """After "busy" the site would send it again and again. An error in the lane would end the lane."""
    rig = Rig(tmp_path)
    hello = wire.encode(wire.Hello(session="text")).replace(b"text", b"\xff\xff\xff\xff")
    frame = bytearray(encode_frame(Record(0, 1000.0, None, None, Text("key", "text"))))
    frame[frame.index(b"text")] = 0xFF
    frame[:4] = zlib.crc32(frame[4:]).to_bytes(4, "little")

    refused = wire.decode_reply(rig.receiver.handle(SITE, hello))
    reply = rig.ask(wire.Batch(STREAM, 0, 1, 1, bytes(frame)))
    rig.log(5, first=1)
    run = rig.finish().lanes["jsonl"][SITE]

    assert isinstance(refused, wire.Refused)
    assert refused.reason == "malformed"
    assert reply == wire.Accepted(refused={"undecodable": 1})
    assert (run.confirmed, sum(run.rejected.values()), run.pending) == (5, 0, 0)
