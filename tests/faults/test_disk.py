# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, read-only or without a write-ahead log: at the site, at the receiver and under a backend."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.faults.conftest import Disk, MakeJob
from tests.faults.independent_readers import count_receiver, count_site
from tests.faults.process import wait_for

MakeDisk = Callable[..., Disk]
MANY = 8_000


@pytest.mark.parametrize("reason", ["disk_full", "spool_full"])
def test_a_full_site_drops_and_counts_the_newest_records_until_there_is_room(
    make_job: MakeJob, make_disk: MakeDisk, reason: str
) -> None:
    job = make_job({"jsonl": {}})
    job.spool_bytes = 200_000 if reason == "spool_full" else 800_000
    if reason == "disk_full":
        make_disk(job.spool(), 320)
    trainer = job.trainer(calls=MANY, pause_s=0, wait_at=MANY - 1000)
    wait_for(lambda: job.count() == MANY - 1000, "the training up to its pause")
    assert count_site(job.spool()).dropped[reason] > 100
    receiver, sender = job.receiver(), job.sender()
    assert sender.ask("flush 30") is True
    looked = time.monotonic()
    wait_for(lambda: time.monotonic() > looked + 0.6, "the time after which a writer looks for room again")
    (job.folder / "a.go").touch()
    assert trainer.wait() == 0, trainer.log

    answer = job.end(sender, receiver)

    site = answer["report"]["sites"]["site-1"]
    dropped = site["at_site"]["dropped"]
    assert list(dropped) == [reason]
    assert site["explained"] == dropped
    assert site["journaled"] == MANY - dropped[reason]
    assert trainer.log.count("tracking dropped a record") == 1
    job.check_all_delivered(lost={"jsonl": {"a": dropped[reason]}})
    assert len([seen for seen in job.held("jsonl") if (seen.step or 0) >= MANY - 1000]) == 1000


def test_a_site_whose_disk_is_full_before_training_starts_counts_every_record(
    make_job: MakeJob, make_disk: MakeDisk
) -> None:
    job = make_job({"jsonl": {}})
    disk = make_disk(job.spool(), 512)
    receiver, sender = job.receiver(), job.sender()
    disk.fill()
    trainer = job.trainer(calls=500)
    assert trainer.wait() == 0, trainer.log

    answer = job.end(sender, receiver)

    assert answer["report"]["sites"]["site-1"]["at_site"] == {
        "logged": 500, "dropped": {"disk_full": 500}, "refused": {}, "withheld": 0, "acked": 0, "spooled": 0,
        "unreadable": 0, "complete": True, "altered": {}, "at_source": False, "by_message": 0, "not_captured": [],
        "not_used": [], "retries": 0,
    }  # fmt: skip
    job.check_equations()


@pytest.mark.parametrize("free", [0, 1, 2, 3, 5, *(pytest.param(n, marks=pytest.mark.long) for n in range(6, 30, 2))])
def test_a_full_disk_at_the_start_fails_nobody_and_tracking_begins_with_the_room(
    make_job: MakeJob, make_disk: MakeDisk, free: int
) -> None:
    """There are so many free blocks: none for the spool, or for ``spool.json`` and for some of the files beside it."""
    job = make_job({"jsonl": {}})
    disk = make_disk(job.spool().parent, 1024)
    filler = disk.fill()
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - free * 4096)
    job.create_spool()
    receiver, sender = job.receiver(), job.sender()
    trainer = job.trainer(calls=500, wait_at=400, announced=True, pause_s=0)
    wait_for(lambda: job.count() == 400, "the training up to its pause")
    sender.ask("flush 1")

    filler.unlink()
    wait_for((job.spool() / "spool.json").exists, "the spool to be there")
    looked = time.monotonic()
    wait_for(lambda: time.monotonic() > looked + 0.6, "the time after which a writer looks for room again")
    job.go("a")
    assert trainer.wait() == 0, trainer.log
    answer = job.end(sender, receiver)

    dropped = answer["report"]["sites"]["site-1"]["at_site"]["dropped"].get("disk_full", 0)
    assert (dropped == 400) if free == 0 else (0 <= dropped <= 400)
    job.check_all_delivered(lost={"jsonl": {"a": dropped}} if dropped else None)
    assert [seen.step for seen in job.held("jsonl") if seen.step is not None][-100:] == list(range(400, 500))


def test_a_spool_that_never_has_room_is_a_count_that_says_that_it_does_not_know(
    make_job: MakeJob, make_disk: MakeDisk
) -> None:
    job = make_job({"jsonl": {}}, sites_s=1)
    make_disk(job.spool().parent, 64).fill()
    job.create_spool()
    receiver, sender = job.receiver(), job.sender()
    trainer = job.trainer(calls=100, announced=True)
    assert trainer.wait() == 0, trainer.log
    assert trainer.log.count("tracking dropped a record (disk_full") == 1

    assert sender.ask("flush 5") is False
    answer = job.end(sender, receiver)

    at_site = answer["report"]["sites"]["site-1"]["at_site"]
    assert (at_site["logged"], at_site["complete"]) == (0, False)
    assert answer["report"]["balanced"] is False


def test_a_disk_without_free_inodes_is_a_full_disk(make_job: MakeJob, make_disk: MakeDisk) -> None:
    job = make_job({"jsonl": {}})
    disk = make_disk(job.spool().parent, 1024, inodes=4)
    job.create_spool()
    receiver, sender = job.receiver(), job.sender()
    trainer = job.trainer(calls=500, wait_at=400, announced=True, pause_s=0)
    wait_for(lambda: job.count() == 400, "the training up to its pause")
    disk.allow_inodes(0)
    wait_for((job.spool() / "spool.json").exists, "the spool to be there")
    job.go("a")
    assert trainer.wait() == 0, trainer.log

    answer = job.end(sender, receiver)

    dropped = answer["report"]["sites"]["site-1"]["at_site"]["dropped"]
    assert dropped.keys() <= {"disk_full"}
    job.check_all_delivered(lost={"jsonl": {"a": sum(dropped.values())}})


