# SPDX-License-Identifier: Apache-2.0
"""Who may read a spool, streams that cannot be read, and processes that come and go."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import MakeJob
from tests.faults.independent_readers import count_site
from tests.faults.job_processes import JobProcesses
from tests.faults.process import wait_for
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.report import Counted

CALLS = 400
MANY = 200


def test_processes_that_come_and_go_leave_their_room_and_lose_nothing(make_job: MakeJob) -> None:
    """Together they log twice as much as the spool holds. Without the room of those before them, they would drop."""
    job = make_job({"jsonl": {}})
    job.spool_bytes = 1 << 20
    job.create_spool()
    receiver, sender = job.receiver(), job.sender()
    for _ in range(5):
        crowd = job.crowd(MANY // 5, calls=200)
        assert crowd.wait() == 0, crowd.log
        assert sender.ask("flush 30") is True
        wait_for(lambda: size_of(job.spool()) < 200_000, "the room of those that have ended")

    job.end(sender, receiver)

    found = count_site(job.spool())
    assert (found.streams, found.logged, found.acked) == (MANY, MANY * 200, MANY * 200)
    assert len(list(job.spool().iterdir())) < MANY
    job.check_all_delivered()


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the sender deletes what is acknowledged
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("seed", range(2))
def test_a_sender_that_is_killed_while_it_tidies_up_counts_nothing_twice(make_job: MakeJob, seed: int) -> None:
    job = make_job({"jsonl": {}}, files=True)
    job.create_spool()
    receiver, sender = job.receiver(), job.sender()
    crowd = job.crowd(MANY, calls=20 + seed)
    for least in range(20, MANY, 30):
        wait_for(lambda: sum(job.count(name) > 0 for name in job.writers) >= least, f"{least} trainers")  # noqa: B023
        sender.kill()
        sender = job.sender()
    assert crowd.wait() == 0, crowd.log

    job.end(sender, receiver)

    assert count_site(job.spool()).streams == MANY
    job.check_all_delivered()


def swap(path: Path) -> Path:
    """Put a folder in the place of a file, so that to read the file fails. Return where the file is now."""
    aside = path.with_name(path.name + ".aside")
    path.rename(aside)
    path.mkdir()
    return aside


def job_with_an_unreadable_stream(job: JobProcesses) -> tuple[Path, Path]:
    """Run three trainers at two sites. Return the segment of one that cannot be read, and where its bytes are."""
    assert job.trainer("a", calls=CALLS).wait() == 0
    (segment,) = job.spool().glob("*.spool")
    for name, site in (("b", "site-1"), ("c", "site-2")):
        assert job.trainer(name, site, calls=CALLS).wait() == 0
    return segment, swap(segment)


def test_a_stream_that_cannot_be_read_holds_up_no_other_and_is_counted(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}})
    segment, aside = job_with_an_unreadable_stream(job)
    receiver, sender, other = job.receiver(), job.sender(), job.sender("site-2")

    assert sender.ask("flush 30") is False  # and at once, as every later one
    assert sender.ask("flush 30") is False
    job.end(other)
    answer = job.end(sender, receiver)

    at_site = answer["report"]["sites"]["site-1"]["at_site"]
    assert (at_site["logged"], at_site["acked"], at_site["unreadable"]) == (2 * CALLS, CALLS, CALLS)
    assert (answer["report"]["balanced"], at_site["complete"]) == (True, True)
    assert job.held("jsonl") == job.truth("b", CALLS)
    assert sender.log.count(f"{segment}: Is a directory") == 1
    replay = job.replay()
    assert replay.wait() == 1
    assert segment.name[:32] in replay.log
    assert f"{CALLS} records are still not delivered" in replay.log

    segment.rmdir()
    aside.rename(segment)
    job.replay_all()


def test_a_replay_passes_over_what_it_cannot_read_and_goes_on_with_the_other_sites(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}})
    segment, aside = job_with_an_unreadable_stream(job)
    job.end(receiver=job.receiver())

    replay = job.replay()

    assert replay.wait() == 1
    assert f"{segment}: Is a directory" in replay.log
    assert job.held("jsonl") == job.truth("b", CALLS)
    assert job.held("jsonl", "site-2") == job.truth("c", CALLS)
    segment.rmdir()
    aside.rename(segment)
    job.replay_all()


def test_a_replay_of_the_spool_of_a_running_job_is_refused(make_job: MakeJob) -> None:
    job = make_job({})
    job.backends = {"jsonl": {"path": str(job.folder / "store")}}
    trainer = job.trainer(calls=CALLS, wait_at=CALLS // 2)
    wait_for(lambda: job.count() == CALLS // 2, "half of the training")
    sender = job.sender()

    replay = job.replay(*job.flags(**job.backends), path=job.spool())
    assert replay.wait() == 1
    assert f"the spool {job.spool()} is in use by another process" in replay.log
    sender.kill()
    replay = job.replay(*job.flags(**job.backends), path=job.spool())
    assert replay.wait() == 1
    assert f"a process of the job still logs to the spool {job.spool()}" in replay.log

    job.go("a")
    assert trainer.wait() == 0, trainer.log
    assert job.held("jsonl") == []
    replay = job.replay(*job.flags(**job.backends), path=job.spool())
    assert replay.wait() == 0, replay.log
    assert job.held("jsonl") == job.truth("a", CALLS)


def test_a_sender_waits_while_another_one_has_its_spool(make_job: MakeJob) -> None:
    """Such as the one of a job process that FLARE has replaced, and that has not ended yet."""
    job = make_job({"jsonl": {}})
    assert job.trainer("a", calls=CALLS).wait() == 0
    receiver, first = job.receiver(), job.sender()
    wait_for(lambda: first.ask("requests") > 0, "the first sender to own the spool")
    first.process.send_signal(signal.SIGSTOP)
    second = job.sender()
    assert second.ask("flush 1") is False
    assert "another process sends the spool" in second.log
    assert second.ask("requests") == 0

    first.kill()
    wait_for(lambda: second.ask("flush 5"), "the second sender to go on")
    job.end(second, receiver)

    job.check_all_delivered()


@pytest.mark.parametrize("way", ["restart", "replay"])
def test_a_cursor_that_is_lost_turns_no_delivered_record_into_a_lost_one(make_job: MakeJob, way: str) -> None:
    """The receiver has the records, and the spool has deleted them. Only the receiver knows that they are delivered."""
    job = make_job({"jsonl": {}})
    job.spool_bytes = 1 << 20
    job.create_spool()
    receiver, sender = job.receiver(), job.sender()
    trainer = job.trainer("a", calls=6000, pause_s=0.0003)
    wait_for(
        lambda: job.count("a") > 0 and not list(job.spool().glob("*-000000.spool")), "the first records to be deleted"
    )
    sender.kill()
    for path in job.spool().glob("*.ack"):
        path.unlink()
    assert trainer.wait() == 0

    if way == "restart":
        successor = job.sender()
        assert successor.ask("flush 60") is True  # the receiver waits for no site that it takes for dead
        job.end(successor, receiver)
        job.check_all_delivered()
    else:
        job.end(receiver=receiver)
        job.replay_all()

    site = read_journal_report(job.journal).sites["site-1"]
    assert site.counted is Counted.FINAL
    assert site.at_site is not None
    assert (site.at_site.logged, site.at_site.acked, site.at_site.dropped) == (6000, 6000, {})
    assert site.duplicates <= int(job.limits["batch_records"]), "the batch of which the sender did not get the reply"