def test_many_processes_together_stay_within_the_limit_of_their_spool(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}})
    job.spool_bytes = 2 << 20
    job.create_spool()
    crowd = job.crowd(16, calls=4000, at_once=16)
    assert crowd.wait() == 0, crowd.log

    found = count_site(job.spool())

    assert sum(path.stat().st_size for path in job.spool().iterdir()) <= 2 << 20
    assert found.logged == 16 * 4000
    assert found.spooled == found.logged - found.dropped["spool_full"] > 20_000  # it is used nearly up to its limit


def test_a_receiver_whose_disk_is_full_accepts_no_record_and_loses_none(make_job: MakeJob, make_disk: MakeDisk) -> None:
    job = make_job({"jsonl": {}, "at_least_once": {}}, sites_s=2, deadline_s=2)
    disk = make_disk(job.journal.parent, 2048)
    trainer = job.trainer(calls=3000)
    receiver, sender = job.receiver(), job.sender()
    wait_for(lambda: job.count() > 500, "500 calls")
    filler = disk.fill()
    assert trainer.wait() == 0, trainer.log

    job.end(sender, receiver, sites_s=1)

    job.check_equations()
    assert count_site(job.spool()).spooled > 0
    disk.resize(16384)  # the write-ahead log alone may take 4 MB before a checkpoint
    filler.unlink()
    job.replay_all()


def test_a_receiver_whose_disk_has_room_again_goes_on(make_job: MakeJob, make_disk: MakeDisk) -> None:
    job = make_job({"jsonl": {}, "at_least_once": {}, "resumable": {}}, files=True)
    disk = make_disk(job.journal.parent, 4096)
    trainer = job.trainer(calls=3000)
    receiver, sender = job.receiver(), job.sender()
    wait_for(lambda: job.count() > 500, "500 calls")
    filler = disk.fill()
    assert trainer.wait() == 0, trainer.log
    assert sender.ask("flush") is False

    disk.resize(16384)
    filler.unlink()
    job.end(sender, receiver)

    job.check_all_delivered()


@pytest.mark.parametrize("fault", ["full", "read_only"])
def test_a_backend_on_a_failing_disk_waits_and_goes_on(make_job: MakeJob, make_disk: MakeDisk, fault: str) -> None:
    job = make_job({})
    disk = make_disk(job.folder / "disk", 1024)
    job.backends = {"jsonl": {"path": str(disk.folder / "jsonl")}, "tensorboard": {}, "idempotent": {}}
    trainer = job.trainer(calls=3000)
    receiver, sender = job.receiver(), job.sender()
    wait_for(lambda: job.held("jsonl"), "the first records")
    if fault == "full":
        disk.fill()
    else:
        disk.set_read_only(True)
    assert trainer.wait() == 0, trainer.log
    wait_for(lambda: len(job.held("idempotent")) == 3000, "the delivery to the other backend")
    assert len(job.held("jsonl")) < 3000

    if fault == "full":
        disk.resize(8192)
    else:
        disk.set_read_only(False)
    job.end(sender, receiver)

    job.check_all_delivered()


def test_records_stay_at_the_site_if_the_receiver_cannot_write_its_folder(
    make_job: MakeJob, make_disk: MakeDisk
) -> None:
    job = make_job({"jsonl": {}})
    disk = make_disk(job.journal.parent, 1024)
    disk.set_read_only(True)
    trainer = job.trainer(calls=500)
    sender = job.sender()
    with pytest.raises(AssertionError, match=r"JournalError: cannot create the journal .* Read-only file system"):
        job.receiver()
    assert trainer.wait() == 0, trainer.log

    job.end(sender, sites_s=0.5)

    job.check_equations()
    disk.set_read_only(False)
    job.end(job.sender(), job.receiver())
    job.check_all_delivered()


def test_status_reads_a_read_only_disk_and_a_replay_says_that_it_cannot_write(
    make_job: MakeJob, make_disk: MakeDisk
) -> None:
    job = make_job({})
    disk = make_disk(job.journal.parent, 1024)
    assert job.trainer(calls=500).wait() == 0
    job.end(receiver=job.receiver(), sender=job.sender())
    disk.set_read_only(True)

    assert job.check_status()["journals"][0]["sites"]["site-1"]["journaled"] == 500
    replay = job.replay("--backend", "jsonl")
    assert replay.wait() == 1
    assert "Read-only file system" in replay.log

    disk.set_read_only(False)
    job.backends = {"jsonl": {}}
    job.replay_all("--backend", "jsonl")


def test_a_file_system_without_a_write_ahead_log_is_used_and_named(make_job: MakeJob) -> None:
    """SQLite's own layer ``unix-dotfile`` has no shared memory, as a network file system has none."""
    job = make_job({"jsonl": {}, "at_least_once": {}}, files=True)
    trainer = job.trainer(calls=400)
    receiver, sender = job.receiver(vfs="unix-dotfile"), job.sender(ack_loss=0.2)
    assert trainer.wait() == 0, trainer.log

    job.end(sender, receiver)

    assert "this file system has no write-ahead log; SQLite uses 'delete', which is slower" in receiver.log
    job.check_all_delivered()
    assert count_receiver(job.journal)["site-1"].journaled == 400
